"""A verifier that cannot fail is worse than none: each seeded fault is caught, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, Case, own_model

import reparam_export as rx
from reparam_export.adapters import glora
from reparam_export.affine import Affine, map_tensors
from reparam_export.checkpoints import Adapter
from reparam_export.errors import EquivalenceError, FusionError
from reparam_export.verification import weights as proof
from reparam_export.verification.weights import prove_layer

LAYER = "blocks.1.mlp.fc2"
Change = Callable[[dict[str, torch.Tensor]], None]


def refused(case: Case, change: Change, **options: Any) -> EquivalenceError:
    """The error that the proof of tampered weights raises."""
    checkpoint = case.read()
    fused = rx.fuse(checkpoint)
    tensors = {name: tensor.clone() for name, tensor in fused.tensors.items()}
    change(tensors)
    with pytest.raises(EquivalenceError) as caught:
        rx.verify(checkpoint, replace(fused, tensors=tensors), case.inputs(), **options)
    assert caught.value.exit_code == 1
    return caught.value


def test_one_weight_off_by_four_rounding_units_is_named(hydra: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{LAYER}.weight"]
        value = weight[5, 7].double()
        weight[5, 7] = (value + 8 * proof.half_ulp(value, torch.float32)).float()

    error = refused(hydra, change)
    assert error.layer == LAYER
    (wrong,) = [e for e in error.evidence.layers if not e.passed]
    assert wrong.worst is not None
    assert (wrong.worst["tensor"], wrong.worst["index"]) == ("weight", [5, 7])
    # the outputs alone would not have shown it
    assert all(o.passed for o in error.evidence.outputs)


def test_one_unit_in_the_last_place_is_not_exact_but_within_the_bound(hydra: Case) -> None:
    checkpoint = hydra.read()
    fused = rx.fuse(checkpoint)
    tensors = {name: tensor.clone() for name, tensor in fused.tensors.items()}
    weight = tensors[f"{LAYER}.weight"]
    exact = proof.exact_layer(base_module(checkpoint, LAYER), adapter_of(checkpoint, LAYER))
    unit = torch.zeros(1, exact.base.in_features, dtype=torch.float64)
    unit[0, 7] = 1
    true = (exact(unit) - exact(0 * unit))[0, 5]
    above = weight[5, 7].double() < true  # the other neighbour of the exact value
    weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(float("inf") if above else float("-inf")))
    evidence = rx.verify(checkpoint, replace(fused, tensors=tensors), hydra.inputs()).certificate
    assert evidence.verdict == "rounded"
    assert [e.module for e in evidence.layers if e.verdict == "rounded"] == [LAYER]


def base_module(checkpoint: rx.Checkpoint, name: str) -> torch.nn.Module:
    from reparam_export.assembly import base_of

    return base_of(checkpoint).build()[0].get_submodule(name)


def adapter_of(checkpoint: rx.Checkpoint, name: str) -> Adapter:
    return next(a for a in checkpoint.adapters if a.module == name)


def test_two_swapped_layers_are_named(hydra: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("weight", "bias"):
            a, b = f"blocks.0.mlp.fc2.{end}", f"blocks.1.mlp.fc2.{end}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    error = refused(hydra, change)
    assert {e.module for e in error.evidence.layers if not e.passed} == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert error.layer == "blocks.0.mlp.fc2"
    assert not any(o.passed for o in error.evidence.outputs)


def test_a_dropped_bias_is_named(hydra: Case) -> None:
    checkpoint = hydra.read()
    base = base_module(checkpoint, LAYER).bias.detach()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.bias"] = base.clone()

    error = refused(hydra, change)
    assert error.layer == LAYER
    assert error.evidence.layers[3].worst["tensor"] == "bias"


def test_a_created_bias_that_was_lost_is_named() -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["blocks.0.attn.qkv.bias"]

    error = refused(CASES["repadapter_linear"], change)
    assert error.layer == "blocks.0.attn.qkv"


def test_a_scale_off_by_one_percent_is_caught(hydra: Case) -> None:
    checkpoint = hydra.read()
    other = rx.read(
        hydra.folder / "ckpt.pt", hydra.options["base"], base_weights=hydra.folder / "base.pt", settings={"scale": 3.03}
    )
    with pytest.raises(EquivalenceError) as caught:
        rx.verify(checkpoint, rx.fuse(other), hydra.inputs())
    assert not any(e.passed for e in caught.value.evidence.layers)
    assert caught.value.layer == "blocks.0.attn.proj"


def test_a_nan_is_caught(hydra: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"][0, 0] = float("nan")

    error = refused(hydra, change)
    assert error.layer == LAYER
    assert not any(o.passed for o in error.evidence.outputs)


def test_the_forks_wrong_order_of_weight_and_bias_is_caught() -> None:
    """The GLoRA fork updates the weight first and then computes W @ C with it."""
    case = CASES["glora_llama"]
    checkpoint = case.read()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for adapter in checkpoint.adapters:
            path = adapter.params.path
            if path.C == "none":
                continue
            c = glora.support(path.C, adapter.params.Cd, adapter.params.Cu)
            updated = tensors[f"{adapter.module}.weight"]
            original = base_module(checkpoint, adapter.module).weight.detach()
            tensors[f"{adapter.module}.bias"] += ((updated - original) @ c).squeeze()

    error = refused(case, change)
    wrong = {e.module for e in error.evidence.layers if not e.passed}
    changed_weight = {
        a.module
        for a in checkpoint.adapters
        if a.params.path.C != "none" and (a.params.path.A, a.params.path.B) != ("none", "none")
    }
    assert wrong == changed_weight
    assert len(wrong) > 3


def test_the_authors_wrong_layer_merge_is_caught(hydra: Case) -> None:
    """set_hydraWeight merges attention with another layer's weight: here the next block's, so that the shapes fit."""
    checkpoint = hydra.read()
    name = "blocks.0.attn.proj"
    adapter = adapter_of(checkpoint, name)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        other, own = base_module(checkpoint, "blocks.1.attn.proj"), base_module(checkpoint, name)
        p = map_tensors(adapter.params, lambda t: t.double())
        wrong = (
            Affine(other.weight.detach().double(), other.bias.detach().double())
            .then(p.sequential.down)
            .then(p.sequential.up)
        )
        parallel = p.parallel.down.then(p.parallel.up)
        tensors[f"{name}.weight"] = (own.weight.detach() + 3 * (parallel.weight + wrong.weight)).float()
        tensors[f"{name}.bias"] = (own.bias.detach() + 3 * (parallel.bias + wrong.bias)).float()

    error = refused(hydra, change)
    assert error.layer == name
    assert [e.module for e in error.evidence.layers if not e.passed] == [name]


def test_a_tensor_that_no_adapter_touches_is_compared_too(hydra: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.2.norm1.weight"][3] *= 1 + 1e-6

    assert refused(hydra, change).evidence.carried.different == ("blocks.2.norm1.weight: differs",)


def test_the_wrong_head_is_caught(hydra: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.bias"] += 1e-3

    assert refused(hydra, change).evidence.carried.different == ("head.bias: differs",)


def test_a_failed_proof_without_wrong_weights_names_the_first_layer_that_parts(hydra: Case) -> None:
    """Weights are blind when the spec's own layer is misplaced; the outputs are not."""
    checkpoint = hydra.read()
    fused = rx.fuse(checkpoint)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.1.norm1.bias"] += 0.1

    error = refused(hydra, change)
    assert error.layer == "blocks.1.attn.proj"
    assert fused.sha256() != error.evidence.weights_sha256


