"""PEFT BOFT folders: ``boft_R`` (factors, blocks, b, b) and ``boft_s`` of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import boft
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, check_geometry, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("BOFT")
READ = ("boft_block_num", "boft_block_size", "boft_n_butterfly_factor")

accepts = of_type("BOFT")


def read(source: Source) -> Parts:
    return read_folder(source, "boft_R", _params, READ, check=check_geometry)


def _params(layer: Layer) -> tuple[str, Any]:
    return "boft", boft.Params(layer.take("boft_R"), layer.take("boft_s").reshape(-1))
