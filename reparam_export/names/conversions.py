"""The names that transformers' files have for the tensors of a model, and where in the model each of them lies.

transformers renames tensors between its versions, and gathers those of experts into stacks; files keep the names that they were first
saved under. Its own way back (``revert_weight_conversion``, which ``save_pretrained`` uses) is run on the model's tensors on the meta
device: what it gives are views of them, whose storage, offset and strides say which part of which tensor each is. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from reparam_export.names import Own, Place

if TYPE_CHECKING:
    from torch import Tensor, nn


def own_of(module: nn.Module) -> Own:
    """The names of a model, without numbers or with them. Those of its files, where it is one of transformers."""
    from torch import nn as torch_nn

    state, files = module.state_dict(keep_vars=True), places_in_files(module)
    layers = (torch_nn.Linear, torch_nn.Embedding, torch_nn.modules.conv._ConvNd)
    transposed = {name for name, part in module.named_modules() if getattr(part, "is_transposed", False) is True}
    return Own(
        modules=tuple(name for name, _ in module.named_modules() if name),
        tensors={name: tuple(tensor.shape) for name, tensor in state.items()},
        files=files or {},
        transposed=frozenset(transposed),
        language=_language(module),
        newer=None if files is None else _newer(module),
        routers=frozenset(
            name
            for name, part in module.named_modules()
            if files is not None
            and not isinstance(part, layers)
            and getattr(part._parameters.get("weight"), "ndim", 0) == 2
            and not hasattr(part, "nf")  # transformers' Conv1D
        ),
    )


def _newer(module: nn.Module) -> Callable[[str], str]:
    """transformers' own renaming of a name in a file while it loads; a part of a stack keeps its name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, state = getattr(module, "base_model_prefix", ""), module.state_dict()

    def newer(name: str) -> str:
        found, part = rename_source_key(name, renamings, converters, prefix, state)
        return name if part else str(found)

    return newer


def _language(module: nn.Module) -> str | None:
    """The name of the text decoder of a model of transformers that has other parts beside it."""
    find = getattr(module, "get_decoder", None)
    try:
        decoder = find() if callable(find) else None
    except Exception:  # some models have the method and no decoder
        return None
    found = next((name for name, part in module.named_modules() if part is decoder), None)
    return found if (found and "language" in found) or (found and "text" in found) else None


def places_in_files(module: nn.Module) -> dict[str, Place | None] | None:
    """Every name that differs in the model's files, with its place; None for a model that is not of transformers 5."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return None
    if not isinstance(module, PreTrainedModel):
        return None
    import torch

    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in module.state_dict().items()}
    names = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
    with _views():
        saved = revert_weight_conversion(module, dict(state))
    places = {name: _place(names.get(t.untyped_storage()._cdata), t, state) for name, t in saved.items()}
    return {name: place for name, place in places.items() if place is None or not place.whole or place.tensor != name}


def _views() -> Any:
    """A mode in which copies of tensors are the tensors themselves."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Views(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func in (torch.Tensor.contiguous, torch.Tensor.clone) else func(*args, **(kwargs or {}))

    return Views()


def _place(name: str | None, view: Tensor, state: dict[str, Tensor]) -> Place | None:
    """Which part of a tensor a view of it is: all, the transpose, one matrix of a stack, rows; None for any other part."""
    if name is None:
        return None
    whole, shape, stride, offset = state[name], tuple(view.shape), tuple(view.stride()), int(view.storage_offset())
    if shape == tuple(whole.shape) and stride == whole.stride() and offset == 0:
        return Place(name)
    if view.ndim == whole.ndim and view.ndim in (2, 3) and offset == 0:
        turned = whole.transpose(-1, -2)
        if shape == tuple(turned.shape) and stride == turned.stride():
            return Place(name, transposed=True)
    if view.ndim != 2 or whole.ndim not in (2, 3):
        return None
    rows, columns = whole.shape[-2:]
    expert, within = divmod(offset, rows * columns) if whole.ndim == 3 else (None, offset)
    start, rest = divmod(within, columns)
    transposed = stride == (1, columns) and shape[0] == columns
    count = shape[1] if transposed else shape[0]
    straight = stride == (columns, 1) and shape[1] == columns
    if rest or not (straight or transposed) or start + count > rows:
        return None
    return Place(name, expert, None if count == rows else (start, start + count), transposed and not straight)


def spread(tensors: Mapping[str, Tensor], files: Mapping[str, Place | None]) -> dict[str, Tensor]:
    """A model's tensors under the names of its files: views of them. Raises KeyError for a part without a place."""
    elsewhere = {place.tensor for place in files.values() if place is not None}
    found = {name: tensor for name, tensor in tensors.items() if name not in elsewhere}
    for name, place in files.items():
        if place is not None and place.tensor in tensors:
            found[name] = part_of(tensors[place.tensor], place)
    return found


def part_of(tensor: Tensor, place: Place) -> Tensor:
    """The part of a model's tensor at this place, as the file has it: a view."""
    part = tensor if place.expert is None else tensor[place.expert]
    part = part if place.rows is None else part[..., slice(*place.rows), :]
    return part.transpose(-1, -2) if place.transposed else part


def gathered(tensors: Mapping[str, Tensor], files: Mapping[str, Place | None]) -> dict[str, Tensor]:
    """The tensors of files as the model's own: renamed, and parts put together in new ones. Raises ValueError where a part is missing, or
    a tensor is there under both of its names."""
    import torch

    found: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, tensor in tensors.items():
        place = files.get(name) or Place(name)
        tensor = tensor.transpose(-1, -2) if place.transposed else tensor
        if place.expert is None and place.rows is None:
            if place.tensor in found:
                raise ValueError(f"{name} and another tensor are both {place.tensor}")
            found[place.tensor] = tensor.contiguous()
        else:
            parts.setdefault(place.tensor, []).append((place, tensor))
    for name, pieces in parts.items():
        experts = 1 + max(place.expert or 0 for place, _ in pieces)
        rows = max(len(t) if place.rows is None else place.rows[1] for place, t in pieces)
        whole = torch.empty((experts, rows, pieces[0][1].shape[1]), dtype=pieces[0][1].dtype)
        if sum(t.numel() for _, t in pieces) != whole.numel() or len({t.dtype for _, t in pieces}) > 1:
            raise ValueError(f"{name}: its {len(pieces)} parts do not make {tuple(whole.shape)} of one dtype")
        if name in found:
            raise ValueError(f"{name} is there whole, and in {len(pieces)} parts")
        for place, tensor in pieces:
            whole[place.expert or 0, slice(*(place.rows or (0, rows)))] = tensor
        found[name] = whole if pieces[0][0].expert is not None else whole[0]
    return found
