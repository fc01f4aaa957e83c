"""PEFT GraLoRA folders: ``gralora_A`` (k, in / k, r), ``gralora_B`` (k, r, out / k) of each module, and a plain pair with ``hybrid_r``."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import gralora
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("GRALORA")
READ = ("alpha", "gralora_k", "hybrid_r", "r")

accepts = of_type("GRALORA")


def read(source: Source) -> Parts:
    return read_folder(source, "gralora_A", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    A, hybrid = layer.take("gralora_A"), int(layer.setting("hybrid_r", 0))  # noqa: N806
    pair = None
    if hybrid:
        down, up = (layer.take(f"gralora_{side}_general.weight") for side in "AB")
        pair = Bottleneck(Affine(down), Affine(up))
    layer.check_rank(int(A.shape[2]))
    scale = float(layer.setting("alpha", 64)) / (int(A.shape[2]) + hybrid)
    return "gralora", gralora.Params(A, layer.take("gralora_B"), scale, pair)
