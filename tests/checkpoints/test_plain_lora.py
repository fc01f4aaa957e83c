"""LoRA of other libraries than peft, each file written by the library itself or as its own code does, held against its own forward."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import timm
import torch
from conftest import own_model
from torch import nn
from torch.nn.utils import parametrize

import reparam_export as rx
from reparam_export.errors import (
    CheckpointError,
    FusionError,
    MissingSettingError,
    ReparamError,
    TensorMismatchError,
    UsageError,
)

SIZES = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SPEC = "timm:vit_tiny_patch16_224?" + "&".join(f"{n}={v}" for n, v in SIZES.items())


def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZES).eval()


def filled(model: nn.Module, mark: str = "lora_") -> nn.Module:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if mark in name:
            p.data = torch.randn_like(p) * 0.2
    return model


def error(checkpoint: rx.Checkpoint, plain: nn.Module, model: Callable[..., torch.Tensor], x: torch.Tensor) -> float:
    """The largest difference of the outputs of fused weights from those of the model as it was trained, in float64."""
    plain = copy.deepcopy(plain)
    plain.load_state_dict(dict(rx.fuse(checkpoint)))
    with torch.no_grad():
        return float((plain.double()(x) - model(x)).abs().max())


def image() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- loralib


class Net(nn.Module):
    """A layer of every kind that loralib has; ``with_lora`` makes them its own."""

    def __init__(self, with_lora: bool) -> None:
        super().__init__()
        of: Any = loralib if with_lora else nn
        more = {"r": 3, "lora_alpha": 7} if with_lora else {}
        packed = {"enable_lora": [True, False, True]} if with_lora else {}
        last = {"enable_lora": [False, True]} if with_lora else {}
        torch.manual_seed(0)
        self.embed = of.Embedding(11, 6, **more)
        self.conv = of.Conv2d(6, 8, 3, **more) if with_lora else nn.Conv2d(6, 8, 3)
        self.point = of.Conv2d(8, 10, 1, **more) if with_lora else nn.Conv2d(8, 10, 1)
        self.qkv = (loralib.MergedLinear if with_lora else nn.Linear)(10, 36, **more, **packed)
        self.kv = (loralib.MergedLinear if with_lora else nn.Linear)(36, 24, **more, **last)
        self.out = of.Linear(24, 5, bias=False, **more)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.point(self.conv(self.embed(ids).permute(0, 3, 1, 2)).tanh())
        return self.out(self.kv(self.qkv(x.permute(0, 2, 3, 1)).tanh()).tanh())


NET = "import sys; sys.path.insert(0, {here!r})\nfrom test_plain_lora import Net\ndef build():\n    return Net(False)\n"


def loralib_base(folder: Path) -> dict[str, Any]:
    (folder / "net.py").write_text(NET.format(here=str(Path(__file__).parent)))
    return {"base": f"py:{folder / 'net.py'}:build", "inputs": ["ids=batch,7,7:int64:11"]}


def plain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.replace(".conv.", "."): t for n, t in state.items() if "lora_" not in n}


def in_train_mode(model: nn.Module) -> Any:
    """loralib's forward beside the weights; there is no dropout in it."""
    return copy.deepcopy(model).double().train()


