"""Every type of today's peft: folded and proven against peft's own unfused forward, or refused by name before anything is written."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_types import CASES, RANDOM, Convolutions, Linears, PeftCase, answer, base, case, quiet, shake
from safetensors.torch import load_file, save_file

import reparam_export as rx
from reparam_export import plugins
from reparam_export.checkpoints.peft_lora import BY_LAYERS, CHANGES_BASE, KEEPS_BASE, READ, REFUSED, TRAINING
from reparam_export.checkpoints.peft_other import PROBED
from reparam_export.checkpoints.peft_other import REFUSED as REFUSED_TYPES
from reparam_export.errors import CheckpointError, FusionError, NotAffineError, ReparamError


@pytest.fixture(scope="module", params=CASES, ids=lambda c: c.name)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PeftCase, Path, rx.Checkpoint, torch.nn.Module]:
    """Each case in turn: the folder that peft wrote, what was read of it, and peft's own model."""
    folder = tmp_path_factory.mktemp("case")
    return request.param, folder, *request.param.make(folder)


def test_a_folder_of_any_type_is_proven_against_pefts_own_unfused_forward(made: Any) -> None:
    given, _, checkpoint, adapted = made
    proven = rx.verify(checkpoint, rx.fuse(checkpoint), count=4)
    assert proven.certificate.verdict == "exact"
    ((_, reference),) = proven.reference.outputs.items()
    expected = answer(copy.deepcopy(adapted), dict(proven.reference.inputs))
    assert float((reference - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert ("probed" in checkpoint.describe()["kinds"]) == given.probed
    (witness,) = proven.certificate.witness
    assert (witness.who, witness.outputs, witness.layers) == ("peft", 1, witness.settings)
    assert (witness.settings > 0) == (not given.probed)
    assert max(witness.error, witness.output_error) < 1e-12


def test_a_folder_with_a_tensor_too_few_or_too_many_is_refused(made: Any, tmp_path: Path) -> None:
    _, folder, checkpoint, _ = made
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    own = [
        n for n in tensors if not any(part in n for part in ("head", ".base_layer.bias", "randlora_A", "randlora_B"))
    ]
    for changed in (
        {name: t for name, t in tensors.items() if name != own[0]},
        tensors | {f"{own[0]}_more": torch.ones(2)},
        tensors | {"base_model.model.nowhere.weight": torch.ones(2)},
    ):
        save_file(changed, file)
        with pytest.raises(ReparamError) as caught:
            rx.fuse(rx.read(adapter, checkpoint.base, inputs=checkpoint.inputs))
        assert caught.value.exit_code in (3, 4)


def test_every_type_of_peft_is_accounted_for() -> None:
    """A type that a new version of peft brings turns this red: fold it, or say why it cannot be."""
    known = {kind.value for kind in peft.PeftType}
    folded = {c.kind for c in CASES}
    assert known == folded | set(REFUSED_TYPES)
    assert not folded & set(REFUSED_TYPES)
    assert {c.kind for c in CASES if all(o.probed for o in CASES if o.kind == c.kind)} == set(PROBED)
    assert len(folded) >= 33


def test_every_setting_of_lora_is_accounted_for() -> None:
    """A setting that a new version of peft brings turns this red: read it, or say why it does not matter."""
    from dataclasses import fields

    from reparam_export.checkpoints._peft import HARMLESS

    known = {field.name for field in fields(peft.LoraConfig)} - {"lora_dropout"}
    assert known == {"init_lora_weights", *READ, *TRAINING, *BY_LAYERS, *REFUSED, *(HARMLESS & known)}
    assert not set(KEEPS_BASE) & set(CHANGES_BASE)


def folder(tmp_path: Path, settings: dict[str, Any], *names: str) -> Path:
    """A folder with these settings and small tensors of these names."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter" / "adapter_model.safetensors")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", sorted(REFUSED_TYPES))
def test_what_no_weight_reproduces_is_refused_with_the_modules_and_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotAffineError) as caught:
        rx.read(folder(tmp_path, {"peft_type": name}, "base_model.model.layer.thing"))
    assert caught.value.modules == ("layer",)
    assert caught.value.reason == REFUSED_TYPES[name]
    assert "layer" in str(caught.value)


def test_a_type_of_the_future_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="NEXT_YEARS_LORA"):
        rx.read(folder(tmp_path, {"peft_type": "NEXT_YEARS_LORA"}, "base_model.model.layer.thing"))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_setting_of_lora_that_no_weight_reproduces_is_refused(name: str, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, name: [1]}
    with pytest.raises(NotAffineError) as caught:
        rx.read(folder(tmp_path, settings, *(f"base_model.model.fc.lora_{side}.weight" for side in "AB")))
    assert caught.value.modules == ("fc",)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_a_base_that_training_changed_and_nobody_can_have_again_is_refused(init: str, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": init}
    with pytest.raises(FusionError, match=f"init_lora_weights='{init}'"):
        rx.read(folder(tmp_path, settings, *(f"base_model.model.fc.lora_{side}.weight" for side in "AB")))


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.OSFConfig], ids=["formula", "layers"])
def test_a_setting_that_not_even_peft_knows_is_refused(config: Any, tmp_path: Path) -> None:
    checkpoint, _ = case("any", config, ["first"]).make(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"a_setting_of_the_future": 3}))
    with pytest.raises(FusionError, match="a_setting_of_the_future"):
        rx.fuse(rx.read(tmp_path / "adapter", checkpoint.base, inputs=checkpoint.inputs))


class Unusual(Convolutions):
    """A convolution with two strides and one that is dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1)
        self.third = torch.nn.Conv1d(8, 6, 3, padding=2, dilation=2)


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (lambda: peft.OFTConfig(oft_block_size=4, target_modules=["first", "second"], **RANDOM), "first"),
        (lambda: peft.HRAConfig(r=2, target_modules=["first", "second"], **RANDOM), "first"),
        (lambda: peft.BOFTConfig(boft_block_num=2, boft_block_size=0, target_modules=["first"], **RANDOM), "first"),
        (lambda: peft.LoraConfig(r=2, target_modules=["second", "third"], init_lora_weights=False), "third"),
    ],
    ids=["oft", "hra", "boft", "lora"],
)
def test_a_convolution_that_peft_takes_for_another_one_is_refused_by_name(
    config: Any, module: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    with quiet():
        adapted = peft.get_peft_model(Unusual(), config())
        adapted.save_pretrained(tmp_path / "adapter")
    _, spec = base(Convolutions, tmp_path)
    net = tmp_path / "net.py"
    net.write_text(net.read_text().replace("Convolutions", "Unusual").replace("peft_types", "test_peft_types"))
    checkpoint = rx.read(tmp_path / "adapter", spec, inputs=["x=batch,4,6,6:float32"])
    with pytest.raises(FusionError, match=rf"{module}\b"):
        rx.fuse(checkpoint)


def test_a_random_forward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAffineError, match="sample_at_inference"):
        case("pvera", peft.PveraConfig, ["first"], r=3, sample_at_inference=True, **RANDOM).make(tmp_path)


