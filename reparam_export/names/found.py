"""Which of the base's own names each name of a checkpoint means.

A checkpoint speaks of modules by the names that they had in the model it was trained in: the base's own; those in the base's files, as
older versions of transformers had them; or either with parts at one place more or less, as a model inside another has them
(``layers.0`` and ``model.layers.0``, ``model.layers.0`` and ``model.language_model.layers.0``).
All names of one file are read in the same way. The base's own names go first, then those of its files; of the other ways just one may be
possible, else it is an error with all of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reparam_export.errors import TensorMismatchError, UsageError
from reparam_export.names import Own, Place

SHOWN = 3
Fits = Callable[[str, Place], bool]  # a name of the file and a place in the base: do their sizes agree?


@dataclass(frozen=True)
class Reading:
    """How a file's names are read. places: of each name; others: of the names that the base has and the file could have had.

    said: one line for the user; empty where the names are the base's own.
    """

    places: Mapping[str, Place]
    others: Mapping[str, Place]
    said: str = ""
    rename: str = ""  # the --rename that asks for this reading


def read_names(
    names: Sequence[str], own: Own, path: Path, fits: Fits = lambda name, place: True, language: bool = False
) -> Reading:
    """The places of tensors (``X.weight`` of a module, whatever it holds). Raises TensorMismatchError.

    Of several readings, those count whose sizes fit, and for a checkpoint of a causal language model those inside the base's.
    """
    straight, stored = straight_names(own), stored_names(own)
    if all(name in straight for name in names):
        return Reading({name: straight[name] for name in names}, straight)
    if all(name in stored for name in names):
        return Reading({name: stored[name] for name in names}, stored, "names as in the base's files")
    newer = {name: straight.get(own.newer(name)) for name in names} if own.newer is not None else {}
    known = {name: place for name, place in newer.items() if place is not None}
    if len(known) == len(names):
        return Reading(known, straight, "names as in files of an older transformers")
    found: dict[tuple[Place, ...], Reading] = {}
    for universe, of in ((straight, ""), (stored, ", names as in its files")):
        for shift in _shifts(names, universe):
            places = {name: universe[shift.base(name)] for name in names}
            others = {o: place for name, place in universe.items() if (o := shift.file(name)) is not None}
            found.setdefault(tuple(places.values()), Reading(places, others, f"{shift.said}{of}", shift.rename))
    if not found:
        raise _unknown(names, straight | stored, own, path)
    fitting = [r for r in found.values() if all(fits(name, place) for name, place in r.places.items())]
    inside = [r for r in fitting if language and own.language and _inside(r, own.language)]
    chosen = inside or fitting or list(found.values())
    if len(chosen) > 1:
        raise _ambiguous(names[0], chosen, path)
    return chosen[0]


def _inside(reading: Reading, module: str) -> bool:
    return all(place.tensor.startswith(f"{module}.") for place in reading.places.values())


def straight_names(own: Own) -> dict[str, Place]:
    """The base's own names: of its tensors, and of the weight of each of its modules, whether it has one or not."""
    modules = {f"{module}.weight": Place(f"{module}.weight") for module in own.modules}
    return modules | {name: Place(name) for name in own.tensors}


def stored_names(own: Own) -> dict[str, Place]:
    """The names in the base's files."""
    places = {name: place for name, place in own.files.items() if place is not None}
    elsewhere = {place.tensor for place in places.values()}
    return {name: place for name, place in straight_names(own).items() if name not in elsewhere} | places


@dataclass(frozen=True)
class Shift:
    """One run of parts that the base's names have after the same first parts, and the file's have not, or the other way round."""

    head: str  # with its dot at the end, or empty
    parts: str
    added: bool  # the base has them

    def base(self, name: str) -> str:
        """A file's name as the base has it."""
        return self._with(name) if self.added else self._without(name) or name

    def file(self, name: str) -> str | None:
        """The base's name as the file would have it, None where it would not have it at all."""
        if not name.startswith(self.head):
            return None
        return self._without(name) if self.added else self._with(name)

    def _with(self, name: str) -> str:
        return f"{self.head}{self.parts}{name.removeprefix(self.head)}"

    def _without(self, name: str) -> str | None:
        run = f"{self.head}{self.parts}"
        return f"{self.head}{name.removeprefix(run)}" if name.startswith(run) else None

    @property
    def rename(self) -> str:
        """The --rename that does the same."""
        run = f"{self.head}{self.parts}".removesuffix(".")
        head = self.head.removesuffix(".")
        return f"{head}={run}" if self.added else f"{run}={head}"

    @property
    def said(self) -> str:
        run = self.parts.removesuffix(".")
        where = f" after {self.head.removesuffix('.')}" if self.head else ""
        return f"the base's names have {run!r} more{where}" if self.added else f"the base's names lack {run!r}{where}"


