"""The search finds the optimum of small spaces, never evaluates twice, survives kills and speaks the authors' layout."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES

import reparam_export as rx
from reparam_export.adapters.glora import Path as Choice
from reparam_export.errors import CheckpointError, UsageError
from reparam_export.training import Search, SearchResult, Space, load_supernet, search
from reparam_export.training.records import JOURNAL, latest
from reparam_export.training.space import Candidate, choices_of, from_dicts, to_dicts

FEW = {"A": ("LoRA_2", "none"), "B": ("vector", "none"), "C": ("none",), "D": ("none",), "E": ("vector", "none")}
ONE = Space(("a",), ((5, 7),), choices_of((2,)))  # 432 candidates
THREE = Space(("a", "b", "c"), ((5, 7), (6, 5), (4, 6)), FEW)  # 512 candidates
DEEP = Space(tuple("abcdefgh"), ((5, 7),) * 8, choices_of((2,)))
QUICK = Search(population=12, select=4, mutations=5, crossovers=4, epochs=4, seed=1)


def value(candidate: Candidate) -> float:
    """A made-up accuracy with one optimum, which rewards choices that depend on each other."""
    draw = random.Random(str(to_dicts(candidate)))
    own = sum(
        {"LoRA": 0.3, "vector": 0.2, "constant": 0.1, "none": 0.0}[c.split("_")[0]] for p in candidate for c in _of(p)
    )
    pairs = sum(a.A == b.B for a, b in pairwise(candidate))
    return own + 0.1 * pairs + 1e-6 * draw.random()


def _of(path: Choice) -> tuple[str, ...]:
    return path.A, path.B, path.C, path.D, path.E


def everything(space: Space) -> list[Candidate]:
    paths = [Choice(*choice) for choice in product(*(space.choices[s] for s in "ABCDE"))]
    return [*product(paths, repeat=len(space.layers))]


@pytest.mark.parametrize("space", [ONE, THREE], ids=["one layer", "three layers"])
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_optimum_of_an_enumerated_space(space: Space, seed: int) -> None:
    best = max(everything(space), key=value)
    settings = Search(population=30, select=8, mutations=12, crossovers=12, epochs=8, seed=seed)
    found = search(space, value, settings)
    assert found.best == best
    assert found.accuracy[0] == value(best)
    assert found.evaluated <= 240 < len(everything(space))


def test_it_beats_chance_in_a_space_too_large_to_enumerate() -> None:
    settings = Search(population=40, select=10, mutations=16, crossovers=16, epochs=12)
    found = search(DEEP, value, settings)
    draw = random.Random(0)
    chance = max(value(DEEP.drawn(draw)) for _ in range(found.evaluated))
    assert found.accuracy[0] > chance + 0.5


def test_no_candidate_is_evaluated_twice_and_the_limits_hold() -> None:
    seen: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:
        seen.append(candidate)
        return value(candidate)

    settings = Search(
        population=30, select=8, mutations=12, crossovers=12, epochs=10, min_parameters=20, max_parameters=60
    )
    found = search(THREE, evaluate, settings)
    assert len(seen) == len(set(seen)) == found.evaluated
    assert all(20 <= THREE.parameters(c) <= 60 for c in seen)
    legal = [c for c in everything(THREE) if 20 <= THREE.parameters(c) <= 60]
    assert found.best == max(legal, key=value)
    assert [THREE.parameters(c) for c in found.top] == [*found.parameters]


def test_a_space_that_is_used_up_ends_the_search_with_all_of_it() -> None:
    small = Space(("a",), ((5, 7),), FEW)
    found = search(small, value, Search(population=6, select=2, mutations=2, crossovers=2, epochs=9))
    assert found.evaluated == small.size == 8
    assert found.best == max(everything(small), key=value)
    assert len(found.history) == 9


def test_the_best_accuracy_never_falls() -> None:
    history = search(DEEP, value, QUICK).history
    assert list(history) == sorted(history)


def test_the_seed_decides() -> None:
    assert search(DEEP, value, QUICK) == search(DEEP, value, QUICK)
    assert search(DEEP, value, QUICK) != search(DEEP, value, Search(**{**vars(QUICK), "seed": 2}))


def test_several_processes_come_to_the_same_result(tmp_path: Path) -> None:
    alone = search(DEEP, value, QUICK)
    several = search(DEEP, value, QUICK, workers=2)
    assert several == alone


def test_what_an_evaluation_raises_reaches_the_caller() -> None:
    def broken(candidate: Candidate) -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        search(ONE, broken, QUICK)
    with pytest.raises(UsageError, match="nan"):
        search(ONE, lambda candidate: float("nan"), QUICK)


# --- on disk ---------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """As if the process ended here."""


def same(one: SearchResult, other: SearchResult) -> bool:
    return (one.top, one.accuracy, one.parameters, one.evaluated, one.history) == (
        other.top, other.accuracy, other.parameters, other.evaluated, other.history,
    )  # fmt: skip


@pytest.mark.parametrize("after", [1, 7, 12, 13, 30, 47])
def test_stopped_anywhere_it_goes_on_to_the_same_result(tmp_path: Path, after: int) -> None:
    whole = search(DEEP, value, QUICK)
    calls: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:
        if len(calls) == after:
            raise StoppedError
        calls.append(candidate)
        return value(candidate)

    with pytest.raises(StoppedError):
        search(DEEP, evaluate, QUICK, folder=tmp_path)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('[0.5, [{"A": "LoR')  # a line that was being written
    again: list[Candidate] = []

    def rest(candidate: Candidate) -> float:
        again.append(candidate)
        return value(candidate)

    assert same(search(DEEP, rest, QUICK, folder=tmp_path), whole)
    assert len(calls) + len(again) == whole.evaluated
    assert not set(calls) & set(again)


KILLED = """
import sys, time
sys.path[:0] = {places!r}
from test_search import DEEP, QUICK, value
from reparam_export.training import search
def slow(candidate):
    time.sleep(0.01)
    return value(candidate)
