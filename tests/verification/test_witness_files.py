"""The second witness of single files: diffusers' own loader, peft's model of a state dict, LyCORIS on names of a model inside another."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import reparam_export as rx
from reparam_export.checkpoints import Checkpoint
from reparam_export.cli import cli
from reparam_export.errors import EquivalenceError
from reparam_export.verification.certificate import WitnessEvidence
from reparam_export.verification.witness import Subject, hear

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
import test_diffusion_files as diffusion
import test_peft_state as states

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def heard(checkpoint: Checkpoint) -> WitnessEvidence:
    """What the witness says of a checkpoint that is read rightly, and of one whose every adapter is half of what it is."""
    (witness,) = rx.verify(checkpoint, rx.fuse(checkpoint), count=2).certificate.witness
    if witness.who:
        wrong = replace(checkpoint, adapters=tuple(replace(a, weight=0.5) for a in checkpoint.adapters))
        wrong = replace(wrong, bind=None) if checkpoint.bind is None else wrong
        if checkpoint.bind is None:
            with pytest.raises(EquivalenceError, match=f"second witness reads .*{witness.who}"):
                rx.verify(wrong, rx.fuse(wrong), count=2)
    return witness


def agrees(witness: WitnessEvidence, who: str, layers: int) -> None:
    assert (witness.who, witness.layers, witness.of_layers, witness.settings) == (who, layers, layers, layers)
    assert witness.outputs
    assert max(witness.error, witness.output_error) < 1e-12


@pytest.mark.parametrize(
    ("others", "layers"),
    [
        ({"use_rslora": True, "alpha_pattern": {"attn1.to_q": 3}, "rank_pattern": {"to_k": 2}}, 40),
        ({"use_dora": True, "target_modules": ["to_q"]}, 8),
    ],
)
def test_diffusers_reads_its_own_header(others: dict[str, Any], layers: int, tmp_path: Path) -> None:
    unet, _ = diffusion.saved(tmp_path, metadata=True, **others)
    own = layers == 8
    if own:  # the model's own file
        unet.save_lora_adapter(tmp_path / "adapter")
    found = rx.read(tmp_path / ("adapter" if own else "lora"), **diffusion.base(tmp_path))
    agrees(heard(found), "diffusers", layers)


@pytest.mark.parametrize(
    ("alpha", "part", "layers", "inside"),
    [(10, "unet", 40, False), ("rank", "unet", 40, True), (10, "text_encoder", 6, True), ("rank", "text_encoder", 6, False)],
)  # fmt: skip
def test_diffusers_is_told_the_alpha_that_was_given(
    alpha: Any, part: str, layers: int, inside: bool, tmp_path: Path
) -> None:
    """inside: the base holds both models, and the file's part is for one of them."""
    diffusion.saved(tmp_path, metadata=False, text=True, rank_pattern={"to_k": 2})
    base = diffusion.base(tmp_path, "both" if inside else part.removesuffix("_encoder"))
    found = rx.read(tmp_path / "lora", **base, settings={"part": part, "lora_alpha": alpha})
    agrees(heard(found), "diffusers", layers)


def test_diffusers_reads_what_older_versions_wrote(tmp_path: Path) -> None:
    diffusion.saved(tmp_path, metadata=False, target_modules=diffusion.TARGETS[:-1])
    state = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    modules = [n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")]
    alphas = {f"{m}.alpha": torch.tensor(3.0 if m.endswith("attn1.to_q") else 10.0) for m in modules}
    save_file(state | alphas, tmp_path / "alphas.safetensors")
    agrees(heard(rx.read(tmp_path / "alphas.safetensors", **diffusion.base(tmp_path))), "diffusers", 32)
    old = {}
    for name, tensor in state.items():
        for new, was in diffusion.OLD:
            name = name.replace(f".{new}.", f".processor.{was}.").removeprefix("unet.")
        old[name] = tensor
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    given = {**diffusion.base(tmp_path), "settings": {"lora_alpha": 10}}
    agrees(heard(rx.read(tmp_path / "pytorch_lora_weights.bin", **given)), "diffusers", 32)


def test_what_diffusers_cannot_be_told_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion.saved(tmp_path, metadata=False)
    given = {"lora_alpha": 10, "use_rslora": True}
    found = rx.read(tmp_path / "lora", **diffusion.base(tmp_path), settings=given)
    assert "rsLoRA by the configuration in the file's header alone" in heard(found).absent
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = rx.read(tmp_path / "lora", **diffusion.base(tmp_path), settings={"lora_alpha": 10})
    (said,) = hear(Subject(found, torch.nn.Module, lambda name: torch.nn.Module()))
    assert "diffusers is not installed; pip install 'reparam-export[diffusers]'" in said.absent


@pytest.mark.parametrize(
    ("kind", "whole"),
    [("plain", True), ("lightning", True), ("parallel", False), ("inside another", False), ("without peft's own names", False)],
)  # fmt: skip
def test_peft_loads_a_state_dict_without_a_configuration(kind: str, whole: bool, tmp_path: Path) -> None:
    config = states.lora(modules_to_save=["head"], rank_pattern={"fc2": 3}, alpha_pattern={})
    model = states.trained(config)
    state = model.state_dict()
    if not whole:
        state = {n: t for n, t in state.items() if "lora_" in n or "modules_to_save" in n}
    torch.save(states.vit().state_dict(), tmp_path / "base.pt")
    torch.save(states.around(kind, state), tmp_path / "last.ckpt")
    weights = {} if whole else {"base_weights": tmp_path / "base.pt"}
    agrees(heard(rx.read(tmp_path / "last.ckpt", states.SPEC, settings={"lora_alpha": 12}, **weights)), "peft", 6)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (states.lora(use_dora=True, use_rslora=True), 6),
        (states.lora(lora_bias=True, bias="all"), 6),
        (states.lora(alpha_pattern={"fc1": 20}, rank_pattern={"blocks.1.attn.qkv": 3}), 6),
        (states.peft.IA3Config(target_modules=states.TARGETS, feedforward_modules=["fc1", "fc2"], init_ia3_weights=False), 6),
        (states.peft.LoHaConfig(r=3, alpha=5, target_modules=states.TARGETS, init_weights=False), 6),
        (states.peft.VeraConfig(r=3, target_modules=["fc1"], init_weights=False), 2),
    ],
    ids=["dora", "biases", "patterns", "ia3", "loha", "vera"],
)  # fmt: skip
def test_peft_loads_a_state_dict_by_its_configuration(config: Any, layers: int, tmp_path: Path) -> None:
    model = states.trained(config)
    model.save_pretrained(tmp_path / "folder")
    torch.save(states.around("lightning", model.state_dict()), tmp_path / "folder" / "whole.ckpt")
    agrees(heard(rx.read(tmp_path / "folder" / "whole.ckpt", states.SPEC)), "peft", layers)


