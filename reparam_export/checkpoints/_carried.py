"""What a file holds beside its adapters: a head, or the whole model that they were trained in.

A state dict of the whole model carries its base: its own tensors are taken, whatever base is given; but where that base has other numbers
in the weights that the adapters lie on, which training leaves as they are, one of the two is the wrong one, and that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.affine import Tensor
from reparam_export.names.constants import is_constant

if TYPE_CHECKING:
    from reparam_export.checkpoints import Adapter, Claim, Parts, Source


def parts_with(
    source: Source,
    adapters: Sequence[Adapter],
    claim: Claim,
    whole: Callable[[str], bool] = lambda name: "head" in name,
    **others: Any,
) -> Parts:
    """The parts of a file of these adapters. whole: names of the tensors that take the place of the base's own.

    Raises TensorMismatchError when anything is left over in a file that does not carry its base.
    """
    from reparam_export.checkpoints import Parts

    rest = claim.take_all(lambda name: True)
    replaced = {name: tensor for name, tensor in rest.items() if whole(name)}
    if any(weight_of(a) in rest for a in adapters):
        return with_base(source, Parts(tuple(adapters), replaced, **others), rest)
    claim.put_back({name: tensor for name, tensor in rest.items() if name not in replaced})
    claim.finish()
    return Parts(tuple(adapters), replaced, **others)


def with_base(source: Source, parts: Parts, state: Mapping[str, Tensor]) -> Parts:
    """The parts of a file that has the whole base in it too. Where a base is given apart, all of the file's take the place of its own.

    Not those that share their memory with another: they are tied in the base, too.
    """
    seen: set[Any] = set()
    replaced = dict(parts.replaced)
    for name, tensor in state.items() if source.weights_given else ():
        place = (tensor.data_ptr(), tuple(tensor.shape)) if hasattr(tensor, "data_ptr") else name
        if place not in seen:
            replaced.setdefault(name, tensor)
        seen.add(place)
    learned = {name: tensor for name, tensor in replaced.items() if not is_constant(name, tensor)}
    return replace(
        parts,
        replaced=learned,
        base_state=state,
        base_digests=digests(parts.adapters, state),
        notes=("the file carries its own base", *parts.notes),
    )


def weight_of(adapter: Adapter) -> str:
    """The name of the tensor that it lies on."""
    return f"{adapter.module}.{adapter.parameter or 'weight'}"


def digests(adapters: Sequence[Adapter], state: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Of the weights below the adapters, dtype and blake3, as ``fit`` compares them with those of a base."""
    from blake3 import blake3

    return {
        name: (str(state[name].dtype).removeprefix("torch."), blake3(_bytes(state[name])).hexdigest())
        for name in dict.fromkeys(map(weight_of, adapters))
        if name in state
    }


def _bytes(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):
        import torch

        tensor = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.tobytes()
