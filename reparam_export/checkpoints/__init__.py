"""Checkpoints: what is on disk, as adapters on named modules.

One on-disk format, one file; it alone knows tensor names, and a missing, left-over or mis-shaped tensor is an error, never
skipped. A format is a module with

    LOOKED_FOR                what it recognises a file by, for the error that lists all formats
    accepts(source) -> bool   by the names of the tensors and the configuration beside them
    read(source) -> Parts     raises CheckpointError and its kin
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from reparam_export import plugins
from reparam_export.adapters import kind
from reparam_export.affine import Tensor, map_tensors, tensors_of
from reparam_export.checkpoints._settings import Settings, read_settings
from reparam_export.errors import (
    CheckpointError,
    FusionError,
    MissingSettingError,
    TensorMismatchError,
    UnknownFormatError,
)
from reparam_export.files import (
    PICKLES,
    fingerprint,
    flat_tensors,
    load_pickle,
    load_safetensors,
    read_json,
    sha256,
    weight_files,
)

NATIVE = "reparam-export/1"


@dataclass(frozen=True)
class Adapter:
    """One adapter on one module of the base.

    module: dotted name; params: the kind's ``Params``; rows: the outputs it acts on (start, stop), as for one of q, k, v in a packed
    projection; None: all of them.
    """

    module: str
    kind: str
    params: Any
    rows: tuple[int, int] | None = None


Covers = Callable[[Sequence[str]], list[str]]  # names of a base's modules -> those that must have an adapter


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

    def read(self, *, numpy: bool = False) -> Checkpoint:
        """The checkpoint; numpy: without torch where the file allows. Raises CheckpointError and its kin."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("checkpoint", "dtype")}
        return read(self.checkpoint, **given, numpy=numpy)

    def read_lightly(self) -> Checkpoint:
        """The checkpoint without torch, where its reader can do without. Raises CheckpointError and its kin."""
        try:
            return self.read(numpy=True)
        except (
            CheckpointError,
            FusionError,
        ):  # a reader that computes needs torch; what is really wrong is raised again
            return self.read()

    def files(self) -> list[Path]:
        """Every file or folder that the result depends on; of a base's folder its config and its weights."""
        files = [Path(f) for f in (self.checkpoint, *self.config, *([self.base_weights] if self.base_weights else []))]
        scheme, _, argument = (self.base or "").partition(":")
        place = Path(argument.rpartition(":")[0] if scheme == "py" else argument.partition("?")[0])
        if scheme == "hf" and place.is_dir():
            own = [] if self.base_weights else list(dict.fromkeys(weight_files(place).values()))
            return [*files, *(f for f in (place / "config.json", *own) if f.is_file())]
        return [*files, place] if scheme in ("hf", "py") and place.exists() else files

    def digests(self) -> dict[str, str]:
        """The fingerprint of each of these."""
        return {str(path): fingerprint(path) for path in self.files()}


@dataclass(frozen=True)
class Parts:
    """What a format's reader finds. ``replaced``: whole base tensors (a head) that the checkpoint carries."""

    adapters: tuple[Adapter, ...]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None  # base spec, where the checkpoint names its base
    ignored: frozenset[str] = frozenset()  # adapter tensors inside the base's own weight file
    base_state: Mapping[str, Tensor] = field(default_factory=dict)  # the whole base, where the checkpoint carries it
    notes: tuple[str, ...] = ()
    covers: Covers | None = None  # which of a base's modules must be adapted; None: all alike those that are


@dataclass(frozen=True)
class Source:
    """One opened checkpoint. ``tensors`` in file order; ``content`` the whole object of our own format."""

    path: Path
    file: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    content: Mapping[str, Any]
    settings: Settings
    base_given: bool

    def claim(self) -> Claim:
        """All tensors, to be taken one by one; what is not taken is an error."""
        return Claim(self.path, dict(self.tensors))


class Claim:
    """Tensors that a reader has to account for, every one of them."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._path, self._left = path, tensors

    def take(self, name: str) -> Tensor:
        """Raises TensorMismatchError when it is not there."""
        if name not in self._left:
            module, _, tensor = name.rpartition(".")
            raise TensorMismatchError(
                f"{self._path}: tensor {name} is missing; the adapter on {module} needs it",
                module=module,
                tensor=tensor,
                expected=name,
                found=None,
            )
        return self._left.pop(name)

    def take_if(self, name: str) -> Tensor | None:
        return self._left.pop(name, None)

    def take_all(self, wanted: Any) -> dict[str, Tensor]:
        """Every remaining tensor whose name satisfies ``wanted``."""
        return {name: self._left.pop(name) for name in list(self._left) if wanted(name)}

    def names(self) -> list[str]:
        return list(self._left)

    def finish(self) -> None:
        """Raises TensorMismatchError when anything was left over."""
        if self._left:
            name = next(iter(self._left))
            module, _, tensor = name.rpartition(".")
            raise TensorMismatchError(
                f"{self._path}: {len(self._left)} tensor(s) that belong to no adapter and no head, first {name} "
                f"{tuple(self._left[name].shape)}; nothing may be left over, because a dropped tensor changes the model",
                module=module,
                tensor=tensor,
                expected=None,
                found=tuple(self._left[name].shape),
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
    ignored: frozenset[str]
    settings: Mapping[str, Any]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    recipe: Recipe
    covers: Covers
    positional: bool
    missing: tuple[MissingSettingError, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What ``inspect`` shows and ``fused.json`` records. JSON types."""
        kinds: dict[str, int] = {}
        for adapter in self.adapters:
            kinds[adapter.kind] = kinds.get(adapter.kind, 0) + 1
        described = [kind(a.kind).describe(a.params) for a in self.adapters]
        ranks = sorted({r for d in described for r in _ranks(d)})
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
        }


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
    inspecting: bool = False,
    numpy: bool = False,
) -> Checkpoint:
    """Read a checkpoint file or PEFT folder.

    base: base spec (``timm:NAME?kw=value``, ``hf:FOLDER``, ``py:FILE.py:FUNCTION``, ``open_clip:NAME``) where the checkpoint names none.
    base_weights: file with the base's state. config, settings, candidate: what the checkpoint itself does not say.
    inputs: input specs for ``py:`` bases. numpy: read safetensors without torch; inspecting: that, and collect missing settings.
    Raises CheckpointError and its kin (exit code 3), UsageError.
    """
    config = [config] if isinstance(config, str | Path) else list(config)
    given = read_settings([Path(c) for c in config], settings, candidate, lenient=inspecting)
    source = open_source(Path(path), given, base_given=base is not None, numpy=inspecting or numpy)
    name, fmt = recognise(source)
    parts = _read(fmt, source)
    given.check_all_used(name)
    _check(source.path, parts)
    if not inspecting:
        _check_finite(source.path, parts)
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
        ignored=parts.ignored,
        settings=given.used,
        files=given.files,
        notes=(*parts.notes, *given.notes),
        recipe=Recipe(
            checkpoint=str(source.path.absolute()),
            base=base,
            base_weights=None if base_weights is None else str(Path(base_weights).absolute()),
            config=tuple(str(Path(c).absolute()) for c in config),
            settings=dict(settings or {}),
            candidate=candidate,
            inputs=tuple(inputs),
        ),
        covers=parts.covers or siblings(parts.adapters),
        positional=given.positional,
        missing=tuple(given.missing),
    )


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