@pytest.mark.parametrize("name", ["psoft", "adamss", "dora"])
def test_a_type_that_is_made_from_the_base_is_folded_before_anything_is_rounded(name: str, tmp_path: Path) -> None:
    checkpoint, _ = next(c for c in CASES if c.name == name).make(tmp_path)
    wide, narrow = rx.fuse(checkpoint), rx.fuse(checkpoint, "bf16")
    for tensor in wide.changed:
        assert torch.equal(narrow[tensor].float(), wide[tensor].bfloat16().float())


def test_the_notes_say_that_peft_itself_was_asked(tmp_path: Path) -> None:
    checkpoint, _ = next(c for c in CASES if c.name == "lora pissa").make(tmp_path)
    assert "peft's own LORA layers" in checkpoint.notes[0]
    assert "pissa" in checkpoint.notes[0]


def test_folders_of_every_type_are_inspected_without_torch(tmp_path: Path) -> None:
    chosen = [
        "dora",
        "loha",
        "oft",
        "vera drawn",
        "vblora topk",
        "shira",
        "psoft",
        "unilora drawn",
        "ln tuning",
        "lora experts",
    ]
    for c in CASES:
        if c.name in chosen:
            (tmp_path / c.name).mkdir()
            c.make(tmp_path / c.name)
    code = (
        "import sys, json, reparam_export.inspection as i\n"
        "from reparam_export.checkpoints import Recipe\n"
        "for path in sys.argv[1:]:\n"
        "    found = i.inspect_checkpoint(Recipe(path, base='hf:x'))\n"
        "    assert found['foldable'], found\n"
        "    json.dumps(found)\n"
        "assert 'torch' not in sys.modules\n"
    )
    paths = [str(tmp_path / name / "adapter") for name in chosen]
    subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)


