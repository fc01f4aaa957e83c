"""Attached adapters start as the base, train alone, and what is saved is folded to what was trained."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Case
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import reparam_export as rx
from reparam_export.errors import CheckpointError, SharedWeightError, TensorMismatchError, UsageError
from reparam_export.fusion import narrowed
from reparam_export.training import adapter_parameters, attach, load, save, trainable
from reparam_export.training.attach import Attached, trainable_kinds
from reparam_export.training.targets import matches

SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SPEC = "timm:vit_tiny_patch16_224?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
TARGETS = ("blocks.*.attn.proj", "blocks.*.mlp.fc2")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("hydra", {"rank": 4, "scale": 0.5}),
    ("hydra", {"rank": 4, "branches": "parallel", "bias": False}),
    ("hydra", {"rank": 4, "branches": "sequential"}),
    ("hydra", {"rank": 2, "sequential_rank": 5, "learnable_scale": True, "scale": 1.5, "init": "normal"}),
    ("hydra", {"rank": 4, "sequential_rank": 8, "bias": False, "init": "kaiming"}),
    ("lora", {"rank": 4, "scale": 2}),
    ("repadapter", {"rank": 4, "scale": 0.5}),
    ("glora", {"rank": 4, "path": {"A": "LoRA_4", "B": "vector", "C": "LoRA_2", "D": "vector", "E": "constant"}}),
    ("glora", {"rank": 3, "path": {"A": "constant", "B": "LoRA_3", "C": "vector", "D": "none", "E": "vector"}}),
    ("glora", {"rank": 1, "path": {"A": "vector", "B": "constant", "C": "none", "D": "constant", "E": "none"}}),
]
PATH = {"A": "LoRA_2", "B": "none", "C": "none", "D": "none", "E": "vector"}
SETTINGS: dict[str, dict[str, Any]] = {  # where a kind needs others than its rank
    "glora": {"rank": 2, "path": PATH},
    "beft": {},
    "c3a": {"block": 4},
    "fourierft": {"frequencies": 20},
    "waveft": {"coefficients": 20},
    "ia3": {},
    "oft": {"block": 4},
    "road": {"group": 4},
    "ssf": {},
}


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SHAPE).eval()
    return model


def trained(model: nn.Module, images: Tensor = IMAGES) -> nn.Module:
    """A few steps of Adam, so that every trainable number has moved."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(images) - 1).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_an_untrained_adapter_gives_the_bases_outputs_bit_for_bit(
    vit: nn.Module, kind: str, settings: dict[str, Any]
) -> None:
    before = vit(IMAGES)
    assert torch.equal(attach(vit, kind, TARGETS, **settings)(IMAGES), before)