@pytest.mark.parametrize("whole", [True, False])
def test_every_layer_of_loralib_but_those_of_several_lists_of_slices(whole: bool, tmp_path: Path) -> None:
    model = filled(Net(True)).train()
    model.kv = nn.Linear(36, 24)  # another list of slices than qkv's
    plain = Net(False)
    plain.load_state_dict(plain_names(model.state_dict()))
    torch.save(plain.state_dict(), tmp_path / "base.pt")
    torch.save(model.state_dict() if whole else loralib.lora_state_dict(model), tmp_path / "lora.pt")
    base = loralib_base(tmp_path) | ({} if whole else {"base_weights": tmp_path / "base.pt"})
    settings: dict[str, Any] = {"lora_alpha": 7, "enable_lora": "true,false,true"} | (
        {"saved_in": "train"} if whole else {}
    )
    for name in settings:
        with pytest.raises(MissingSettingError, match=name) as caught:
            rx.read(tmp_path / "lora.pt", **base, settings={n: v for n, v in settings.items() if n != name})
        assert caught.value.setting == name
    ids = torch.randint(0, 11, (4, 7, 7), generator=torch.Generator().manual_seed(3))
    found = rx.read(tmp_path / "lora.pt", **base, settings=settings)
    assert found.format == "loralib"
    assert error(found, plain, in_train_mode(model), ids) < 1e-5
    wrong = settings | {"enable_lora": [True, True, False]}
    assert error(rx.read(tmp_path / "lora.pt", **base, settings=wrong), plain, in_train_mode(model), ids) > 1e-2


def test_the_only_adapted_slice_of_a_packed_layer_of_loralib(tmp_path: Path) -> None:
    model = filled(Net(True)).train()
    model.qkv = nn.Linear(10, 36)
    plain = Net(False)
    plain.load_state_dict(plain_names(model.state_dict()))
    torch.save(model.state_dict(), tmp_path / "lora.pt")
    settings = {"lora_alpha": 7, "enable_lora": [False, True], "saved_in": "train"}
    found = rx.read(tmp_path / "lora.pt", **loralib_base(tmp_path), settings=settings)
    ids = torch.randint(0, 11, (4, 7, 7), generator=torch.Generator().manual_seed(3))
    assert error(found, plain, in_train_mode(model), ids) < 1e-5


def test_loralib_weights_that_hold_the_change_already_are_not_folded_twice(tmp_path: Path) -> None:
    model = filled(nn.Sequential(loralib.Linear(6, 4, r=2, lora_alpha=6)))
    model.eval()
    torch.save(model.state_dict(), tmp_path / "lora.pt")
    base = own_model(tmp_path, "self.add_module('0', Linear(6, 4))", "self._modules['0'](x)")
    given = {"base": base, "inputs": ["x=batch,6:float32"]}
    with pytest.raises(FusionError, match="hold the change of the adapters already"):
        rx.read(tmp_path / "lora.pt", **given, settings={"lora_alpha": 6, "saved_in": "eval"})
    model.train()
    torch.save({n: t for n, t in model.state_dict().items() if "lora" not in n}, tmp_path / "base.pt")
    apart = rx.read(tmp_path / "lora.pt", **given, base_weights=tmp_path / "base.pt", settings={"lora_alpha": 6})
    with pytest.raises(TensorMismatchError, match="other numbers"):  # the base shows it
        rx.fuse(apart)


@pytest.mark.parametrize("wrong", ["maybe", "true,false", [False, False, False], 3])
def test_a_list_of_slices_that_is_none_is_refused(wrong: Any, tmp_path: Path) -> None:
    torch.save(loralib.lora_state_dict(Net(True)), tmp_path / "lora.pt")
    with pytest.raises((UsageError, MissingSettingError)):
        rx.read(tmp_path / "lora.pt", **loralib_base(tmp_path), settings={"lora_alpha": 7, "enable_lora": wrong})


# --- minLoRA


