"""An output that the adapter does not move proves nothing of it, and is said to: in the certificate, the report and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import own_model
from safetensors.torch import save_file
from test_cli import run

import reparam_export as rx

LAYERS = "self.a, self.b, self.c = Linear(6, 5), Linear(5, 3), Linear(6, 4)"
ZERO = f"{LAYERS}; [torch.nn.init.zeros_(p) for p in self.b.parameters()]"
CONSTANT = f"{LAYERS}; torch.nn.init.zeros_(self.b.weight)"


def adapter(folder: Path, size: float = 1.0) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    pair = {"lora_A": torch.randn(2, 6, generator=generator), "lora_B": size * torch.randn(5, 2, generator=generator)}
    save_file({f"base_model.model.a.{n}.weight": t for n, t in pair.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["a"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def proven(folder: Path, layers: str, forward: str, size: float = 1.0) -> rx.VerifiedModel:
    checkpoint = rx.read(
        adapter(folder / "adapter", size), own_model(folder, layers, forward), inputs=["x=batch,6:float32"]
    )
    return rx.verify(checkpoint, rx.fuse(checkpoint))


def test_how_far_the_adapter_moves_an_output_is_measured(tmp_path: Path) -> None:
    model = proven(tmp_path, LAYERS, "self.b(torch.tanh(self.a(x)))")
    with torch.no_grad():
        x = model.reference.inputs["x"].double()
        net = model.unfused(torch.float64)
        folded, plain = net(x), net.b(torch.tanh(x @ net.a.weight.double().T + net.a.bias.double()))
    expected = float((folded - plain).abs().max())
    assert all(o.moved == pytest.approx(expected, rel=1e-9) for o in model.certificate.outputs)
    assert expected > 1000 * model.certificate.outputs[0].bound
    assert model.certificate.vacuous == ()
    assert model.certificate.outputs_prove


@pytest.mark.parametrize(
    ("layers", "forward", "said"),
    [
        (ZERO, "self.b(torch.tanh(self.a(x)))", "output is 0 for every sample, with the adapter and without"),
        (CONSTANT, "self.b(torch.tanh(self.a(x)))", "the adapter does not move output on these samples"),
        (LAYERS, "self.c(x) + 0 * self.a(x).sum()", "the adapter does not move output on these samples"),
        (LAYERS, "self.c(x) + 1e-9 * self.a(x).sum()", "the plain base would pass as well"),
    ],
    ids=["head of zeros", "constant head", "a branch that counts for nothing", "a branch that hardly counts"],
)
def test_outputs_that_prove_nothing_are_said_to(tmp_path: Path, layers: str, forward: str, said: str) -> None:
    base = own_model(tmp_path, layers, forward)
    words = ("convert", adapter(tmp_path / "adapter"), "--base", base, "--input", "x=batch,6:float32", "--to", "onnx")
    result = run(*words, "-o", tmp_path / "out", "--batch", "1:1:2")
    assert result.exit_code == 0, result.output
    assert "note: output output proves nothing: " in result.stdout
    assert "Proven by its weights alone: the 1 layer exact; its outputs prove nothing: " in result.stdout
    assert said in " ".join(result.stdout.split())
    content = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert (content["outputs_prove"], content["vacuous"]) == (False, ["output"])
    artifacts = json.loads((tmp_path / "out" / "artifact.json").read_text())["artifacts"]
    assert all(o["moved"] <= o["bound"] for a in artifacts for o in a["outputs"])
    assert all("its outputs prove nothing of the adapter" in a["note"] for a in artifacts)
    for name, text in (
        ("report.md", "| proves nothing |"),
        ("report.html", "proves nothing"),
        ("junit.xml", "proves nothing"),
    ):
        assert text in (tmp_path / "out" / name).read_text(), name


def test_one_output_of_two_is_enough_and_the_other_is_named(tmp_path: Path) -> None:
    model = proven(tmp_path, LAYERS, "(self.c(x), self.b(self.a(x)))")
    assert model.certificate.vacuous == ("output_0",)
    assert model.certificate.outputs_prove


def test_of_a_checkpoint_without_adapters_it_is_the_whole_tensors_that_move(tmp_path: Path) -> None:
    base = own_model(tmp_path, LAYERS, "self.b(self.a(x))")
    torch.save({"a.bias": torch.randn(5)}, tmp_path / "c.pt")
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,6:float32"])
    model = rx.verify(checkpoint, rx.fuse(checkpoint))
    assert all(o.moved is not None and o.moved > 0.1 for o in model.certificate.outputs)


def test_the_measure_is_there_again_when_the_proof_is_picked_up(tmp_path: Path) -> None:
    from reparam_export.folder import load_proof, save_evidence

    model = proven(tmp_path, LAYERS, "self.b(self.a(x))")
    save_evidence(tmp_path / "out", model)
    again = load_proof(tmp_path / "out", base=f"py:{tmp_path / 'net.py'}:build")
    assert again.reference.moved == model.reference.moved