def test_a_folder_without_peft_installed_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam_export.errors import MissingBackendError

    checkpoint, _ = next(c for c in CASES if c.name == "osf").make(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingBackendError, match=r"reparam-export\[peft\]"):
        rx.fuse(checkpoint)


def test_only_one_reader_takes_a_folder() -> None:
    from reparam_export.checkpoints import Source
    from reparam_export.checkpoints._settings import Settings

    for kind in peft.PeftType:
        tensors = {"base_model.model.fc.glora_A.X": torch.ones(1)} if kind.value == "GLORA" else {}
        source = Source(Path(), Path(), tensors, {"peft_type": kind.value}, {}, {}, Settings(), False)
        takers = [n for n in plugins.names("checkpoints") if plugins.load("checkpoints", n).accepts(source)]
        assert len(takers) == 1, (kind, takers)


def test_an_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    model, spec = base(next(iter({c.net for c in CASES if c.name == "loha"})), tmp_path)
    with quiet():
        adapted = peft.get_peft_model(model, peft.LoHaConfig(r=2, target_modules=["first"]))
        adapted.save_pretrained(tmp_path / "adapter")
        shake(adapted)
    with pytest.raises(FusionError, match="changes nothing"):
        rx.fuse(rx.read(tmp_path / "adapter", spec, inputs=["x=batch,12:float32"]))