class LoRAParametrization(nn.Module):
    """As cccntu/minLoRA has it (minlora/model.py)."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, alpha: float, swap: bool = False) -> None:
        super().__init__()
        self.swapped = swap
        a, b = (rank, fan_in), (fan_out, rank)
        self.lora_A = nn.Parameter(torch.zeros(a[::-1] if swap else a))
        self.lora_B = nn.Parameter(torch.zeros(b[::-1] if swap else b))
        self.scaling = alpha / rank
        self.register_buffer("lora_dropout_mask", torch.ones((fan_in, 1) if swap else (1, fan_in)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = (self.lora_A, self.lora_B) if self.swapped else (self.lora_B, self.lora_A)
        return x + torch.matmul(*pair).view(x.shape) * self.scaling


@pytest.mark.parametrize("whole", [True, False])
def test_minlora_on_linear_layers_convolutions_and_embeddings(whole: bool, tmp_path: Path) -> None:
    plain = Net(False)
    model = copy.deepcopy(plain)
    for name in ("conv", "qkv", "out"):
        layer = model.get_submodule(name)
        out, *rest = layer.weight.shape
        parametrize.register_parametrization(layer, "weight", LoRAParametrization(math.prod(rest), out, 3, 7.0))
    parametrize.register_parametrization(model.embed, "weight", LoRAParametrization(11, 6, 3, 7.0, swap=True))
    filled(model)
    state = model.state_dict()
    torch.save(plain.state_dict(), tmp_path / "base.pt")
    kept = state if whole else {n: t for n, t in state.items() if n.endswith(("lora_A", "lora_B"))}
    torch.save(kept, tmp_path / "lora.pt")
    base = loralib_base(tmp_path) | ({} if whole else {"base_weights": tmp_path / "base.pt"})
    with pytest.raises(MissingSettingError, match="own default is 1"):
        rx.read(tmp_path / "lora.pt", **base)
    ids = torch.randint(0, 11, (4, 7, 7), generator=torch.Generator().manual_seed(3))
    found = rx.read(tmp_path / "lora.pt", **base, settings={"lora_alpha": 7})
    assert found.format == "minlora"
    assert error(found, plain, copy.deepcopy(model).double(), ids) < 1e-5
    assert (
        error(
            rx.read(tmp_path / "lora.pt", **base, settings={"lora_alpha": 3}), plain, copy.deepcopy(model).double(), ids
        )
        > 1e-2
    )


# --- SAMed, LoRA-ViT


class PackedLoRA(nn.Module):
    """As JamesQFreeman/LoRA-ViT has it (lora.py, ``_LoRA_qkv_timm``); SAMed's has no scale."""

    def __init__(self, qkv: nn.Linear, rank: int, scale: int) -> None:
        super().__init__()
        self.qkv, self.dim, self.scale = qkv, qkv.in_features, scale
        self.a_q, self.a_v = (nn.Linear(self.dim, rank, bias=False) for _ in "qv")
        self.b_q, self.b_v = (nn.Linear(rank, self.dim, bias=False) for _ in "qv")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        qkv[:, :, : self.dim] += self.scale * self.b_q(self.a_q(x))
        qkv[:, :, -self.dim :] += self.scale * self.b_v(self.a_v(x))
        return qkv


