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


def trained_tensors(model: nn.Module) -> list[str]:
    """What is not the base's any more besides the adapters: all that is trainable or was changed, and running statistics."""
    known = dict(_memory(model))
    return [
        name
        for name, tensor in _numbers(model)
        if tensor.requires_grad or name.endswith(RUNNING) or (known and _changed(known.get(name), tensor))
    ]


def base_digests(model: nn.Module, but: Collection[str]) -> dict[str, Digest]:
    """The digests of all parameters but these, as they are now: what is computed, as buffers are, may differ between versions."""
    return {n: digest_of(t) for n, t in _numbers(model) if isinstance(t, nn.Parameter) and n not in but}


def _changed(before: Digest | None, tensor: Tensor) -> bool:
    """Is this another tensor than the one of the base? One that was cast since is told apart when the checkpoint is read."""
    if before is None:
        return True
    return str(tensor.dtype) == f"torch.{before[0]}" and digest_of(tensor) != before


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
