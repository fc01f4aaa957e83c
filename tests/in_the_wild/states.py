"""State dicts: of peft's models out of training loops, and of other libraries' LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import torch
from test_peft_state import SPEC, around, lora, trained, vit
from test_plain_lora import TOWERS, LoRAParametrization, Net, clip_lora, filled, loralib_base, packed, plain_names
from torch import nn
from torch.nn.utils import parametrize

from .made import Made, Wild, answers
from .models import draw

IMAGE = draw(3, 3, 32, 32)


def of_peft(kind: str, whole: bool) -> Callable[[Path], Made]:
    """A state dict in what the training loop puts around it; alone, or the base's own tensors beside it."""

    def make(folder: Path) -> Made:
        model = trained(lora(modules_to_save=["head"]))
        state = model.state_dict()
        options: dict[str, Any] = {"base": SPEC, "settings": {"lora_alpha": 12}}
        if not whole:
            state = {n: t for n, t in state.items() if "lora_" in n or "modules_to_save" in n}
            torch.save(vit().state_dict(), folder / "base.pt")
            options["base_weights"] = folder / "base.pt"
        torch.save(around(kind, state), folder / "last.ckpt")
        return Made(folder / "last.ckpt", {"image": IMAGE}, answers(model, image=IMAGE.double()), options)

    return make


IDS = torch.randint(0, 11, (4, 7, 7), generator=torch.Generator().manual_seed(3))


def of_loralib(folder: Path) -> Made:
    """Embedding, convolutions, MergedLinear and Linear; the weights of the training mode are those of the base."""
    model: Any = filled(Net(True)).train()
    model.kv = nn.Linear(36, 24)
    plain = plain_names(model.state_dict())
    torch.save(plain, folder / "base.pt")
    torch.save(loralib.lora_state_dict(model), folder / "lora.pt")
    options = loralib_base(folder) | {
        "base_weights": folder / "base.pt",
        "settings": {"lora_alpha": 7, "enable_lora": "true,false,true"},
    }
    with torch.no_grad():
        expected = model.double()(IDS)
    return Made(folder / "lora.pt", {"ids": IDS}, expected, options)


def of_minlora(folder: Path) -> Made:
    model: Any = Net(False)
    for name in ("conv", "qkv", "out"):
        layer = model.get_submodule(name)
        out, *rest = layer.weight.shape
        parametrize.register_parametrization(layer, "weight", LoRAParametrization(math.prod(rest), out, 3, 7.0))
    filled(model)
    torch.save(model.state_dict(), folder / "lora.pt")
    options = loralib_base(folder) | {"settings": {"lora_alpha": 7}}
    return Made(folder / "lora.pt", {"ids": IDS}, answers(model, ids=IDS), options)


def by_number(scale: int) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        model, state = packed([0, 1], scale)
        torch.save(state, folder / "lora.pth")
        torch.save(vit().state_dict(), folder / "base.pt")
        options = {"base": SPEC, "base_weights": folder / "base.pt", "settings": {"scale": scale}}
        return Made(folder / "lora.pth", {"image": IMAGE}, answers(model, image=IMAGE.double()), options)

    return make


def of_clip_lora(folder: Path) -> Made:
    (folder / "net.py").write_text(TOWERS)
    scope: dict[str, Any] = {}
    exec(TOWERS, scope)
    model = scope["build"]()
    weights = clip_lora(model, {"transformer": list(range(12)), "visual.transformer": list(range(4))}, "qkv", 3)
    said = {"r": 4, "alpha": 3, "encoder": "both", "params": list("qkv"), "position": "all"}
    torch.save({"weights": weights, "metadata": said}, folder / "lora.pt")
    inputs = {"text": draw(3, 5, 8), "image": draw(3, 6, 16)}
    options = {
        "base": f"py:{folder / 'net.py'}:build",
        "inputs": ["text=batch,5,8:float32", "image=batch,6,16:float32"],
    }
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    return Made(folder / "lora.pt", inputs, answers(model, **wide), options)


CODE = "its code, written out"
STATES = [
    Wild("a peft model's state dict, whole", "torch.save", of_peft("plain", whole=True)),
    Wild("a peft model's state dict, `.ckpt`", "Lightning", of_peft("lightning", whole=True)),
    Wild("adapters alone, `module.` in front", "DataParallel", of_peft("parallel", whole=False)),
    Wild("adapters alone, inside another model", "torch.save", of_peft("inside another", whole=False)),
    Wild("loralib: Embedding, Conv2d, MergedLinear, Linear", "loralib", of_loralib, ""),
    Wild("minLoRA, parametrizations", "minLoRA", of_minlora, "", CODE),
    Wild("`w_a_000`, `w_b_000`", "SAMed", by_number(1), "", CODE),
    Wild("`w_a_000`, `w_b_000`, with a scale", "LoRA-ViT", by_number(2), "", CODE),
    Wild("CLIP-LoRA", "CLIP-LoRA", of_clip_lora, "", CODE),
]
