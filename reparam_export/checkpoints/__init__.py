"""Checkpoints: what is on disk, as adapters on named modules.

One on-disk format, one file; it alone knows tensor names, and a missing, left-over or mis-shaped tensor is an error, never
skipped. A format is a module with

    LOOKED_FOR                what it recognises a file by, for the error that lists all formats
    accepts(source) -> bool   by the names of the tensors and the configuration beside them
    read(source) -> Parts     raises CheckpointError and its kin
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from reparam_export import plugins
from reparam_export.adapters import kind
from reparam_export.affine import Tensor
from reparam_export.checkpoints._checks import (
    by_site,
    check,
    check_disjoint,
    check_finite,
    check_plain,
    components,
    non_finite,
    zeros,
)
from reparam_export.checkpoints._settings import read_settings
from reparam_export.checkpoints._source import (
    NATIVE,
    Claim,
    Source,
    alike,
    as_core,
    as_integers,
    as_matrix,
    open_source,
    placed,
    without,
)
from reparam_export.errors import CheckpointError, FusionError, MissingSettingError, UnknownFormatError
from reparam_export.files import fingerprint, sha256, weight_files

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "NATIVE",
    "Adapter",
    "Bind",
    "Checkpoint",
    "Claim",
    "Covers",
    "Format",
    "Parts",
    "Recipe",
    "Source",
    "Unbound",
    "alike",
    "as_core",
    "as_integers",
    "as_matrix",
    "by_site",
    "check_disjoint",
    "check_finite",
    "components",
    "non_finite",
    "open_source",
    "placed",
    "read",
    "recognise",
    "settings_of",
    "siblings",
    "unnumbered",
    "zeros",
]


@dataclass(frozen=True)
class Adapter:
    """One adapter on one module of the base.

    module: dotted name; params: the kind's ``Params``; rows: the outputs it acts on (start, stop), as for one of q, k, v in a packed
    projection; None: all of them. parameter: the module's tensor that it changes, where that is read directly and not through a
    plain layer's forward (``in_proj_weight`` of an nn.MultiheadAttention, the weights of experts); expert: which matrix of a stack.
    weight: how much of its change is kept, where several adapters are put on one base.
    """

    module: str
    kind: str
    params: Any
    rows: tuple[int, int] | None = None
    parameter: str | None = None
    expert: int | None = None
    weight: float = 1.0

    @property
    def site(self) -> str:
        """The matrix it acts on: module, its tensor unless that is the weight of a layer, and the number in a stack."""
        tensor = f"{self.module}.{self.parameter}" if self.parameter else self.module
        return tensor if self.expert is None else f"{tensor}[{self.expert}]"


@dataclass(frozen=True)
class Unbound:
    """Stands for the Params of an adapter that is made when its base is there: what the checkpoint itself says of it."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]


Covers = Callable[[Sequence[str]], list[str]]  # names of a base's modules -> those that must have an adapter
# the base, with whole tensors in place, and the adapters that stand for those on it, under its own names -> those on it
Bind = Callable[["nn.Module", "Sequence[Adapter]"], "Sequence[Adapter]"]


