"""PEFT LoHa folders: ``hada_w1_a`` to ``hada_w2_b`` of each module, and ``hada_t1``, ``hada_t2`` for the kernel of a convolution."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import loha
from reparam_export.checkpoints import Parts, Source, as_core
from reparam_export.checkpoints._peft import Layer, check_alpha, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("LOHA")
READ = ("alpha", "alpha_pattern", "r", "rank_pattern", "use_effective_conv2d")

accepts = of_type("LOHA")


def read(source: Source) -> Parts:
    check_alpha(source, "alpha")
    return read_folder(source, "hada_w1_a", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    t1, t2 = (as_core(layer.take_if(f"hada_t{n}")) for n in (1, 2))
    a1, b1, a2, b2 = (layer.take(f"hada_w{n}_{side}") for n in (1, 2) for side in "ab")
    if t1 is not None:
        a1, a2 = a1.T, a2.T
    layer.check_rank(int(b1.shape[0]))
    return "loha", loha.Params(a1, b1, a2, b2, float(layer.own("alpha_pattern", "alpha")) / int(b1.shape[0]), t1, t2)
