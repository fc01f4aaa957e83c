"""PEFT HRA folders: ``hra_u`` (in, r) of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import hra
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, check_geometry, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("HRA")
READ = ("apply_GS", "r", "rank_pattern")

accepts = of_type("HRA")


def read(source: Source) -> Parts:
    return read_folder(source, "hra_u", _params, READ, check=check_geometry)


def _params(layer: Layer) -> tuple[str, Any]:
    u = layer.take("hra_u")
    layer.check_rank(int(u.shape[1]))
    return "hra", hra.Params(u, "orthonormal" if layer.source.config.get("apply_GS") else "as given")