@pytest.mark.parametrize("kind", trainable_kinds())
@pytest.mark.parametrize("bias", [True, False])
def test_layers_without_bias_and_transposed_layers_start_bit_for_bit_too(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias), Conv1D(8, 16))
    x = torch.randn(2, 5, 24)
    before = model(x)
    assert torch.equal(attach(model, kind, "*", **SETTINGS.get(kind, {"rank": 2}))(x), before)
    assert not torch.equal(trained(model, x)(x), before)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_a_saved_adapter_is_read_folded_and_proven_without_an_option(
    vit: nn.Module, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model = trained(attach(vit, kind, TARGETS, train="head", **settings))
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    checkpoint = rx.read(tmp_path / "ckpt.pt")
    verified = rx.verify(checkpoint, rx.fuse(checkpoint), {"image": IMAGES})
    assert set(checkpoint.replaced) == {"head.weight", "head.bias"}
    assert {a.module for a in checkpoint.adapters} == {
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.proj", "mlp.fc2")
    }
    assert verified.certificate.verdict == "exact"
    with torch.no_grad():
        torch.testing.assert_close(verified.module()(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", trainable_kinds())
def test_every_kind_that_can_be_trained_is_saved_loaded_and_proven(vit: nn.Module, tmp_path: Path, kind: str) -> None:
    model = trained(attach(vit, kind, TARGETS, **SETTINGS.get(kind, {"rank": 2})))
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    checkpoint = rx.read(tmp_path / "ckpt.pt")
    assert rx.verify(checkpoint, rx.fuse(checkpoint), {"image": IMAGES}).certificate.verdict == "exact"
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ckpt.pt")(IMAGES), model(IMAGES))


def test_saved_params_are_the_trained_ones(vit: nn.Module, tmp_path: Path) -> None:
    model = trained(attach(vit, "hydra", "blocks.0.attn.proj", rank=3, scale=0.25))
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    (adapter,) = rx.read(tmp_path / "ckpt.pt").adapters
    live = model.get_submodule("blocks.0.attn.proj").params()  # type: ignore[operator]
    assert torch.equal(adapter.params.sequential.up.weight, live.sequential.up.weight)
    assert torch.equal(adapter.params.parallel.down.bias, live.parallel.down.bias)
    assert adapter.params.parallel_scale == adapter.params.sequential_scale == 0.25
    assert not adapter.params.parallel.up.weight.requires_grad


def test_training_moves_adapter_and_head_and_nothing_else(vit: nn.Module) -> None:
    before = copy.deepcopy(vit.state_dict())
    model = trained(attach(vit, "hydra", TARGETS, rank=4, scale=0.5, train="head"))
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}
    initial = attach(copy.deepcopy(vit.__class__(num_classes=5, **SHAPE)), "hydra", TARGETS, rank=4).state_dict()
    new = set(after) - set(before)
    assert new == set(initial) - set(before)
    assert all(bool(after[name].any()) for name in new)


def test_trainable_counts_adapter_and_trained_modules(vit: nn.Module) -> None:
    model = attach(vit, "lora", "blocks.*.attn.proj", rank=4, train=("head",))
    assert trainable(model) == 2 * (4 * 48 + 48 * 4) + (5 * 48 + 5)


def test_an_attached_model_can_be_copied_moved_and_reloaded(vit: nn.Module) -> None:
    model = trained(attach(vit, "hydra", TARGETS, rank=4))
    expected = model(IMAGES)
    other = attach(
        copy.deepcopy(timm.create_model("vit_tiny_patch16_224", num_classes=5, **SHAPE)), "hydra", TARGETS, rank=4
    )
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IMAGES), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
    double = copy.deepcopy(model).double()
    assert double(IMAGES.double()).dtype == torch.float64
    assert torch.equal(model(IMAGES), expected)


@pytest.mark.parametrize(
    ("preset", "names", "adapted"),
    [
        ("hydra-vit", ("blocks.3.attn.proj", "blocks.3.mlp.fc2", "blocks.3.mlp.fc1", "blocks.3.attn.qkv", "head"), 2),
        ("hydra-clip", ("visual.transformer.resblocks.0.mlp.c_proj", "transformer.resblocks.0.mlp.c_proj"), 1),
        ("hydra-roberta", ("encoder.layer.1.output.dense", "encoder.layer.1.attention.output.dense", "x.dense"), 1),
        ("glora", ("blocks.3.attn.qkv", "lin", "head", "x.lm_head", "head_dist", "head.fc"), 3),
    ],
)
def test_presets_name_the_layers_that_the_authors_adapt(preset: str, names: tuple[str, ...], adapted: int) -> None:
    assert [n for n in names if matches(preset, n)] == (
        [*names[:adapted]] if preset != "glora" else ["blocks.3.attn.qkv", "lin", "head.fc"]
    )


def test_targets_are_globs_regular_expressions_or_presets(vit: nn.Module) -> None:
    def adapted(targets: Any) -> list[str]:
        model = copy.deepcopy(vit)
        attach(model, "lora", targets, rank=1)
        return [name for name, module in model.named_modules() if isinstance(module, Attached)]

    both = ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2"]
    assert adapted("hydra-vit") == both
    assert adapted(re.compile(r"blocks\.[1-9]\..*(proj|fc2)")) == both[2:]
    assert adapted(["blocks.1.mlp.fc2", re.compile("blocks.0.attn.proj")]) == [both[0], both[3]]
    assert len(adapted("glora")) == 8


def test_timm_folds_attached_adapters_when_it_reparameterizes(vit: nn.Module) -> None:
    for kind, settings in (VARIANTS[0], VARIANTS[6]):
        model = trained(attach(copy.deepcopy(vit), kind, TARGETS, **settings))
        plain = timm.utils.reparameterize_model(model)
        assert not any(isinstance(module, Attached) for module in plain.modules())
        assert [type(m) for m in plain.modules()] == [type(m) for m in vit.modules()]
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(IMAGES.double())
            error = float((plain.double()(IMAGES.double()) - expected).abs().max())
            floor = float((model(IMAGES) - expected).abs().max())
        assert error < 8 * floor < 1e-3 * float(expected.abs().max())


def test_a_layer_stored_transposed_is_folded_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 16))
    x = torch.randn(3, 16)
    trained(attach(model, "hydra", "0", rank=2), x)
    plain = model[0].fuse()
    assert isinstance(plain, Conv1D)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pair", "settings", "quantum"),
    [
        ("lora", "pair", {}, 2 * 5),  # numbers of the input are dropped, each is seen by all 5 of the middle
        (
            "hydra",
            "parallel",
            {"branches": "parallel", "bias": False},
            2 * 7,
        ),  # of the middle, each the sum of 7 inputs
        ("repadapter", "pair", {"bias": False}, 2 * 7),
    ],
)
def test_dropout_acts_in_training_only_and_where_the_paper_has_it(
    kind: str, pair: str, settings: dict[str, Any], quantum: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(7))
        attach(model, kind, "0", rank=5, dropout=0.5, **settings)
        for tensor in model[0].adapter.values():
            tensor.fill_(1.0)
    x = torch.ones(200, 7)
    assert torch.equal(model.eval()(x), torch.full((200, 7), 36.0))
    added = (model.train()(x) - x)[:, 0].detach()
    assert set((added % quantum).tolist()) == {0.0}
    assert len(set(added.tolist())) > 4
    assert abs(float(added.mean()) - 35) < 5  # what is kept is scaled up


