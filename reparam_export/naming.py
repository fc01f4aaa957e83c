"""A checkpoint under its base's own names: its adapters, and the tensors that it brings whole."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from reparam_export.adapters import kind
from reparam_export.affine import tensors_of
from reparam_export.checkpoints import Adapter, Checkpoint, Unbound
from reparam_export.errors import TensorMismatchError, UsageError
from reparam_export.fit import check_covered
from reparam_export.names import Own, Place
from reparam_export.names.found import Fits, Reading, read_names, renamed
from reparam_export.names.once import renamed_once
from reparam_export.names.underscored import read_underscored
from reparam_export.names.wrappers import OUTER

if TYPE_CHECKING:
    from reparam_export.affine import Tensor


def named(checkpoint: Checkpoint, own: Own) -> Checkpoint:
    """The checkpoint under the names of this base, with a note where they were others; every name is used once.

    Raises TensorMismatchError for a name that is none of the base's, or could be several; UsageError for a rename that changes nothing.
    """
    placed = [a for a in checkpoint.adapters if a.kind != "probed"]  # peft itself finds the modules of those
    keys = (
        [*dict.fromkeys(a.module for a in placed)]
        if checkpoint.underscored
        else _keys(placed, checkpoint.replaced, own)
    )
    if not keys:
        return replace(checkpoint, named=True)
    if not checkpoint.recipe.renames:
        _check_outer(checkpoint, own, keys)
    now = renamed(keys, checkpoint.recipe.renames, checkpoint.path)
    _check_once(now, checkpoint)
    if checkpoint.underscored:
        reading = read_underscored(list(now.values()), own, checkpoint.path)
    else:
        fits = _fits(placed, checkpoint, own, now)
        reading = read_names(list(now.values()), own, checkpoint.path, fits, checkpoint.task == "CAUSAL_LM")
    places = {key: reading.places[name] for key, name in now.items()}
    _check_places(places, checkpoint)
    if not reading.said and not checkpoint.recipe.renames and not any(a.module in own.routers for a in placed):
        return replace(checkpoint, named=True)
    _check_dialect(checkpoint, reading, places, own.tensors)
    return replace(
        checkpoint,
        adapters=tuple(
            a if a.kind == "probed" else _moved(a, places[_key(a, checkpoint)], own, checkpoint)
            for a in checkpoint.adapters
        ),
        replaced=renamed_once(checkpoint.replaced, lambda name: _name(name, places, own), checkpoint.path),
        copies=frozenset(_name(name, places, own) for name in checkpoint.copies),
        base_state=renamed_once(checkpoint.base_state, lambda name: _whole(name, reading), checkpoint.path),
        base_digests=renamed_once(checkpoint.base_digests, lambda name: _whole(name, reading), checkpoint.path),
        notes=(*checkpoint.notes, *([f"{reading.said}: {_example(places)}"] if reading.said else [])),
        spelled=_spelled(places),
        covers=lambda names: [],  # checked above, in the file's own names
        only=False,
        named=True,
    )


def _fits(adapters: list[Adapter], checkpoint: Checkpoint, own: Own, now: Mapping[str, str]) -> Fits:
    """Do the sizes of an adapter, or of a whole tensor, agree with a place in the base?"""
    of = {now[f"{a.module}.weight"]: a for a in adapters if not isinstance(a.params, Unbound) and a.parameter is None}
    whole = {now.get(name, name): tuple(tensor.shape) for name, tensor in checkpoint.replaced.items()}

    def fits(name: str, place: Place) -> bool:
        shape = own.tensors.get(place.tensor, ())
        if name in whole:
            return shape == whole[name]
        if name not in of or len(shape) < 2:
            return True
        rows, columns = shape[-2:] if place.expert is not None else (shape[0], math.prod(shape[1:]))
        rows = rows if place.rows is None else place.rows[1] - place.rows[0]
        found = {n: tuple(t.shape) for n, t in tensors_of(of[name].params).items()}
        return any(
            kind(of[name].kind).shapes(*size, of[name].params) == found for size in ((rows, columns), (columns, rows))
        )

    return fits


def _keys(adapters: list[Adapter], replaced: Mapping[str, Tensor], own: Own) -> list[str]:
    """What has to be found: the weight of each adapted module, and each whole tensor, a new bias by the weight beside it."""
    return list(dict.fromkeys([*(f"{a.module}.weight" for a in adapters), *(_beside(n, own) for n in replaced)]))


def _key(adapter: Adapter, checkpoint: Checkpoint) -> str:
    return adapter.module if checkpoint.underscored else f"{adapter.module}.weight"


def _beside(name: str, own: Own) -> str:
    """The tensor by which a whole one is found: a bias stands beside a weight, and may be new."""
    return f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") and name not in own.tensors else name


def _name(name: str, places: Mapping[str, Place], own: Own) -> str:
    """The base's name of a tensor that is taken whole. Raises TensorMismatchError for one that is part of another."""
    key = _beside(name, own)
    place = places[key]
    if not place.whole:
        raise TensorMismatchError(
            f"{name}: the checkpoint brings it whole, and it is a part of {place.tensor} in this base",
            module=place.module, tensor=name, expected=place.tensor, found=name,
        )  # fmt: skip
    return place.tensor if key == name else f"{place.module}.bias"


