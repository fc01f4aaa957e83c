"""Files that cannot be folded, or not as they are: each is one error that says what it is and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import test_grouped
import torch
from safetensors.torch import load_file, save_file
from test_diffusion_files import base as text_base

from reparam_export.errors import CheckpointError, FusionError, ReparamError, TensorMismatchError

from .made import ADAPTER, adapted, language_model, saved

Given = tuple[Path, dict[str, Any]]  # the file, and the options of rx.read


@dataclass(frozen=True)
class Refused:
    """One kind of file. says: a pattern of the error's text."""

    name: str
    who: str
    make: Callable[[Path], Given]
    error: type[ReparamError]
    says: str


def changed(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Callable[[Path], Given]:
    """A peft folder whose configuration or tensors are changed in place."""

    def make(folder: Path) -> Given:
        base = saved(language_model(), folder / "base")
        adapted(language_model(), base, folder / "adapter", target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        file, config = folder / "adapter" / ADAPTER, folder / "adapter" / "adapter_config.json"
        settings, tensors = json.loads(config.read_text()), load_file(file)
        change(settings, tensors)
        config.write_text(json.dumps(settings))
        save_file(tensors, file)
        return folder / "adapter", {}

    return make


def emptied(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors |= dict.fromkeys(tensors, torch.zeros(0))


def without_alpha(settings: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    settings["lora_alpha"] = 0


def halved(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(n for n in tensors if "lora_B" in n)]


def of_nothing(settings: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    settings["alpha_pattern"] = {"no_such_proj": 3}


def several_checkpoints(folder: Path) -> Given:
    changed(lambda *_: None)(folder)
    (folder / "run").mkdir()
    for number in (10, 20):
        (folder / "run" / f"checkpoint-{number}").mkdir()
        for file in (folder / "adapter").iterdir():
            (folder / "run" / f"checkpoint-{number}" / file.name).write_bytes(file.read_bytes())
    return folder / "run", {}


def on_a_depthwise_convolution(folder: Path) -> Given:
    test_grouped.peft_adapter(folder, ["depthwise"]).save_pretrained(folder / "adapter")
    return folder / "adapter", {"base": test_grouped.spec(folder), "inputs": test_grouped.INPUTS}


def file_of(names: dict[str, tuple[int, ...]], **options: Any) -> Callable[[Path], Given]:
    def make(folder: Path) -> Given:
        save_file({name: torch.ones(shape) for name, shape in names.items()}, folder / "lora.safetensors")
        return folder / "lora.safetensors", options

    return make


def of_two_towers(folder: Path) -> Given:
    return file_of(TOWERS)(folder)[0], text_base(folder, "text")


FLUX = "diffusion_model.double_blocks.0.img_attn.qkv"
TOWERS = {
    f"lora_{te}_text_model_encoder_layers_0_mlp_fc1.{part}": shape
    for te in ("te1", "te2")
    for part, shape in {"lora_down.weight": (2, 8), "lora_up.weight": (16, 2), "alpha": ()}.items()
}
REFUSED = [
    Refused("every tensor of shape [0]", "DeepSpeed ZeRO-3", changed(emptied), CheckpointError, r"zero_to_fp32\.py"),
    Refused("lora_alpha 0", "verl", changed(without_alpha), CheckpointError, "lora_alpha"),
    Refused("half a pair", "anyone", changed(halved), TensorMismatchError, "lora_B"),
    Refused("a pattern that matches nothing", "anyone", changed(of_nothing), CheckpointError, "no_such_proj"),
    Refused("a folder of `checkpoint-N`", "transformers", several_checkpoints, CheckpointError, "checkpoint-20"),
    Refused("LoRA on a depthwise convolution", "peft", on_a_depthwise_convolution, FusionError, "in 8 groups"),
    Refused(
        "FLUX under its first names",
        "ComfyUI",
        file_of({f"{FLUX}.lora_A.weight": (4, 8), f"{FLUX}.lora_B.weight": (24, 4)}, settings={"lora_alpha": 4}),
        CheckpointError,
        "save_lora_adapter",
    ),
    Refused("two text encoders in one file", "kohya", of_two_towers, ReparamError, r"te1\|te2"),
]
