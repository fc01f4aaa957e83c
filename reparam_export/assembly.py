"""A checkpoint or its fused weights put into a live base module; the only place, with ``training/``, that touches one.

adapted()   the unfused model: every touched module runs its kind's ``apply`` on the activations
fused()     the plain model with the fused tensors in it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import kind
from reparam_export.affine import map_tensors
from reparam_export.checkpoints import Adapter, Checkpoint
from reparam_export.errors import TensorMismatchError
from reparam_export.layouts import affine_of, layout_of, outputs_of, rows_of
from reparam_export.models import Base, parse_input

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def base_of(checkpoint: Checkpoint) -> Base:
    """The base that the checkpoint names. Raises MissingSettingError when it names none and none was given."""
    from reparam_export.errors import MissingSettingError

    if checkpoint.base is None:
        raise MissingSettingError(
            f"{checkpoint.path}: a {checkpoint.format} checkpoint holds the adapter only and does not name its base; "
            "pass it with --base timm:NAME, hf:FOLDER, open_clip:NAME or py:FILE.py:FUNCTION (and --base-weights FILE)",
            setting="base",
            found_in="the training script",
            option="--base SPEC",
        )
    return Base(
        spec=checkpoint.base,
        weights=checkpoint.base_weights,
        state=checkpoint.base_state or None,
        replaced={name: tuple(tensor.shape) for name, tensor in checkpoint.replaced.items()},
        ignored=checkpoint.ignored,
        inputs=tuple(parse_input(text) for text in checkpoint.inputs),
    )


def place(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors under their state-dict names into the module; each takes the dtype it has. Returns the module.

    A bias that the module lacks (``X.bias`` with X present) is created. A tensor that has several names there takes the value given for
    one of them; where several are given, each name gets its own and they are one no longer.
    Raises TensorMismatchError for a name or shape the module lacks.
    """
    from torch import nn as torch_nn

    tied = tied_names(module)
    for name, tensor in tensors.items():
        owner, attribute = _owner(module, name)
        current = getattr(owner, attribute, None)
        created = current is None and attribute == "bias" and hasattr(owner, "weight")
        if not created and (current is None or tuple(current.shape) != tuple(tensor.shape)):
            raise TensorMismatchError(
                f"{name}: the base has {None if current is None else tuple(current.shape)}, the checkpoint brings {tuple(tensor.shape)}",
                module=name.rpartition(".")[0],
                tensor=attribute,
                expected=None if current is None else tuple(current.shape),
                found=tuple(tensor.shape),
            )
        if attribute in owner._buffers:
            owner._buffers[attribute] = tensor
        else:
            parameter = torch_nn.Parameter(tensor, requires_grad=False)
            for other in tied.get(name, (name,)):
                if other == name or other not in tensors:
                    setattr(*_owner(module, other), parameter)
    return module


def tied_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each name of a parameter that has several (tied embeddings): all of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def with_replaced(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The base with the tensors that the checkpoint brings whole, in the base's own dtype."""
    state = module.state_dict()
    cast = {
        name: tensor.to(state[name].dtype) if name in state and state[name].is_floating_point() else tensor
        for name, tensor in checkpoint.replaced.items()
    }
    return place(module, cast)


def fused(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The plain base module with all of the fused tensors in it (its own dtype each)."""
    return place(module, tensors)


def adapted(module: nn.Module, adapters: Sequence[Adapter], dtype: torch.dtype) -> nn.Module:
    """The unfused model in one dtype: every touched module is replaced by one that runs its kind's ``apply``.

    module: a fresh base (``with_replaced``), which is changed and returned. The adapters' tensors are cast to dtype.
    """
    module = module.to(dtype)
    by_module: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        by_module.setdefault(adapter.module, []).append(adapter)
    for name, of_module in by_module.items():
        parent_name, _, attribute = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        setattr(parent, attribute, adapted_module(name, getattr(parent, attribute), of_module, dtype))
    return module.eval()


def adapted_module(name: str, module: nn.Module, adapters: Sequence[Adapter], dtype: torch.dtype) -> nn.Module:
    """One touched module with its adapters unfused: same inputs and outputs as the module itself."""
    from torch import nn as torch_nn

    layout = layout_of(name, module)
    whole = affine_of(module, layout, dtype)
    cast = [(kind(a.kind), map_tensors(a.params, lambda t: t.to(dtype)), a.rows) for a in adapters]

    class Adapted(torch_nn.Module):
        """y = apply(x, base, p) on the adapter's rows, the base's own output on all others."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = whole.in_features, whole.out_features
            self.weight = module.weight
            self.bias = getattr(module, "bias", None)
            self.calls = 0  # a module that is never called has its weight read directly, or no part in the outputs

        def forward(self, x: Tensor) -> Tensor:
            import torch

            self.calls += 1
            rows = rows_of(x, module, layout, dtype)
            y: Any = None
            for of_kind, params, part in cast:
                if part is None:
                    return outputs_of(of_kind.apply(rows, whole, params), layout)
                y = whole(rows) if y is None else y
                inner = of_kind.apply(rows, whole.rows(*part), params)
                y = torch.cat([y[..., : part[0]], inner, y[..., part[1] :]], dim=-1)
            return outputs_of(y, layout)

    return Adapted()


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    parent, _, attribute = name.rpartition(".")
    try:
        return module.get_submodule(parent), attribute
    except AttributeError as error:
        raise TensorMismatchError(
            f"{name}: the base has no module {parent!r}; is this the base that the checkpoint was trained on?",
            module=parent,
            tensor=attribute,
            expected=None,
            found=name,
        ) from error
