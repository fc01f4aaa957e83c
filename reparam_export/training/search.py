"""GLoRA's search: evolution over the paths of a trained supernet, as ``EvolutionSearcher`` of the authors' ViT code.

Each epoch makes a population by mutation and crossover of the best candidates so far, fills it up with random ones, evaluates it and
keeps the best (Chavan et al., "One-for-All: Generalized LoRA", 2023, section 3.3). With a folder it can be killed at any moment:
started again, it goes on where it was and comes to the same result; no candidate is evaluated twice (``records.py``).
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reparam_export.errors import UsageError
from reparam_export.files import sha256
from reparam_export.training.records import KEPT, Journal, Record, State, latest, read_checkpoint, write_checkpoint
from reparam_export.training.space import Candidate, Space

Evaluate = Callable[[Candidate], float]
EvaluateAll = Callable[[Sequence[Candidate]], Iterator[float]]
Progress = Callable[[int, int, float], None]  # candidates evaluated, in all, best accuracy so far
TRIES = 10  # draws for each candidate that mutation or crossover is to make, as the authors'
PATIENCE = 1000  # draws for each random candidate; then the space is taken to hold no more within the limits


@dataclass(frozen=True)
class Search:
    """The settings of a search; the defaults are the authors'. Limits are parameters of all paths, without the head."""

    population: int = 50
    select: int = 10
    mutations: int = 25
    crossovers: int = 25
    mutation_probability: float = 0.2
    epochs: int = 20
    min_parameters: int = 0
    max_parameters: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "select", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: expected at least 1")
        if min(self.mutations, self.crossovers, self.min_parameters) < 0 or not 0 <= self.mutation_probability <= 1:
            raise UsageError("mutations, crossovers, min_parameters: expected at least 0; mutation_probability: 0 to 1")
        if self.max_parameters is not None and self.max_parameters < self.min_parameters:
            raise UsageError(f"no candidate has {self.min_parameters} to {self.max_parameters} parameters")

    def allows(self, parameters: int) -> bool:
        return self.min_parameters <= parameters and (self.max_parameters is None or parameters <= self.max_parameters)


@dataclass(frozen=True)
class SearchResult:
    """The best candidates, best first, with what was measured of them."""

    top: tuple[Candidate, ...]
    accuracy: tuple[float, ...]
    parameters: tuple[int, ...]
    evaluated: int  # candidates, each once
    history: tuple[float, ...]  # the best accuracy after each epoch
    checkpoint: Path | None  # what ``reparam-export convert --config`` takes

    @property
    def best(self) -> Candidate:
        return self.top[0]


