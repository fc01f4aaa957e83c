"""What a model was when adapters were put on it: what is trained since is saved, whether or not it is still trainable then."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from reparam_export.fit import Digest, digest_of

RUNNING = ("running_mean", "running_var")
MEMORY = "_reparam_base"  # on a module: the digests of its parameters by name; None for one that is not the base's


def remember(model: nn.Module, but: Collection[str] = ()) -> None:
    """Note the digests of all parameters that are not known yet. but: those that a checkpoint has brought; they are not the base's."""
    known = dict(_memory(model))
    new = {name: None if name in but else digest_of(p) for name, p in _numbers(model) if name not in known}
    setattr(model, MEMORY, known | new)


def trained_tensors(model: nn.Module) -> list[str]:
    """What is not the base's any more besides the adapters: parameters that are trainable or were changed, and running statistics."""
    known = dict(_memory(model))
    trained = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or (known and not parameter.is_meta and _changed(known.get(name), parameter))
    ]
    return trained + [name for name, _ in model.named_buffers() if name.endswith(RUNNING)]


def base_digests(model: nn.Module, but: Collection[str]) -> dict[str, Digest]:
    """The digests of all parameters but these, as they are now."""
    return {name: digest_of(parameter) for name, parameter in _numbers(model) if name not in but}


def _changed(before: Digest | None, parameter: nn.Parameter) -> bool:
    """Is this another tensor than the one of the base? One that was cast since is told apart when the checkpoint is read."""
    if before is None:
        return True
    return str(parameter.dtype) == f"torch.{before[0]}" and digest_of(parameter) != before


def _memory(model: nn.Module) -> Iterator[tuple[str, Digest | None]]:
    """What is known of a model, or of parts of it on which adapters were put."""
    for prefix, module in model.named_modules():
        for name, digest in getattr(module, MEMORY, {}).items():
            yield f"{prefix}.{name}" if prefix else name, digest


def _numbers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that have numbers."""
    return ((n, p) for n, p in model.named_parameters(remove_duplicate=False) if not p.is_meta)