def packed(blocks: list[int], scale: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The adapted model, and the file of ``save_lora_parameters``."""
    model, state = vit(), {}
    for number, block in enumerate(blocks):
        layer = PackedLoRA(model.blocks[block].attn.qkv, 4, scale)
        model.blocks[block].attn.qkv = layer
        for letter in "ab":
            state |= {
                f"w_{letter}_{2 * number + i:03d}": getattr(layer, f"{letter}_{part}").weight
                for i, part in enumerate("qv")
            }
    filled(model, "_q.")
    filled(model, "_v.")
    return model.double(), {n: t.detach().float() for n, t in state.items()}


@pytest.mark.parametrize("blocks", [[0, 1], [1]])
def test_lora_by_number_lands_on_q_and_v_of_the_blocks(blocks: list[int], tmp_path: Path) -> None:
    model, state = packed(blocks, 2)
    head = torch.randn(5, 48, generator=torch.Generator().manual_seed(4))
    model.head.weight.data = head.double()  # type: ignore[union-attr]
    torch.save(state | {"fc_48in_5out": head}, tmp_path / "lora.pth")
    torch.save(vit().state_dict(), tmp_path / "base.pt")
    given = {"base": SPEC, "base_weights": tmp_path / "base.pt"}
    with pytest.raises(MissingSettingError, match=r"alpha // r \(rounded down\)") as caught:
        rx.read(tmp_path / "lora.pth", **given)
    assert caught.value.setting == "scale"
    settings: dict[str, Any] = {"scale": 2}
    if blocks == [1]:
        with pytest.raises(TensorMismatchError, match=r"first blocks\.1\.attn\.qkv"):
            rx.fuse(rx.read(tmp_path / "lora.pth", **given, settings=settings))
        settings |= {"lora_layer": [1]}
    found = rx.read(tmp_path / "lora.pth", **given, settings=settings)
    assert found.format == "samed"
    assert error(found, vit(), model, image()) < 3e-6
    with pytest.raises(UsageError, match="expected the numbers of"):
        rx.read(tmp_path / "lora.pth", **given, settings=settings | {"lora_layer": [0, 1, 2]})


def test_sams_own_names_stand_in_front_where_the_file_shows_that_it_is_sam(tmp_path: Path) -> None:
    _, state = packed([0, 1], 1)
    torch.save(state | {"mask_decoder.iou_token.weight": torch.ones(1, 4)}, tmp_path / "sam.pth")
    found = rx.read(tmp_path / "sam.pth", settings={"scale": 1})
    assert [a.module for a in found.adapters[::2]] == [f"image_encoder.blocks.{n}.attn.qkv" for n in range(2)]
    assert [a.rows for a in found.adapters[:2]] == [(0, 48), (96, 144)]
    assert list(found.replaced) == ["mask_decoder.iou_token.weight"]
    torch.save(state | {"sa_a_000": torch.ones(4, 4)}, tmp_path / "more.pth")
    with pytest.raises(TensorMismatchError, match="sa_a_000"):
        rx.read(tmp_path / "more.pth", settings={"scale": 1})


# --- CLIP-LoRA

TOWERS = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
    def forward(self, x):
        return x + self.attn(x, x, x, need_weights=False)[0]
class Tower(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width) for _ in range(depth)))
    def forward(self, x):
        return self.resblocks(x)
class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = Tower(16, 4)
class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer, self.visual = Tower(8, 12), Visual()
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p)
    def forward(self, text, image):
        return self.transformer(text), self.visual.transformer(image)
def build():
    return Clip().eval()
"""


def clip_lora(model: nn.Module, towers: dict[str, list[int]], params: str, alpha: float) -> dict[str, Any]:
    """The file of ``save_lora`` (loralib/utils.py), and the change added to the model as ``PlainMultiheadAttentionLoRA`` runs it."""
    weights: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(5)
    for tower, blocks in towers.items():
        for block in blocks:
            attention = model.get_submodule(f"{tower}.resblocks.{block}.attn")
            width = attention.embed_dim
            layer = weights[f"layer_{len(weights)}"] = {}
            for letter, name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "proj"), strict=True):
                if letter in params:
                    a, b = (torch.randn(s, generator=draw) * 0.3 for s in ((4, width), (width, 4)))
                    layer[name] = {"w_lora_A": a, "w_lora_B": b}
                    delta = alpha / math.sqrt(4) * (b @ a)
                    place = "qkv".find(letter)
                    target = (
                        attention.in_proj_weight.data[width * place : width * (place + 1)]
                        if place >= 0
                        else attention.out_proj.weight.data
                    )
                    target += delta
    return weights


