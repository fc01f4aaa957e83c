"""peft's layers of a skeleton: with the real base layer put inside, and a plain LoRA without any."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import kind
from reparam_export.adapters.probed import exactly
from reparam_export.affine import to_dtype
from reparam_export.checkpoints import Adapter
from reparam_export.verification.witness._layers import error

if TYPE_CHECKING:
    from torch import Tensor, nn


def with_base(layer: Any, base: nn.Module) -> nn.Module:
    """A copy of one of peft's layers with the numbers of the base layer in it; its own bias stays, which peft may have loaded."""
    inner = layer.get_base_layer()
    kept = inner.weight
    inner.weight = None
    try:
        made = copy.deepcopy(layer)
    finally:
        inner.weight = kept
    made.get_base_layer().weight = base.get_parameter("weight")
    return made.double()  # type: ignore[no-any-return]


def adapter_alone(layer: Any, adapters: Sequence[Adapter], seed: int) -> float | None:
    """The relative difference of a plain LoRA on a linear layer without its base layer; None for anything else, or without numbers."""
    import torch

    plain = (
        len(adapters) == 1 and adapters[0].kind == "lora" and adapters[0].rows is None and adapters[0].parameter is None
    )
    if not plain or type(layer).__name__ != "Linear" or any(p.is_meta for p in layer.parameters()):
        return None
    params = to_dtype(_torch(adapters[0].params), torch.float64)
    into, out = params.pair.down.weight.shape[1], params.pair.up.weight.shape[0]
    x = torch.randn((2, 3, into), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], out)

    class Nothing(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nothing(x)

    kept, layer.base_layer = layer.base_layer, Nothing()
    try:
        with exactly(torch.float64):
            theirs = copy.deepcopy(layer).double()(x)
            base: Any = nothing
            ours = kind("lora").apply(x, base, params)
    finally:
        layer.base_layer = kept
    return error(theirs, ours, nothing(x))


def _torch(params: Any) -> Any:
    """Params that were read without torch, with torch's tensors."""
    import torch

    from reparam_export.affine import map_tensors

    return map_tensors(params, lambda t: t if isinstance(t, torch.Tensor) else torch.as_tensor(t))
