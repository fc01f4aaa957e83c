"""One layer of another library against ours: the same seeded inputs, float64, no gradients.

    error = max |theirs - ours| / max(max |ours - base|, FLOOR max |ours|)

in units of what the adapter does to the layer's answers, so that a small adapter misread shows as clearly as a large one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.adapters.probed import exactly
from reparam_export.assembly import adapted
from reparam_export.checkpoints import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

BOUND = 1e-6  # of the adapter's effect: what a constant kept in float32 may cost; a misread setting costs far more
FLOOR = 1e-6  # of the answer: what float64 itself loses is below BOUND x FLOOR of it


def unfused(name: str, module: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    """A copy of the module with its adapters, unfused, in float64. adapters: those on the module itself or on modules inside it."""
    import torch

    root = torch.nn.Module()
    root.add_module("it", copy.deepcopy(module))
    inside = [replace(a, module="it" + a.module.removeprefix(name)) for a in adapters]
    return adapted(root, inside, torch.float64).get_submodule("it")


def inputs_of(module: nn.Module, seed: int) -> tuple[Tensor, ...] | None:
    """Seeded inputs of a plain layer in float64 (integers for an embedding); None for a module that is called in a way of its own."""
    import torch
    from torch import nn

    draw = torch.Generator().manual_seed(seed)
    many: Any = module

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    if isinstance(module, nn.Embedding):
        return (torch.randint(module.num_embeddings, (2, 5), generator=draw),)
    if isinstance(module, nn.Linear):
        return (normal(2, 3, module.in_features),)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return (normal(2, 3, many.weight.shape[0]),)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        return (normal(2, module.in_channels, *((k - 1) * d + 1 + 2 * s for k, s, d in sizes)),)
    if isinstance(module, nn.MultiheadAttention):
        return (normal(2, 3, module.embed_dim),) * 3
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return (normal(2, 3, *module.normalized_shape),)
    return None


def answer(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """What a layer answers; the first of several tensors."""
    import torch

    with exactly(torch.float64):
        found: Any = module(*inputs)
    first: Tensor = found[0] if isinstance(found, tuple) else found
    return first


def error(theirs: Tensor, ours: Tensor, base: Tensor) -> float:
    """See above; infinite for another shape and for what is not finite."""
    if theirs.shape != ours.shape or not bool(theirs.isfinite().all()):
        return math.inf
    if not theirs.numel():
        return 0.0
    scale = max(_largest(ours - base) if base.shape == ours.shape else 0.0, FLOOR * _largest(ours))
    gap = _largest(theirs - ours)
    return gap / scale if scale > 0 else (0.0 if gap == 0 else math.inf)


def tensors_error(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """The same of tensors that are read directly, the worst of them."""
    return max((error(theirs[n].double(), ours[n].double(), base[n].double()) for n in theirs), default=0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