def open_source(path: Path, settings: Settings, *, base_given: bool, numpy: bool) -> Source:
    """Open a file, or the weights and configuration of a folder. Raises CheckpointError."""
    file = _weights_file(path)
    beside = file.parent if path.is_file() else path
    config: dict[str, Any] = {}
    for name in ("adapter_config.json", "config.json"):
        if not config and (beside / name).is_file():
            config = read_json(beside / name)
    content: Mapping[str, Any] = {}
    metadata: dict[str, str] = {}
    if file.suffix == ".safetensors":
        tensors, metadata = load_safetensors(file, numpy=numpy)
    else:
        loaded = load_pickle(file)
        if isinstance(loaded, Mapping) and loaded.get("format") == NATIVE:
            content, tensors = loaded, {}
        else:
            tensors = flat_tensors(file, loaded)
    return Source(path, file, tensors, config, metadata, content, settings, base_given)


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


def _weights_file(path: Path) -> Path:
    if path.is_file():
        if path.name.endswith((*PICKLES, ".safetensors")):
            return path
        raise CheckpointError(
            f"{path}: expected {', '.join(PICKLES)}, .safetensors or a PEFT folder, found the ending {path.suffix or '(none)'}"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    for name in ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: the folder holds no adapter_model.safetensors, adapter_model.bin, model.safetensors or pytorch_model.bin"
    )


def _check(path: Path, parts: Parts) -> None:
    """No two adapters on the same outputs of one module, and at least one adapter."""
    if not parts.adapters:
        raise CheckpointError(f"{path}: holds no adapter")
    seen: dict[str, list[tuple[int, float]]] = {}
    for adapter in parts.adapters:
        start, stop = adapter.rows or (0, float("inf"))
        for other_start, other_stop in seen.setdefault(adapter.module, []):
            if start < other_stop and other_start < stop:
                raise CheckpointError(f"{path}: two adapters act on the same outputs of {adapter.module}")
        seen[adapter.module].append((start, stop))


def _check_finite(path: Path, parts: Parts) -> None:
    for name, tensor in _named(parts):
        real = any(str(tensor.dtype).endswith(kind) for kind in ("float16", "float32", "float64"))  # bfloat16 too
        if not real and not (name in parts.replaced and "int" in str(tensor.dtype)):
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; expected 16, 32 or 64 bit floating point numbers")
        if hasattr(tensor, "is_meta") and (tensor.is_meta or tensor.is_sparse or tensor.is_quantized):
            raise CheckpointError(f"{path}: {name} is not a plain dense tensor")
    for adapter in parts.adapters:
        where = f"{path}: {adapter.module}"
        map_tensors(adapter.params, lambda t: t, partial(_finite_number, where))
    bad = non_finite(parts)
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} tensor(s) hold NaN or infinity, first {bad[0]}; this training run diverged"
        )


def non_finite(parts: Parts | Checkpoint) -> list[str]:
    """Names of tensors with a NaN or an infinity."""
    return [name for name, tensor in _named(parts) if not _finite(tensor)]


def zeros(parts: Parts | Checkpoint) -> list[str]:
    """Names of adapter tensors that are zero throughout."""
    return [
        name
        for name, t in _named(parts)
        if name not in parts.replaced and 0 not in t.shape and not bool((t != 0).any())
    ]


def _named(parts: Parts | Checkpoint) -> list[tuple[str, Tensor]]:
    adapters = [(f"{a.module}: {name}", t) for a in parts.adapters for name, t in tensors_of(a.params).items()]
    return [*adapters, *parts.replaced.items()]


def _finite_number(where: str, number: float) -> float:
    if number != number or abs(number) > sys.float_info.max:
        raise CheckpointError(f"{where}: {number} is no usable scale")
    return number


def _finite(tensor: Tensor) -> bool:
    return bool((tensor == tensor).all()) and bool((abs(tensor) != float("inf")).all())


def _ranks(described: Any) -> list[int]:
    if not isinstance(described, dict):
        return []
    found = [described["rank"]] if isinstance(described.get("rank"), int) else []
    return found + [r for value in described.values() for r in _ranks(value)]
