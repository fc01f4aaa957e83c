"""PEFT MiSS folders: ``miss_block`` of each module; ``init_weights`` says which of the three forms it is."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import miss
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("MISS")
READ = ("mini_r", "r")

accepts = of_type("MISS")


def read(source: Source) -> Parts:
    return read_folder(source, "miss_block", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    form = layer.source.config.get("init_weights")
    return "miss", miss.Params(layer.take("miss_block"), form if form in ("bat", "mini") else "miss")
