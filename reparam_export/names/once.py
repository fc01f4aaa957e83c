"""Other names for what a file holds, each of them once: where two of its keys come out as one, one of them would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from reparam_export.errors import TensorMismatchError

ADVICE = "the file holds one thing twice, or is mixed up: take out the one that is not meant"
V = TypeVar("V")


def renamed_once(
    tensors: Mapping[str, V], rename: Callable[[str], str], path: Path | str, advice: str = ADVICE
) -> dict[str, V]:
    """The tensors under other names, in the same order. Raises TensorMismatchError for two that come out as one, naming both."""
    return once(((name, rename(name), tensor) for name, tensor in tensors.items()), path, advice)


def once(entries: Iterable[tuple[str, str, V]], path: Path | str, advice: str = ADVICE) -> dict[str, V]:
    """Entries (as the file has it, its name here, what it is) by their names here. Raises TensorMismatchError as above."""
    found: dict[str, V] = {}
    before: dict[str, str] = {}
    for old, new, value in entries:
        if new in before:
            raise TensorMismatchError(
                f"{path}: {before[new]} and {old} are both {new}; {advice}",
                module=new.rpartition(".")[0],
                tensor=new,
                expected="one of them",
                found=[before[new], old],
            )
        before[new], found[new] = old, value
    return found
