"""Tiny random models of many architectures (``architectures.yaml``): each is saved, and returned with its options of ``convert``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

Made = tuple[torch.nn.Module, list[str]]
LIST = Path(__file__).with_suffix("").parent / "architectures.yaml"


def architectures() -> dict[str, Callable[[Path], Made]]:
    """By ``library/name``: the function that makes it in a folder."""
    listed = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    found: dict[str, Callable[[Path], Made]] = {}
    for auto, group in listed["transformers"].items():
        found |= {f"transformers/{kind}": partial(of_kind, auto, kind, settings) for kind, settings in group.items()}
    for kind, entry in listed["transformers classes"].items():
        found[f"transformers/{kind}"] = partial(of_class, entry["class"], entry["config"], entry["settings"])
    for spec in listed["timm"]:
        found[f"timm/{spec.partition('?')[0]}"] = partial(of_timm, spec)
    for kind, entry in listed["diffusers"].items():
        found[f"diffusers/{kind}"] = partial(of_diffusers, entry["class"], entry["settings"])
    return found


def of_kind(auto: str, kind: str, settings: dict[str, Any], folder: Path) -> Made:
    """A model of transformers by its model_type and auto class."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **settings)
    return saved(getattr(transformers, auto).from_config(config), folder, "hf")


def of_class(name: str, config: str, settings: dict[str, Any], folder: Path) -> Made:
    """A model of transformers by its class and that of its config."""
    import transformers

    return saved(getattr(transformers, name)(getattr(transformers, config)(**settings)), folder, "hf")


def of_diffusers(name: str, settings: dict[str, Any], folder: Path) -> Made:
    """A UNet or transformer of diffusers."""
    import diffusers

    return saved(getattr(diffusers, name)(**settings), folder, "diffusers")


def of_timm(spec: str, folder: Path) -> Made:
    """A model of timm, with weights of its own in a file."""
    import timm

    from reparam_export.models import split_argument

    name, keywords = split_argument(spec)
    model = moved(timm.create_model(name, **keywords, num_classes=7).eval())
    folder.mkdir()
    torch.save(model.state_dict(), folder / "base.pt")
    full = f"timm:{spec}{'&' if '?' in spec else '?'}num_classes=7"
    return model, ["--base", full, "--base-weights", str(folder / "base.pt")]


def saved(model: torch.nn.Module, folder: Path, scheme: str) -> Made:
    """The model as its library saves it."""
    model = moved(model.eval())
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)  # type: ignore[operator]
    return model, ["--base", f"{scheme}:{folder}"]


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms that start at zero and one would hide a fault, and so would a head of zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.ndim == 1 or not parameter.any()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