search(DEEP, slow, QUICK, folder={folder!r})
"""


def test_killed_at_a_random_moment_it_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole = search(DEEP, value, QUICK)
    draw = random.Random()
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        code = KILLED.format(places=[str(p) for p in Path(__file__).parents[:2]], folder=str(folder))
        process = subprocess.Popen([sys.executable, "-c", code])
        while not (folder / JOURNAL).is_file() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len((folder / JOURNAL).read_bytes().splitlines())
        assert same(search(DEEP, value, QUICK, folder=folder), whole), f"killed after {done} lines"
        lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()[1:]]
        assert len(lines) == len({json.dumps(entry[1]) for entry in lines}) == whole.evaluated
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")] or os.name == "nt"


def test_a_finished_search_can_be_continued_to_more_epochs(tmp_path: Path) -> None:
    longer = Search(**{**vars(QUICK), "epochs": 7})
    search(DEEP, value, QUICK, folder=tmp_path)
    assert same(search(DEEP, value, longer, folder=tmp_path), search(DEEP, value, longer))


@pytest.mark.parametrize("left", [b"", b'{"search": "torn'], ids=["empty", "torn"])
def test_a_checkpoint_beside_a_journal_that_says_nothing_is_refused(tmp_path: Path, left: bytes) -> None:
    search(DEEP, value, QUICK, folder=tmp_path)
    (tmp_path / JOURNAL).write_bytes(left)
    with pytest.raises(UsageError, match="another search"):
        search(DEEP, value, QUICK, folder=tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == left


def test_another_search_is_not_mixed_into_the_folder(tmp_path: Path) -> None:
    search(DEEP, value, QUICK, folder=tmp_path)
    with pytest.raises(UsageError, match="another search"):
        search(DEEP, value, Search(**{**vars(QUICK), "seed": 9}), folder=tmp_path)
    with pytest.raises(UsageError, match="another search"):
        search(THREE, value, QUICK, folder=tmp_path)


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    search(DEEP, value, QUICK, folder=tmp_path)
    path = tmp_path / JOURNAL
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "[0.5, 3]\n", *lines[3:]]))
    with pytest.raises(CheckpointError, match="line 4"):
        search(DEEP, value, Search(**{**vars(QUICK), "epochs": 9}), folder=tmp_path)


FURTHER = Search(**{**vars(QUICK), "epochs": 9})  # more epochs, so that the search would go on


def never(candidate: Candidate) -> float:
    raise StoppedError("the search went on with a damaged file")


LINES = {
    "NaN": b"[NaN, %b]",
    "infinity": b"[-Infinity, %b]",
    "400 digits": b"[" + b"9" * 400 + b", %b]",
    "a string": b'["0.5", %b]',
    "no number": b"[null, %b]",
    "deep": b"[" * 200_000,
    "a return in between": b"[0.5,\r3",
    "a list of choices": b'[0.5, [["A", "B", "C", "D", "E"]]]',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_of_the_journal_with_damaged_values_is_refused(tmp_path: Path, line: bytes) -> None:
    search(DEEP, value, QUICK, folder=tmp_path)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = line.replace(b"%b", json.dumps(json.loads(lines[5])[1]).encode())
    path.write_bytes(b"".join([*lines[:5], damaged + b"\n", *lines[6:]]))
    refused(tmp_path, path, "line 6")


def test_a_journal_whose_first_line_is_not_text_is_refused(tmp_path: Path) -> None:
    search(DEEP, value, QUICK, folder=tmp_path)
    path = tmp_path / JOURNAL
    for header in (b"\xff\xfe\n", b"\xff\r\xfe\n"):
        path.write_bytes(header + b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
        refused(tmp_path, path, "line 1")


def refused(folder: Path, file: Path, place: str) -> None:
    """With one error that names the file and the place in it, and without a change to the folder."""
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        search(DEEP, never, FURTHER, folder=folder)
    assert str(file) in str(caught.value)
    assert place in str(caught.value)
    assert caught.value.exit_code == 3
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "infinite accuracy": lambda c: _first(c).update(acc=math.inf),
    "accuracy of 400 digits": lambda c: _first(c).update(acc=10**400),
    "no accuracy of the best": lambda c: _first(c).pop("acc"),
    "infinite params": lambda c: _first(c).update(params=math.inf),
    "choices of no path": lambda c: c["memory"][0][0][0].pop("E"),
    "negative epoch": lambda c: c.update(epoch=-(10**6)),
    "infinite epoch": lambda c: c.update(epoch=math.inf),
    "half an epoch": lambda c: c.update(epoch=4.5),
    "epoch above": lambda c: c.update(epoch=5),
    "epoch below": lambda c: c.update(epoch=3),
    "short memory": lambda c: c["memory"].pop(),
    "short top_accuracies": lambda c: c["top_accuracies"].pop(),
    "empty top_accuracies": lambda c: c["top_accuracies"].__setitem__(0, []),
    "top_accuracies of NaN": lambda c: c["top_accuracies"].__setitem__(0, [math.nan]),
    "no best": lambda c: c.update(keep_top_k={50: []}),
    "no random numbers": lambda c: c.update(random=[3, [2**70] * 625, None]),
}


def _first(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its best candidate."""
    info: dict[str, Any] = content["vis_dict"][str(content["keep_top_k"][50][0])]
    return info


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_with_damaged_values_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    path = search(DEEP, value, QUICK, folder=tmp_path).checkpoint
    assert path is not None
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    refused(tmp_path, path, "not an evolution checkpoint")


