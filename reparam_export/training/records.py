"""What a search leaves on disk: checkpoints in the authors' layout, and a journal of every evaluation.

checkpoint-N.pth.tar    after epoch N, as EvolutionSearcher.save_checkpoint of the authors' ViT code writes it, with one more
                        entry, ``random``: the state of the random numbers, so that a search goes on as if never stopped
evaluations.jsonl       first line: which search this is; then a line for each evaluation, as soon as it ends
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from reparam_export.errors import CheckpointError, UsageError
from reparam_export.files import load_pickle, replace_file
from reparam_export.training.space import Candidate, Space, from_dicts, to_dicts

KEPT = 50  # best candidates in a checkpoint, besides the ``select`` best that breed
JOURNAL = "evaluations.jsonl"
CHECKPOINT = re.compile(r"checkpoint-(\d{1,9})\.pth\.tar")
KEYS = ("top_accuracies", "memory", "candidates", "vis_dict", "keep_top_k", "epoch")
# what Python, and ``from_dicts``, raise for a value of another kind or size than a search writes
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, UsageError)


@dataclass
class Record:
    """One candidate that was drawn. ``accuracy`` is there once it was evaluated; ``visited``: it was, or is about to be."""

    parameters: int
    accuracy: float | None = None
    visited: bool = False


@dataclass
class State:
    """A search between two epochs. ``candidates``: the next population, evaluated; empty when it is still to be made."""

    draw: random.Random
    epoch: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    top: list[Candidate] = field(default_factory=list)  # best first
    memory: list[list[Candidate]] = field(default_factory=list)  # the population of each epoch
    top_accuracies: list[list[float]] = field(default_factory=list)
    records: dict[Candidate, Record] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)  # what a file says of candidates that it never evaluated

    def accuracy(self, candidate: Candidate) -> float:
        """Of an evaluated candidate."""
        found = self.records[candidate].accuracy
        assert found is not None
        return found


def write_checkpoint(folder: Path, state: State, select: int) -> Path:
    """Write ``checkpoint-N.pth.tar`` for the epochs done; the file appears whole or not at all."""
    import torch

    best = [to_dicts(c) for c in state.top]
    content = {
        "top_accuracies": state.top_accuracies,
        "memory": [[to_dicts(c) for c in population] for population in state.memory],
        "candidates": [to_dicts(c) for c in state.candidates],
        "vis_dict": state.drawn | {str(to_dicts(c)): _to_info(r) for c, r in state.records.items()},
        "keep_top_k": {select: best[:select], KEPT: best[:KEPT]},
        "epoch": state.epoch,
        "random": _plain_state(state.draw),
    }
    path = folder / f"checkpoint-{state.epoch}.pth.tar"
    replace_file(path, lambda temporary: torch.save(content, temporary))
    return path


def read_checkpoint(path: Path, space: Space, seed: int) -> State:
    """The state in a checkpoint of the authors' code or ours; theirs has no random numbers, which then start from the seed.

    Raises CheckpointError for a file of another layout or with damaged values, UsageError for candidates that are not in the space.
    """
    content = load_pickle(path)
    if not isinstance(content, Mapping) or not set(KEYS) <= set(content):
        raise CheckpointError(f"{path}: expected an evolution checkpoint with {', '.join(KEYS)}")
    try:
        state = _to_state(content, seed)
        _check_complete(state)
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: not an evolution checkpoint as ViT-Slim writes it: {error!r}; go on from an earlier one, or fetch it again"
        ) from error
    for candidate in state.records:
        space.check(candidate)
    return state


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest epoch in a folder."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := CHECKPOINT.fullmatch(p.name))} if folder.is_dir() else {}
    return found[max(found)] if found else None


class Journal:
    """Every evaluation of one search, also of an epoch that a kill cut short. Without a folder, in memory only."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Raises UsageError when the folder belongs to another search, or to another program."""
        self.known: dict[Candidate, float] = {}
        self._file: TextIO | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL
        header = json.dumps({"search": hashlib.sha256(json.dumps(identity).encode()).hexdigest(), **identity})
        whole = self._read(path, header) if path.is_file() else 0
        if not whole and latest(folder) is not None:  # a checkpoint comes after the first line
            raise UsageError(f"{folder}: holds checkpoints of another search; pass one as start=, and another folder")
        if path.is_file():
            os.truncate(path, whole)  # a line that a kill tore
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self._line(header)

    def add(self, candidate: Candidate, accuracy: float) -> None:
        """Remember, on disk before it returns."""
        self.known[candidate] = accuracy
        if self._file is not None:
            self._line(json.dumps([accuracy, to_dicts(candidate)]))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def _line(self, text: str) -> None:
        assert self._file is not None
        self._file.write(f"{text}\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, path: Path, header: str) -> int:
        """Read what is known; the number of bytes up to the last whole line."""
        whole = 0
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last end of a line is torn
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
                if number > 1:
                    accuracy, dicts = json.loads(text)
                    self.known[from_dicts(dicts)] = _finite(accuracy)
            except DAMAGE as error:
                raise CheckpointError(
                    f"{path}: line {number} is damaged: {error}; restore the file, or use another folder"
                ) from error
            if number == 1 and text != header:
                raise UsageError(
                    f"{path.parent}: holds another search (other layers, choices, settings, start, weights or data); use another folder"
                )
            whole += len(line) + 1
        return whole


def _to_state(content: Mapping[str, Any], seed: int) -> State:
    """The state in the content of a checkpoint. Raises any of DAMAGE."""
    epoch = content["epoch"]
    if type(epoch) is not int or epoch < 0:  # the search counts up from it
        raise ValueError(f"epoch {epoch!r}: expected a whole number of at least 0")
    top = max(content["keep_top_k"].values(), key=len)
    state = State(
        draw=random.Random(seed + epoch),
        epoch=epoch,
        candidates=[from_dicts(c) for c in content["candidates"]],
        top=[from_dicts(c) for c in top],
        memory=[[from_dicts(c) for c in population] for population in content["memory"]],
        top_accuracies=[list(map(_finite, accuracies)) for accuracies in content["top_accuracies"]],
    )
    for candidate in (*state.candidates, *state.top, *(c for population in state.memory for c in population)):
        state.records[candidate] = _from_info(content["vis_dict"][str(to_dicts(candidate))])
    state.drawn = {k: v for k, v in content["vis_dict"].items() if "visited" not in v}
    if any(state.records[c].accuracy is None for c in (*state.top, *state.candidates)):
        raise ValueError("a candidate of its population was never evaluated")
    state.top.sort(key=state.accuracy, reverse=True)
    if "random" in content:
        version, numbers, following = content["random"]
        state.draw.setstate((version, tuple(numbers), following))
    return state


def _check_complete(state: State) -> None:
    """Raises ValueError unless each epoch left a population and accuracies, and the epochs together a best candidate."""
    for name, length in (("memory", len(state.memory)), ("top_accuracies", len(state.top_accuracies))):
        if length != state.epoch:
            raise ValueError(f"{name} of {length} epochs: expected {state.epoch}, as epoch says")
    if not all(state.top_accuracies) or (state.epoch and not state.top):
        raise ValueError("top_accuracies or keep_top_k is empty: expected the best candidates of every epoch")


def _to_info(record: Record) -> dict[str, Any]:
    info: dict[str, Any] = {"params": record.parameters / 10.0**6}
    return info if record.accuracy is None else info | {"acc": record.accuracy, "visited": True}


def _from_info(info: Mapping[str, Any]) -> Record:
    accuracy = _finite(info["acc"]) if "acc" in info else None
    return Record(round(float(info["params"]) * 10**6), accuracy, accuracy is not None)


def _finite(accuracy: Any) -> float:
    """Raises ValueError for infinity and for what is not a number, TypeError and OverflowError for what cannot be one."""
    if not math.isfinite(accuracy):
        raise ValueError(f"the accuracy {accuracy}: expected a finite number")
    return float(accuracy)


def _plain_state(draw: random.Random) -> list[Any]:
    version, numbers, following = draw.getstate()
    return [version, list(numbers), following]