def test_dropout_without_a_place_is_refused() -> None:
    with pytest.raises(UsageError, match="no dropout"):
        attach(nn.Sequential(nn.Linear(4, 4)), "glora", "0", dropout=0.1, **SETTINGS["glora"])
    with pytest.raises(UsageError, match="share"):
        attach(nn.Sequential(nn.Linear(4, 4)), "lora", "0", rank=1, dropout=1.0)


def test_parameters_are_counted_as_the_papers_do(vit: nn.Module) -> None:
    hydra = attach(copy.deepcopy(vit), "hydra", "hydra-vit", rank=2, train="head")
    width = 48
    of_block = sum(w * 2 + 2 + 2 * width + width for w in (width, width, 4 * width, width))
    assert adapter_parameters(hydra) == 2 * of_block
    assert trainable(hydra) == 2 * of_block + 5 * width + 5
    path = {"A": "LoRA_4", "B": "vector", "C": "LoRA_4", "D": "constant", "E": "none"}
    glora = attach(copy.deepcopy(vit), "glora", "blocks.0.mlp.fc1", rank=4, path=path)
    assert adapter_parameters(glora) == 4 * (192 + 48) + 192 + 4 * (48 + 1) + 1  # get_param of the authors' search


def test_a_learnable_scale_is_learnt_and_saved(vit: nn.Module, tmp_path: Path) -> None:
    model = attach(vit, "hydra", "blocks.0.attn.proj", rank=4, scale=1.5, learnable_scale=True)
    trained(trained(model))
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    (adapter,) = rx.read(tmp_path / "ckpt.pt").adapters
    scales = [float(adapter.params.parallel_scale), float(adapter.params.sequential_scale)]
    assert 1.5 not in scales
    assert scales[0] != scales[1]


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_load_gives_the_saved_model_back(vit: nn.Module, tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model = trained(attach(vit, kind, TARGETS, train="head", **settings))
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    again = load(tmp_path / "ckpt.pt")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == names
    save(again, tmp_path / "again.pt", base=SPEC)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again.pt")(IMAGES), model(IMAGES))
    assert not torch.equal(trained(again)(IMAGES), model(IMAGES))


def test_the_authors_own_checkpoint_can_be_trained_further(hydra: Case) -> None:
    path, given = hydra.arguments()
    model = load(path, **given)
    with torch.no_grad():
        found = copy.deepcopy(model).double()(hydra.inputs()["image"].double())
    assert float((found - hydra.expected()).abs().max()) < 1e-13
    assert trainable(model) == sum(t.numel() for t in torch.load(path, weights_only=True).values())


def test_a_part_of_a_packed_layer_cannot_be_attached(tmp_path: Path, vit: nn.Module) -> None:
    save(attach(vit, "lora", "blocks.0.attn.qkv", rank=2), tmp_path / "ckpt.pt", base=SPEC)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["adapters"][0]["rows"] = [0, 144]
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(UsageError, match="part of a layer"):
        load(tmp_path / "part.pt")


def test_running_statistics_that_training_moved_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    trained(attach(model.train(), "lora", "0", rank=2), torch.randn(8, 6) + 3)
    save(model, tmp_path / "ckpt.pt", base=None)
    replaced = rx.read(tmp_path / "ckpt.pt").replaced
    assert torch.equal(replaced["1.running_mean"], model.state_dict()["1.running_mean"])
    assert set(replaced) == {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize(
    ("base", "base_state", "held"),
    [
        (SPEC, None, True),
        (f"{SPEC}&pretrained=true", None, False),
        (None, None, False),
        (None, True, True),
        (SPEC, False, False),
    ],
)
def test_the_base_is_in_the_file_where_it_exists_nowhere_else(
    vit: nn.Module, tmp_path: Path, base: str | None, base_state: bool | None, held: bool
) -> None:
    plain = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    model = trained(attach(vit, "lora", TARGETS, rank=2, train="head"))
    save(model, tmp_path / "ckpt.pt", base=base, base_state=base_state)
    state = rx.read(tmp_path / "ckpt.pt").base_state
    assert set(state) == ({name for name in plain if not name.startswith("head.")} if held else set())
    assert all(torch.equal(state[name], plain[name]) for name in state)


def small_bert(folder: Path | str) -> nn.Module:
    """The model in a new Hugging Face folder, with an adapter that looks trained."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    BertModel(config).save_pretrained(folder)
    return perturbed(attach(BertModel.from_pretrained(folder), "lora", "*.query", rank=2))


def test_a_language_model_can_carry_its_base(tmp_path: Path) -> None:
    model = small_bert(tmp_path / "bert")
    save(model, tmp_path / "ckpt.pt", base=f"hf:{tmp_path / 'bert'}", base_state=True)
    (tmp_path / "bert" / "model.safetensors").unlink()
    assert rx.fuse(rx.read(tmp_path / "ckpt.pt")).changed == ("encoder.layer.0.attention.self.query.weight",)


def test_a_relative_base_folder_is_found_from_anywhere_and_after_both_were_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    save(small_bert("models/bert"), "runs/ckpt.pt", base="hf:models/bert?hidden_act=relu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").rename(tmp_path / "moved")
    checkpoint = rx.read("moved/runs/ckpt.pt")
    assert checkpoint.base == "hf:moved/runs/../models/bert?hidden_act=relu"
    assert rx.fuse(checkpoint).changed == ("encoder.layer.0.attention.self.query.weight",)


def test_what_was_trained_is_saved_even_when_it_is_frozen_by_then(vit: nn.Module, tmp_path: Path) -> None:
    attach(vit, "lora", TARGETS, rank=2, train="head")
    vit.norm.requires_grad_(True)  # by the user's own hand
    trained(vit).requires_grad_(False)
    with torch.no_grad():
        expected = vit.eval()(IMAGES)
    save(vit, tmp_path / "ckpt.pt", base=f"{SPEC}&pretrained=true")
    checkpoint = rx.read(tmp_path / "ckpt.pt")
    assert set(checkpoint.replaced) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    save(vit, tmp_path / "ckpt.pt", base=SPEC)
    again = load(tmp_path / "ckpt.pt").requires_grad_(False)
    assert torch.equal(again(IMAGES), expected)
    save(again, tmp_path / "again.pt", base=SPEC)  # what a checkpoint brought is never the base's
    assert set(rx.read(tmp_path / "again.pt").replaced) == set(checkpoint.replaced)


BASES = """
import timm, torch
def base(seed=0, **other):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **({shape} | other))
def other():
    return base(1)
def half():
    return base().half()
"""


@pytest.fixture
def bases(tmp_path: Path) -> tuple[str, Any]:
    """``py:FILE.py:``, and a function that makes its models."""
    found: dict[str, Any] = {}
    code = BASES.format(shape=SHAPE)
    (tmp_path / "bases.py").write_text(code)
    exec(code, found)
    return f"py:{tmp_path / 'bases.py'}:", found["base"]


IMAGE = ["image=batch,3,32,32:float32"]
CENTRED = """
import torch
class Centred(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 6)
        self.register_buffer("center", torch.zeros(6))
        self.register_buffer("codes", torch.zeros(6, dtype=torch.int64))
    def forward(self, x):
        if self.training:
            self.center += 0.3 * (x.mean(0) - self.center)
            self.codes += 1
        return self.fc(x - self.center) + self.codes
def base():
    torch.manual_seed(0)
    return Centred()
"""


def test_buffers_that_training_moved_are_saved(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    (tmp_path / "centred.py").write_text(CENTRED)
    exec(CENTRED, found)
    x = 1 + torch.randn(5, 6)
    model = trained(attach(found["base"](), "lora", "fc", rank=2).train(), x).eval()
    save(model, tmp_path / "ckpt.pt", base=None)
    spec, inputs = f"py:{tmp_path / 'centred.py'}:base", ["x=batch,6:float32"]
    checkpoint = rx.read(tmp_path / "ckpt.pt", spec, inputs=inputs)
    assert set(checkpoint.replaced) == {"center", "codes"}
    verified = rx.verify(checkpoint, rx.fuse(checkpoint), {"x": x})
    torch.testing.assert_close(verified.module()(x), model(x))
    assert torch.equal(load(tmp_path / "ckpt.pt", spec, inputs=inputs)(x), model(x))


def test_whole_tensors_keep_the_numbers_they_were_trained_to(tmp_path: Path, bases: tuple[str, Any]) -> None:
    spec, make = bases
    model = perturbed(attach(make().half().float(), "lora", TARGETS, rank=2, train=["norm", "head"])).eval()
    save(model, tmp_path / "ckpt.pt", base=None)
    checkpoint = rx.read(tmp_path / "ckpt.pt", f"{spec}half", inputs=IMAGE)
    wide = rx.fuse(checkpoint, "fp32")
    assert all(
        torch.equal(wide[name], checkpoint.replaced[name]) for name in ("norm.weight", "head.weight", "head.bias")
    )
    verified = rx.verify(checkpoint, wide, {"image": IMAGES})
    torch.testing.assert_close(verified.module()(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    narrow = rx.fuse(checkpoint)
    assert torch.equal(narrow["norm.weight"], checkpoint.replaced["norm.weight"].half())
    assert rx.verify(checkpoint, narrow, {"image": IMAGES}).certificate.verdict == "exact"
    assert len(narrowed(checkpoint, lambda name: narrow[name].dtype.itemsize)) == len(checkpoint.replaced) == 4
    assert not narrowed(checkpoint, lambda name: wide[name].dtype.itemsize)
    again = load(tmp_path / "ckpt.pt", f"{spec}half", inputs=IMAGE)
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_a_spec_that_leaves_out_what_no_tensor_tells_is_noticed(vit: nn.Module, tmp_path: Path) -> None:
    model = perturbed(attach(vit, "lora", TARGETS, rank=2)).train()
    with pytest.raises(UsageError, match="not the model in hand"):
        save(model, tmp_path / "ckpt.pt", base=SPEC.replace("num_heads=3", "num_heads=6"))
    assert (tmp_path / "ckpt.pt").is_file()  # hours of training are not lost
    assert all(module.training for module in model.modules())
    save(model, tmp_path / "ckpt.pt", base=SPEC)


def test_another_base_than_the_one_it_was_trained_on_is_refused(bases: tuple[str, Any], tmp_path: Path) -> None:
    spec, make = bases
    save(trained(attach(make(), "lora", TARGETS, rank=2, train="head")), tmp_path / "ckpt.pt", base=None)
    assert rx.fuse(rx.read(tmp_path / "ckpt.pt", f"{spec}base", inputs=IMAGE)).changed
    with pytest.raises(TensorMismatchError, match="trained on a base with other numbers") as caught:
        rx.fuse(rx.read(tmp_path / "ckpt.pt", f"{spec}other", inputs=IMAGE))
    assert not caught.value.tensor.startswith("head.")
    with pytest.raises(TensorMismatchError):
        load(tmp_path / "ckpt.pt", f"{spec}other", inputs=IMAGE)
    edited = make()
    with torch.no_grad():
        edited.blocks[0].mlp.fc1.weight[3, 4] += 1e-3  # one entry, before it is trained
    save(trained(attach(edited, "lora", TARGETS, rank=2)), tmp_path / "edited.pt", base=None)
    with pytest.raises(TensorMismatchError, match="1 of ") as caught:
        rx.fuse(rx.read(tmp_path / "edited.pt", f"{spec}base", inputs=IMAGE))
    assert caught.value.tensor == "blocks.0.mlp.fc1.weight"


def test_a_base_that_was_cast_for_training_is_the_same_base(bases: tuple[str, Any], tmp_path: Path) -> None:
    spec, make = bases
    before, after = make().half(), attach(make(), "lora", TARGETS, rank=2)
    save(perturbed(attach(before, "lora", TARGETS, rank=2)), tmp_path / "before.pt", base=None)
    save(perturbed(after).half(), tmp_path / "after.pt", base=None)
    for name in ("before.pt", "after.pt"):
        for base in ("base", "half"):
            checkpoint = rx.read(tmp_path / name, f"{spec}{base}", inputs=IMAGE)
            assert not checkpoint.replaced
            assert rx.fuse(checkpoint).changed


def test_the_second_of_a_stack_may_be_trained_on_what_the_first_made(bases: tuple[str, Any], tmp_path: Path) -> None:
    spec, make = bases
    save(perturbed(attach(make(), "lora", "blocks.0.*", rank=2)), tmp_path / "one.pt", base=None)
    one = rx.read(tmp_path / "one.pt", f"{spec}base", inputs=IMAGE)
    made = make()
    made.load_state_dict(dict(rx.fuse(one)))
    save(perturbed(attach(made, "lora", "blocks.0.*", rank=2)), tmp_path / "two.pt", base=None)
    two = rx.read(tmp_path / "two.pt", f"{spec}base", inputs=IMAGE)
    with pytest.raises(TensorMismatchError):
        rx.fuse(two)
    assert rx.fuse(rx.stacked([one, two])).changed


def perturbed(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrappers_are_taken_off(vit: nn.Module, tmp_path: Path, wrap: Any) -> None:
    model = perturbed(attach(vit, "lora", TARGETS, rank=2, train="head")).eval()
    save(model, tmp_path / "plain.pt", base=SPEC)
    save(wrap(model), tmp_path / "wrapped.pt", base=SPEC)
    plain, wrapped = (load(tmp_path / f"{name}.pt") for name in ("plain", "wrapped"))
    assert torch.equal(plain(IMAGES), wrapped(IMAGES))
    assert rx.read(tmp_path / "plain.pt").replaced.keys() == rx.read(tmp_path / "wrapped.pt").replaced.keys()


def test_a_compiled_part_is_saved_under_its_plain_name(vit: nn.Module, tmp_path: Path) -> None:
    model = perturbed(attach(vit, "lora", TARGETS, rank=2)).eval()
    model.blocks[0] = torch.compile(model.blocks[0])
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    assert {a.module for a in rx.read(tmp_path / "ckpt.pt").adapters} == {
        f"blocks.{n}.{layer}" for n in (0, 1) for layer in ("attn.proj", "mlp.fc2")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", trainable_kinds())
def test_under_autocast_too_an_untrained_adapter_gives_the_bases_outputs(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(OrderedDict(a=nn.Linear(24, 16), b=nn.Linear(16, 12))), torch.randn(5, 24)
    plain = copy.deepcopy(model)
    attach(model, kind, "*", **SETTINGS.get(kind, {"rank": 2}))
    with torch.autocast("cpu", dtype):
        found, expected = model(x), plain(x)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


def test_what_a_path_does_not_read_is_not_trained() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(6, 5)))
    path = {"A": "LoRA_4", "B": "none", "C": "none", "D": "none", "E": "vector"}
    attach(model, "glora", "a", rank=4, path=path)
    assert trainable(model) == adapter_parameters(model) == 4 * (6 + 5) + 5
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"a.adapter.{t}" for t in ("Ad", "Au", "E")}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "probed", "rank": 4}, "glora"),
        ({"kind": "glora", "rank": 4}, "supernet()"),
        ({"kind": "glora", "path": {"A": "LoRA_8", "B": "none", "C": "none", "D": "none", "E": "none"}}, "LoRA_8"),
        ({"targets": "block.*.attn.proj"}, "blocks.0.attn.proj"),
        ({"targets": "blocks.0.norm1"}, "LayerNorm"),
        ({"targets": ()}, "targets"),
        ({"targets": ("blocks.0.attn.proj", "nothing")}, "'nothing'"),
        ({"train": "haed"}, "head"),
        ({"rank": 0}, "rank"),
        ({"rank": None}, "rank"),
        ({"alpha": 8}, "alpha"),
        ({"branches": "none"}, "branches"),
    ],
)
def test_a_wrong_call_is_refused_and_leaves_the_model_alone(
    vit: nn.Module, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        attach(vit, **({"kind": "hydra", "targets": TARGETS, "rank": 4} | arguments))
    assert named in str(caught.value)
    assert not any(isinstance(module, Attached) for module in vit.modules())
    assert all(p.requires_grad for p in vit.parameters())


def test_a_missing_rank_is_a_usage_error(vit: nn.Module) -> None:
    with pytest.raises(UsageError):
        attach(vit, "lora", TARGETS)


def test_an_adapted_layer_takes_no_second_adapter(vit: nn.Module) -> None:
    attach(vit, "lora", "blocks.0.attn.proj", rank=2)
    with pytest.raises(UsageError, match="has an adapter already"):
        attach(vit, "lora", "blocks.0.attn.proj", rank=2)


def test_a_layer_whose_weight_is_read_past_its_forward_is_refused() -> None:
    with pytest.raises(UsageError, match="MultiheadAttention"):
        attach(nn.Sequential(nn.MultiheadAttention(8, 2)), "lora", "*.out_proj", rank=2)


def test_a_tied_weight_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    with pytest.raises(SharedWeightError) as caught:
        attach(model, "lora", "1", rank=2)
    assert set(caught.value.owners) == {"0.weight", "1.weight"}


@pytest.mark.parametrize(
    ("name", "base"), [("ckpt.txt", SPEC), ("ckpt.safetensors", SPEC), ("ckpt.pt", "py:net.py:make")]
)
def test_what_could_not_be_read_back_is_not_written(vit: nn.Module, tmp_path: Path, name: str, base: str) -> None:
    attach(vit, "lora", TARGETS, rank=2)
    with pytest.raises(UsageError):
        save(vit, tmp_path / name, base=base)
    assert not any(tmp_path.iterdir())


def test_a_model_without_adapters_is_not_saved(vit: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        save(vit, tmp_path / "ckpt.pt", base=SPEC)


def test_a_failed_save_leaves_the_old_file(vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(attach(vit, "lora", TARGETS, rank=2), tmp_path / "ckpt.pt", base=SPEC)
    before = (tmp_path / "ckpt.pt").read_bytes()

    def fail(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save(vit, tmp_path / "ckpt.pt", base=SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_diverged_training_run_is_refused_on_reading(vit: nn.Module, tmp_path: Path) -> None:
    attach(vit, "lora", TARGETS, rank=2)
    with torch.no_grad():
        vit.get_submodule("blocks.0.attn.proj").adapter["pair_up_weight"].fill_(float("nan"))  # type: ignore[index, union-attr]
    save(vit, tmp_path / "ckpt.pt", base=SPEC)
    with pytest.raises(CheckpointError):
        rx.read(tmp_path / "ckpt.pt")


def test_a_second_attach_leaves_the_first_trainable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Linear(6, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 3)))
    attach(model, "lora", "a", rank=2, train="head")
    first = trainable(model)
    attach(model, "hydra", "b", rank=2)
    names = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"a", "b", "head"}
    assert trainable(model) == first + sum(p.numel() for p in model.b.parameters() if p.requires_grad)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2"])
def test_a_scale_that_is_no_number_is_refused(scale: Any) -> None:
    with pytest.raises(UsageError, match="scale"):
        attach(nn.Sequential(nn.Linear(4, 4)), "lora", "0", rank=2, scale=scale)