def probed_layer() -> tuple[torch.nn.Module, Affine, Adapter, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 48)
    layer = Affine(module.weight.detach().double(), module.bias.detach().double())
    params = glora.example(3, layer)
    fused = glora.fuse(layer, params)
    tensors = {"layer.weight": fused.weight.bfloat16(), "layer.bias": fused.bias.bfloat16()}
    return module, layer, Adapter("layer", "glora", params), tensors


def test_a_probed_layer_is_as_strict_on_every_entry() -> None:
    """Large layers: one entry off, and the unfused base passed off as the fused layer, are both wrong."""
    module, layer, adapter, tensors = probed_layer()
    clean = prove_layer(module, adapter, tensors, seed=0, limit=0)
    assert (clean.method, clean.verdict, clean.probes) == ("probes", "exact", proof.PROBES)
    assert clean.detectable < 1e-10
    assert (
        prove_layer(module, adapter, tensors | {"layer.weight": layer.weight.bfloat16()}, seed=0, limit=0).verdict
        == "wrong"
    )
    tensors["layer.weight"][7, 5] *= 1 + 2**-5  # 4 rounding units
    wrong = prove_layer(module, adapter, tensors, seed=0, limit=0)
    assert wrong.verdict == "wrong"
    assert wrong.worst is not None
    assert wrong.worst["index"] == [7, 5]


