"""What a file holds beside its adapters: a head, or the whole model that they were trained in.

A state dict of the whole model carries its base: its own tensors are taken, whatever base is given; but where that base has other numbers
in the weights that the adapters lie on, which training leaves as they are, one of the two is the wrong one, and that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reparam_export.affine import Tensor
from reparam_export.names.constants import is_constant

if TYPE_CHECKING:
    from reparam_export.checkpoints import Adapter, Claim, Parts

SAID = "the file carries its own base"


def parts_with(
    adapters: Sequence[Adapter],
    claim: Claim,
    whole: Callable[[str], bool] = lambda name: "head" in name,
    **others: Any,
) -> Parts:
    """The parts of a file of these adapters. whole: names of the tensors that the base may lack, where the file does not carry all of it.

    Raises TensorMismatchError when anything else is left over.
    """
    from reparam_export.checkpoints import Parts

    rest = claim.take_all(lambda name: True)
    if any(weight_of(a) in rest for a in adapters):
        notes = (SAID, *others.pop("notes", ()))
        learned = {name: tensor for name, tensor in rest.items() if not is_constant(name, tensor)}
        return Parts(
            tuple(adapters), learned, base_state=rest, base_digests=digests(adapters, rest), notes=notes, **others
        )
    replaced = {name: tensor for name, tensor in rest.items() if whole(name)}
    claim.put_back({name: tensor for name, tensor in rest.items() if name not in replaced})
    claim.finish()
    return Parts(tuple(adapters), replaced, **others)


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
