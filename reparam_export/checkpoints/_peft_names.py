"""Which modules a PEFT configuration means, as peft 0.21 matches names, and whether each of its patterns and targets means one.

A pattern that matches nothing is passed over by peft with a warning; here it is an error that names it (a scale or a rank was meant for
something, and the module that it was meant for may be called otherwise in this file), and so are targets that somebody wrote one by one:
``target_parameters``, ``modules_to_save`` but for the heads that peft itself puts there whatever the model calls its own (``classifier``,
``score``, ``qa_outputs``), ``trainable_token_indices``, the layers of ``layers_to_transform``, the ``feedforward_modules`` of (IA)^3.
``exclude_modules`` may leave out nothing. An entry of a list of ``target_modules`` may match nothing while others do: such lists are
written once for many models (q_proj beside qkv_proj), peft trains what matches, and the file shows what that was; it is said in a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reparam_export.checkpoints import Covers
from reparam_export.errors import CheckpointError

PREFIX = "base_model.model."
HEADS = ("classifier", "score", "qa_outputs")  # put into modules_to_save by peft for a task, found or not
ANY_LAYER = r".*?\.[^.]*\.(?P<number>\d+)\."


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """``re.match`` (or ``re.search``) for a pattern out of a file: one that takes longer than a second, or is none, is refused."""
    return _match(pattern, name, "search" if anywhere else "match") is not None


def _match(pattern: str, name: str, how: str = "match") -> Any:
    import regex

    try:
        return getattr(regex, how)(pattern, name, timeout=1)
    except (regex.error, TimeoutError) as error:
        raise CheckpointError(f"adapter_config.json: the pattern {pattern[:80]!r} cannot be used: {error}") from error


def named(name: str, given: str | Sequence[str]) -> bool:
    """Does a module's name match a pattern as a whole, or end, from a dot on, with one of several names?"""
    if isinstance(given, str):
        return matches(rf"(?:{given})\Z", name)
    return any(name == end or name.endswith(f".{end}") for end in given)


def of_pattern(pattern: str, name: str) -> bool:
    """Does the end of a name, from a dot on, match a key of ``rank_pattern`` and its kin?"""
    return matches(rf"(.*\.)?({pattern})$", name)


def ends_with(name: str, ends: Sequence[str]) -> str | None:
    """The first of these that the name ends with, from a dot on if there is one of that kind."""
    return next((end for end in ends if named(name, [end])), next((end for end in ends if name.endswith(end)), None))


def part_of(tensor: str, entries: Sequence[str]) -> bool:
    """Is a tensor one of a module, or of a part of one, whose name ends with one of the entries of ``modules_to_save``?"""
    return any(module.endswith(entry) for module in _prefixes(tensor.rpartition(".")[0]) for entry in entries)


def targets(config: Mapping[str, Any]) -> Covers | None:
    """The modules that peft adapts for this configuration, as it matches names; None where the list does not say."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    saved = config.get("modules_to_save") or []
    for name, value in (("target_modules", wanted), ("exclude_modules", excluded), ("modules_to_save", saved)):
        texts = [value] if isinstance(value, str) else value
        if texts and not (isinstance(texts, list | tuple | set) and all(isinstance(text, str) for text in texts)):
            raise CheckpointError(
                f"adapter_config.json: {name} is {str(value)[:80]}; expected a name, a pattern or a list of names"
            )
    if not wanted or wanted == "all-linear":
        return None

    def covers(names: Sequence[str]) -> list[str]:
        kept = [n for n in names if named(n, wanted) and not (excluded and named(n, excluded)) and of_layer(config, n)]
        return [n for n in kept if not any(matches(rf"(^|.*\.){part}($|\..*)", n) for part in saved)]

    return covers


def of_layer(config: Mapping[str, Any], name: str) -> bool:
    """Is a module in one of the ``layers_to_transform``, if there are any?"""
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(wanted, str) or name in (wanted or ()) or layers is None or layers == []:
        return True
    found = layer_number(config, name)
    return found is not None and found in ([layers] if isinstance(layers, int) else layers)


def layer_number(config: Mapping[str, Any], name: str) -> int | None:
    """The number after the first part of the name that ``layers_pattern`` matches, or after the first that any may."""
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    forms = [rf"(?:^|.*?\.){p}\.(?P<number>\d+)\." for p in patterns] or [ANY_LAYER]
    return next((int(found["number"]) for form in forms if (found := _match(form, name)) is not None), None)


def check_matched(path: Path, config: Mapping[str, Any], adapted: Sequence[str], whole: Sequence[str]) -> None:
    """Raises CheckpointError for a pattern or a target that means nothing in this folder.

    adapted: modules (or parameters) with adapters, by the names that patterns are matched against; empty: not known. whole: tensors that
    the folder brings whole.
    """
    for entry in config.get("modules_to_save") or []:
        if entry not in HEADS and not any(part_of(name, [str(entry)]) for name in whole):
            raise _unmatched(path, "modules_to_save", str(entry), "the file brings no such module")
    if not adapted:
        return
    for setting, pattern in _patterns(config):
        hit = matches if config.get("peft_type") == "OSF" else of_pattern
        options = {"anywhere": True} if hit is matches else {}
        if not any(hit(pattern, name, **options) for name in adapted):
            raise _unmatched(path, setting, pattern, _none_of(adapted))
    forward = config.get("feedforward_modules") or []
    for entry in [] if isinstance(forward, str) else forward:
        if not any(name.endswith(str(entry)) for name in adapted):
            raise _unmatched(path, "feedforward_modules", str(entry), _none_of(adapted))
    _check_layers(path, config, adapted)


def unused_targets(config: Mapping[str, Any], adapted: Sequence[str], whole: Sequence[str]) -> tuple[str, ...]:
    """A note on entries of ``target_modules`` that mean nothing in this folder."""
    wanted = config.get("target_modules") or []
    known = [*adapted, *(module for name in whole for module in _prefixes(name.rpartition(".")[0]))]
    unused = [] if isinstance(wanted, str) else [str(t) for t in wanted if not any(named(n, [str(t)]) for n in known)]
    if not unused or not adapted:
        return ()
    return (
        f"target_modules names {', '.join(unused)} too, which nothing in the file is called: passed over where the base has no such module",
    )


def _patterns(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every key of ``rank_pattern``, ``alpha_pattern`` and their kin. AdaLoRA's are names of tensors with the ranks that were left."""
    if config.get("peft_type") == "ADALORA":
        return []
    kinds = [(name, value) for name, value in config.items() if name.endswith("_pattern") and isinstance(value, dict)]
    return [(name, str(key)) for name, value in kinds for key in value]


def _check_layers(path: Path, config: Mapping[str, Any], adapted: Sequence[str]) -> None:
    layers = config.get("layers_to_transform")
    if layers is None or isinstance(config.get("target_modules"), str):
        return
    found = {layer_number(config, name) for name in adapted}
    for layer in [layers] if isinstance(layers, int) else layers:
        if layer not in found:
            raise _unmatched(path, "layers_to_transform", str(layer), _none_of(adapted))


def _none_of(adapted: Sequence[str]) -> str:
    return f"it is none of the {len(adapted)} that the file adapts (first {adapted[0]})"


def _unmatched(path: Path, setting: str, entry: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {setting} of adapter_config.json names {entry!r}, and {found}; is it misspelt, or is the module called otherwise here? "
        f"Correct it; or, if it meant nothing when the adapter was trained either, take it out"
    )


def _prefixes(module: str) -> list[str]:
    """A module and all that it is in."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
