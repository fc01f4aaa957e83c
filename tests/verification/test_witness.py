"""The second witness: who it is, what it sees, what happens where the two readings differ, and that its absence is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import reparam_export as rx
from reparam_export.checkpoints import Adapter, Checkpoint
from reparam_export.cli import cli
from reparam_export.errors import CheckpointError, EquivalenceError, UsageError
from reparam_export.folder import load_proof, save_fused, save_proof
from reparam_export.report import write_report
from reparam_export.verification.certificate import UNWITNESSED, WitnessEvidence, from_json
from reparam_export.verification.witness import Subject, hear

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
from peft_types import CASES, PeftCase

BY_NAME: dict[str, PeftCase] = {case.name: case for case in CASES}
Misread = Callable[[Adapter], Adapter | None]


def misread(checkpoint: Checkpoint, how: Misread) -> Checkpoint:
    """The checkpoint as a reader with a fault reads it, whether it makes its adapters at once or when the base is there."""

    def of(adapters: Any) -> tuple[Adapter, ...]:
        return tuple(changed for adapter in adapters if (changed := how(adapter)) is not None)

    bind = checkpoint.bind
    return replace(
        checkpoint,
        adapters=of(checkpoint.adapters),
        bind=None if bind is None else lambda module, own: of(bind(module, own)),
        covers=lambda names: [],
        only=False,
    )


def scaled(factor: float) -> Misread:
    return lambda a: replace(a, params=replace(a.params, scale=factor * a.params.scale)) if a.kind == "lora" else a


def first_rows(adapter: Adapter, count: int) -> Adapter:
    pair = adapter.params.pair
    up = replace(pair.up, weight=pair.up.weight[:count])
    return replace(adapter, rows=(0, count), params=replace(adapter.params, pair=replace(pair, up=up)))


@pytest.mark.parametrize(
    ("case", "how", "said"),
    [
        ("lora", scaled(0.5), "first: scale: ours 1.16667, peft "),
        ("lora experts", lambda a: scaled(0.5)(a) if a.parameter == "up" else a, "experts.up: scale: ours 1.75, peft "),
        ("lora", lambda a: None if a.module == "second" else a, "second: peft "),
        ("lora", lambda a: first_rows(a, 4) if a.module == "first" else a, "first: outputs: ours 0:4, peft "),
        ("dora", lambda a: replace(a, params=replace(a.params, magnitude=a.params.magnitude.flip(0))), "first: the answers of peft"),
        ("ia3", lambda a: replace(a, weight=0.5), "first: the answers of peft"),
    ],
)  # fmt: skip
def test_a_misread_adapter_is_found_out_by_module_and_setting(
    case: str, how: Misread, said: str, tmp_path: Path
) -> None:
    checkpoint = misread(BY_NAME[case].make(tmp_path)[0], how)
    weights = rx.fuse(checkpoint)
    alone = rx.verify(checkpoint, weights, count=4, witness="none").certificate
    assert alone.verdict == "exact"  # our own proof is relative to our own reading
    assert alone.witness[0].absent == "none was wanted (--witness none)"
    with pytest.raises(EquivalenceError, match=f"the second witness reads .*{said}") as caught:
        rx.verify(checkpoint, weights, count=4)
    certificate = caught.value.evidence
    assert certificate.verdict == "wrong"
    assert any(said in difference for difference in certificate.witness[0].differences)
    assert any("output output: the unfused model of peft" in d for d in certificate.witness[0].differences)


def test_a_stack_is_read_again_in_its_order_and_with_its_weights(tmp_path: Path) -> None:
    made = []
    for name in ("lora", "dora"):
        (tmp_path / name).mkdir()
        made.append(BY_NAME[name].make(tmp_path / name)[0])
    made[1] = replace(made[1], base=None, recipe=replace(made[1].recipe, base=None))
    stack = rx.stacked(made, [0.5, 0.7])
    (witness,) = rx.verify(stack, rx.fuse(stack), count=4).certificate.witness
    assert (witness.who, witness.settings, witness.layers, witness.outputs) == ("peft", 6, 6, 1)
    assert max(witness.error, witness.output_error) < 1e-12
    swapped = replace(stack, members=stack.members[::-1])
    first, second = stack.members
    heavier = replace(stack, members=(replace(first, recipe=replace(first.recipe, weight=1.0)), second))
    for wrong in (swapped, heavier):
        wrong = replace(wrong, recipe=stack.recipe)
        with pytest.raises(EquivalenceError, match="second witness"):
            rx.verify(wrong, rx.fuse(wrong), count=4)


def test_without_the_library_it_is_said_and_required_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = BY_NAME["lora"].make(tmp_path)
    weights = rx.fuse(checkpoint)
    monkeypatch.setitem(sys.modules, "peft", None)
    (witness,) = rx.verify(checkpoint, weights, count=2).certificate.witness
    assert (witness.who, witness.passed) == ("", True)
    assert "peft is not installed; pip install 'reparam-export[peft]'" in witness.absent
    with pytest.raises(EquivalenceError, match=r"no second witness, and one is required: .*not installed"):
        rx.verify(checkpoint, weights, count=2, witness="required")
    with pytest.raises(UsageError, match="expected auto, required, none"):
        rx.verify(checkpoint, weights, count=2, witness="maybe")


def test_a_folder_that_peft_itself_reads_in_part_bears_no_witness(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint, _ = BY_NAME["lora"].make(tmp_path)
    weights = rx.fuse(checkpoint)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name.replace("second", "another"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    (witness,) = rx.verify(checkpoint, weights, count=2).certificate.witness
    assert witness.who == ""
    assert "itself leaves 2 tensors" in witness.absent
    assert "another" in witness.absent


def test_a_pattern_that_takes_for_ever_bears_no_witness(tmp_path: Path) -> None:
    checkpoint, _ = BY_NAME["lora"].make(tmp_path)
    weights = rx.fuse(checkpoint)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"alpha_pattern": {"(.*.*.*.*.*.*.*.*.*.*.*.*)*z": 3}}
    file.write_text(json.dumps(config))
    (witness,) = rx.verify(checkpoint, weights, count=2).certificate.witness
    assert "takes more than 5 s" in witness.absent


def test_only_a_seeded_choice_of_layers_is_compared_in_numbers_beyond_the_limit(tmp_path: Path) -> None:
    from reparam_export.assembly import base_of, opened

    base, _, checkpoint = opened(BY_NAME["lora"].make(tmp_path)[0])
    chosen = set()
    for seed in range(4):
        subject = Subject(checkpoint, lambda: base_of(checkpoint).build()[0], base.get_submodule, seed=seed, limit=150)
        (witness,) = hear(subject)
        assert (witness.settings, witness.layers, witness.of_layers, witness.seed) == (3, 1, 3, seed)
        chosen.add(witness.error)
    assert len(chosen) > 1  # not always the same layer


def test_a_proof_of_before_has_no_second_witness(tmp_path: Path) -> None:
    checkpoint, _ = BY_NAME["lora"].make(tmp_path)
    content = json.loads(json.dumps(rx.verify(checkpoint, rx.fuse(checkpoint), count=2).certificate.to_json()))
    assert from_json(content).witness[0].who == "peft"
    del content["witness"]
    assert from_json(content).witness == (UNWITNESSED,)
    with pytest.raises(CheckpointError, match="run verify again"):
        from_json(content | {"witness": [{"unknown": 1}]})


def test_the_command_line_says_it_in_every_place(tmp_path: Path) -> None:
    case = BY_NAME["lora"]
    checkpoint, _ = case.make(tmp_path)
    given = [str(tmp_path / "adapter"), "--base", str(checkpoint.base), "--input", "x=batch,12:float32"]
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["convert", *given, "--to", "safetensors", "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "; second witness: peft " in done.output
    assert "agrees on 3 layers and 1 whole output, to " in done.output
    for file in ("report.html", "report.md"):
        assert "second witness: peft " in (out / file).read_text().replace("&#58;", ":")
    assert json.loads((out / "verification.json").read_text())["witness"][0]["who"] == "peft"
    runner = CliRunner()
    runner.invoke(cli, ["verify", str(out), *given[1:3], "--witness", "none"], catch_exceptions=False)
    assert write_report(out).headline.endswith("; no second witness")
    for file in ("report.html", "report.md"):
        assert "no second witness" in (out / file).read_text()
    assert json.loads((out / "verification.json").read_text())["witness"][0]["who"] == ""


def test_a_difference_stands_in_the_report(tmp_path: Path) -> None:
    checkpoint, _ = BY_NAME["lora"].make(tmp_path)
    weights = rx.fuse(checkpoint)
    good = rx.verify(checkpoint, weights, count=2)
    said = "first: scale: ours 1, peft 1.2.3 2"
    wrong = replace(good.certificate, witness=(WitnessEvidence("peft", "1.2.3", 1, 1, 1, 0, 0.5, differences=(said,)),))
    save_fused(tmp_path / "out", checkpoint, weights)
    save_proof(tmp_path / "out", wrong, good)
    report = write_report(tmp_path / "out")
    assert report.verdict == "wrong"
    assert report.headline == f"Failed: second witness peft: {said}"
    with pytest.raises(EquivalenceError):
        load_proof(tmp_path / "out", base=checkpoint.base)


def test_the_base_of_the_witness_is_built_without_the_checkpoint(tmp_path: Path) -> None:
    """A whole tensor that is put in the wrong place by us is not there for peft."""
    checkpoint, _ = BY_NAME["lora only bias"].make(tmp_path)
    wrong = dict(checkpoint.replaced)
    wrong["head.bias"] = wrong["head.bias"] + torch.ones(5)
    checkpoint = replace(checkpoint, replaced=wrong)
    with pytest.raises(
        EquivalenceError, match=r"head\.bias: we take it whole from the file, peft .* has other numbers there"
    ):
        rx.verify(checkpoint, rx.fuse(checkpoint), count=2)
