"""An opened checkpoint: its tensors and the settings beside them, every one of which a reader has to account for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from reparam_export.affine import Tensor
from reparam_export.checkpoints._folder import INDEX, check_beside, check_whole, shards, weights_file
from reparam_export.checkpoints._nemo import ENDING, open_archive
from reparam_export.checkpoints._settings import Settings
from reparam_export.errors import CheckpointError, TensorMismatchError, UsageError
from reparam_export.files import (
    flat_tensors,
    is_tensor,
    load_pickle,
    load_safetensors,
    plain_tensors,
    read_json,
    state_dicts,
)
from reparam_export.names.once import once
from reparam_export.names.wrappers import has_outer, unwrapped

NATIVE = "reparam-export/1"
LONGEST = 1000  # characters of a path or a hub id


@dataclass(frozen=True)
class Source:
    """One opened checkpoint. ``tensors`` in file order; ``content`` the whole object of a torch file."""

    path: Path
    file: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    content: Mapping[str, Any]
    settings: Settings
    base_given: bool
    weights_given: bool = False  # the base's, apart from this file
    outer: bool = False  # ``module.`` in front of all names was taken for a wrapper's

    def claim(self) -> Claim:
        """All tensors, to be taken one by one; what is not taken is an error."""
        return Claim(self.path, dict(self.tensors))

    def near(self, place: str) -> str:
        """The folder of a model that the checkpoint names: beside its file, else one of the working folder, or a hub id.

        Raises CheckpointError for what is neither.
        """
        if len(place) > LONGEST or not place.isprintable():
            raise CheckpointError(
                f"{self.path}: the base that it names, {place[:80]!r} and on, is no usable folder or hub id; correct the name in the file, "
                "or take it out and pass --base"
            )
        beside = self.file.parent / place
        return str(beside) if beside.is_dir() else place


def placed(spec: str, place: Callable[[str], str]) -> str:
    """An ``hf:`` base spec with ``place`` of its folder or id; any other as it is."""
    scheme, _, argument = spec.partition(":")
    folder, mark, keywords = argument.partition("?")
    return f"hf:{place(folder)}{mark}{keywords}" if scheme == "hf" else spec


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

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """What was taken, and belongs to nothing."""
        self._left |= tensors

    def names(self) -> list[str]:
        return list(self._left)

    def finish(self) -> None:
        """Raises TensorMismatchError when anything was left over."""
        if self._left:
            name = next(iter(self._left))
            module, _, tensor = name.rpartition(".")
            raise TensorMismatchError(
                f"{self._path}: {len(self._left)} tensor(s) that belong to no adapter and no head, first {name} "
                f"{tuple(self._left[name].shape)}; nothing may be left over, because a dropped tensor changes the model. If the model is "
                f"wanted without them, such as a value head, drop them by name: --drop '{_pattern(list(self._left))}'",
                module=module,
                tensor=tensor,
                expected=None,
                found=tuple(self._left[name].shape),
            )


def _pattern(names: list[str]) -> str:
    """What ``--drop`` takes for these: the module that all of them are in, or the first of them."""
    heads = [name.split(".")[:-1] for name in names]
    common = [part for part, *others in zip(*heads, strict=False) if all(part == other for other in others)]
    known = [part for part in common if part not in ("base_model", "model", "module")]
    return f"{'.'.join(common)}.*" if known else names[0]


def without(source: Source, patterns: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """The source without the tensors that the user drops by name, and their names.

    A pattern has ``*`` and ``?``; it is of a whole name, or of one from some dot on. Raises UsageError for one that drops nothing.
    """
    dropped: dict[str, None] = {}
    for pattern in patterns:
        names = [n for n in source.tensors if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")]
        if not names:
            near = difflib.get_close_matches(pattern, list(source.tensors), n=3, cutoff=0.3) or list(source.tensors)[:3]
            raise UsageError(
                f"--drop {pattern!r}: {source.path} holds no tensor of this name (nearest: {', '.join(near) or 'it holds none by name'})"
            )
        dropped |= dict.fromkeys(names)
    kept = {name: tensor for name, tensor in source.tensors.items() if name not in dropped}
    return replace(source, tensors=kept), tuple(dropped)


def open_source(
    path: Path, settings: Settings, *, base_given: bool, numpy: bool, weights_given: bool = False
) -> Source:
    """Open a file, or the weights and configuration of a folder. Raises CheckpointError."""
    file = weights_file(path)
    beside = file.parent if path.is_file() else path
    config: dict[str, Any] = {}
    for name in ("adapter_config.json", "config.json"):
        if not config and (beside / name).is_file():
            config = read_json(beside / name)
    if "peft_type" in settings.values:  # adapter_config.json, given with --config
        config = settings.take_all()
    content: Mapping[str, Any] = {}
    metadata: dict[str, str] = {}
    if file.name.endswith(INDEX):
        tensors = shards(file, numpy=numpy)
    elif file.suffix == ".safetensors":
        tensors, metadata = load_safetensors(file, numpy=numpy)
    else:
        if file.suffix == ENDING:
            loaded, config = open_archive(file)
        else:
            loaded = load_pickle(file)
        if isinstance(loaded, Mapping) and loaded.get("format") == NATIVE:
            content, tensors = loaded, {}
        else:
            content, tensors = loaded if isinstance(loaded, Mapping) else {}, _state(file, loaded, settings)
    check_whole(path, tensors, config)
    check_beside(beside, config)
    outer, plain = has_outer(list(tensors)), unwrapped(tensors, file)
    return Source(path, file, plain, config, metadata, content, settings, base_given, weights_given, outer)


def _state(file: Path, loaded: Any, settings: Settings) -> dict[str, Tensor]:
    """What a training script saved, as tensors: of the only state dict, or of the one that the user chose. Raises MissingSettingError."""
    found = state_dicts(loaded, file)
    if not found and isinstance(loaded, Mapping) and "metadata" in loaded:  # CLIP-LoRA: by layer, by projection
        leaves = _leaves(loaded.get("weights"))
        if leaves is not None:
            return plain_tensors(once(leaves, file))
    if len(found) < 2:
        return flat_tensors(file, loaded)
    average = (
        "the trained weights and their moving average" if any("ema" in name for name in found) else "several models"
    )
    why = f"{file}: the checkpoint holds {average}; which one was evaluated decides what the result is"
    return plain_tensors(found[settings.choice("weights", list(found), why=why)])


def _leaves(nested: Any, depth: int = 4) -> list[tuple[str, str, Tensor]] | None:
    """Mappings of mappings of tensors as one: their keys one by one, dotted names, tensors. None for anything else."""
    if not isinstance(nested, Mapping) or not nested or not depth:
        return None
    found: list[tuple[str, str, Tensor]] = []
    for key, value in nested.items():
        if not isinstance(key, str):
            return None
        inner = None if is_tensor(value) else _leaves(value, depth - 1)
        if is_tensor(value):
            found.append((f"[{key!r}]", key, value))
        elif inner is None:
            return None
        else:
            found += [(f"[{key!r}]{keys}", f"{key}.{name}", tensor) for keys, name, tensor in inner]
    return found


def alike(one: Tensor, other: Tensor) -> bool:
    """Have they one shape, and equal numbers?"""
    return tuple(one.shape) == tuple(other.shape) and bool((one == other).all())


def as_matrix(tensor: Tensor) -> Tensor:
    """A convolution's weight (out, in, *kernel) as the matrix over its patches."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def as_core(tensor: Tensor | None) -> Tensor | None:
    """The core (r, r, *kernel) of a factored convolution with its kernel as one axis."""
    return None if tensor is None else tensor.reshape(*tensor.shape[:2], -1)


def as_integers(tensor: Tensor) -> Tensor:
    """Indices, which peft saves as floating point numbers on Windows."""
    return tensor.long() if hasattr(tensor, "long") else tensor.astype("int64")
