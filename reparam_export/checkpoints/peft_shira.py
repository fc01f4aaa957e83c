"""PEFT SHiRA folders: ``shira_weight`` (n,) and ``shira_indices`` (2, n) of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import shira
from reparam_export.checkpoints import Parts, Source, as_integers
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("SHIRA")
READ = ("mask_type", "r", "random_seed")

accepts = of_type("SHIRA")


def read(source: Source) -> Parts:
    return read_folder(source, "shira_weight", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    return "shira", shira.Params(layer.take("shira_weight"), as_integers(layer.take("shira_indices")))