def test_probes_catch_a_closed_form_that_is_not_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    module, layer, adapter, _ = probed_layer()
    right = glora.fuse

    def slightly_wrong(base: Affine, p: Any) -> Affine:
        fused = right(base, p)
        weight = fused.weight.clone()
        weight[7] += 100 * 1e-12 * torch.randn(64, dtype=torch.float64)
        return Affine(weight, fused.bias)

    monkeypatch.setattr(glora, "fuse", slightly_wrong)
    fused = slightly_wrong(layer, adapter.params)
    tensors = {"layer.weight": fused.weight.float(), "layer.bias": fused.bias.float()}
    wrong = prove_layer(module, adapter, tensors, seed=0, limit=0)
    assert wrong.verdict == "wrong"
    assert wrong.worst is not None
    assert (wrong.worst["tensor"], wrong.worst["index"]) == ("output row", [7])


def test_cancellation_inside_an_adapter_is_not_called_exact() -> None:
    """Components of 1e9 that cancel leave nothing of float64 to prove the layer with."""
    from reparam_export.adapters import lora
    from reparam_export.affine import Bottleneck

    torch.manual_seed(0)
    module = torch.nn.Linear(16, 16)
    a, b = torch.randn(1, 16, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    pair = Bottleneck(Affine(torch.cat([a * 1e9, a * 1e9])), Affine(torch.cat([b * 1e9, -b * 1e9], dim=1)))
    tensors = {"layer.weight": module.weight.detach() + 0.1 * torch.randn(16, 16), "layer.bias": module.bias.detach()}
    assert prove_layer(module, Adapter("layer", "lora", lora.Params(pair, 1.0)), tensors, seed=0).verdict == "wrong"


def test_a_model_that_answers_differently_each_time_is_refused(tmp_path: Path) -> None:
    base = own_model(tmp_path, "self.fc = Linear(6, 4)", "torch.nn.functional.dropout(self.fc(x), 0.5, training=True)")
    torch.save(
        {"fc.adapter.conv_A.weight": torch.ones(2, 6, 1), "fc.adapter.conv_B.weight": torch.ones(6, 1, 1)},
        tmp_path / "c.pt",
    )
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,6:float32"])
    with pytest.raises(EquivalenceError, match="differently on each call"):
        rx.verify(checkpoint, rx.fuse(checkpoint))


def test_rows_outside_a_packed_adapter_must_stay(tmp_path: object) -> None:
    """An adapter on v of a packed qkv leaves q and k alone, and the proof looks."""
    checkpoint = CASES["repadapter_linear"].read()
    part = next(a for a in checkpoint.adapters if a.module == "blocks.0.attn.qkv")
    packed = replace(checkpoint, adapters=(replace(part, rows=(128, 192)),), covers=lambda names: [])
    fused = rx.fuse(packed)
    assert rx.verify(packed, fused).certificate.verdict == "exact"
    tensors = {name: tensor.clone() for name, tensor in fused.tensors.items()}
    tensors["blocks.0.attn.qkv.weight"][3, 3] += 0.5
    with pytest.raises(EquivalenceError) as caught:
        rx.verify(packed, replace(fused, tensors=tensors))
    assert caught.value.evidence.carried.different == (
        "blocks.0.attn.qkv.weight: rows outside the adapted ones differ",
    )


def test_weights_changed_after_the_proof_cannot_be_used(hydra: Case) -> None:
    checkpoint = hydra.read()
    model = rx.verify(checkpoint, rx.fuse(checkpoint))
    model.weights.tensors["head.weight"][0, 0] += 1
    with pytest.raises(EquivalenceError):
        model.module()


def test_a_bound_as_large_as_the_outputs_decides_nothing() -> None:
    from reparam_export.verification.outputs import passes

    assert passes(error=1e-6, floor=1e-6, bound=8e-6, magnitude=1.0)
    assert not passes(error=9e-6, floor=1e-6, bound=8e-6, magnitude=1.0)
    assert not passes(error=0.5, floor=0.2, bound=1.6, magnitude=1.0)
    assert passes(error=0.0, floor=0.0, bound=0.0, magnitude=0.0)
    assert not passes(error=0.0, floor=float("inf"), bound=float("inf"), magnitude=1.0)


def each_with_each(folder: Path, outputs: str) -> tuple[rx.Checkpoint, rx.FusedWeights]:
    base = own_model(folder, "self.fc = Linear(6, 4)", outputs)
    torch.manual_seed(2)
    adapter = {"fc.adapter.conv_A.weight": torch.randn(2, 6, 1), "fc.adapter.conv_B.weight": torch.randn(6, 1, 1)}
    torch.save(adapter, folder / "c.pt")
    checkpoint = rx.read(folder / "c.pt", base, inputs=["x=batch,6:float32"])
    return checkpoint, rx.fuse(checkpoint)


def test_outputs_of_each_sample_with_each_are_proven(tmp_path: Path) -> None:
    checkpoint, fused = each_with_each(
        tmp_path, "{'each': self.fc(x) @ self.fc(x).T, 'one': self.fc.weight.shape[0] * torch.ones(())}"
    )
    model = rx.verify(checkpoint, fused, count=11)
    assert {(o.output, o.batch) for o in model.certificate.outputs} == {
        (n, b) for n in ("each", "one") for b in (1, 2, 11)
    }
    assert model.reference.outputs["each"].shape == (11, 11)
    rx.export(model, "onnx", tmp_path / "out", batch=(1, 2, 23))
    tensors = {name: tensor.clone() for name, tensor in fused.tensors.items()}
    tensors["fc.weight"][1, 1] += 0.1
    with pytest.raises(EquivalenceError, match="output each at batch 1"):
        rx.verify(checkpoint, replace(fused, tensors=tensors), count=11)


def test_an_output_that_depends_on_its_batch_is_refused_as_such(tmp_path: Path) -> None:
    checkpoint, fused = each_with_each(tmp_path, "{'mean': self.fc(x).mean()}")
    with pytest.raises(FusionError, match="answers a sample otherwise when others are in the batch"):
        rx.verify(checkpoint, fused)


def test_a_layer_under_three_names_is_picked_up_from_its_folder(tmp_path: Path) -> None:
    from reparam_export.folder import load_fused, save_fused

    layers = "self.fc = Linear(6, 6); self.a = Linear(6, 6); self.b = self.a; self.c = self.a"
    base = own_model(tmp_path, layers, "self.fc(self.a(self.b(self.c(x))))")
    torch.manual_seed(2)
    adapter = {"fc.adapter.conv_A.weight": torch.randn(2, 6, 1), "fc.adapter.conv_B.weight": torch.randn(6, 1, 1)}
    torch.save(adapter, tmp_path / "c.pt")
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,6:float32"])
    fused = rx.fuse(checkpoint)
    assert set(fused.aliases.values()) == {"a.weight", "a.bias"}
    save_fused(tmp_path / "out", checkpoint, fused)
    assert load_fused(tmp_path / "out", base=base)[1].aliases == fused.aliases


def test_a_model_whose_constants_only_float64_holds_has_its_reference(tmp_path: Path) -> None:
    least = "torch.max(self.fc(x), torch.tensor(torch.finfo(x.dtype).min))"  # as XGLM masks its attention
    checkpoint, fused = each_with_each(tmp_path, least)
    reference = rx.verify(checkpoint, fused).reference
    dtype, weight = torch.get_default_dtype(), fused["fc.weight"].double()
    expected = reference.inputs["x"].double() @ weight.T + fused["fc.bias"].double()
    assert dtype == torch.float32
    assert torch.allclose(reference.outputs["output"], expected, rtol=0, atol=1e-5)


def test_a_layer_whose_weight_is_read_past_its_adapter_is_refused_as_that(tmp_path: Path) -> None:
    direct = "torch.nn.functional.linear(self.a(x), self.fc.weight, self.fc.bias)"
    base = own_model(tmp_path, "self.a = Linear(6, 6); self.fc = Linear(6, 4)", direct)
    torch.manual_seed(2)
    adapter = {
        f"{name}.adapter.conv_{part}.weight": torch.randn(*shape, 1)
        for name in ("a", "fc")
        for part, shape in (("A", (2, 6)), ("B", (6, 2)))
    }
    torch.save(adapter, tmp_path / "c.pt")
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,6:float32"])
    fused = rx.fuse(checkpoint)
    with pytest.raises(FusionError, match=r"never calls 1 of the layers that have adapters, first fc: it reads"):
        rx.verify(checkpoint, fused)
    tensors = {name: tensor.clone() for name, tensor in fused.tensors.items()}
    tensors["a.weight"][1, 1] += 0.1  # another fault beside it is not explained by it
    with pytest.raises(EquivalenceError):
        rx.verify(checkpoint, replace(fused, tensors=tensors))
