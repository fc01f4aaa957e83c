"""What a model was when adapters were put on it: what is trained since is saved, whether or not it is still trainable then."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from reparam_export.fit import Digest, digest_of

RUNNING = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"  # of a batch norm, which no output depends on
MEMORY = "_reparam_base"  # on a module: the digests of its tensors by name; None for one that is not the base's


def remember(model: nn.Module, but: Collection[str] = ()) -> None:
    """Note the digests of all tensors that are not known yet. but: those that a checkpoint has brought; they are not the base's."""
    known = dict(_memory(model))
    new = {name: None if name in but else digest_of(t) for name, t in _numbers(model) if name not in known}
    setattr(model, MEMORY, known | new)


def told_apart(model: nn.Module) -> tuple[list[str], dict[str, Digest]]:
    """What is not the base's any more: all that is trainable or was changed, and running statistics. And the digests of other parameters.

    Of parameters only: what is computed, as buffers are, may differ between versions. What was cast since is told apart on reading.
    """
    known = dict(_memory(model))
    trained: list[str] = []
    digests: dict[str, Digest] = {}
    for name, tensor in _numbers(model):
        if tensor.requires_grad or name.endswith(RUNNING):
            trained.append(name)
            continue
        before, now = known.get(name), digest_of(tensor)
        if known and (before is None or (before[0] == now[0] and before != now)):
            trained.append(name)
        elif isinstance(tensor, nn.Parameter):
            digests[name] = now
    return trained, digests


def _memory(model: nn.Module) -> Iterator[tuple[str, Digest | None]]:
    """What is known of a model, or of parts of it on which adapters were put."""
    for prefix, module in model.named_modules():
        for name, digest in getattr(module, MEMORY, {}).items():
            yield f"{prefix}.{name}" if prefix else name, digest


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds, but for what is on the device meta and what counts batches."""
    state = model.state_dict(keep_vars=True)
    tensors = ((name, t) for name, t in state.items() if isinstance(t, Tensor))  # a module may have more to say
    return ((name, t) for name, t in tensors if not t.is_meta and not name.endswith(COUNTER))
