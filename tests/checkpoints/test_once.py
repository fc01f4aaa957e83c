"""Two keys of a file that are one here: an error with both, whatever the format; none of them is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reparam_export as rx
from reparam_export.errors import CheckpointError, TensorMismatchError
from reparam_export.names.once import renamed_once
from reparam_export.state import load_state

State = dict[str, Any]


def t(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(module: str, a: str = "lora_A", b: str = "lora_B", end: str = ".weight") -> State:
    return {f"{module}.{a}{end}": t(2, 6), f"{module}.{b}{end}": t(8, 2)}


def hydra() -> State:
    names = {f"{part}_proj.{leaf}" for part in ("down", "up") for leaf in ("weight", "bias")}
    sizes = {"down_proj.weight": (2, 8), "down_proj.bias": (2,), "up_proj.weight": (8, 2), "up_proj.bias": (8,)}
    return {f"b.mlp.ad_lin.adapter_{branch}.{n}": t(*sizes[n]) for branch in ("par", "seq") for n in sorted(names)}


SWIN = {"layers.0.downsample.ssf_scale_1": t(8), "layers.0.downsample.ssf_shift_1": t(8)}
STATE = lora("base_model.model.x", "lora_A.default", "lora_B.default")
# what is read as it is; what makes it two of one; the two; settings
FILES: dict[str, tuple[State, State, tuple[str, str], dict[str, Any]]] = {
    "diffusers": (
        lora("unet.x.to_q"), lora("unet.x.to_q", "lora.down", "lora.up"),
        ("x.to_q.lora_A.weight", "x.to_q.lora.down.weight"), {"lora_alpha": 5},
    ),
    "diffusers, processors": (
        lora("unet.x.to_q"), lora("unet.x.processor", "to_q_lora.down", "to_q_lora.up"),
        ("x.to_q.lora_A.weight", "x.processor.to_q_lora.down.weight"), {"lora_alpha": 5},
    ),
    "samed, heads": (
        {"w_a_000": t(2, 8), "w_b_000": t(8, 2), "w_a_001": t(2, 8), "w_b_001": t(8, 2), "fc_32in_5out": t(5, 32)},
        {"fc_032in_5out": t(5, 32)}, ("fc_32in_5out", "fc_032in_5out"), {"scale": 2},
    ),
    "minlora": (
        lora("x.parametrizations.weight.0", end="") | {"x.parametrizations.weight.original": t(8, 6)},
        {"x.weight": t(8, 6)}, ("x.parametrizations.weight.original", "x.weight"), {"lora_alpha": 5},
    ),
    "loralib": (
        lora("x", end="") | {"x.conv.weight": t(8, 6, 1, 1)},
        {"x.weight": t(8, 6)}, ("x.conv.weight", "x.weight"), {"lora_alpha": 5, "saved_in": "train"},
    ),
    "ssf": (
        SWIN | {"head.weight": t(5, 8)}, {"head.fc.weight": t(5, 8)}, ("head.weight", "head.fc.weight"), {},
    ),
    "hydra_clip": (
        hydra() | {"b.mlp.ad_lin.linear.weight": t(8, 8)}, {"b.mlp.c_proj.weight": t(8, 8)},
        ("b.mlp.ad_lin.linear.weight", "b.mlp.c_proj.weight"), {"scale": 2},
    ),
    "peft_state": (
        STATE | {"base_model.model.x.base_layer.weight": t(8, 6)}, {"base_model.model.x.weight": t(8, 6)},
        ("base_model.model.x.base_layer.weight", "base_model.model.x.weight"), {"lora_alpha": 5},
    ),
    "peft_state, heads": (
        STATE | {"base_model.model.y.weight": t(8, 6)}, {"y.weight": t(8, 6)},
        ("base_model.model.y.weight", "y.weight"), {"lora_alpha": 5},
    ),
    "peft_state, saved": (
        STATE | {"base_model.model.y.modules_to_save.default.weight": t(8, 6)},
        {"base_model.model.y.modules_to_save.weight": t(8, 6)},
        ("y.modules_to_save.default.weight", "y.modules_to_save.weight"), {"lora_alpha": 5},
    ),
    "peft_state, trained": (
        STATE | {"base_model.model.y.modules_to_save.default.weight": t(8, 6)}, {"base_model.model.y.weight": t(4, 6)},
        ("y.weight is in the file twice", ""), {"lora_alpha": 5},
    ),
    "wrappers": (
        lora("unet.x.to_q"), lora("unet._orig_mod.x.to_q"),
        ("unet.x.to_q.lora_A.weight", "unet._orig_mod.x.to_q.lora_A.weight"), {"lora_alpha": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_two_keys_that_are_one_are_refused_with_both(case: str, tmp_path: Path) -> None:
    tensors, more, both, settings = FILES[case]
    for state, file in ((tensors, "one.pt"), (tensors | more, "two.pt"), (more | tensors, "turned.pt")):
        torch.save(state, tmp_path / file)
    rx.read(tmp_path / "one.pt", settings=settings)
    for file in ("two.pt", "turned.pt"):
        with pytest.raises(TensorMismatchError) as caught:
            rx.read(tmp_path / file, settings=settings)
        assert all(name in str(caught.value) for name in both), caught.value


def test_nested_keys_with_dots_in_them_are_refused(tmp_path: Path) -> None:
    pair = {"w_lora_A": t(2, 8), "w_lora_B": t(8, 2)}
    said = {"r": 2, "alpha": 3, "encoder": "vision", "params": ["q"], "position": "top"}
    for file, more in (("one.pt", {}), ("two.pt", {"q_proj.w_lora_A": t(2, 8) * 2})):
        torch.save({"weights": {"layer_0": {"q_proj": pair} | more}, "metadata": said}, tmp_path / file)
    assert len(rx.read(tmp_path / "one.pt").adapters) == 1
    with pytest.raises(TensorMismatchError, match=r"\['q_proj'\]\['w_lora_A'\] and .*\['q_proj.w_lora_A'\]"):
        rx.read(tmp_path / "two.pt")


@pytest.mark.parametrize("entry", [{}, {"a.b": lora("z")}], ids=["one", "two"])
def test_state_dicts_of_one_name_are_refused(entry: State, tmp_path: Path) -> None:
    torch.save({"a": {"b": lora("x")}} | entry, tmp_path / "x.pt")
    if not entry:
        assert list(load_state(tmp_path / "x.pt")) == list(lora("x"))
        return
    for act in (load_state, rx.read):
        with pytest.raises(TensorMismatchError, match=r"\['a'\]\['b'\] and \['a.b'\]"):
            act(tmp_path / "x.pt")


def test_two_members_of_an_npz_of_one_name_are_refused(tmp_path: Path) -> None:
    import io
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, value in (("a.npy", 1.0), ("a", 2.0)):
            buffer = io.BytesIO()
            np.save(buffer, np.full(3, value))
            archive.writestr(name, buffer.getvalue())
    with pytest.raises(TensorMismatchError, match="both a"):
        load_state(tmp_path / "x.npz")


def test_renaming_keeps_the_order_and_refuses_what_would_be_lost(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError, match="p and q are both z"):
        renamed_once({"p": 1, "q": 2}, lambda name: "z", tmp_path)
    assert renamed_once({"p": 1, "q": 2}, str.upper, tmp_path) == {"P": 1, "Q": 2}


def write_json(path: Path, r: str) -> None:
    path.write_text(f'{{"peft_type": "LORA", "r": 2, {r} "lora_alpha": 5}}')


def write_header(path: Path, r: str) -> None:
    metadata = {"lora_adapter_metadata": f'{{"unet.r": 2, {r.replace("r", "unet.r")} "unet.lora_alpha": 5}}'}
    save_file(lora("unet.x"), path, metadata=metadata)


@pytest.mark.parametrize("again", ['"r": 2,', '"r": 3,'])
def test_a_setting_of_json_with_two_values_is_refused(again: str, tmp_path: Path) -> None:
    save_file(lora("base_model.model.x"), tmp_path / "adapter_model.safetensors")
    write_json(tmp_path / "adapter_config.json", again)
    write_header(tmp_path / "unet.safetensors", again)
    reads: list[Callable[[], Any]] = [
        lambda: rx.read(tmp_path),
        lambda: rx.read(tmp_path / "unet.safetensors"),
    ]
    for read in reads:
        if "2" in again:
            assert read().adapters
            continue
        with pytest.raises(CheckpointError, match="twice, 2 and 3"):
            read()


def test_a_setting_of_yaml_given_twice_is_refused(tmp_path: Path) -> None:
    torch.save(lora("x", end=""), tmp_path / "x.pt")
    (tmp_path / "x.yaml").write_text("lora_alpha: 5\nlora_alpha: 6\n")
    with pytest.raises(CheckpointError, match="'lora_alpha' twice"):
        rx.read(tmp_path / "x.pt", config=tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("lora_alpha: 5\n")
    assert rx.read(tmp_path / "x.pt", config=tmp_path / "x.yaml").adapters[0].params.scale == 2.5


def test_paths_of_one_layer_given_twice_are_refused(tmp_path: Path) -> None:
    names = {"Ad": (6, 2), "Au": (2, 8), "Bd": (6, 2), "Bu": (2, 8), "Cd": (6, 2), "Cu": (2, 1), "D": (8,), "E": (8,)}
    torch.save({f"x.{name}": t(*shape) for name, shape in names.items()}, tmp_path / "x.pt")
    path = {"A": "LoRA_2", "B": "none", "C": "none", "D": "none", "E": "none"}
    twice = {"x": path, "base_model.model.x": path | {"E": "vector"}}
    (tmp_path / "paths.json").write_text(json.dumps(twice))
    with pytest.raises(TensorMismatchError, match=r"x and base_model\.model\.x are both x"):
        rx.read(tmp_path / "x.pt", config=tmp_path / "paths.json")
