"""PEFT LoKr folders: ``lokr_w1`` or its two factors, ``lokr_w2`` or its two factors and ``lokr_t2`` for the kernel of a convolution.

The scale is alpha / r, whatever is stored whole. A whole ``lokr_w2`` of a Conv1d has three dimensions, and peft pairs the wrong ones
of them in its Kronecker product; such a folder goes through peft's own layers.
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import lokr
from reparam_export.affine import Tensor
from reparam_export.checkpoints import Parts, Source, as_core, as_matrix
from reparam_export.checkpoints._peft import Layer, check_alpha, looked_for, of_type, read_folder
from reparam_export.checkpoints._peft_layers import read_layers

LOOKED_FOR = looked_for("LOKR")
READ = (
    "alpha", "alpha_pattern", "decompose_both", "decompose_factor", "r", "rank_dropout_scale", "rank_pattern",
    "use_effective_conv2d",
)  # fmt: skip

accepts = of_type("LOKR")


def read(source: Source) -> Parts:
    check_alpha(source, "alpha")
    if any(name.endswith(".lokr_w2") and len(tensor.shape) == 3 for name, tensor in source.tensors.items()):
        return read_layers(
            source, "peft's own LOKR layers, probed one by one: their Conv1d has no plain Kronecker product"
        )
    return read_folder(source, ("lokr_w1", "lokr_w1_a"), _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (
        layer.take_if(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    )
    for name, whole, a, b in (("w1", w1, w1_a, w1_b), ("w2", w2, w2_a, w2_b)):
        if (whole is None) != (a is not None and b is not None):
            layer.take(f"lokr_{name}")  # names what is missing
    scale = float(layer.own("alpha_pattern", "alpha")) / int(layer.own("rank_pattern", "r"))
    return "lokr", lokr.Params(scale, w1, w1_a, w1_b, _matrix(w2), w2_a, w2_b, as_core(t2))


def _matrix(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else as_matrix(tensor)
