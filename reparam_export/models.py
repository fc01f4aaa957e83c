"""Plain models and their unfused reference.

    Signature   names, shapes and dtypes of a model's inputs and outputs
    Base        a base spec that builds the same plain ``nn.Module`` again and again
    adapted()   the unfused model: every touched module runs its kind's ``apply``
    fused()     the plain model with the fused tensors in it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Input:
    """One model input. ``shape`` holds ints and names of dynamic axes; the first is always ``"batch"``."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"  # "float32" or "int64"
    high: int | None = None  # integers are drawn from [0, high)
    default: dict[str, int] | None = None  # a usual size for each dynamic axis other than batch


@dataclass(frozen=True)
class Signature:
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any] | None = None  # keyword arguments the forward always gets, such as use_cache=False


def plain(model: nn.Module, signature: Signature) -> nn.Module:
    """``model`` as a module of positional tensors (in signature order) to a tuple of tensors. It owns ``.model``."""
    from torch import nn as torch_nn

    class Plain(torch_nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return outputs_of_call(self.model, signature, tensors)

    return Plain()


def outputs_of_call(model: nn.Module, signature: Signature, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Call the model and return its outputs as a flat tuple, in the order of ``signature.outputs``."""
    import torch

    settings = dict(signature.settings or {})
    method = getattr(model, settings.pop("method", "forward") if "method" in settings else "__call__")
    if settings.pop("by_name", False):
        result = method(**{i.name: t for i, t in zip(signature.inputs, tensors, strict=True)}, **settings)
    else:
        result = method(*tensors, **settings)
    if isinstance(result, torch.Tensor):
        return (result,)
    values = result.values() if isinstance(result, Mapping) else result
    return tuple(v for v in values if isinstance(v, torch.Tensor))
