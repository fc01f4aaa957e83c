"""The unfused contender: the same function as the proof's reference, and the program that its user would ship."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from conftest import CASES, Case
from torch import nn
from torch.nn import functional as F

import reparam_export as rx
from reparam_export.adapters import kind
from reparam_export.affine import Affine, Bottleneck
from reparam_export.assembly import adapted, adapted_module, base_of, with_replaced
from reparam_export.checkpoints import Adapter
from reparam_export.errors import FusionError
from reparam_export.exporters.onnx import write
from reparam_export.latency.unfused import unfused
from reparam_export.models import Input, Signature
from reparam_export.verification.outputs import run


def modules(case: Case) -> tuple[nn.Module, nn.Module, Signature]:
    """The contender and the reference, in float64."""
    checkpoint = case.read()
    module, signature = base_of(checkpoint).build()
    reference = adapted(with_replaced(module, checkpoint), checkpoint.adapters, torch.float64)
    return (
        unfused(with_replaced(base_of(checkpoint).build()[0], checkpoint).double(), checkpoint.adapters),
        reference,
        signature,
    )


def test_it_answers_as_the_reference_that_the_authors_outputs_were_compared_with(case: Case) -> None:
    contender, reference, signature = modules(case)
    found, same = (run(m, signature, case.inputs(), torch.float64)[0] for m in (contender, reference))
    torch.testing.assert_close(found, same, rtol=1e-10, atol=1e-10)


def test_every_tensor_of_an_adapter_is_a_parameter(hydra: Case) -> None:
    contender, _, _ = modules(hydra)
    base = base_of(hydra.read()).build()[0]
    own = sum(p.numel() for p in contender.parameters()) - sum(p.numel() for p in base.parameters())
    stored = torch.load(hydra.folder / "ckpt.pt", weights_only=True)
    assert own == sum(t.numel() for name, t in stored.items() if "hydra" in name)


def test_frozen_layers_and_low_rank_pairs_run_as_linear_layers(hydra: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    contender, _, signature = modules(hydra)
    plain, real = base_of(hydra.read()).build()[0], F.linear
    calls: list[int] = []

    def counted(*given: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(*given)

    monkeypatch.setattr(F, "linear", counted)
    inputs = {name: t[:1] for name, t in hydra.inputs().items()}
    run(plain, signature, inputs, torch.float32)
    of_base = len(calls)
    run(contender, signature, inputs, torch.float64)
    assert len(calls) - of_base == of_base + 6 * 4  # six layers, each with two ways down and two up


class AuthorsHydra(nn.Module):
    """extremebird/Hydra, vtab1k/hydra.py, in its own words but for names."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.down_par, self.up_par = nn.Linear(layer.in_features, rank), nn.Linear(rank, layer.out_features)
        self.down_seq, self.up_seq = nn.Linear(layer.out_features, rank), nn.Linear(rank, layer.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return h + self.up_par(self.down_par(x)) * self.scale + self.up_seq(self.down_seq(h)) * self.scale


class AuthorsGLoRA(nn.Module):
    """Arnav0400/ViT-Slim, GLoRA: the weight is made anew at every call. Path: A LoRA, B LoRA, C LoRA, D vector, E vector."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        out, inn = layer.weight.shape
        self.weight, self.bias = layer.weight, layer.bias
        shapes = {
            "Ad": (out, rank),
            "Au": (rank, inn),
            "Bd": (out, rank),
            "Bu": (rank, inn),
            "Cd": (inn, rank),
            "Cu": (rank, 1),
        }
        for name, shape in (shapes | {"D": (out,), "E": (out,)}).items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.Ad @ self.Au, self.Bd @ self.Bu, self.Cd @ self.Cu
        weight = self.weight + self.weight * a + b
        bias = self.bias + self.bias * self.D + self.E
        return F.linear(x, weight, bias + torch.matmul(self.weight, c).squeeze())


def exported_operators(module: nn.Module, path: Path) -> Counter[str]:
    signature = Signature((Input("x", ("batch", 5, 12)),), ("output",))
    write(module.eval(), signature, {"x": torch.randn(2, 5, 12)}, path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_hydra_exports_to_the_operators_of_its_authors_module(tmp_path: Path) -> None:
    layer = nn.Linear(12, 7)
    theirs = AuthorsHydra(layer, 3, 0.5)
    pairs = [(theirs.down_par, theirs.up_par), (theirs.down_seq, theirs.up_seq)]
    par, seq = (Bottleneck(*(Affine(m.weight.detach(), m.bias.detach()) for m in pair)) for pair in pairs)
    ours = unfused(nn.Sequential(layer), [Adapter("0", "hydra", kind("hydra").Params(par, seq, 0.5, 0.5))])
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    assert exported_operators(ours, tmp_path / "a.onnx") == exported_operators(theirs, tmp_path / "b.onnx")


def test_glora_exports_to_the_operators_of_its_authors_module(tmp_path: Path) -> None:
    layer = nn.Linear(12, 7)
    theirs = AuthorsGLoRA(layer, 3)
    spec = kind("glora")
    path = replace(
        spec.example(0, Affine(layer.weight, layer.bias)).path,
        A="LoRA_3",
        B="LoRA_3",
        C="LoRA_3",
        D="vector",
        E="vector",
    )
    tensors = {n: p.detach() for n, p in theirs.named_parameters() if n not in ("weight", "bias")}
    ours = unfused(nn.Sequential(layer), [Adapter("0", "glora", spec.Params(path=path, **tensors))])
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    found, wanted = (exported_operators(m, tmp_path / f"{n}.onnx") for m, n in ((ours, "a"), (theirs, "b")))
    assert (
        found["MatMul"] + found["Gemm"] == wanted["MatMul"] + wanted["Gemm"] == 5
    )  # A, B, C, W C and the layer itself
    assert sum(found.values()) - sum(wanted.values()) in (0, 1)  # squeeze or reshape


def test_peft_exports_to_the_same_products(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    torch.manual_seed(0)
    net = Net()
    theirs = get_peft_model(
        net, LoraConfig(r=3, lora_alpha=6, target_modules=["fc"], init_lora_weights=False)
    ).base_model.model
    down, up = theirs.fc.lora_A["default"].weight.detach(), theirs.fc.lora_B["default"].weight.detach()
    base = nn.Linear(12, 7)
    base.load_state_dict(theirs.fc.base_layer.state_dict())
    ours = unfused(
        nn.Sequential(base), [Adapter("0", "lora", kind("lora").Params(Bottleneck(Affine(down), Affine(up)), 2.0))]
    )
    found, wanted = (exported_operators(m.eval(), tmp_path / f"{n}.onnx") for m, n in ((ours, "a"), (theirs, "b")))
    assert found == wanted


def test_an_adapter_on_some_outputs_does_not_run_the_layer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9)
    pairs = [Bottleneck(Affine(torch.randn(2, 12)), Affine(torch.randn(3, 2))) for _ in range(2)]
    adapters = [
        Adapter("0", "lora", kind("lora").Params(p, 1.0), rows) for p, rows in zip(pairs, [(0, 3), (6, 9)], strict=True)
    ]
    ours = unfused(nn.Sequential(layer), adapters)
    x = torch.randn(4, 12)
    expected = layer(x)
    expected = torch.cat([expected[:, :3] + pairs[0](x), expected[:, 3:6], expected[:, 6:] + pairs[1](x)], -1)
    shapes: list[tuple[int, ...]] = []
    real = F.linear

    def seen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(F, "linear", seen)
    torch.testing.assert_close(ours(x), expected)
    assert shapes == [(9, 12), (2, 12), (3, 2), (2, 12), (3, 2)]


def test_what_nobody_could_ship_is_refused() -> None:
    layer = nn.Embedding(7, 4)
    params = kind("repadapter").example(0, Affine(torch.randn(4, 7).double()))
    with pytest.raises(FusionError, match="to be shipped unfused"):
        unfused(nn.Sequential(layer), [Adapter("0", "repadapter", params)])


def test_lora_on_an_embedding_looks_up_and_multiplies_no_one_hot() -> None:
    case = CASES["peft_lora_embed_head"]
    contender, _, signature = modules(case)
    names = [n for n, m in contender.named_modules() if "Unfused" in type(m).__name__]
    assert any("embed" in name for name in names)
    shapes: list[torch.Size] = []
    real = F.one_hot
    F.one_hot = lambda *a, **k: shapes.append(a[0].shape) or real(*a, **k)  # type: ignore[assignment, func-returns-value]
    try:
        run(contender, signature, case.inputs(), torch.float64)
    finally:
        F.one_hot = real
    assert not shapes


def test_the_contender_is_the_checkpoint_itself_not_what_was_fused(exported: Path) -> None:
    from reparam_export.folder import load_fused
    from reparam_export.latency.contenders import module_of

    checkpoint, weights = load_fused(exported)
    case = CASES["hydra_vtab"]
    signature = base_of(checkpoint).build()[1]
    answers = [
        run(module_of(checkpoint, weights, which), signature, case.inputs(), torch.float32)[0]
        for which in ("base", "adapted", "fused")
    ]
    assert (answers[1] - answers[2]).abs().max() < 1e-4 < (answers[0] - answers[1]).abs().max()
    assert rx.fuse(checkpoint).sha256() == weights.sha256()


def stack_of(*steps: tuple[str, tuple[int, int] | None, float], bias: bool) -> tuple[nn.Linear, list[Adapter]]:
    torch.manual_seed(3)
    layer = nn.Linear(12, 9, bias=bias).double()
    whole = Affine(layer.weight.detach(), layer.bias.detach() if bias else None)
    found = []
    for number, (name, rows, weight) in enumerate(steps):
        part = whole.rows(*rows) if rows else whole
        found.append(Adapter("0", name, kind(name).example(number, part), rows, weight=weight))
    return layer, found


@pytest.mark.parametrize(
    "steps",
    [
        [("lora", None, 1.0), ("hydra", None, 1.0)],
        [("glora", None, 0.5), ("lora", (3, 6), 1.0), ("hydra", None, 2.0)],
        [("dora", (0, 3), 0.25), ("lora", (0, 3), 1.0), ("lora", (6, 9), -1.0)],
        [("lora", (0, 6), 1.0), ("hydra", (3, 9), 0.5)],
    ],
)
def test_a_stack_answers_as_the_reference(steps: list[tuple[str, tuple[int, int] | None, float]]) -> None:
    for bias in (True, False):
        layer, adapters = stack_of(*steps, bias=bias)
        wanted = adapted_module("0", layer, adapters, torch.float64)
        ours = unfused(nn.Sequential(layer), adapters)
        x = torch.randn(4, 5, 12, dtype=torch.float64)
        torch.testing.assert_close(ours(x), wanted(x), rtol=1e-12, atol=1e-12)


def test_a_stack_runs_the_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, adapters = stack_of(("lora", (0, 6), 0.5), ("hydra", (3, 9), 0.5), bias=True)
    ours, real, seen = unfused(nn.Sequential(layer), adapters), F.linear, []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(tuple(weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    ours(torch.randn(2, 12, dtype=torch.float64))
    assert seen.count((9, 12)) == 1
    assert len(seen) == 1 + 2 + 4


def test_an_adapter_that_reads_a_weight_which_another_made_is_refused() -> None:
    layer, adapters = stack_of(("lora", None, 1.0), ("dora", None, 1.0), bias=True)
    ours = unfused(nn.Sequential(layer), adapters)
    with pytest.raises(FusionError, match="no form that is shipped unfused"):
        ours(torch.randn(2, 12, dtype=torch.float64))


def test_one_that_acts_on_a_tensor_or_is_probed_is_refused() -> None:
    layer = nn.Linear(4, 4)
    params = kind("probed").example(0, Affine(torch.randn(4, 4).double()))
    with pytest.raises(FusionError, match="to be shipped unfused"):
        unfused(nn.Sequential(layer), [Adapter("0", "probed", params)])
    lora = kind("lora").example(0, Affine(torch.randn(4, 4).double()))
    with pytest.raises(FusionError, match="in_proj_weight"):
        unfused(nn.Sequential(nn.MultiheadAttention(4, 1)), [Adapter("0", "lora", lora, parameter="in_proj_weight")])
