"""PEFT BEFT folders: ``beft_bias`` (1, out) of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import beft
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("BEFT")

accepts = of_type("BEFT")


def read(source: Source) -> Parts:
    return read_folder(source, "beft_bias", _params)


def _params(layer: Layer) -> tuple[str, Any]:
    return "beft", beft.Params(layer.take("beft_bias").reshape(-1))
