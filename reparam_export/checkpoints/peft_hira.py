"""PEFT HiRA folders: ``hira_A`` and ``hira_B`` of each module, ``hira_embedding_A`` and ``hira_embedding_B`` of an embedding.

peft 0.21 passes over the ranks of ``rank_pattern``: the tensors have rank r all the same. The rank is no part of the scale.
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import hira
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Parts, Source, as_matrix
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("HIRA")
READ = ("r", "rank_pattern")

accepts = of_type("HIRA")


def read(source: Source) -> Parts:
    return read_folder(source, ("hira_A", "hira_embedding_A"), _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    down = layer.take_if("hira_embedding_A")
    name = "hira_" if down is None else "hira_embedding_"
    down = layer.take("hira_A") if down is None else down
    if int(down.shape[0]) != layer.setting("r", 0):
        layer.check_rank(int(down.shape[0]))
    return "hira", hira.Params(Bottleneck(Affine(as_matrix(down)), Affine(as_matrix(layer.take(f"{name}B")))))
