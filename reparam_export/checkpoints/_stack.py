"""Several checkpoints on one base: each, in the order given, acts on the model that those before it made.

The weight of a checkpoint scales the change that it makes: y = b(x) + weight (y'(x) - b(x)), b the model before it, y' with it.
For adapters that add to the weights (LoRA and its kin) that is the weighted sum, whatever the order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reparam_export.affine import Tensor
from reparam_export.checkpoints import Adapter, Checkpoint, placed
from reparam_export.errors import CheckpointError, UsageError


def stacked(checkpoints: Sequence[Checkpoint], weights: Sequence[float] | None = None) -> Checkpoint:
    """One checkpoint that is all of these on one base, in this order. weights: one for each; default: 1 each.

    The base, its weights and its inputs are the first one's, unless only others name them. Raises UsageError for weights that are
    no finite numbers other than 0, CheckpointError for checkpoints that cannot be put on one base.
    """
    weights = [1.0] * len(checkpoints) if weights is None else [float(w) for w in weights]
    if not checkpoints or len(weights) != len(checkpoints):
        raise UsageError(f"{len(checkpoints)} checkpoints and {len(weights)} weights: expected one weight for each")
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(f"{checkpoint.path}: weight {weight}: expected a finite number other than 0")
        if checkpoint.members:
            raise UsageError(f"{checkpoint.path}: is a stack already; give its checkpoints one by one")
    first = checkpoints[0]
    members = tuple(
        replace(c, recipe=replace(c.recipe, weight=w, others=())) for c, w in zip(checkpoints, weights, strict=True)
    )
    replaced, notes = _whole_tensors(members)
    return replace(
        first,
        format=" + ".join(m.format for m in members),
        sha256=hashlib.sha256("".join(f"{m.sha256} {m.recipe.weight!r}\n" for m in members).encode()).hexdigest(),
        adapters=tuple(replace(a, weight=m.recipe.weight) for m in members for a in m.adapters),
        replaced=replaced,
        base=_base(members),
        base_weights=next((m.base_weights for m in members if m.base_weights), None),
        inputs=next((m.inputs for m in members if m.inputs), ()),
        settings={name: value for m in reversed(members) for name, value in m.settings.items()},
        files=tuple(dict.fromkeys(f for m in members for f in m.files)),
        notes=(*(n for m in members for n in m.notes), *notes),
        recipe=replace(members[0].recipe, others=tuple(m.recipe for m in members[1:])),
        missing=tuple(e for m in members for e in m.missing),
        copies=frozenset(name for m in members for name in m.copies),
        bind=None,
        expected={},
        members=members,
        rebuilt=", ".join(dict.fromkeys(m.rebuilt for m in members if m.rebuilt)) or None,
        dropped=tuple(name for m in members for name in m.dropped),
    )


def _base(members: Sequence[Checkpoint]) -> str | None:
    """The base that the user named, else the one that all name, or none of them. Raises CheckpointError."""
    carried = [m.path for m in members[1:] if m.base_state]
    if carried:
        raise CheckpointError(f"{carried[0]}: brings a base of its own; it can only be the first of a stack")
    stated = {_place(m.recipe.base): m.recipe.base for m in members if m.recipe.base}
    named = stated or {_place(m.base): m.base for m in members if m.base}
    if len(named) > 1:
        raise CheckpointError(
            f"{members[-1].path}: these checkpoints name different bases: {', '.join(map(str, named.values()))}; "
            "state the one they are to be put on with --base"
        )
    return next(iter(named.values()), None)


def _place(spec: str | None) -> str:
    """A base spec that is the same for one folder, however it is written."""
    return placed(str(spec), lambda folder: str(Path(folder).resolve()) if Path(folder).is_dir() else folder)


def _whole_tensors(members: Sequence[Checkpoint]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that the checkpoints bring whole, and what to say of those that replace one another. Raises CheckpointError."""
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    adapted: list[Adapter] = []
    for member in members:
        if member.replaced and member.recipe.weight != 1:
            raise CheckpointError(
                f"{member.path}: has weight {member.recipe.weight:g} and brings whole tensors (first {next(iter(member.replaced))}), "
                "which a weight cannot scale; give it weight 1"
            )
        for name in member.replaced:
            owner = name.rpartition(".")[0]
            if any(a.module == owner for a in adapted):
                raise CheckpointError(
                    f"{member.path}: replaces {name}, which a checkpoint before it adapts; that adapter would be lost: "
                    "put this checkpoint first, or leave the other out"
                )
            if name in found:
                notes.append(f"{name}: taken from {member.path.name}, the last of the stack that brings it")
        found |= member.replaced
        adapted += member.adapters
    return found, notes
