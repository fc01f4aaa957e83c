"""The branch analysis against numpy's SVD and constructed cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CASES, Case
from torch import nn

from reparam_export.adapters import hydra, lora, plugins
from reparam_export.affine import Affine, Bottleneck
from reparam_export.analysis import BranchAnalysis, analyse, analyse_stack
from reparam_export.checkpoints import Adapter

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def one(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float = 1.0) -> BranchAnalysis:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    params = lora.Params(Bottleneck(Affine(down), Affine(up)), scale)
    (found,) = analyse_stack(nn.ModuleDict({"layer": layer}), [Adapter("layer", "lora", params)])
    return found


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_every_quantity_is_what_numpys_svd_gives(shape: tuple[int, int]) -> None:
    weight, down, up = rand(*shape), rand(3, shape[1]), rand(shape[0], 3)
    found = one(weight, down, up, 0.5)
    W, D = weight.numpy(), 0.5 * (up @ down).numpy()  # noqa: N806
    uw, _, vw = np.linalg.svd(W)
    ud, sd, vd = np.linalg.svd(D)
    r = 3
    assert found.rank == found.directions == r
    assert found.norm == pytest.approx(np.linalg.norm(D))
    assert found.relative_norm == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W))
    p = sd[:r] / sd[:r].sum()
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)
    assert found.similarity_out == pytest.approx(np.linalg.norm(uw[:, :r].T @ ud[:, :r]) ** 2 / r)
    assert found.similarity_in == pytest.approx(np.linalg.norm(vw[:r] @ vd[:r].T) ** 2 / r)
    assert found.amplification == pytest.approx(np.linalg.norm(D) / np.linalg.norm(ud[:, :r].T @ W @ vd[:r].T))
    assert (found.chance_out, found.chance_in) == (r / shape[0], r / shape[1])
    assert found.share == pytest.approx(1.0)


def test_a_change_along_the_largest_directions_of_the_weight_is_recognised() -> None:
    weight = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64))
    basis = torch.eye(6, dtype=torch.float64)
    same = one(weight, basis[:2], 2 * basis[:, :2])
    assert same.similarity_out == pytest.approx(1)
    assert same.similarity_in == pytest.approx(1)
    assert same.amplification == pytest.approx(math.hypot(2, 2) / math.hypot(8, 4))
    assert same.effective_rank == pytest.approx(2)
    other = one(weight, basis[4:], basis[:, 2:4])
    assert other.similarity_out == pytest.approx(0)
    assert other.similarity_in == pytest.approx(0)
    assert other.amplification == math.inf  # the weight does nothing there


def test_random_directions_come_near_the_chance_level() -> None:
    found = [one(rand(40, 60), rand(4, 60), rand(40, 4)) for _ in range(60)]
    mean = sum(f.similarity_out for f in found) / len(found)
    assert mean == pytest.approx(found[0].chance_out, rel=0.2)
    mean = sum(f.similarity_in for f in found) / len(found)
    assert mean == pytest.approx(found[0].chance_in, rel=0.2)


def test_the_sequential_branch_of_hydra_is_taken_through_the_weight() -> None:
    weight = rand(8, 5)
    layer = nn.Linear(5, 8).double()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    pairs = [Bottleneck(Affine(rand(2, n), rand(2)), Affine(rand(8, 2), rand(8))) for n in (5, 8)]
    params = hydra.Params(*pairs, 0.5, torch.tensor([2.0], dtype=torch.float64))
    found = analyse_stack(nn.ModuleDict({"layer": layer}), [Adapter("layer", "hydra", params)])
    assert [f.branch for f in found] == ["parallel", "sequential"]
    P = 0.5 * pairs[0].up.weight @ pairs[0].down.weight  # noqa: N806
    S = 2.0 * pairs[1].up.weight @ pairs[1].down.weight @ weight  # noqa: N806
    assert [f.norm for f in found] == pytest.approx([float(P.norm()), float(S.norm())])
    total = P + S
    assert found[1].share == pytest.approx(float((S * total).sum() / (total * total).sum()))
    assert found[0].share + found[1].share == pytest.approx(1)
    assert found[0].share != pytest.approx(0.5)


def test_a_branch_that_changes_nothing_has_zeros() -> None:
    found = one(rand(6, 5), rand(2, 5), torch.zeros(6, 2, dtype=torch.float64))
    assert (found.norm, found.rank, found.effective_rank, found.directions, found.amplification) == (0, 0, 0, 0, 0)


def test_every_recorded_checkpoint_can_be_analysed(case: Case) -> None:
    checkpoint = case.read()
    found = analyse(checkpoint)
    modules = {a.module for a in checkpoint.adapters}
    assert {f.module for f in found} == modules
    for module in modules:
        of_module = [f for f in found if f.module == module]
        changed = any(f.norm for f in of_module)  # the text tower of CLIP is not, nor is a GLoRA layer without A and B
        assert sum(f.share for f in of_module) == pytest.approx(1 if changed else 0)
    assert any(f.norm for f in found)
    for f in found:
        assert 0 <= f.similarity_out <= 1 + 1e-9
        assert 0 <= f.similarity_in <= 1 + 1e-9
        assert 0 < f.effective_rank <= f.rank + 1e-9 or f.norm == 0


def test_a_low_rank_branch_has_the_rank_of_its_pair() -> None:
    found = analyse(CASES["hydra_vtab"].read())
    assert {f.rank for f in found} == {4}
    assert len(found) == 12


def test_the_branches_of_a_kind_are_its_whole_change() -> None:
    from reparam_export.adapters import kind

    for name in plugins.names("adapters"):
        spec = kind(name)
        if not hasattr(spec, "branches"):
            continue
        for seed in range(8):
            base = Affine(rand(5, 7), rand(5))
            params = spec.example(seed, base)
            parts = spec.branches(base, params)
            torch.testing.assert_close(sum(parts.values()), spec.fuse(base, params).weight - base.weight)
