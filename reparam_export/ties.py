"""Tied tensors, one under several names, and when a checkpoint makes them tensors of their own.

An adapter acts on the module that it sits on, and a module of a PEFT folder's ``modules_to_save`` is a copy beside the base's own: what is
tied to either keeps its numbers. So an adapter on one of the names, or on each, unties it, and so do copies, unless all of the names get
equal ones. Tokens that peft trains on an embedding are trained for the layers that share its weight, too, and other whole tensors are the
base's own (peft saves embeddings that were resized, trained or not): they are for all of the names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Checkpoint, Unbound, alike
from reparam_export.errors import SharedWeightError

if TYPE_CHECKING:
    from torch import nn

Apart = Callable[[Collection[str]], list[str]]  # the names of one tensor -> those that become tensors of their own


def apart_of(checkpoint: Checkpoint) -> Apart:
    """Which names of one tensor the checkpoint gives numbers of their own."""
    layers = [a for a in checkpoint.adapters if a.kind != "tokens"]
    adapted = {f"{a.module}.weight" for a in layers if a.parameter in (None, "weight") or isinstance(a.params, Unbound)}
    tokens = {f"{a.module}.weight": a.params for a in checkpoint.adapters if a.kind == "tokens"}

    def apart(names: Collection[str]) -> list[str]:
        own = {name for name in names if name in adapted}
        own |= copies_apart(checkpoint, names)
        trained = [tokens[name] for name in names if name in tokens]
        if any(p.indices != trained[0].indices or not alike(p.vectors, trained[0].vectors) for p in trained):
            own |= {name for name in names if name in tokens}
        return [name for name in names if name in own]

    return apart


def copies_apart(checkpoint: Checkpoint, names: Collection[str]) -> set[str]:
    """Those of the names that get a copy of their own; none where all of them get equal numbers."""
    replaced = checkpoint.replaced
    copies = {name for name in names if name in checkpoint.copies}
    whole = all(name in replaced for name in names) and _all_alike([replaced[name] for name in names])
    return set() if whole else copies


def untie(module: nn.Module, apart: Apart) -> tuple[str, ...]:
    """Give these names tensors of their own, with the numbers that they had together. Returns the names with a new tensor.

    apart: for adapters, the base with whole tensors in place; for copies, before they are. A module that has several names
    itself cannot be told apart, and stays as it is.
    """
    from torch import nn as torch_nn

    made = []
    for names in groups_of(module):
        own = apart(names)
        owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in names}
        parameter = module.get_parameter(names[0])
        if not own or len({id(owner) for owner in owners.values()}) < len(names):
            continue
        for name in own if len(own) < len(names) else own[1:]:
            new = torch_nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(owners[name], name.rpartition(".")[2], new)
            made.append(name)
    return tuple(made)


def check_known(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises SharedWeightError for a copy of other rows than the base's where what is tied to it has no numbers of that many.

    module: the base, before whole tensors are in place.
    """
    for names in groups_of(module):
        unknown = [name for name in names if name not in checkpoint.replaced]
        copies = sorted(copies_apart(checkpoint, names))
        if copies and unknown and not bool((module.get_parameter(names[0]) != 0).any()):
            raise SharedWeightError(
                f"{checkpoint.path}: brings {copies[0]} {tuple(checkpoint.replaced[copies[0]].shape)} as a copy, not of the base's size; "
                f"{unknown[0]}, tied to it in the base, was resized too, and is not in the file. Give the resized base with --base",
                tensor=copies[0],
                owners=tuple(names),
            )


def groups_of(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def second_names(module: nn.Module, tensors: Mapping[str, Any]) -> list[str]:
    """Names that get the numbers that another name of the same tensor gets: they stay one, and so do names that get none."""
    given = [[name for name in names if name in tensors] for names in groups_of(module)]
    return [name for names in given if names and _all_alike([tensors[name] for name in names]) for name in names[1:]]


def _all_alike(tensors: list[Any]) -> bool:
    return all(alike(tensors[0], other) for other in tensors[1:])
