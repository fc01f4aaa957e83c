"""PEFT RoAd folders: ``road_theta`` and ``road_alpha`` of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import road
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder
from reparam_export.errors import CheckpointError

LOOKED_FOR = looked_for("ROAD")
READ = ("group_size", "variant")

accepts = of_type("ROAD")


def read(source: Source) -> Parts:
    return read_folder(source, "road_theta", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    variant = str(layer.setting("variant", "road_1"))
    if variant not in road.SIZES:
        raise CheckpointError(f"{layer.source.path}: variant {variant!r} is not one of {', '.join(road.SIZES)}")
    group = int(layer.setting("group_size", 64))
    return "road", road.Params(layer.take("road_theta"), layer.take("road_alpha"), variant, group)