def _shifts(names: Sequence[str], universe: Mapping[str, Place]) -> list[Shift]:
    """Every shift with which all names are in the universe."""
    common = _common(names)
    first = names[0].split(".")
    found = []
    for at in range(len(common) + 1):
        head = "".join(f"{part}." for part in first[:at])
        rest = ".".join(first[at:])
        for name in universe:  # the base has more
            if name.startswith(head) and name.endswith(f".{rest}"):
                found.append(Shift(head, name[len(head) : len(name) - len(rest)], True))
        for stop in range(at + 1, len(common) + 1):  # the file has more
            found.append(Shift(head, "".join(f"{part}." for part in first[at:stop]), False))
    return [shift for shift in dict.fromkeys(found) if all(shift.base(name) in universe for name in names)]


def _common(names: Sequence[str]) -> list[str]:
    """The parts that all names begin with; the name of a tensor and of its own layer are none of them."""
    split = [
        name.split(".")[: -2 if name.endswith((".weight", ".bias")) else -1] for name in names
    ]  # cls_token has no layer
    shortest = min(split, key=len)
    count = next((i for i, part in enumerate(shortest) if any(s[i] != part for s in split)), len(shortest))
    return shortest[:count]


def _ambiguous(name: str, readings: Sequence[Reading], path: Path) -> TensorMismatchError:
    candidates = [reading.places[name].tensor for reading in readings]
    ways = " or ".join(f"--rename {reading.rename}" for reading in readings[:5])
    return TensorMismatchError(
        f"{path}: {name} could be each of {', '.join(candidates[:5])}; say which: {ways}",
        module=name.rpartition(".")[0],
        tensor=name,
        expected=name,
        found=candidates,
    )


def _unknown(names: Sequence[str], stored: Mapping[str, Place], own: Own, path: Path) -> TensorMismatchError:
    missing = [name for name in names if name not in stored]
    if missing[0] in own.files:
        return TensorMismatchError(
            f"{path}: {missing[0]} is spread over a tensor of the model, not in rows of it: no adapter of its own can be folded into it",
            module=missing[0].rpartition(".")[0], tensor=missing[0], expected="a block of rows", found=None,
        )  # fmt: skip
    module = missing[0].removesuffix(".weight")
    near = difflib.get_close_matches(
        module, [*own.modules, *(n.removesuffix(".weight") for n in own.files)], n=SHOWN, cutoff=0.5
    )
    return TensorMismatchError(
        f"the checkpoint adapts {module}, which the base does not have (nearest: {', '.join(near) or 'none'}); "
        f"{len(missing)} of its {len(names)} names are not the base's; is this the base that it was trained on? "
        "Names that were changed can be given with --rename OLD=NEW",
        module=module,
        tensor="weight",
        expected=module,
        found=near,
    )


def renamed(names: Iterable[str], renames: Sequence[str], path: Path) -> dict[str, str]:
    """Each name with every ``OLD=NEW`` done in order: the first run of parts OLD becomes NEW, which may be empty.

    With an empty OLD, NEW is put in front.
    Raises UsageError for one that is not of this form, and for one that changes nothing.
    """
    found = {name: name for name in names}
    for text in renames:
        old, equals, new = text.partition("=")
        if not equals or not (old or new) or not re.fullmatch(r"[\w.\-/]*", old + new):
            raise UsageError(
                f"--rename {text!r}: expected OLD=NEW, parts of dotted names, such as --rename encoder=model.encoder"
            )
        changed = {name: _replaced(now, old.strip("."), new.strip(".")) for name, now in found.items()}
        if all(_replaced(now, old.strip("."), "\0") == now for now in found.values()):
            raise UsageError(
                f"--rename {text!r}: changes no name of {path}; it has {', '.join(list(found)[:SHOWN])}, ..."
            )
        found = changed
    return found


def _replaced(name: str, old: str, new: str) -> str:
    if not old:
        return f"{new}.{name}"
    parts = re.sub(rf"(?<![A-Za-z0-9]){re.escape(old)}(?![A-Za-z0-9])", lambda _: new, name, count=1)
    return re.sub(r"\.{2,}", ".", parts).strip(".")