def search(
    space: Space,
    evaluate: Evaluate,
    settings: Search | None = None,
    *,
    folder: str | Path | None = None,
    start: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the best candidate of the space. The same seed gives the same result, whatever the number of workers.

    evaluate: how good a candidate is, more is better. folder: where checkpoints and evaluations go; a search that was begun
    there goes on, also to more epochs; one of other layers, settings or (of ``Fused``) other weights or data is refused.
    start: an evolution checkpoint, of the authors' code or ours, to go on from. workers: processes that evaluate; above 1,
    ``evaluate`` is sent to each, so a script needs ``if __name__ == "__main__"``.
    progress: called after each evaluation; None: a bar on a terminal.
    Raises UsageError for a folder of another search, limits that no candidate meets, an evaluation that is no number and, with a
    folder, data that cannot be told from other data; CheckpointError for a damaged file.
    """
    settings = settings or Search()
    place = None if folder is None else Path(folder)
    identity = {} if place is None else _identity(space, evaluate, settings, start)  # in memory it meets no other
    with Journal(place, identity) as journal:
        found = (None if place is None else latest(place)) or (None if start is None else Path(start))
        seed = settings.seed
        state = State(random.Random(seed)) if found is None else read_checkpoint(found, space, seed)
        with evaluator(evaluate, workers) as evaluate_all, shown(progress) as report:
            while state.epoch < settings.epochs:
                _next_epoch(space, settings, state, _Evaluation(journal, evaluate_all, report, settings))
                if place is not None:
                    write_checkpoint(place, state, settings.select)
    return SearchResult(
        top=tuple(state.top),
        accuracy=tuple(map(state.accuracy, state.top)),
        parameters=tuple(state.records[c].parameters for c in state.top),
        evaluated=sum(record.accuracy is not None for record in state.records.values()),
        history=tuple(max(accuracies) for accuracies in state.top_accuracies),
        checkpoint=None if place is None else latest(place),
    )


def _identity(space: Space, evaluate: Evaluate, settings: Search, start: str | Path | None) -> dict[str, Any]:
    """What makes a search this one. Raises what the identity of ``evaluate`` raises."""
    return {
        "layers": space.layers,
        "shapes": space.shapes,
        "choices": dict(space.choices),
        "settings": asdict(settings) | {"epochs": None},
        "start": None if start is None else sha256(Path(start)),
        "evaluation": getattr(evaluate, "identity", None),
    }


@dataclass
class _Evaluation:
    """Evaluates a population, but for what the journal knows."""

    journal: Journal
    evaluate_all: EvaluateAll
    report: Progress
    settings: Search

    def __call__(self, state: State, population: Sequence[Candidate]) -> None:
        known = self.journal.known
        unknown = [c for c in population if c not in known]
        best = max((r.accuracy for r in state.records.values() if r.accuracy is not None), default=-math.inf)
        for candidate, accuracy in zip(unknown, self.evaluate_all(unknown), strict=True):
            if not math.isfinite(accuracy):
                raise UsageError(f"the evaluation of a candidate gave {accuracy}; expected a finite number")
            self.journal.add(candidate, accuracy)
            best = max(best, accuracy)
            self.report(len(known), self.settings.population * self.settings.epochs, best)
        for candidate in population:
            state.records[candidate].accuracy = known[candidate]


def _next_epoch(space: Space, settings: Search, state: State, evaluate: _Evaluation) -> None:
    """One epoch; ``state`` is changed once all of its evaluations are there."""
    population = state.candidates or _population(space, settings, state)
    evaluate(state, [c for c in population if state.records[c].accuracy is None])
    state.memory.append(list(population))
    state.top = sorted([*state.top, *population], key=state.accuracy, reverse=True)[: max(KEPT, settings.select)]
    state.top_accuracies.append([state.accuracy(c) for c in state.top[:KEPT]])
    state.candidates = []
    state.epoch += 1


def _population(space: Space, settings: Search, state: State) -> list[Candidate]:
    """Mutations and crossovers of the best, and random candidates: within the limits, none seen before.

    Fewer when the space has no more. Raises UsageError when it never had one.
    """
    draw, parents = state.draw, state.top[: settings.select]

    def mutation() -> Candidate:
        return space.mutated(draw.choice(parents), settings.mutation_probability, draw)

    def crossover() -> Candidate:
        return space.crossed(draw.choice(parents), draw.choice(parents), draw)

    found: list[Candidate] = []
    if parents:
        found += _legal(space, settings, state, mutation, settings.mutations, TRIES)
        found += _legal(space, settings, state, crossover, settings.crossovers, TRIES)
    missing = settings.population - len(found)
    found += _legal(space, settings, state, lambda: space.drawn(draw), missing, PATIENCE)
    if not found and not parents:
        limit = "any number of" if settings.max_parameters is None else f"at most {settings.max_parameters}"
        raise UsageError(
            f"no candidate within the limits (at least {settings.min_parameters} and {limit} parameters) in "
            f"{PATIENCE * settings.population} random ones; one of them has {space.parameters(space.drawn(draw))}"
        )
    return found


def _legal(
    space: Space, settings: Search, state: State, make: Callable[[], Candidate], wanted: int, tries: int
) -> list[Candidate]:
    found: list[Candidate] = []
    for _ in range(tries * wanted):
        if len(found) == wanted or (len(state.records) == space.size and _exhausted(settings, state)):
            break
        candidate = make()
        record = state.records.get(candidate)
        if record is None:
            record = state.records[candidate] = Record(space.parameters(candidate))
        if record.visited or not settings.allows(record.parameters):
            continue
        record.visited = True
        found.append(candidate)
    return found


def _exhausted(settings: Search, state: State) -> bool:
    return all(record.visited or not settings.allows(record.parameters) for record in state.records.values())


@contextmanager
def evaluator(evaluate: Evaluate, workers: int) -> Iterator[EvaluateAll]:
    """Evaluates candidates in order, in this process or in several."""
    if workers < 1:
        raise UsageError(f"workers {workers}: expected at least 1")
    if workers == 1:
        yield lambda candidates: map(evaluate, candidates)
        return
    import multiprocessing
    import pickle
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")  # a fork of a process that runs threads can hang
    copy = pickle.dumps(
        evaluate
    )  # as bytes: torch would share its tensors between the processes, which write into them
    with ProcessPoolExecutor(workers, context, _take, (copy,)) as pool:
        yield lambda candidates: pool.map(_evaluate_here, candidates)


_here: list[Evaluate] = []  # of a worker process


def _take(evaluate: bytes) -> None:
    import pickle

    import torch

    torch.set_num_threads(1)
    _here[:] = [pickle.loads(evaluate)]


def _evaluate_here(candidate: Candidate) -> float:
    return _here[0](candidate)


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """The caller's own progress, or a bar on a terminal, or nothing."""
    if progress is not None or not sys.stderr.isatty():
        yield progress or (lambda done, total, best: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("search"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, best: bar.update(task, completed=done, total=total, description=f"best {best:.4g}")