def test_a_finished_search_with_an_empty_history_is_refused(tmp_path: Path) -> None:
    path = search(DEEP, value, Search(**{**vars(QUICK), "epochs": 1}), folder=tmp_path).checkpoint
    assert path is not None
    torch.save(torch.load(path, weights_only=True) | {"top_accuracies": [[]]}, path)
    with pytest.raises(CheckpointError, match="top_accuracies"):
        search(DEEP, never, Search(**{**vars(QUICK), "epochs": 1}), folder=tmp_path)


# --- the authors' layout ---------------------------------------------------------------------------------------------

AUTHORS = CASES["glora_vit"].folder / "checkpoint-3.pth.tar"


@pytest.fixture(scope="module")
def theirs() -> Space:
    path, given = CASES["glora_vit"].arguments()
    given.pop("config")
    return load_supernet(path, **given).space


def test_the_authors_checkpoint_is_continued_and_written_back_in_their_layout(theirs: Space, tmp_path: Path) -> None:
    before = torch.load(AUTHORS, weights_only=True)
    new: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:
        new.append(candidate)
        return value(candidate) / 100

    settings = Search(population=12, select=4, mutations=5, crossovers=4, epochs=5)
    found = search(theirs, evaluate, settings, folder=tmp_path, start=AUTHORS)
    assert found.checkpoint == tmp_path / "checkpoint-5.pth.tar"
    after = torch.load(found.checkpoint, weights_only=True)
    assert set(before) <= set(after)
    assert after["epoch"] == 5
    assert after["memory"][:3] == before["memory"]
    assert after["memory"][3] == before["candidates"]  # its next population was evaluated already
    assert after["top_accuracies"][:3] == before["top_accuracies"]
    for key, info in before["vis_dict"].items():
        assert after["vis_dict"][key] == info or not info
    old = {k for k, v in before["vis_dict"].items() if "visited" in v}
    assert not old & {str(to_dicts(c)) for c in new}
    for kept in after["keep_top_k"].values():
        accuracies = [after["vis_dict"][str(c)]["acc"] for c in kept]
        assert accuracies == sorted(accuracies, reverse=True)
    for key, info in after["vis_dict"].items():
        if "visited" in info:
            assert info["params"] * 1e6 == pytest.approx(theirs.parameters(from_dicts(_parsed(key))))


