"""PEFT DEFT folders: ``deft_P`` (out, r) and, unless ``para`` is on, ``deft_R`` (r, in) of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import deft
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder
from reparam_export.errors import CheckpointError

LOOKED_FOR = looked_for("DEFT")
READ = ("alpha", "decomposition_method", "init_scale", "para", "r")

accepts = of_type("DEFT")


def read(source: Source) -> Parts:
    return read_folder(source, "deft_P", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    P = layer.take("deft_P")  # noqa: N806
    R = None if layer.source.config.get("para") else layer.take("deft_R")  # noqa: N806
    method, alpha = layer.setting("decomposition_method", "relu"), layer.source.config.get("alpha")
    if method not in ("relu", "qr"):
        raise CheckpointError(f"{layer.source.path}: decomposition_method {method!r} is not one of relu, qr")
    return "deft", deft.Params(P, R, float(alpha) / int(P.shape[1]) if alpha else 1.0, str(method))
