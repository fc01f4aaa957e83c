"""Several checkpoints on one base: in order, weighted, against peft's own models of several adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from conftest import CASES, own_model
from peft_types import Linears, answer, base, quiet, shake
from safetensors.torch import save_file
from torch import nn

import reparam_export as rx
from reparam_export.adapters import kind
from reparam_export.affine import Affine
from reparam_export.checkpoints.native import to_plain
from reparam_export.cli import cli
from reparam_export.errors import CheckpointError, FusionError, UsageError
from reparam_export.fusion import FusedWeights

TARGETS = ["first", "second", "third"]
INPUTS = ["x=batch,12:float32"]
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS),
    "other": peft.LoraConfig(r=3, lora_alpha=2, target_modules=["first", "third"], use_rslora=True),
    "dora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    "hra": peft.HRAConfig(r=2, target_modules=["first", "second"]),
    "psoft": peft.PsoftConfig(r=2, target_modules=["first", "second"]),
    "head": peft.LoraConfig(r=2, lora_alpha=5, target_modules=["first"], modules_to_save=["head"]),
}


def trained(name: str, folder: Path, seed: int = 1) -> Path:
    """A folder of that adapter, as peft writes it after training on the plain base."""
    torch.manual_seed(seed)
    with quiet():
        model = peft.get_peft_model(base(Linears, folder)[0], copy.deepcopy(CONFIGS[name]))
        shake(model)
        model.save_pretrained(folder / name)
    return folder / name


def spec(folder: Path) -> str:
    return base(Linears, folder)[1]


def read(folder: Path, *names: str, weights: Sequence[float] | None = None) -> rx.Checkpoint:
    members = [rx.read(folder / name, spec(folder), inputs=INPUTS) for name in names]
    return rx.stacked(members, weights)


def proven(checkpoint: rx.Checkpoint) -> tuple[torch.Tensor, dict[str, torch.Tensor], FusedWeights]:
    """The float64 reference of the proof, its inputs and the fused weights."""
    weights = rx.fuse(checkpoint)
    model = rx.verify(checkpoint, weights, count=4)
    assert model.certificate.verdict == "exact"
    ((_, reference),) = model.reference.outputs.items()
    return reference, dict(model.reference.inputs), weights


def in_turn(folder: Path, *names: str) -> nn.Module:
    """peft's model of the last adapter, unfused, on the base with those before it merged in float64."""
    model: Any = base(Linears, folder)[0]
    with quiet():
        for name in names[:-1]:
            model = peft.PeftModel.from_pretrained(model, folder / name).double().merge_and_unload()
        return peft.PeftModel.from_pretrained(model, folder / names[-1]).eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize(
    "names",
    [("lora", "other"), ("lora", "dora"), ("dora", "lora"), ("ia3", "hra"), ("hra", "ia3", "lora"), ("psoft", "lora")],
)
def test_a_stack_is_pefts_last_adapter_on_the_base_with_the_others_merged(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    for seed, name in enumerate(names):
        trained(name, tmp_path, seed)
    reference, inputs, _ = proven(read(tmp_path, *names))
    assert close(reference, answer(in_turn(tmp_path, *names), inputs))
    if "dora" in names:
        swapped, _, _ = proven(read(tmp_path, *reversed(names)))
        assert not close(reference, swapped)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -1.7)])
def test_weights_are_those_of_pefts_weighted_adapter(weights: tuple[float, float], tmp_path: Path) -> None:
    for seed, name in enumerate(("lora", "other")):
        trained(name, tmp_path, seed)
    reference, inputs, _ = proven(read(tmp_path, "lora", "other", weights=weights))
    with quiet():
        model = peft.PeftModel.from_pretrained(base(Linears, tmp_path)[0], tmp_path / "lora", adapter_name="lora")
        model.load_adapter(tmp_path / "other", adapter_name="other")
        model = model.double()
        model.base_model.set_adapter(["lora", "other"])
        both = answer(copy.deepcopy(model).eval(), inputs)
    assert close(reference, both) == (weights == (1.0, 1.0))
    # peft's "cat" puts each pair beside the other, scaled by sqrt(weight): for positive weights the very sum
    if all(w > 0 for w in weights):
        model.add_weighted_adapter(["lora", "other"], list(weights), "sum", combination_type="cat")
        model.set_adapter("sum")
        assert float((reference - answer(model.eval(), inputs)).abs().max()) < 1e-6
    swapped, _, _ = proven(read(tmp_path, "other", "lora", weights=weights[::-1]))
    assert close(reference, swapped)


