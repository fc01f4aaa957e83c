"""PEFT C3A folders: ``c3a_kernel`` (out / block, in / block, block) of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import c3a
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("C3A")
READ = ("block_size", "block_size_pattern")

accepts = of_type("C3A")


def read(source: Source) -> Parts:
    return read_folder(source, "c3a_kernel", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    return "c3a", c3a.Params(layer.take("c3a_kernel"))
