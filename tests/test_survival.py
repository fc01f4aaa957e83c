"""Survival: what a storage format keeps of an adapter's change, against its definition, and --dtype auto."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import CASES, own_model
from safetensors.torch import load_file
from streaming.models import llama, lora

import reparam_export as rx
from reparam_export.checkpoints import read
from reparam_export.cli import cli
from reparam_export.fusion import Kept, survival_of
from reparam_export.streaming import plan_of
from reparam_export.streaming.survey import one_for_all, survey
from reparam_export.verification.certificate import LayerEvidence
from reparam_export.verification.survival import least, overall

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def small_change(folder: Path, base: Path, size: float) -> Path:
    """A LoRA whose change is about ``size`` of the weights."""
    return lora(folder, base, lora_alpha=4 * size * 100)


def share(exact: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> float:
    """The definition: <stored - W, exact - W> / |exact - W|^2."""
    change = exact - base
    return float((change * (exact.to(dtype).double() - base)).sum() / (change * change).sum())


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-4])
def test_the_survey_is_the_definition_in_every_dtype(tmp_path: Path, size: float) -> None:
    base = llama(tmp_path / "base")
    adapter = small_change(tmp_path / "adapter", base, size)
    found = survey(plan_of(read(adapter, numpy=True), None))
    exact = rx.fuse(read(adapter), "fp32")  # its own rounding is far below that of 16 bits
    before = {n: t.double() for n, t in load_file(base / "model.safetensors").items()}
    for module, of in found.items():
        name = f"{module}.weight"
        for short in ("bf16", "fp16"):
            assert of[short].share == pytest.approx(
                share(exact[name].double(), before[name], DTYPES[short]), abs=2e-3
            ), (module, short)
        assert of["fp32"].share > 0.999
    for short in DTYPES:
        in_memory = rx.fuse(read(adapter), short).kept
        for module, of in found.items():
            assert in_memory[module].share == pytest.approx(of[short].share, abs=1e-3)
            assert in_memory[module].change == pytest.approx(of[short].change, rel=1e-3)


@pytest.mark.parametrize(("size", "chosen"), [(1e-1, "bf16"), (1e-3, "fp16"), (1e-5, "fp32")])
def test_auto_takes_the_narrowest_that_keeps_enough_of_every_layer(tmp_path: Path, size: float, chosen: str) -> None:
    base = llama(tmp_path / "base")
    adapter = small_change(tmp_path / "adapter", base, size)
    plan = plan_of(read(adapter, numpy=True), None)
    storage, why = one_for_all(plan)
    assert storage == (None if chosen == "bf16" else chosen)  # the base is bf16 already
    assert chosen in why
    found = {short: min(of[short].share for of in survey(plan).values()) for short in DTYPES}
    assert next(short for short in ("bf16", "fp16", "fp32") if found[short] >= 0.99) == chosen
    assert rx.fuse(read(adapter), "auto").dtype == chosen
    done = CliRunner().invoke(cli, ["fuse", str(adapter), "-o", str(tmp_path / "out"), "--dtype", "auto"])
    assert done.exit_code == 0, done.output
    assert "one for all" in done.output
    record = json.loads((tmp_path / "out" / "fused.json").read_text())
    assert record["survival"]["least"] >= 0.99
    assert set(record["storage"]) == {str(DTYPES[chosen]).removeprefix("torch.")}
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text())["dtype"] == str(
        DTYPES[chosen]
    ).removeprefix("torch.")


def test_auto_gives_each_layer_its_own_where_the_target_allows(tmp_path: Path) -> None:
    """A plain model of bf16 numbers: one layer changes much, one little; both proofs, and both in one safetensors file."""
    base = own_model(
        tmp_path,
        "self.a, self.b = (Linear(*s).bfloat16().float() for s in ((40, 30), (30, 20)))",
        "self.b(torch.tanh(self.a(x)))",
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, width, size in (("a", 40, 0.3), ("b", 30, 3e-6)):
        tensors[f"{name}.adapter.conv_A.weight"] = torch.randn(4, width, 1, generator=generator) * width**-0.5
        tensors[f"{name}.adapter.conv_B.weight"] = torch.randn(width, 2, 1, generator=generator) * size
    torch.save(tensors, tmp_path / "c.pt")
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,40:float32"])
    weights = rx.fuse(checkpoint, "auto")
    assert weights["a.weight"].dtype == torch.bfloat16
    assert weights["b.weight"].dtype == torch.float32
    assert weights.dtype == "auto"
    assert all(of.share >= 0.99 for of in weights.kept.values())
    model = rx.verify(checkpoint, weights)
    assert model.certificate.verdict == "exact"
    artifact = rx.export(model, "safetensors", tmp_path / "out")
    assert artifact.details["tensors"] == 4
    assert rx.export(model, "onnx", tmp_path / "out", batch=(1, 2, 3)).ran
    tampered = dict(weights.tensors)
    tampered["a.weight"] = tampered["a.weight"].clone()
    tampered["a.weight"].view(torch.int16)[1, 2] ^= 16
    from dataclasses import replace

    from reparam_export.errors import EquivalenceError

    with pytest.raises(EquivalenceError):
        rx.verify(checkpoint, replace(weights, tensors=tampered))


def test_all_layers_together_count_by_their_change() -> None:
    kept = {"a": Kept(0.5, 3.0), "b": Kept(1.0, 1.0)}
    assert survival_of(kept) == {"overall": 0.625, "least": 0.5, "layers": {"a": 0.5, "b": 1.0}}
    layers = [
        LayerEvidence(m, "lora", (), (1, 1), "bfloat16", "probes", 1, 1, 0.0, 0.0, k.share, "exact", change=k.change)
        for m, k in kept.items()
    ]
    assert overall(layers) == 0.625
    assert least(layers) == 0.5
    assert overall([]) == least([]) == 1.0


def test_inspect_shows_what_each_dtype_would_keep() -> None:
    done = CliRunner().invoke(cli, ["inspect", str(CASES["peft_lora"].folder), "--survival", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)["survival"]
    assert set(found) == {"bf16", "fp16", "fp32"}
    assert found["bf16"]["overall"] <= found["fp32"]["overall"] + 1e-6
    assert len(found["bf16"]["layers"]) == 14
    done = CliRunner().invoke(cli, ["inspect", *CASES["hydra_vtab"].command(), "--survival"])
    assert done.exit_code == 0, done.output
    assert "(least)" in done.output