def test_a_weight_scales_the_change_of_any_kind(tmp_path: Path) -> None:
    trained("hra", tmp_path)
    for weight in (0.25, 2.0):
        _, _, weights = proven(read(tmp_path, "hra", weights=[weight]))
        whole, plain = rx.fuse(read(tmp_path, "hra")), base(Linears, tmp_path)[0].state_dict()
        for name in whole.changed:
            expected = plain[name].double() + weight * (whole[name].double() - plain[name].double())
            assert float((weights[name].double() - expected).abs().max()) < 1e-6


def test_checkpoints_of_different_formats_go_on_one_base(tmp_path: Path) -> None:
    trained("lora", tmp_path)
    tensors = {
        "lycoris_second.lora_up.weight": torch.randn(8, 2),
        "lycoris_second.lora_down.weight": torch.randn(2, 16),
    }
    save_file(tensors, tmp_path / "kohya.safetensors")
    save_file({"first.bias": torch.randn(16)}, tmp_path / "bitfit.safetensors")
    reference, _, weights = proven(read(tmp_path, "bitfit.safetensors", "lora", "kohya.safetensors"))
    plain = base(Linears, tmp_path)[0]
    both = rx.fuse(read(tmp_path, "lora"))["second.weight"].double() + (
        tensors["lycoris_second.lora_up.weight"] @ tensors["lycoris_second.lora_down.weight"]
    )
    assert float((weights["second.weight"] - both).abs().max()) < 1e-5
    assert not torch.equal(weights["first.bias"], plain.first.bias)
    assert reference.shape[-1] == 5


def test_the_order_is_in_the_record_the_certificate_and_the_report(tmp_path: Path) -> None:
    for name in ("lora", "dora"):
        trained(name, tmp_path)
    out = tmp_path / "out"
    call = [
        "convert",
        tmp_path / "lora",
        "--adapter",
        f"{tmp_path / 'dora'}=0.5",
        "--weight",
        "2",
        "--base",
        spec(tmp_path),
    ]
    result = CliRunner().invoke(cli, [*map(str, call), "--input", *INPUTS, "--to", "safetensors", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert f"1. {tmp_path / 'lora'} (peft_lora), weight 2" in result.output
    expected = [(str(tmp_path / "lora"), 2.0), (str(tmp_path / "dora"), 0.5)]
    for file in ("fused.json", "verification.json"):
        stack = json.loads((out / file).read_text())["checkpoint"]["stack"]
        assert [(m["path"], m["weight"]) for m in stack] == expected
        assert all(len(m["sha256"]) == 64 for m in stack)
    for file in ("report.md", "report.html"):
        text = (out / file).read_text()
        first, second = (text.index(f"{n} of the stack") for n in (1, 2))
        assert first < second
        assert "(peft_lora), weight 0.5, sha256" in text.replace("&#40;", "(").replace("&#41;", ")").replace(
            "&#44;", ","
        ).replace("&#95;", "_")
    again = CliRunner().invoke(
        cli, [*map(str, call), "--input", *INPUTS, "--to", "safetensors", "-o", str(out), "--resume"]
    )
    assert again.exit_code == 0, again.output
    call[call.index("--weight") + 1] = "3"
    other = CliRunner().invoke(
        cli, [*map(str, call), "--input", *INPUTS, "--to", "safetensors", "-o", str(out), "--resume"]
    )
    assert isinstance(other.exception, UsageError)
    assert "another checkpoint, base or settings" in str(other.exception)
    seen = CliRunner().invoke(cli, ["inspect", *map(str, call[1:]), "--json"])
    assert [m["weight"] for m in json.loads(seen.output)["stack"]] == [3.0, 0.5]


def test_settings_are_for_the_checkpoint_whose_number_they_have(tmp_path: Path) -> None:
    case = CASES["repadapter_vit"]
    path, given = case.arguments()
    config = f"2:{given['config'][0]}"
    common = ["--base", given["base"], "--base-weights", given["base_weights"]]
    call = ["fuse", path, "--set", "scale=0.5", "--adapter", path, "--config", config, *common, "-o", tmp_path / "out"]
    result = CliRunner().invoke(cli, list(map(str, call)))
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "out" / "fused.json").read_text())["recipe"]
    assert recipe["settings"] == {"scale": 0.5}
    assert recipe["others"][0]["config"] == [str(given["config"][0])]
    call[call.index("scale=0.5")] = "3:scale=0.5"
    third = CliRunner().invoke(cli, list(map(str, call)))
    assert "is for checkpoint 3 of the stack, which has 2" in str(third.exception)


