"""Names with ``_`` for the dots, as kohya and LyCORIS write them: ``PREFIX_NAME``, PREFIX ``lycoris``, ``lora_unet``, ..."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from reparam_export.errors import TensorMismatchError
from reparam_export.names import Own, Place
from reparam_export.names.found import Reading, stored_names

MODEL = re.compile(r"lora_(?:unet|te\d*)(?=_)")  # kohya keeps several models in one file
PREFIXES = ("lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora")
Spelled = Mapping[str, Sequence[str]]  # a name with _ for the dots -> all names that are written so


def read_underscored(stems: Sequence[str], own: Own, path: Path) -> Reading:
    """For each stem the weight of the module that it names. Raises TensorMismatchError for one that names none, or several."""
    own_names = {name: Place(name) for name in own.tensors}
    try:
        return _read(stems, own_names, path, "")
    except TensorMismatchError:
        if not own.files:
            raise
        try:
            return _read(stems, stored_names(own), path, ", names as in the base's files")
        except TensorMismatchError:
            pass
        raise


def _read(stems: Sequence[str], universe: Mapping[str, Place], path: Path, of: str) -> Reading:
    spelled: dict[str, list[str]] = {}
    for name in universe:
        if name.endswith(".weight"):
            spelled.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    groups: dict[str, list[str]] = {}
    for stem in stems:
        groups.setdefault(match[0] if (match := MODEL.match(stem)) else "", []).append(stem)
    try:
        found = {stem: name for group in groups.values() for stem, name in _names(group, spelled, path).items()}
    except TensorMismatchError as error:
        if len(groups) == 1:
            raise
        parts = [group.removeprefix("lora_") for group in groups if group]
        raise TensorMismatchError(
            f"{error}; it has the parts {', '.join(parts)}, each for a model of its own: --set part={'|'.join(parts)} reads one of them",
            module=error.module, tensor=error.tensor, expected=error.expected, found=error.found,
        ) from error  # fmt: skip
    _check_apart(groups, found, path)
    return Reading({stem: universe[name] for stem, name in found.items()}, {}, f"names with _ for the dots{of}")


def _check_apart(groups: Mapping[str, Sequence[str]], found: Mapping[str, str], path: Path) -> None:
    """Raises TensorMismatchError where two models of one file would be one of the base: each must lie under an attribute of its own."""
    roots = {group: {found[stem].partition(".")[0] for stem in stems} for group, stems in groups.items()}
    parts = list(roots)
    for number, group in enumerate(parts):
        other = next((o for o in parts[:number] if roots[o] & roots[group]), None)
        if other is not None:
            named = [g.removeprefix("lora_") for g in parts if g]
            raise TensorMismatchError(
                f"{path}: adapts several models, {', '.join(named)}, and both {other} and {group} would be the base's "
                f"{min(roots[other] & roots[group])}; --set part={'|'.join(named)} reads one of them",
                module=groups[group][0], tensor="weight", expected="one model", found=parts,
            )  # fmt: skip


def _names(stems: Sequence[str], spelled: Spelled, path: Path) -> dict[str, str]:
    """Of the stems of one model, which share a prefix."""
    parts = [stem.split("_") for stem in stems]
    possible = [{"_".join(p[:i]) for i in range(1, len(p)) if "_".join(p[i:]) in spelled} for p in parts]
    common = set.intersection(*possible)
    prefix = next((p for p in PREFIXES if p in common), min(common, default="", key=len))
    if not common:
        inner = _inside(stems, spelled)
        if inner is not None:
            return inner
        prefix = next((p for p in PREFIXES if any(p in found for found in possible)), parts[0][0])
    names: dict[str, str] = {}
    for stem in stems:
        found = spelled.get(stem.removeprefix(f"{prefix}_"), ())
        if len(found) != 1:
            raise _unresolved(stem, found, stem.removeprefix(f"{prefix}_"), spelled, path)
        names[stem] = found[0]
    return names


def _inside(stems: Sequence[str], spelled: Spelled) -> dict[str, str] | None:
    """The names of a model that stands inside the base, under an attribute of it; None where it could be several, or is none."""
    known = [p for p in PREFIXES if all(stem.startswith(f"{p}_") for stem in stems)]
    if not known:
        return None
    rests = [stem.removeprefix(f"{max(known, key=len)}_") for stem in stems]
    outer = {key.removesuffix(rests[0]) for key in spelled if key.endswith(f"_{rests[0]}")}
    fits = [o for o in outer if all(len(spelled.get(o + rest, ())) == 1 for rest in rests)]
    return (
        {stem: spelled[fits[0] + rest][0] for stem, rest in zip(stems, rests, strict=True)} if len(fits) == 1 else None
    )


def _unresolved(stem: str, found: Sequence[str], rest: str, spelled: Spelled, path: Path) -> TensorMismatchError:
    found = [name.removesuffix(".weight") for name in found]
    near = [
        name.removesuffix(".weight")
        for key in difflib.get_close_matches(rest, spelled, n=3, cutoff=0.5)
        for name in spelled[key]
    ]
    problem = (
        f"could be each of {', '.join(found)}: with dots as underscores they are one name"
        if found
        else f"names no module of the base (nearest: {', '.join(near) or 'none'}); is this the base that it was trained on?"
    )
    return TensorMismatchError(
        f"{path}: {stem} {problem}", module=stem, tensor="weight", expected=stem, found=found or near
    )
