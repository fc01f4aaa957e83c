"""Whole models in one file, as the authors' training code leaves them, with the outputs that it gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import CASES
from test_whole_files import whole

from .made import Made, Wild

AUTHORS = "the authors' recorded answers"


def its_own_base(name: str) -> Callable[[Path], Made]:
    """Adapters and base in one state dict, in a training loop's checkpoint."""

    def make(folder: Path) -> Made:
        case = CASES[name]
        state = {f"module.{n}": t for n, t in whole(name).items()}
        torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3}, folder / "last.pt")
        options = {n: v for n, v in case.arguments()[1].items() if n != "base_weights"}
        return Made(folder / "last.pt", case.inputs(), case.expected(), options)

    return make


def average_beside(folder: Path) -> Made:
    """timm's saver with a moving average of the weights."""
    case = CASES["hydra_vtab"]
    state = torch.load(case.folder / case.path, weights_only=True)
    worse = {n: 2 * t for n, t in state.items()}
    torch.save({"state_dict": worse, "state_dict_ema": state, "epoch": 3, "arch": "vit"}, folder / "model_best.pth.tar")
    options = case.arguments()[1] | {"settings": {"weights": "state_dict_ema"}}
    return Made(folder / "model_best.pth.tar", case.inputs(), case.expected(), options)


def base_of_lightning(folder: Path) -> Made:
    """The adapters alone; the base's weights in a checkpoint of Lightning."""
    case = CASES["repadapter_vit"]
    path, options = case.arguments()
    given: dict[str, Any] = torch.load(options["base_weights"], weights_only=True)
    content = {"state_dict": {f"model.{n}": t for n, t in given.items()}, "hyper_parameters": {"lr": 1e-3}}
    torch.save(content, folder / "base.ckpt")
    return Made(path, case.inputs(), case.expected(), options | {"base_weights": folder / "base.ckpt"})


def as_it_is(name: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        path, options = CASES[name].arguments()
        return Made(path, CASES[name].inputs(), CASES[name].expected(), options)

    return make


WHOLE = [
    Wild("whole model, `module.` in front", "Hydra", its_own_base("hydra_vtab"), "", AUTHORS),
    Wild("whole model", "GLoRA", its_own_base("glora_vit"), "", AUTHORS),
    Wild("whole model", "RepAdapter", its_own_base("repadapter_vit"), "", AUTHORS),
    Wild("moving average beside the weights", "Hydra in timm's saver", average_beside, "", AUTHORS),
    Wild("base weights in a `.ckpt`", "RepAdapter, Lightning", base_of_lightning, "", AUTHORS),
    Wild("whole model", "SSF", as_it_is("ssf_vit"), "", AUTHORS),
]
