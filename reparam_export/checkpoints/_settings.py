"""What the user says beside the checkpoint: ``--config`` files, ``--set`` values, ``--candidate``.

A setting that decides the result and is not there is refused, never guessed. While inspecting, it is collected instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reparam_export.errors import CheckpointError, MissingSettingError, UsageError
from reparam_export.files import unlike_pairs
from reparam_export.names.once import renamed_once

Choice = dict[str, str]  # {"A": "LoRA_4", "B": "vector", ...}
SUPPORTS = frozenset("ABCDE")
CHOICES = frozenset(("adapter", "base_weights", "part", "weights"))  # of what a file holds


@dataclass
class Settings:
    """``values`` by name, per-layer GLoRA ``paths`` by layer name or in layer order, what was ``used`` and is ``missing``."""

    values: dict[str, Any] = field(default_factory=dict)
    paths: Mapping[str, Choice] | Sequence[Choice] | None = None
    files: tuple[Path, ...] = ()
    given: frozenset[str] = frozenset()  # names from --set: each must be used
    notes: list[str] = field(default_factory=list)
    lenient: bool = False  # collect what is missing instead of raising
    used: dict[str, Any] = field(default_factory=dict)
    missing: list[MissingSettingError] = field(default_factory=list)
    positional: bool = False  # a list of paths was matched to the layers by their order

    def number(self, name: str, *, found_in: str) -> float:
        """A finite number. Raises MissingSettingError, or UsageError when it is not one."""
        if name not in self.values:
            self.miss(
                f"the checkpoint does not hold the {name}; it is found in {found_in}; "
                f"pass that file with --config FILE, or the value with --set {name}=VALUE"
                + (f" (you gave {', '.join(sorted(self.given))})" if self.given else ""),
                setting=name,
                found_in=found_in,
                option=f"--set {name}=VALUE",
            )
            return math.nan
        value = self.values[name]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            raise UsageError(f"setting {name}: expected a finite number, found {_shown(value)}")
        if number == 0:
            raise UsageError(f"setting {name} is 0: that switches the adapter off; pass the value it was trained with")
        self.used[name] = number
        return number

    def take_all(self) -> dict[str, Any]:
        """Every value but those that choose among what files hold, as one configuration."""
        found = {name: value for name, value in self.values.items() if name not in CHOICES}
        self.used |= {name: found[name] for name in self.given if name in found}
        return found

    def flag(self, name: str) -> bool:
        """Yes or no; no where it is not given. Raises UsageError for another value."""
        value = self.values.get(name, False)
        value = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise UsageError(f"setting {name}: expected true or false, found {_shown(value)}")
        if name in self.values:
            self.used[name] = value
        return value

    def offer(self, name: str, value: Any, where: str) -> None:
        """A value that the file itself has, where the user gives none."""
        if value is not None and name not in self.values:
            self.values[name] = value
            self.notes.append(f"{name} {_shown(value)} from {where}")

    def choice(self, name: str, options: Sequence[str], *, why: str) -> str:
        """One of the options; the first while inspecting. Raises MissingSettingError, or UsageError for another value."""
        if name not in self.values:
            option = f"--set {name}={'|'.join(options)}"
            self.miss(f"{why}; say which one with {option}", setting=name, found_in="what was evaluated", option=option)
            return options[0]
        value = self.values[name]
        if value not in options:
            raise UsageError(f"setting {name}: expected {' or '.join(options)}, found {_shown(value)}")
        self.used[name] = value
        return str(value)

    def layer_paths(self, layers: Sequence[str], *, found_in: str) -> list[Choice | None]:
        """One path choice per layer, matched by name or, for a plain list, by order. None for each while inspecting."""
        if self.paths is None:
            self.miss(
                "the checkpoint does not say which path each GLoRA layer takes, and without it the trained supernet has "
                f"no defined output; it is found in {found_in}; pass it with --config FILE (the evolution "
                "checkpoint, or a JSON/YAML list of {A, B, C, D, E} per layer)",
                setting="paths",
                found_in=found_in,
                option="--config FILE",
            )
            return [None] * len(layers)
        if isinstance(self.paths, Mapping):
            return self._paths_by_name(layers, self.paths)
        if len(self.paths) != len(layers):
            raise CheckpointError(
                f"{self._names()}: holds a path for {len(self.paths)} layers, the checkpoint has {len(layers)} GLoRA layers"
            )
        self.used["paths"] = len(layers)
        self.positional = True
        return list(self.paths)

    def _paths_by_name(self, layers: Sequence[str], paths: Mapping[str, Choice]) -> list[Choice | None]:
        known = renamed_once(paths, lambda name: name.removeprefix("base_model.model."), self._names())
        absent = [layer for layer in layers if layer not in known]
        left = [name for name in known if name not in layers]
        if absent or left:
            raise CheckpointError(
                f"{self._names()}: the paths and the checkpoint's layers differ; without a path: {absent[:3] or 'none'}, "
                f"paths without a layer: {left[:3] or 'none'}"
            )
        self.used["paths"] = len(layers)
        return [known[layer] for layer in layers]

    def check_all_used(self, format_name: str) -> None:
        """Raises UsageError for a ``--set`` name, or paths, that nothing read: a misspelt setting must not pass."""
        unused = sorted(self.given - set(self.used))
        if unused:
            raise UsageError(
                f"--set {unused[0]}: the {format_name} format reads no such setting; "
                f"it reads: {', '.join(sorted(set(self.used) - {'paths'})) or 'none'}"
            )
        if self.paths is not None and "paths" not in self.used:
            raise UsageError(
                f"{self._names()}: holds GLoRA paths, but no layer of this {format_name} checkpoint has one to choose; leave it out"
            )

    def miss(self, message: str, **fields: str) -> None:
        """A setting that decides the result is not there: raises MissingSettingError, and collects it while inspecting."""
        error = MissingSettingError(message, **fields)
        if not self.lenient:
            raise error
        self.missing.append(error)

    def _names(self) -> str:
        return ", ".join(str(f) for f in self.files) or "--config"


def read_settings(
    config: Sequence[Path] = (), values: Mapping[str, Any] | None = None, candidate: int = 0, *, lenient: bool = False
) -> Settings:
    """Read the ``--config`` files in order and lay the ``--set`` values over them.

    config: YAML or JSON mappings of settings, lists or mappings of GLoRA paths, or the authors' ``checkpoint-N.pth.tar``.
    Raises CheckpointError for a file that is none of these.
    """
    settings = Settings(files=tuple(config), lenient=lenient)
    for path in config:
        content = _load(path)
        if isinstance(content, dict) and "keep_top_k" in content:
            settings.paths = _candidate(path, content, candidate, settings.notes)
        elif isinstance(content, list):
            settings.paths = _path_list(path, content)
        elif isinstance(content, dict) and content and all(_is_choice(v) for v in content.values()):
            settings.paths = {str(k): _choice(v) for k, v in content.items()}
        elif isinstance(content, dict):
            settings.values |= {str(k): v for k, v in content.items()}
        else:
            raise CheckpointError(
                f"{path}: expected a mapping of settings or a list of paths, found {type(content).__name__}"
            )
    if candidate and not any("candidate" in note for note in settings.notes):
        raise UsageError("--candidate needs an evolution checkpoint (checkpoint-N.pth.tar) among the --config files")
    settings.values |= dict(values or {})
    settings.given = frozenset(values or {})
    return settings


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file (given with --config)")
    if path.name.endswith((".pth.tar", ".pt", ".pth")):
        from reparam_export.files import load_pickle

        return load_pickle(path)
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=unlike_pairs)
        return yaml.load(text, _each_key_once(yaml.SafeLoader))  # plain data only
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be read as {'JSON' if path.suffix == '.json' else 'YAML'}: {first}"
        ) from error


def _each_key_once(loader: Any) -> Any:
    """YAML's safe loader, which raises ValueError for a key that a mapping has twice, of which it would keep the last."""

    class Loader(loader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and not key.tag.endswith(":merge"):
                    if key.value in seen:
                        raise ValueError(f"it gives {key.value!r:.80} twice{key.start_mark}")
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def _candidate(path: Path, content: dict[str, Any], index: int, notes: list[str]) -> list[Choice] | dict[str, Choice]:
    """The index-th best evaluated candidate of a GLoRA evolution checkpoint (ViT-Slim, EvolutionSearcher.save_checkpoint)."""
    try:
        best = max((list(v) for k, v in content["keep_top_k"].items() if k == 50), default=[], key=len)
        best = best or max((list(v) for v in content["keep_top_k"].values()), key=len)
        accuracy = {tuple(map(str, c)): content["vis_dict"][str(c)]["acc"] for c in best}
        if not best or any(value != value for value in accuracy.values()):
            raise ValueError("no evaluated candidate with an accuracy that is a number")
        best = sorted(best, key=lambda c: -float(accuracy[tuple(map(str, c))]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a GLoRA evolution checkpoint as ViT-Slim writes it: {error!r}") from error
    if not 0 <= index < len(best):
        raise UsageError(f"--candidate {index}: {path} holds {len(best)} evaluated candidates, 0 is the best")
    chosen = best[index]
    acc = float(accuracy[tuple(map(str, chosen))])
    notes.append(f"candidate {index} of {len(best)} in {path.name}: accuracy {acc:g} in the search")
    return _path_list(path, list(chosen))


def _path_list(path: Path, content: list[Any]) -> list[Choice] | dict[str, Choice]:
    if not content or not all(_is_choice(item) for item in content):
        raise CheckpointError(f"{path}: expected a list with one mapping of A, B, C, D, E per layer")
    if all("layer" in item for item in content):
        names = [str(item["layer"]) for item in content]
        if len(set(names)) != len(names):
            raise CheckpointError(f"{path}: the same layer is named twice")
        return {str(item["layer"]): _choice(item) for item in content}
    return [_choice(item) for item in content]


def _shown(value: Any) -> str:
    """A value for an error message: its type where writing it out could take for ever."""
    return (
        repr(value)[:80]
        if isinstance(value, str | int | float | None) and len(str(value)[:100]) < 100
        else type(value).__name__
    )


def _is_choice(value: Any) -> bool:
    return isinstance(value, dict) and SUPPORTS <= set(value) <= SUPPORTS | {"layer"}


def _choice(value: dict[str, Any]) -> Choice:
    return {name: str(value[name]) for name in sorted(SUPPORTS)}