@pytest.mark.parametrize("name", ["default", "other"])
def test_peft_loads_the_adapter_that_was_chosen(name: str, tmp_path: Path) -> None:
    model = states.trained(states.lora(modules_to_save=["head"]), "other")
    torch.save(model.state_dict(), tmp_path / "two.pt")
    found = rx.read(tmp_path / "two.pt", states.SPEC, settings={"lora_alpha": 12, "adapter": name})
    agrees(heard(found), "peft", 6)


def test_a_state_dict_that_peft_finds_no_place_for_bears_no_witness(tmp_path: Path) -> None:
    model = states.trained(states.lora())
    state = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    torch.save(states.vit().state_dict(), tmp_path / "base.pt")
    torch.save(state, tmp_path / "a.pt")
    found = rx.read(tmp_path / "a.pt", states.SPEC, settings={"lora_alpha": 12}, base_weights=tmp_path / "base.pt")
    weights = rx.fuse(found)
    first = next(iter(state))
    torch.save(state | {first.replace("qkv", "other"): state[first]}, tmp_path / "b.pt")
    (witness,) = rx.verify(replace(found, path=tmp_path / "b.pt"), weights, count=2).certificate.witness
    assert witness.who == ""
    assert "peft 0." in witness.absent


@pytest.mark.parametrize(
    ("base", "part", "layers"),
    [("text", "te", 6), ("both", "te", 6), ("both", None, 46)],
)
def test_lycoris_finds_a_model_that_stands_inside_another(
    base: str, part: str | None, layers: int, tmp_path: Path
) -> None:
    file, _, _ = diffusion.kohya(tmp_path)
    given = {} if part is None else {"part": part}
    agrees(heard(rx.read(file, **diffusion.base(tmp_path, base), settings=given)), "LyCORIS", layers)


def test_a_stack_of_files_that_no_library_reads_as_one_says_so(tmp_path: Path) -> None:
    file, _, _ = diffusion.kohya(tmp_path)
    found = rx.read(file, **diffusion.base(tmp_path), settings={"part": "unet"})
    half = rx.stacked([found], [0.5])
    assert "a stack or a weight is read again for peft's folders alone" in heard(half).absent
    assert "--expected FILE.npz" in heard(half).absent


def test_the_command_line_is_silent_about_casts(tmp_path: Path) -> None:
    """diffusers warns of each ``to()`` of a model; the proof casts on purpose."""
    import logging

    cli_runner = CliRunner()
    diffusion.saved(tmp_path, metadata=True)
    base = diffusion.base(tmp_path)
    words = [w for text in base["inputs"] for w in ("--input", text)]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(handler)
    try:
        arguments = ["convert", str(tmp_path / "lora"), "--base", base["base"], *words, "--to", "safetensors"]
        done = cli_runner.invoke(
            cli,
            [
                *arguments,
                "-o",
                str(tmp_path / "out"),
            ],
            catch_exceptions=False,
        )
    finally:
        logger.removeHandler(handler)
    assert done.exit_code == 0, done.output
    assert "second witness: diffusers " in done.output
    assert not [line for line in lines if "float32" in line]