@dataclass(frozen=True)
class Recipe:
    """What the user gave: enough to read the same checkpoint again. Paths are absolute."""

    checkpoint: str
    base: str | None = None
    base_weights: str | None = None
    config: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    candidate: int = 0
    inputs: tuple[str, ...] = ()
    dtype: str | None = None
    renames: tuple[str, ...] = ()  # OLD=NEW: of the names in the checkpoint to those of the base
    drop: tuple[str, ...] = ()  # patterns of the names of tensors that the model is wanted without
    weight: float = 1.0  # of this checkpoint in a stack
    others: tuple[Recipe, ...] = ()  # the rest of the stack, in the order they act

    def read(self, *, inspecting: bool = False, numpy: bool = False) -> Checkpoint:
        """The checkpoint, with the others on top of it; numpy: without torch where the files allow. Raises CheckpointError and its kin."""
        own = ("checkpoint", "dtype", "weight", "others")
        stack = [
            read(
                recipe.checkpoint,
                inspecting=inspecting,
                numpy=numpy,
                **{f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in own},
            )
            for recipe in (self, *self.others)
        ]
        if not self.others and self.weight == 1:
            return stack[0]
        from reparam_export.checkpoints._stack import stacked

        return stacked(stack, [recipe.weight for recipe in (self, *self.others)])

    def read_lightly(self) -> Checkpoint:
        """The checkpoint without torch, where its reader can do without. Raises CheckpointError and its kin."""
        try:
            return self.read(numpy=True)
        except (CheckpointError, FusionError):  # a reader that computes needs torch
            return self.read()  # what is really wrong is raised again

    def files(self) -> list[Path]:
        """Every file or folder that the result depends on; of a base's folder its config and its weights."""
        files = [Path(f) for f in (self.checkpoint, *self.config, *([self.base_weights] if self.base_weights else []))]
        for other in self.others:
            files += other.files()
        scheme, _, argument = (self.base or "").partition(":")
        place = Path(argument.rpartition(":")[0] if scheme == "py" else argument.partition("?")[0])
        if scheme == "hf" and place.is_dir():
            own = [] if self.base_weights else list(dict.fromkeys(weight_files(place).values()))
            return [*files, *(f for f in (place / "config.json", *own) if f.is_file())]
        return [*files, place] if scheme in ("hf", "py", "diffusers") and place.exists() else files

    def digests(self) -> dict[str, str]:
        """The fingerprint of each of these."""
        return {str(path): fingerprint(path) for path in self.files()}