def changed(adapter: Path, **settings: Any) -> Path:
    """The folder with other settings in its configuration."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return adapter


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_parameters": ["experts.up", "experts.down", "experts.router", "experts.sideways"]}, "sideways"),
        ({"target_parameters": ["experts.up", "experts.down"]}, "3 of them in the file"),
        ({"rank_pattern": {"experts.up": 3}}, "says rank 3, the tensors have rank 2"),
    ],
)
def test_targeted_parameters_that_the_file_or_the_base_lacks_are_refused(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    checkpoint, _ = next(c for c in CASES if c.name == "lora experts").make(tmp_path)
    with pytest.raises(ReparamError, match=named):
        rx.fuse(rx.read(changed(tmp_path / "adapter", **settings), checkpoint.base, inputs=checkpoint.inputs))


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("lora rslora patterns", {"alpha_pattern": {"first": 5, "secnod": 9}}, "secnod"),
        ("lora rslora patterns", {"rank_pattern": {"second": 2, r"blocks\.\d+": 3}}, "blocks"),
        ("lora rslora patterns", {"modules_to_save": ["head"]}, "head"),
        ("lora only bias", {"modules_to_save": ["norm", "head", "pooler"]}, "pooler"),
        ("lora tokens", {"trainable_token_indices": {"embed": [2, 7, 29], "shared": [1]}}, "shared"),
        ("lora experts patterns", {"alpha_pattern": {r"(.*\.)?down": 5, "experts.router": 3, "experts": 1}}, "experts"),
        ("lora pissa", {"alpha_pattern": {"fourth": 5}}, "fourth"),
        ("osf", {"rank_pattern": {"fourth": 5}}, "fourth"),
        ("loha", {"alpha_pattern": {"fourth": 5}}, "fourth"),
        ("lokr", {"rank_pattern": {"second": 1, "fourth": 5}}, "fourth"),
        ("delora", {"lambda_pattern": {"fourth": 5}}, "fourth"),
        ("hira", {"rank_pattern": {"fourth": 5}}, "fourth"),
        ("c3a", {"block_size_pattern": {"fourth": 5}}, "fourth"),
        ("fourierft", {"n_frequency_pattern": {"first": 17, "fourth": 5}}, "fourth"),
        ("waveft", {"n_frequency_pattern": {"fourth": 5}}, "fourth"),
        ("ia3", {"feedforward_modules": ["second", "third", "fourth"]}, "fourth"),
        ("lora", {"layers_to_transform": [7]}, "7"),
    ],
)
def test_a_pattern_or_a_target_that_means_nothing_is_refused_by_its_name(
    name: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    checkpoint, _ = next(c for c in CASES if c.name == name).make(tmp_path)
    with pytest.raises(CheckpointError, match=f"{next(iter(settings))} of adapter_config.json names .*{named}"):
        rx.fuse(rx.read(changed(tmp_path / "adapter", **settings), checkpoint.base, inputs=checkpoint.inputs))


@pytest.mark.parametrize("name", ["lora rslora patterns", "lora experts patterns"])
def test_what_may_mean_nothing_is_folded_and_said(name: str, tmp_path: Path) -> None:
    """Lists of targets for many models, modules to leave out, and the heads that peft lists for every task."""
    given = next(c for c in CASES if c.name == name)
    checkpoint, _ = given.make(tmp_path)
    targets = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    wide = {
        "target_modules": [*targets["target_modules"], "qkv_proj"],
        "exclude_modules": ["lm_head"],
        "modules_to_save": ["classifier", "score"],
    }
    again = rx.read(changed(tmp_path / "adapter", **wide), checkpoint.base, inputs=checkpoint.inputs)
    assert any("qkv_proj" in note for note in again.notes)
    assert not any("qkv_proj" in note for note in checkpoint.notes)
    assert rx.fuse(again).sha256() == rx.fuse(checkpoint).sha256()


def test_what_decomposes_the_base_while_loading_is_said_in_the_headline(tmp_path: Path) -> None:
    from reparam_export.report.statement import _rebuilt_sentence

    for name, said in (
        ("lora pissa", "PiSSA"),
        ("lora kasa", "KaSA"),
        ("psoft", "PSOFT"),
        ("osf", "OSF"),
        ("lora bdlora", None),
    ):
        (tmp_path / name).mkdir()
        checkpoint, _ = next(c for c in CASES if c.name == name).make(tmp_path / name)
        proven = rx.verify(checkpoint, rx.fuse(checkpoint), count=2)
        assert proven.certificate.checkpoint["rebuilt"] == said
        assert (f"{said} decomposes the base" in _rebuilt_sentence(proven.certificate)) == (said is not None)
        assert any("plain LoRA" in note for note in checkpoint.notes) == (said is not None)


def test_a_kind_whose_own_outputs_the_last_bit_of_the_base_turns_over_is_refused(tmp_path: Path) -> None:
    """The measurement behind it, made again: FROD moves by as much as its outputs are, PiSSA by far less."""
    moved = {}
    for name, config in (
        ("frod", peft.FrodConfig),
        ("pissa", partial(peft.LoraConfig, init_lora_weights="pissa", r=3)),
    ):
        model, _ = base(Linears, tmp_path)
        with quiet():
            adapted = peft.get_peft_model(model, config(target_modules=["first", "second"]))
            shake(adapted)
            adapted.save_pretrained(tmp_path / name)
            answers = []
            for towards in (None, torch.inf):
                other, _ = base(Linears, tmp_path)
                with torch.no_grad():
                    for parameter in other.parameters() if towards else []:
                        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, towards)))
                again = peft.PeftModel.from_pretrained(other, tmp_path / name).eval()
                answers.append(answer(again, {"x": torch.randn(4, 12, generator=torch.Generator().manual_seed(3))}))
        moved[name] = float((answers[1] - answers[0]).abs().max() / answers[0].abs().max())
    assert moved["pissa"] < 1e-3 < 1e-2 < moved["frod"]
    with pytest.raises(NotAffineError, match="FROD"):
        rx.read(tmp_path / "frod")
