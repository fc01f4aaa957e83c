"""Bases whose files have other names than their model, or hold experts one by one: streamed under the names of the files.

A matrix in a stack of the model is a tensor of its own in most files, and its rows are those of several (gate and up); an adapter on it is
an adapter on each of these. Files that hold a stack as one tensor are folded one matrix after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from reparam_export.adapters import kind
from reparam_export.affine import map_tensors, tensors_of
from reparam_export.checkpoints import Adapter
from reparam_export.hf_folder import Structure
from reparam_export.names import Own, Place
from reparam_export.streaming.formats import Array
from reparam_export.streaming.source import NotStreamableError

LARGE = 1 << 20  # outputs of no layer


def in_files(structure: Structure) -> Structure:
    """The structure under the names of the files. Raises NotStreamableError for a tensor that is spread over others."""
    own = structure.own
    lost = [name for name, place in own.files.items() if place is None]
    if lost:
        raise NotStreamableError(f"{lost[0]} in the base's files is spread over its model in another way than by rows")
    whole = {p.tensor: name for name, p in own.files.items() if p is not None and p.whole}
    parts = {name: p for name, p in own.files.items() if p is not None and not p.whole}
    gone = {place.tensor for place in parts.values()}

    def tensor(name: str) -> str:
        return whole.get(name, name)

    def module(name: str) -> str:
        return tensor(f"{name}.weight").removesuffix(".weight")

    shapes = {tensor(n): s for n, s in own.tensors.items() if n not in gone}
    shapes |= {name: _shape(own.tensors[p.tensor], p) for name, p in parts.items()}
    order = [*map(module, structure.order), *(n.removesuffix(".weight") for n in parts if n.endswith(".weight"))]
    return replace(
        structure,
        transposed=frozenset(map(module, structure.transposed)),
        embeddings=frozenset(map(module, structure.embeddings)),
        scaled=frozenset(map(module, structure.scaled)),
        ties={tensor(alias): tensor(holder) for alias, holder in structure.ties.items()},
        order=tuple(order),
        refused={module(n): why for n, why in structure.refused.items() if n not in own.routers},
        shapes=shapes if structure.shapes is not None else None,
    )


def _shape(whole: tuple[int, ...], place: Place) -> tuple[int, ...]:
    *stack, rows, columns = whole if place.expert is None else whole[1:]
    rows = rows if place.rows is None else place.rows[1] - place.rows[0]
    return (*stack, *((columns, rows) if place.transposed else (rows, columns)))


def onto_files(adapters: Iterable[Adapter], own: Own) -> tuple[Adapter, ...]:
    """The adapters on the tensors of files; one on several of them is taken apart. Raises NotStreamableError."""
    parts: dict[tuple[str, int | None], list[tuple[str, Place]]] = {}
    for name, place in own.files.items():
        if place is not None:
            parts.setdefault((place.tensor, place.expert), []).append((name, place))
    found: list[Adapter] = []
    for adapter in adapters:
        tensor = f"{adapter.module}.{adapter.parameter or 'weight'}"
        pieces = parts.get((tensor, adapter.expert), parts.get((tensor, None), [(tensor, Place(tensor))]))
        made = [_on(adapter, name, place, own) for name, place in pieces]
        found += [each for each in made if each is not None]
    return tuple(found)


def _on(adapter: Adapter, name: str, place: Place, own: Own) -> Adapter | None:
    """The adapter on one tensor of a file; None where it leaves that alone."""
    if place.transposed or (place.rows is not None and place.module in own.transposed):
        raise NotStreamableError(f"{name} in the base's files is the transpose of what {adapter.site} is in its model")
    module, _, parameter = name.rpartition(".")
    stacked = adapter.expert is not None and place.expert is None
    rows = adapter.rows
    if place.rows is not None:
        start, stop = place.rows
        first, last = adapter.rows or (start, stop)
        inside = max(first, start), min(last, stop)
        if inside[0] >= inside[1]:
            return None
        adapter = sliced(adapter, inside[0] - (adapter.rows or (0, 0))[0], inside[1] - (adapter.rows or (0, 0))[0])
        rows = None if inside == (start, stop) else (inside[0] - start, inside[1] - start)
    plain = parameter == "weight" and not stacked
    return replace(
        adapter,
        module=module,
        parameter=None if plain else parameter,
        expert=adapter.expert if stacked else None,
        rows=rows,
    )


def sliced(adapter: Adapter, start: int, stop: int) -> Adapter:
    """The adapter on some of its outputs: what follows their number in its first axis is taken by rows.

    Raises NotStreamableError for a kind whose outputs do not stand side by side.
    """
    tensors = tensors_of(adapter.params)
    inn = 1
    shapes, longer = (kind(adapter.kind).shapes(n, inn, adapter.params) for n in (LARGE, LARGE + 1))
    follows = {name for name in shapes if shapes[name] != longer[name]}
    mixed = [name for name in follows if shapes[name][1:] != longer[name][1:]]
    if mixed:
        raise NotStreamableError(
            f"{adapter.site}: {mixed[0]} of {adapter.kind} mixes outputs that are apart in the files"
        )
    chosen = {id(tensors[name]) for name in follows}
    return replace(adapter, params=map_tensors(adapter.params, lambda t: t[start:stop] if id(t) in chosen else t))


def matrices(shape: Sequence[int], raw: Array) -> list[Array]:
    """The bytes of each matrix of a stack (experts, rows, columns), in order."""
    return list(raw.reshape(shape[0], -1))


def stacks_of(adapters: Iterable[Adapter]) -> Mapping[str, tuple[Adapter, ...]]:
    """The adapters on the matrices of stacks that files hold as one tensor, by that tensor."""
    found: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.expert is not None:
            found.setdefault(f"{adapter.module}.{adapter.parameter}", []).append(adapter)
    return {name: tuple(group) for name, group in found.items()}