def _parsed(key: str) -> list[dict[str, str]]:
    import ast

    return list(ast.literal_eval(key))


def test_our_checkpoint_is_a_config_of_convert(theirs: Space, tmp_path: Path) -> None:
    found = search(theirs, value, QUICK, folder=tmp_path)
    case = CASES["glora_vit"]
    path, given = case.arguments()
    for place in range(3):
        checkpoint = rx.read(path, **(given | {"config": [found.checkpoint], "candidate": place}))
        assert tuple(a.params.path for a in checkpoint.adapters) == found.top[place]


def test_a_start_that_does_not_belong_to_the_supernet_is_refused(theirs: Space) -> None:
    shallow = Space(theirs.layers[1:], theirs.shapes[1:], theirs.choices)
    with pytest.raises(UsageError, match="layers"):
        search(shallow, value, Search(epochs=9), start=AUTHORS)
    other = Space(theirs.layers, theirs.shapes, choices_of((2,)))
    with pytest.raises(UsageError, match="LoRA_4"):
        search(other, value, Search(epochs=9), start=AUTHORS)


@pytest.mark.parametrize("damage", ["epoch", "vis_dict", "accuracy", "tuple"])
def test_a_damaged_checkpoint_is_refused(theirs: Space, tmp_path: Path, damage: str) -> None:
    content = torch.load(AUTHORS, weights_only=True)
    if damage in ("epoch", "vis_dict"):
        del content[damage]
    elif damage == "accuracy":
        content["vis_dict"][str(content["candidates"][0])]["acc"] = float("nan")
    else:
        content["keep_top_k"][50][0] = 3
    torch.save(content, tmp_path / "checkpoint-3.pth.tar")
    with pytest.raises(CheckpointError, match="evolution checkpoint"):
        search(theirs, value, Search(epochs=9), start=tmp_path / "checkpoint-3.pth.tar")


def test_the_latest_checkpoint_is_that_of_the_highest_epoch(tmp_path: Path) -> None:
    for number in (2, 10, 9):
        (tmp_path / f"checkpoint-{number}.pth.tar").touch()
    assert latest(tmp_path) == tmp_path / "checkpoint-10.pth.tar"
    assert latest(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"population": 0},
        {"epochs": 0},
        {"select": 0},
        {"mutations": -1},
        {"mutation_probability": 2.0},
        {"min_parameters": 9, "max_parameters": 8},
    ],
    ids=str,
)
def test_settings_that_no_search_can_have_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Search(**wrong)  # type: ignore[arg-type]


def test_limits_that_no_candidate_meets_are_refused() -> None:
    with pytest.raises(UsageError, match="within the limits"):
        search(ONE, value, Search(population=2, min_parameters=10**6))
    with pytest.raises(UsageError, match="workers"):
        search(ONE, value, QUICK, workers=0)
