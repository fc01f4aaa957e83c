"""PEFT OFT folders: ``oft_R.weight`` of each module, the entries of its skew-symmetric blocks; ``oft_embedding_R.weight`` of an embedding.

On a convolution with a kernel, peft's forward cuts the input into overlapping windows, turns each, and sums them where they overlap:
it is not the base's convolution even with no rotation at all, so it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import oft
from reparam_export.checkpoints import Adapter, Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder
from reparam_export.errors import NotAffineError

if TYPE_CHECKING:
    from torch import nn

LOOKED_FOR = looked_for("OFT")
READ = ("block_share", "coft", "eps", "num_cayley_neumann_terms", "oft_block_size", "r", "use_cayley_neumann")

accepts = of_type("OFT")


def read(source: Source) -> Parts:
    return read_folder(source, ("oft_R.weight", "oft_embedding_R.weight"), _params, READ, check=_check)


def _params(layer: Layer) -> tuple[str, Any]:
    on_outputs = layer.take_if("oft_embedding_R.weight")
    entries = layer.take("oft_R.weight") if on_outputs is None else on_outputs
    terms = 0
    if layer.source.config.get("use_cayley_neumann", True):
        terms = max(1, int(layer.setting("num_cayley_neumann_terms", 5)))
    eps = float(layer.setting("eps", 6e-5)) if layer.source.config.get("coft") else 0.0
    return "oft", oft.Params(entries, terms, eps, "input" if on_outputs is None else "output")


def _check(module: nn.Module, adapters: Sequence[Adapter]) -> None:
    kernels = [a.module for a in adapters if set(getattr(module.get_submodule(a.module), "kernel_size", (1,))) != {1}]
    if kernels:
        raise NotAffineError(
            f"{', '.join(kernels)}: OFT on a convolution with a kernel; peft sums the turned windows where they overlap, so that "
            "no weight of the base's convolution reproduces what was trained; train OFT on linear layers and 1 x 1 convolutions",
            modules=tuple(kernels),
            reason="OFT on a convolution with a kernel",
        )