def test_what_cannot_be_put_on_one_base_is_refused(tmp_path: Path) -> None:
    for name in ("lora", "psoft", "head"):
        trained(name, tmp_path)
    with pytest.raises(FusionError, match=r"first: an adapter that is probed .* put its checkpoint first"):
        rx.fuse(read(tmp_path, "lora", "psoft"))
    with pytest.raises(CheckpointError, match=r"whole tensors .* give it weight 1"):
        read(tmp_path, "lora", "head", weights=[1, 0.5])
    with pytest.raises(UsageError, match="2 checkpoints and 1 weights"):
        read(tmp_path, "lora", "head", weights=[1])
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="expected a finite number other than 0"):
            read(tmp_path, "lora", weights=[weight])
    with pytest.raises(UsageError, match="is a stack already"):
        rx.stacked([read(tmp_path, "lora", "head"), read(tmp_path, "lora")])
    save_file({"first.bias": torch.randn(16), "head.bias": torch.randn(5)}, tmp_path / "bitfit.safetensors")
    assert "the last of the stack that brings it" in read(tmp_path, "bitfit.safetensors", "head").notes[-1]
    with pytest.raises(CheckpointError, match=r"replaces first.bias, which a checkpoint before it adapts"):
        read(tmp_path, "lora", "bitfit.safetensors")


def test_checkpoints_that_name_different_bases_need_the_one_that_is_meant(tmp_path: Path) -> None:
    llama, gpt2 = CASES["peft_lora"].folder, CASES["peft_lora_gpt2"].folder
    with pytest.raises(CheckpointError, match="name different bases"):
        rx.stacked([rx.read(llama), rx.read(gpt2)])
    embed = CASES["peft_lora_embed_head"].folder
    stack = rx.stacked([rx.read(llama), rx.read(llama)], [0.5, 0.5])
    assert stack.base == rx.read(llama).base
    once, _, _ = proven(rx.read(llama))
    twice, _, _ = proven(stack)
    assert close(twice, once)
    mixed = rx.stacked([rx.read(llama), rx.read(embed)])
    assert len(mixed.adapters) == len(rx.read(llama).adapters) + len(rx.read(embed).adapters)


def test_a_stack_of_rows_and_of_all_rows_is_proven(tmp_path: Path) -> None:
    """One of q, k, v, then the whole projection: the stacks of a module join where they overlap."""
    layer = nn.Linear(4, 6).double()
    whole = Affine(layer.weight.detach(), layer.bias.detach())
    parts = {
        "rows": [rx.Adapter("fc", "lora", kind("lora").example(2, whole.rows(2, 4)), rows=(2, 4))],
        "whole": [rx.Adapter("fc", "hra", kind("hra").example(3, whole))],
    }
    for name, adapters in parts.items():
        content = {
            "format": "reparam-export/1",
            "adapters": [
                {"module": a.module, "kind": a.kind, "rows": a.rows and list(a.rows), "params": to_plain(a.params)}
                for a in adapters
            ],
        }
        torch.save(content, tmp_path / f"{name}.pt")
    net = own_model(tmp_path, "self.fc = Linear(4, 6)", "self.fc(x)")
    for order in (("rows", "whole"), ("whole", "rows")):
        members = [rx.read(tmp_path / f"{name}.pt", net, inputs=["x=batch,4:float32"]) for name in order]
        proven(rx.stacked(members, [1, 0.7]))
