"""The user's own training code as the witness: the model that it makes, the answers that it gave, those that save() records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn

import reparam_export as rx
from reparam_export.cli import cli
from reparam_export.errors import CheckpointError, EquivalenceError, UsageError
from reparam_export.training import attach
from reparam_export.training.saving import save

CODE = """
import torch
from torch import nn

class Low(nn.Module):
    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale = inner, scale
        self.a, self.b = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(8, 3))
    def forward(self, x):
        return self.inner(x) + self.scale * (x @ self.a.T) @ self.b.T

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))

def adapted(scale=0.7):
    model = base()
    torch.manual_seed(1)
    model[0] = Low(model[0], scale)
    return model

def other():
    return adapted(0.35)

def broken():
    return nn.Linear(3, 3)
"""


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, list[str], Any]:
    """A whole LyCORIS-like file of a model of the user's own, the options that read it, and the module of code."""
    file = tmp_path / "net.py"
    file.write_text(CODE)
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    low = scope["adapted"]()[0]
    tensors = {
        "lycoris_0.lora_down.weight": low.a.detach(),
        "lycoris_0.lora_up.weight": low.b.detach(),
        "lycoris_0.alpha": torch.tensor(3 * 0.7),
    }
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "ckpt.safetensors")
    options = ["--base", f"py:{file}:base", "--input", "x=batch,12:float32"]
    return tmp_path / "ckpt.safetensors", options, scope


def recorded(scope: dict[str, Any], make: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The two lines of the README."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    answer = scope[make]().to(dtype)(x.to(dtype)).detach()
    np.savez(path, x=x.numpy(), output=answer.float().numpy(), dtype=str(dtype).removeprefix("torch."))
    return path


def checkpoint_of(trained: tuple[Path, list[str], Any]) -> rx.Checkpoint:
    path, options, _ = trained
    return rx.read(path, options[1], inputs=[options[3]])


def test_the_users_own_model_bears_witness(trained: tuple[Path, list[str], Any]) -> None:
    checkpoint = checkpoint_of(trained)
    weights, file = rx.fuse(checkpoint), trained[0].parent / "net.py"
    heard = rx.verify(checkpoint, weights, witness=f"py:{file}:adapted").certificate.witness[-1]
    assert (heard.who, heard.outputs) == (f"py:{file}:adapted", 1)
    assert heard.output_error < 1e-7  # the file holds alpha in float32
    with pytest.raises(EquivalenceError, match=r"output output: the unfused model of py:.*other and ours differ"):
        rx.verify(checkpoint, weights, witness=f"py:{file}:other")
    with pytest.raises(CheckpointError, match="expected the adapted model, called as its base is"):
        rx.verify(checkpoint, weights, witness=f"py:{file}:broken")
    with pytest.raises(UsageError, match="expected a function 'nothing'"):
        rx.verify(checkpoint, weights, witness=f"py:{file}:nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_recorded_answers_bear_witness_within_the_precision_they_were_made_in(
    dtype: torch.dtype, trained: tuple[Path, list[str], Any], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(trained)
    weights = rx.fuse(checkpoint)
    good = recorded(trained[2], "adapted", tmp_path / "good.npz", dtype)
    heard = rx.verify(checkpoint, weights, expected=good).certificate.witness[-1]
    assert (heard.who, heard.outputs, heard.passed) == ("good.npz", 1, True)
    assert heard.output_error <= heard.output_bound
    bad = recorded(trained[2], "other", tmp_path / "bad.npz", dtype)
    with pytest.raises(
        EquivalenceError, match=r"output output: the answers in bad\.npz and those of our unfused model"
    ):
        rx.verify(checkpoint, weights, expected=bad)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"output": None}, "expected floating point arrays of one or more of the outputs output"),
        ({"output": np.arange(4)}, "expected floating point arrays"),
        ({"other": np.zeros(3, np.float32)}, "other is neither an input nor an output"),
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"x": np.zeros((4, 11), np.float32)}, "expected shape"),
    ],
)
def test_answers_that_do_not_fit_are_refused(
    changed: dict[str, Any], said: str, trained: tuple[Path, list[str], Any], tmp_path: Path
) -> None:
    arrays = dict(np.load(recorded(trained[2], "adapted", tmp_path / "good.npz"))) | changed
    np.savez(tmp_path / "changed.npz", **{n: a for n, a in arrays.items() if a is not None})
    checkpoint = checkpoint_of(trained)
    with pytest.raises(UsageError, match=said):
        rx.verify(checkpoint, rx.fuse(checkpoint), expected=tmp_path / "changed.npz")


def test_the_command_line_takes_both_and_a_folder_never_runs_them_again(
    trained: tuple[Path, list[str], Any], tmp_path: Path
) -> None:
    path, options, scope = trained
    out, good = tmp_path / "out", recorded(scope, "adapted", tmp_path / "good.npz")
    words = [str(path), *options, "--to", "safetensors", "-o", str(out)]
    given = ["--witness", f"py:{tmp_path / 'net.py'}:adapted", "--expected", str(good)]
    done = CliRunner().invoke(cli, ["convert", *words, *given], catch_exceptions=False)
    assert done.exit_code == 0
    assert "net.py:adapted sha256" in done.output
    assert "second witness: good.npz" in done.output
    for file in ("fused.json", "verification.json"):
        assert "adapted" not in (out / file).read_text() or file == "verification.json"
    CliRunner().invoke(cli, ["verify", str(out), *options[:2]], catch_exceptions=False)
    assert "net.py:adapted" not in (out / "verification.json").read_text()


def test_save_records_what_the_model_answered_and_verify_holds_us_to_it(tmp_path: Path) -> None:
    spec = "timm:vit_tiny_patch16_224?img_size=32&embed_dim=24&depth=1&num_heads=3&num_classes=5"
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    model = attach(model, "lora", "blocks.0.attn.proj", rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    save(model, tmp_path / "ckpt.pt", base=spec)
    checkpoint = rx.read(tmp_path / "ckpt.pt")
    assert {n: tuple(t.shape) for n, t in checkpoint.expected["outputs"].items()} == {"logits": (2, 5)}
    (heard,) = rx.verify(checkpoint, rx.fuse(checkpoint)).certificate.witness
    assert (heard.who, heard.passed, heard.outputs) == ("the answers in the checkpoint", True, 1)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["expected"]["outputs"]["logits"] *= 1.01
    torch.save(content, tmp_path / "other.pt")
    other = rx.read(tmp_path / "other.pt")
    with pytest.raises(EquivalenceError, match="second witness"):
        rx.verify(other, rx.fuse(other))
    content["expected"]["dtype"] = "int8"
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="'expected' must hold"):
        rx.read(tmp_path / "other.pt")


def test_inputs_given_to_save_are_recorded_for_a_base_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CODE)
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    model: nn.Module = attach(scope["base"](), "lora", "0", rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    save(model.train(), tmp_path / "ckpt.pt", base=None, inputs={"x": torch.randn(3, 12)})
    assert model.training
    checkpoint = rx.read(tmp_path / "ckpt.pt", f"py:{tmp_path / 'net.py'}:base", inputs=["x=batch,12:float32"])
    (heard,) = rx.verify(checkpoint, rx.fuse(checkpoint)).certificate.witness
    assert (heard.who, heard.passed) == ("the answers in the checkpoint", True)