def recipe_from_json(content: Mapping[str, Any]) -> Recipe:
    """The recipe out of its ``asdict``. Raises TypeError or AttributeError for what is none."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return Recipe(**given | {"others": tuple(recipe_from_json(other) for other in content.get("others", ()))})


@dataclass(frozen=True)
class Parts:
    """What a format's reader finds. ``replaced``: whole base tensors (a head) that the checkpoint carries."""

    adapters: tuple[Adapter, ...]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None  # base spec, where the checkpoint names its base
    ignored: frozenset[str] = frozenset()  # adapter tensors inside the base's own weight file
    base_state: Mapping[str, Tensor] = field(default_factory=dict)  # the whole base, where the checkpoint carries it
    base_digests: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # of the base's parameters; see ``fit``
    notes: tuple[str, ...] = ()
    expected: Mapping[str, Any] = field(
        default_factory=dict
    )  # inputs, outputs (by name) and their dtype, where they were recorded
    covers: Covers | None = None  # which of a base's modules must be adapted; None: all alike those that are
    only: bool = False  # may no others be adapted?
    underscored: bool = False  # the adapters' modules are named with _ for the dots
    by_shapes: bool = False  # ``bind`` looks at the names and shapes of the base only, not at its numbers
    task: str | None = None  # peft's task_type
    rebuilt: str | None = None  # the kind, where it decomposes the base again while loading
    copies: frozenset[str] = (
        frozenset()
    )  # of ``replaced``: copies beside the base's own, which leave what is tied to these as it is
    bind: Bind | None = (
        None  # where the adapters need the base (its names, its sizes, its numbers): makes them; ``adapters`` stand for them
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: adapters on named modules, and where their base comes from."""

    path: Path
    format: str
    sha256: str
    adapters: tuple[Adapter, ...]
    replaced: Mapping[str, Tensor]
    base: str | None
    base_weights: Path | None
    inputs: tuple[str, ...]
    base_state: Mapping[str, Tensor]
    base_digests: Mapping[str, tuple[str, str]]
    ignored: frozenset[str]
    settings: Mapping[str, Any]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    recipe: Recipe
    covers: Covers
    only: bool
    positional: bool
    missing: tuple[MissingSettingError, ...] = ()
    copies: frozenset[str] = frozenset()  # of ``replaced``, as in Parts
    bind: Bind | None = None  # the adapters of this base, where ``adapters`` only stand for them
    rebuilt: str | None = None  # the kind, where it decomposes the base again while loading
    untied: tuple[str, ...] = ()  # names that it gives tensors of their own on this base
    members: tuple[Checkpoint, ...] = ()  # of a stack, in the order they act
    expected: Mapping[str, Any] = field(default_factory=dict)  # of ``Parts``
    underscored: bool = False  # the adapters' modules are named with _ for the dots
    by_shapes: bool = False  # ``bind`` looks at the names and shapes of the base only, not at its numbers
    task: str | None = None  # peft's task_type
    named: bool = False  # under the base's own names; see ``naming``
    outer: bool = False  # ``module.`` in front of all names of the file was taken for a wrapper's
    spelled: Mapping[str, str] = field(
        default_factory=dict
    )  # modules by their names in the file, where the base has others
    dropped: tuple[str, ...] = ()  # names of the file's tensors that the user left out

    def describe(self) -> dict[str, Any]:
        """What ``inspect`` shows and ``fused.json`` records. JSON types."""
        kinds: dict[str, int] = {}
        for adapter in self.adapters:
            kinds[adapter.kind] = kinds.get(adapter.kind, 0) + 1
        ranks = sorted({r for adapter in self.adapters for r in _ranks(settings_of(adapter))})
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "format": self.format,
            "kinds": kinds,
            "modules": len(self.adapters),
            "rank": ranks,
            "settings": dict(self.settings),
            "files": [str(f) for f in self.files],
            "notes": list(self.notes),
            "dropped": list(self.dropped),
            "rebuilt": self.rebuilt,
            "stack": [
                {"path": str(m.path), "sha256": m.sha256, "format": m.format, "weight": m.recipe.weight}
                for m in self.members
            ],
        }


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """What a reader wants to see of an adapter: its rank, its scale."""
    if isinstance(adapter.params, Unbound):
        return adapter.params.settings
    return kind(adapter.kind).describe(adapter.params)


class Format(Protocol):
    LOOKED_FOR: str

    def accepts(self, source: Source) -> bool: ...
    def read(self, source: Source) -> Parts: ...


def read(
    path: str | Path,
    base: str | None = None,
    *,
    base_weights: str | Path | None = None,
    config: Sequence[str | Path] | str | Path = (),
    settings: Mapping[str, Any] | None = None,
    candidate: int = 0,
    inputs: Sequence[str] = (),
    renames: Sequence[str] = (),
    drop: Sequence[str] = (),
    inspecting: bool = False,
    numpy: bool = False,
) -> Checkpoint:
    """Read a checkpoint file or PEFT folder.

    base: base spec (``timm:NAME?kw=value``, ``hf:FOLDER``, ``py:FILE.py:FUNCTION``, ``open_clip:NAME``) where the checkpoint names none.
    base_weights: file with the base's state. config, settings, candidate: what the checkpoint itself does not say.
    inputs: input specs for ``py:`` bases. renames: ``OLD=NEW``, parts of dotted names as the checkpoint
    and as the base has them. numpy: read safetensors without torch; inspecting: that, and collect missing settings.
    drop: names, with ``*`` and ``?``, of tensors that the model is wanted without, such as a value head; it is said wherever the result is.
    Raises CheckpointError and its kin (exit code 3), UsageError.
    """
    config = [config] if isinstance(config, str | Path) else list(config)
    given = read_settings([Path(c) for c in config], settings, candidate, lenient=inspecting)
    source = open_source(
        Path(path),
        given,
        base_given=base is not None,
        numpy=inspecting or numpy,
        weights_given=base_weights is not None,
    )
    source, dropped = without(source, drop)
    name, fmt = recognise(source)
    parts = _read(fmt, source)
    if base_weights is not None and "base_weights" in given.values:  # which of the models in that file
        given.used["base_weights"] = str(given.values["base_weights"])
    given.check_all_used(name)
    check(source.path, parts)
    check_plain(source.path, parts)
    if not inspecting:
        check_finite(source.path, parts)
    return Checkpoint(
        path=source.path,
        format=name,
        sha256=sha256(source.path),
        adapters=parts.adapters,
        replaced=parts.replaced,
        base=base or parts.base,
        base_weights=None if base_weights is None else Path(base_weights),
        inputs=tuple(inputs),
        base_state=parts.base_state,
        base_digests=parts.base_digests,
        ignored=parts.ignored,
        settings=given.used,
        files=given.files,
        notes=(*parts.notes, *given.notes, *_of_dropped(dropped, drop), *_of_another_base(parts.base, base)),
        dropped=dropped,
        recipe=Recipe(
            checkpoint=str(source.path.absolute()),
            base=base,
            base_weights=None if base_weights is None else str(Path(base_weights).absolute()),
            config=tuple(str(Path(c).absolute()) for c in config),
            settings=dict(settings or {}),
            candidate=candidate,
            inputs=tuple(inputs),
            renames=tuple(renames),
            drop=tuple(drop),
        ),
        covers=parts.covers or siblings(parts.adapters),
        only=parts.only,
        positional=given.positional,
        missing=tuple(given.missing),
        copies=parts.copies,
        rebuilt=parts.rebuilt,
        bind=parts.bind,
        expected=parts.expected,
        underscored=parts.underscored,
        outer=source.outer,
        by_shapes=parts.by_shapes,
        task=parts.task,
    )


def _of_dropped(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [f"dropped by name (--drop {' '.join(patterns)}): {', '.join(names)}"] if names else []


def _of_another_base(named: str | None, given: str | None) -> list[str]:
    """A note where the checkpoint names another base than the one that was given: by path, by ID or by the last part of either."""
    texts = [str(spec).partition(":")[2].partition("?")[0].rstrip("/") for spec in (named, given)]
    if named is None or given is None or named.partition(":")[0] != given.partition(":")[0]:
        return []
    if len({Path(text).resolve() for text in texts}) == 1 or len({Path(text).name.lower() for text in texts}) == 1:
        return []
    return [f"the checkpoint names the base {texts[0]}; folded into {texts[1]}, as given"]


def siblings(adapters: Sequence[Adapter]) -> Covers:
    """All modules that are named like an adapted one but for their numbers: authors' code adapts every block alike."""
    alike = {unnumbered(adapter.module) for adapter in adapters}
    return lambda names: [name for name in names if unnumbered(name) in alike]


def unnumbered(module: str) -> str:
    """The name with every part that is a number (of a block) as ``#``."""
    return ".".join("#" if part.isdecimal() else part for part in module.split("."))


def _read(fmt: Format, source: Source) -> Parts:
    """The format's reader, with whatever a hostile or damaged file makes it stumble over as one error."""
    try:
        return fmt.read(source)
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        RuntimeError,
        re.error,
    ) as error:
        raise CheckpointError(
            f"{source.path}: damaged or of another version: {type(error).__name__}: {error}"
        ) from error


def recognise(source: Source) -> tuple[str, Format]:
    """The format that accepts the source. Raises UnknownFormatError that lists what each format looked for."""
    formats = {name: cast(Format, plugins.load("checkpoints", name)) for name in plugins.names("checkpoints")}
    for name, fmt in formats.items():
        if fmt.accepts(source):
            return name, fmt
    looked_for = {name: fmt.LOOKED_FOR for name, fmt in formats.items()}
    first = ", ".join(list(source.tensors)[:3]) or "no tensors"
    raise UnknownFormatError(
        f"{source.path}: no reader recognises this checkpoint; it holds {len(source.tensors)} tensors ({first}, ...)\n"
        + "\n".join(f"  {name:12} looks for {wanted}" for name, wanted in looked_for.items()),
        path=str(source.path),
        looked_for=looked_for,
    )


def _ranks(described: Any) -> list[int]:
    if not isinstance(described, dict):
        return []
    found = [described["rank"]] if isinstance(described.get("rank"), int) else []
    return found + [r for value in described.values() for r in _ranks(value)]