@pytest.mark.parametrize(
    ("encoder", "position", "text", "vision", "params"),
    [
        ("both", "all", range(12), range(4), "qkvo"),
        ("vision", "half-up", (), (2, 3), "qv"),
        ("text", "top3", (9, 10, 11), (), "ko"),
    ],
)
def test_clip_lora_by_number(encoder: str, position: str, text: Any, vision: Any, params: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(TOWERS)
    scope: dict[str, Any] = {}
    exec(TOWERS, scope)
    plain, model = scope["build"](), scope["build"]()
    weights = clip_lora(model, {"transformer": list(text), "visual.transformer": list(vision)}, params, 3)
    said = {"r": 4, "alpha": 3, "encoder": encoder, "params": list(params), "position": position}
    torch.save({"weights": weights, "metadata": said}, tmp_path / "lora.pt")
    inputs = ["text=batch,5,8:float32", "image=batch,6,16:float32"]
    found = rx.read(tmp_path / "lora.pt", f"py:{tmp_path / 'net.py'}:build", inputs=inputs)
    assert found.format == "clip_lora"
    fused = rx.fuse(found)
    expected = model.state_dict()
    assert all(torch.allclose(t, expected[n], atol=1e-5) for n, t in fused.items())
    assert any((t - plain.state_dict()[n]).abs().max() > 0.1 for n, t in fused.items())
    torch.save(
        {"weights": weights, "metadata": {n: v for n, v in said.items() if n != "position"}}, tmp_path / "older.pt"
    )
    with pytest.raises(MissingSettingError, match="--set position=all"):
        rx.read(tmp_path / "older.pt")
    assert (
        rx.read(tmp_path / "older.pt", settings={"position": position}).adapters[0].module == found.adapters[0].module
    )
    torch.save({"weights": weights, "metadata": said | {"position": "bottom", "encoder": "text"}}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="own tables"):
        rx.read(tmp_path / "odd.pt")
    for other in ([*params, "v" if "v" not in params else "k"], list(params)[1:], ["x"], 3):
        torch.save({"weights": weights, "metadata": said | {"params": other}}, tmp_path / "odd.pt")
        if set(other if isinstance(other, list) else ()) == set(params):
            continue  # it has them all
        with pytest.raises(CheckpointError, match="params"):
            rx.read(tmp_path / "odd.pt")


@pytest.mark.parametrize(("encoder", "position"), [("vision", "all"), ("both", "all"), ("vision", "half-up")])
def test_a_clip_lora_file_that_ends_too_early_is_refused(encoder: str, position: str, tmp_path: Path) -> None:
    """Its own tables let it be that of a smaller backbone; the base knows better."""
    (tmp_path / "net.py").write_text(TOWERS)
    scope: dict[str, Any] = {}
    exec(TOWERS, scope)
    towers = {"transformer": list(range(12)), "visual.transformer": list(range(4))}
    if encoder == "vision":
        towers = {"visual.transformer": [0, 1, 2, 3] if position == "all" else [2, 3]}
    said = {"r": 4, "alpha": 3, "encoder": encoder, "params": ["q", "v"], "position": position}
    weights = clip_lora(scope["build"](), towers, "qv", 3)
    for short in (False, True):
        if short:
            weights.popitem()
        torch.save({"weights": weights, "metadata": said}, tmp_path / "lora.pt")
        inputs = ["text=batch,5,8:float32", "image=batch,6,16:float32"]
        found = rx.read(tmp_path / "lora.pt", f"py:{tmp_path / 'net.py'}:build", inputs=inputs)
        if not short:
            assert len(rx.fuse(found).changed) == len(weights)
            continue
        with pytest.raises(
            TensorMismatchError, match=r"have no adapter in it, first visual\.transformer\.resblocks\.[23]\.attn"
        ):
            rx.fuse(found)


def test_half_a_pair_is_an_error_in_every_one_of_these_formats(tmp_path: Path) -> None:
    files = {
        "loralib": {"fc.lora_A": torch.ones(2, 6)},
        "minlora": {"fc.parametrizations.weight.0.lora_A": torch.ones(2, 6)},
        "samed": {"w_a_000": torch.ones(2, 6), "w_a_001": torch.ones(2, 6), "w_b_000": torch.ones(6, 2)},
    }
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pt")
        settings = {"scale": 1} if name == "samed" else {"lora_alpha": 2}
        with pytest.raises(TensorMismatchError, match="is missing"):
            rx.read(tmp_path / f"{name}.pt", settings=settings)
    half = {"layer_0": {"q_proj": {"w_lora_A": torch.ones(4, 8)}}}
    said = {"r": 4, "alpha": 3, "encoder": "vision", "position": "all"}
    torch.save({"weights": half, "metadata": said}, tmp_path / "clip.pt")
    with pytest.raises(ReparamError):
        rx.read(tmp_path / "clip.pt")
