"""A supernet draws seeded paths, answers as the authors' own code does, and is saved, loaded and converted."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import CASES, Case
from torch import Tensor, nn

import reparam_export as rx
from reparam_export.adapters import glora
from reparam_export.checkpoints import Recipe
from reparam_export.errors import MissingSettingError, UsageError
from reparam_export.inspection import inspect_checkpoint
from reparam_export.training import Supernet, load_supernet, save, supernet, trainable
from reparam_export.training.space import Candidate, Space, choices_of, from_dicts, to_dicts

SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
SPEC = "timm:vit_tiny_patch16_224?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Supernet:
    return make()


def make(seed: int = 0, **settings: Any) -> Supernet:
    torch.manual_seed(0)
    return supernet(timm.create_model("vit_tiny_patch16_224", **SHAPE).eval(), seed=seed, **settings)


def trained(net: Supernet) -> Supernet:
    """A few steps, so that every tensor has moved."""
    optimizer = torch.optim.Adam([p for p in net.model.train().parameters() if p.requires_grad], lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        (net.model(IMAGES) - 1).square().sum().backward()
        optimizer.step()
    net.model.eval()
    return net


def candidate(net: Supernet, seed: int = 0) -> Candidate:
    import random

    return net.space.drawn(random.Random(seed))


def paths(net: Supernet) -> Candidate:
    return tuple(layer.drawn for layer in net.layers())


def test_every_linear_layer_but_the_head_has_all_the_papers_choices(net: Supernet) -> None:
    assert net.space.layers == tuple(
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    )
    assert net.space.size == (4 * 4 * 3 * 3 * 3) ** 8
    assert net.space.choices["A"] == ("LoRA_4", "vector", "constant", "none")
    assert trainable(net.model) == sum(t.numel() for layer in net.layers() for t in layer.adapter.values())


def test_an_untrained_supernet_is_the_base_whatever_the_path() -> None:
    torch.manual_seed(0)
    base = timm.create_model("vit_tiny_patch16_224", **SHAPE).eval()
    net = make()
    for seed in range(5):
        assert torch.equal(net.fix(candidate(net, seed)).model(IMAGES), base(IMAGES))


def test_a_training_forward_draws_a_path_for_each_layer_and_the_seed_decides_which() -> None:
    def drawn(seed: int) -> list[Candidate]:
        net = make(seed)
        net.model.train()
        found = []
        for _ in range(50):
            net.model(IMAGES)
            found.append(paths(net))
        return found

    once = drawn(3)
    assert once == drawn(3)
    assert once != drawn(4)
    assert len(set(once)) == 50
    counts = Counter(p.A for c in once for p in c)
    assert set(counts) == {"LoRA_4", "vector", "constant", "none"}
    assert min(counts.values()) > 60  # of 400, 100 are expected


def test_a_forward_that_is_computed_again_takes_the_same_path(net: Supernet) -> None:
    model: Any = net.model.train()
    model.set_grad_checkpointing(True)
    trained_once = [layer.adapter["E"] for layer in net.layers()]
    with torch.no_grad():
        for tensor in trained_once:
            tensor.normal_()
    model(IMAGES.requires_grad_()).sum().backward()  # torch refuses a second forward of other shapes or operators
    assert all((layer.adapter["E"].grad is not None) == (layer.drawn.E != "none") for layer in net.layers())


def test_without_a_path_there_is_no_output(net: Supernet) -> None:
    with pytest.raises(UsageError, match="no defined output"):
        net.model.eval()(IMAGES)
    net.fix(candidate(net))
    net.model(IMAGES)
    with pytest.raises(UsageError, match="no defined output"):
        net.free().model(IMAGES)


def test_a_fixed_path_holds_in_training_too(net: Supernet) -> None:
    chosen = candidate(net)
    net.fix(chosen).model.train()(IMAGES)
    assert tuple(layer.params().path for layer in net.layers()) == chosen == net.fixed


def test_a_copy_draws_its_own_paths(net: Supernet) -> None:
    other = copy.deepcopy(net)
    other.model.train()(IMAGES)
    assert paths(other) != paths(net)
    assert paths(net) == (glora.UNCHOSEN,) * 8


def test_a_candidate_of_another_space_is_refused(net: Supernet) -> None:
    good = candidate(net)
    with pytest.raises(UsageError, match="7 layers"):
        net.fix(good[1:])
    with pytest.raises(UsageError, match="LoRA_8"):
        net.fix((*good[:-1], glora.Path("LoRA_8", "none", "none", "none", "none")))


def test_ranks_are_slices_of_the_same_tensors() -> None:
    net = trained(make(rank=4, ranks=(1, 2, 4)))
    assert net.space.choices["C"] == ("LoRA_1", "LoRA_2", "LoRA_4", "vector", "none")
    layer = net.layers()[0]
    full = layer.adapter["Bd"].clone()
    net.fix(tuple(glora.Path("none", "LoRA_2", "none", "none", "none") for _ in net.space.layers))
    before = net.model(IMAGES)
    with torch.no_grad():
        layer.adapter["Bd"][:, 2:] = 7
    assert torch.equal(net.model(IMAGES), before)
    with torch.no_grad():
        layer.adapter["Bd"].copy_(full)
    with pytest.raises(UsageError, match="rank"):
        make(rank=2, ranks=(4,))


def test_parameters_are_the_authors_count(net: Supernet) -> None:
    def authors(config: dict[str, str], out: int, inn: int) -> int:  # written from get_param_tensor of their search
        total = 0
        for name, choice in config.items():
            rows, columns = (inn, 1) if name == "C" else (out, inn)
            if choice.startswith("LoRA"):
                rank = int(choice.split("_")[1])
                total += rows * rank + columns * rank
            else:
                total += {"vector": rows, "constant": 1, "none": 0}[choice]
        return total

    for seed in range(20):
        chosen = candidate(net, seed)
        expected = sum(authors(d, *shape) for d, shape in zip(to_dicts(chosen), net.space.shapes, strict=True))
        assert net.space.parameters(chosen) == expected


@pytest.mark.parametrize("name", ["glora_vit", "glora_llama"])
def test_a_path_answers_as_the_authors_own_forward(name: str) -> None:
    case = CASES[name]
    path, given = case.arguments()
    config = given.pop("config")
    net = load_supernet(path, **given)
    if name == "glora_vit":
        best = torch.load(config[0], weights_only=True)["keep_top_k"][50][0]
    else:
        named = {entry["layer"]: entry for entry in _entries(config[0])}
        best = [{k: named[layer][k] for k in "ABCDE"} for layer in net.space.layers]
    net.fix(from_dicts(best))
    model = copy.deepcopy(net.model).double()
    from reparam_export.assembly import base_of
    from reparam_export.verification.outputs import run

    signature = base_of(case.read()).build()[1]
    found = run(model, signature, case.inputs(), torch.float64)[0]
    # glora_llama: the rotary frequencies of stock transformers are float32, the recorded ones were float64
    assert float((found - case.expected()).abs().max()) < (1e-13 if name == "glora_vit" else 1e-6)
    assert float(case.expected().abs().max()) > 1


def _entries(path: Path) -> list[dict[str, str]]:
    content = json.loads(path.read_text())
    if isinstance(content, dict):
        return [{"layer": layer.removeprefix("base_model.model."), **choices} for layer, choices in content.items()]
    return [{**entry, "layer": entry["layer"].removeprefix("base_model.model.")} for entry in content]


def test_a_saved_candidate_converts_without_an_option(tmp_path: Path) -> None:
    net = trained(make(train="head"))
    net.fix(candidate(net, 5))
    save(net.model, tmp_path / "ckpt.pt", base=SPEC)
    checkpoint = rx.read(tmp_path / "ckpt.pt")
    verified = rx.verify(checkpoint, rx.fuse(checkpoint), {"image": IMAGES})
    assert verified.certificate.verdict == "exact"
    assert agree(verified.module()(IMAGES), net.model(IMAGES))


def test_a_saved_supernet_needs_a_candidate_and_then_converts(tmp_path: Path) -> None:
    net = trained(make(train="head"))  # the path that was drawn last is not the one that is saved
    save(net.model, tmp_path / "net.pt", base=SPEC)
    with pytest.raises(MissingSettingError) as caught:
        rx.read(tmp_path / "net.pt")
    assert caught.value.setting == "paths"
    shown = inspect_checkpoint(Recipe(str(tmp_path / "net.pt")))
    assert {choice for a in shown["adapters"] for choice in a["settings"]["path"].values()} == {"unchosen"}
    chosen = candidate(net, 7)
    (tmp_path / "paths.json").write_text(json.dumps(net.space.named(chosen)))
    checkpoint = rx.read(tmp_path / "net.pt", config=tmp_path / "paths.json")
    verified = rx.verify(checkpoint, rx.fuse(checkpoint), {"image": IMAGES})
    assert agree(verified.module()(IMAGES), net.fix(chosen).model(IMAGES))
    (tmp_path / "list.json").write_text(json.dumps(to_dicts(chosen)))
    again = rx.read(tmp_path / "net.pt", config=tmp_path / "list.json")
    assert [a.params.path for a in again.adapters] == [*chosen]


def test_a_loaded_supernet_is_the_saved_one(tmp_path: Path) -> None:
    net = trained(make(train="head"))
    save(net.model, tmp_path / "net.pt", base=SPEC)
    again = load_supernet(tmp_path / "net.pt", seed=4)
    assert again.space == net.space
    chosen = candidate(net, 2)
    assert torch.equal(again.fix(chosen).model(IMAGES), net.fix(chosen).model(IMAGES))
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == {
        n for n, p in net.model.named_parameters() if p.requires_grad
    }


def test_another_kind_is_no_supernet(hydra: Case) -> None:
    path, given = hydra.arguments()
    with pytest.raises(UsageError, match="hydra"):
        load_supernet(path, **given)


def test_paths_for_a_checkpoint_that_has_none_to_choose_are_refused(hydra: Case, tmp_path: Path) -> None:
    path, given = hydra.arguments()
    (tmp_path / "paths.json").write_text(json.dumps([dict.fromkeys("ABCDE", "none")]))
    with pytest.raises(UsageError, match="paths"):
        rx.read(path, **(given | {"config": [*given["config"], tmp_path / "paths.json"]}))


def test_a_space_without_a_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="ranks"):
        choices_of(())
    assert Space(("a",), ((2, 3),), choices_of((2,))).size == 432


def agree(found: Tensor, expected: Tensor) -> bool:
    with torch.no_grad():
        return bool(np.allclose(found.numpy(), expected.detach().numpy(), rtol=1e-4, atol=1e-4))


class Two(nn.Module):
    """Two layers without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))
