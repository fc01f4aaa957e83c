"""PEFT DeLoRA folders: ``delora_A``, ``delora_B``, ``delora_lambda`` and ``delora_w_norm`` of each module."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import delora
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("DELORA")
READ = ("delora_lambda", "lambda_pattern", "r", "rank_pattern")

accepts = of_type("DELORA")


def read(source: Source) -> Parts:
    return read_folder(source, "delora_A", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    A = layer.take("delora_A")  # noqa: N806
    layer.check_rank(int(A.shape[0]))
    return "delora", delora.Params(A, layer.take("delora_B"), layer.take("delora_lambda"), layer.take("delora_w_norm"))