def _whole(name: str, reading: Reading) -> str:
    """The base's name of a tensor of the base that the checkpoint carries; one that it does not have stays as it is."""
    place = reading.others.get(name)
    return place.tensor if place is not None and place.whole else name


def _moved(adapter: Adapter, place: Place, own: Own, checkpoint: Checkpoint) -> Adapter:
    """The adapter where its matrix lies in this base. Raises TensorMismatchError for a part that no adapter can act on."""
    if place.parameter == "weight" and place.whole:
        router = place.module in own.routers and adapter.parameter is None
        return replace(adapter, module=place.module, parameter="weight" if router else adapter.parameter)
    turned = place.transposed != (place.module in own.transposed and place.expert is not None)
    sliced = place.rows is not None and (place.module in own.transposed or adapter.rows is not None)
    if adapter.parameter is not None or turned or sliced:
        raise TensorMismatchError(
            f"{checkpoint.path}: {adapter.site} is a part of {place.tensor} in this base on which its adapter cannot act",
            module=adapter.module, tensor=place.tensor, expected="a block of rows", found=str(place),
        )  # fmt: skip
    rows = adapter.rows if place.rows is None else place.rows
    return replace(adapter, module=place.module, parameter=place.parameter, expert=place.expert, rows=rows)


def _check_places(places: Mapping[str, Place], checkpoint: Checkpoint) -> None:
    """Raises TensorMismatchError for two names of a file that are one of the base's: one would be lost, or be added to the other."""
    seen: dict[Place, str] = {}
    for name, place in places.items():
        if place in seen:
            raise TensorMismatchError(
                f"{checkpoint.path}: {seen[place]} and {name} are both {place.tensor} in this base; the file holds two "
                "adapters, or is mixed up",
                module=place.module, tensor=name, expected="one name", found=[seen[place], name],
            )  # fmt: skip
        seen[place] = name


def _check_outer(checkpoint: Checkpoint, own: Own, names: Collection[str]) -> None:
    """Raises TensorMismatchError where ``module.`` was taken for a wrapper's, and the base has modules of both names."""
    if checkpoint.outer and names and all(f"{OUTER}.{n}" in own.tensors and n in own.tensors for n in names):
        first = next(iter(names))
        raise TensorMismatchError(
            f"{checkpoint.path}: {OUTER}.{first} could be the base's own, or its {first} in a wrapper; say which: --rename ={OUTER} "
            f"puts the name in front again, --rename {first.partition('.')[0]}={first.partition('.')[0]} leaves it out",
            module=first.rpartition(".")[0], tensor=first, expected=first, found=[first, f"{OUTER}.{first}"],
        )  # fmt: skip


def _check_once(now: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raises UsageError where renaming makes two names one."""
    seen: dict[str, str] = {}
    for old, new in now.items():
        if new in seen:
            raise UsageError(f"{checkpoint.path}: with --rename, {seen[new]} and {old} are both {new}")
        seen[new] = old


def _check_dialect(
    checkpoint: Checkpoint, reading: Reading, places: Mapping[str, Place], tensors: Collection[str]
) -> None:
    """Every module that the checkpoint's configuration means has its adapter, by the names that the file has for them."""
    if checkpoint.underscored or not reading.others:
        return
    given = {place: name for name, place in places.items()}
    own = [(name, p) for name, p in reading.others.items() if name.endswith(".weight") and p.tensor in tensors]
    check_covered([given.get(place, name).removesuffix(".weight") for name, place in own], checkpoint)


def _spelled(places: Mapping[str, Place]) -> dict[str, str]:
    """The modules that the base calls otherwise than the file; none where the base gathers some of the file's in stacks."""
    if not all(place.whole for place in places.values()):
        return {}
    pairs = ((name.rpartition(".")[0] or name, place.module) for name, place in places.items())
    return {file: base for file, base in pairs if file != base}


def _example(places: Mapping[str, Place]) -> str:
    name, place = next(iter(places.items()))
    expert = "" if place.expert is None else f"[{place.expert}]"
    rows = "" if place.rows is None else f" rows {place.rows[0]} to {place.rows[1]}"
    return f"{name} is {place.tensor}{expert}{rows}"
