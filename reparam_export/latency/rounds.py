"""The run: rounds in fresh processes until every verdict is there, or the time is up.

Every model at every batch size is decided for itself, and costs nothing more once it is; the base is timed until all are.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from reparam_export.errors import ExportError
from reparam_export.latency.machine import available_memory
from reparam_export.latency.measurement import Case, Contest, case_of
from reparam_export.latency.runners import Job, runner
from reparam_export.latency.statistics import decided, is_look, log_ratios

CYCLES = (4, 25)  # of a round, at least and at most; fewer would be outweighed by the warm-ups
ROUND_NS = 1_000_000_000  # what all cycles of one model should take together in a round
Progress = Callable[[str, int, float], None]  # (runner, rounds, seconds until the time is up)
Raw = dict[str, list[list[int]]]  # nanoseconds by model, round and cycle


@dataclass(frozen=True)
class Settings:
    """How a run is done. Times in seconds; ``cycles`` None: as many as make a round of about a second a model."""

    margin: float = 0.01
    max_time: float = 900.0
    threads: int = 1
    seed: int = 0
    cycles: int | None = None
    rounds: int | None = None  # stop after so many, decided or not
    memory: bool = True  # also start a process for every model alone, to see what it takes


@dataclass(frozen=True)
class Models:
    """What is timed: who is compared, and each of them as the runners need it. Files by model; ``modules`` as in ``Job``."""

    contest: Contest
    inputs: Path
    files: dict[str, Path]
    modules: dict[str, tuple[str, str]] = field(default_factory=dict)
    engines: dict[str, Path] = field(default_factory=dict)
    dtype: str = "float32"
    builder: str | None = None
    code: str | None = None

    def lack(self, name: str) -> str:
        """Why this runner has nothing to run, "" when it has."""
        takes = runner(name).TAKES
        if not {"onnx": self.files, "torch": self.modules, "engine": self.engines}[takes]:
            needs = {"onnx": "ONNX files", "torch": "output folders, to build modules from", "engine": "engines"}
            return f"it needs {needs[takes]}"
        size = sum(f.stat().st_size for path in self.files.values() for f in path.parent.glob(f"{path.name}*"))
        free = available_memory()
        return f"all models together take {size:,} bytes, {free:,} are free" if size > free else ""

    def job(self, name: str, threads: int) -> Job:
        """What a timing process of that runner is told."""
        takes = runner(name).TAKES
        files = {"onnx": self.files, "engine": self.engines}.get(takes, {})
        modules = self.modules if takes == "torch" else {}
        paths = {model: str(path.resolve()) for model, path in files.items()}
        return Job(name, str(self.inputs.resolve()), paths, modules, self.dtype, threads, self.builder, self.code)


class WorkerError(ExportError):
    """A timing process ended before its answer. ``cases``: what had been measured by then."""

    cases: Sequence[Case] = ()


class StoppedError(Exception):
    """Ctrl-C. ``cases``: what had been measured by then."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__("interrupted")
        self.cases = cases


class Worker:
    """One timing process, as a context manager. ``ask`` raises WorkerError when it fails or dies."""

    def __init__(self, job: Job) -> None:
        self._first = {"job": asdict(job)}
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.threads))
        self._environment = {**os.environ, **counts, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def __enter__(self) -> Worker:
        import tempfile

        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "reparam_export.latency.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for this process alone, which ends the other
        )
        self._send(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a "round" or a "memory" request."""
        self._send(request)
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or ["no word"])[-1]
            killed = ", killed: out of memory?" if code == -9 else ""
            raise WorkerError(f"the timing process ended with code {code}{killed}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _send(self, request: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # it has died: the answer, which does not come, says how
            if self._process.stdin:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()


def peak_memory(job: Job, contest: Contest, batches: Sequence[int]) -> dict[int, dict[str, int]]:
    """The peak of a fresh process that holds one model alone, by batch and model, in bytes; empty where no system says so.

    The control is the base, and takes what the base takes.
    """
    found: dict[int, dict[str, int]] = {batch: {} for batch in batches}
    for model in (m for m in contest.models if m != contest.control):
        answer = _asked(job, [model], memory={"model": model, "batches": list(batches)})
        for batch, size in answer["memory"].items():
            found[int(batch)][model] = size
    return found


def take(
    job: Job, contest: Contest, batches: Sequence[int], settings: Settings, progress: Progress | None = None
) -> list[Case]:
    """The cases of one runner, one a batch size. Raises WorkerError when a model cannot be run there at all.

    There is one round at least, however little time there is. Ctrl-C raises StoppedError with what was measured.
    """
    ends, chance = time.monotonic() + settings.max_time, random.Random(settings.seed)
    memory = peak_memory(job, contest, batches) if settings.memory else {}
    raw: dict[int, Raw] = {batch: {} for batch in batches}
    done, lasted = 0, 0.0
    cycles = _cycles(job, contest, batches, settings)
    still = {batch: _open(contest, {}, settings) for batch in batches}
    try:
        while any(still.values()) and (not done or time.monotonic() + lasted < ends):
            started = time.monotonic()
            needed = [m for m in contest.models if any(m in models for models in still.values())]
            loaded = chance.sample(needed, len(needed))
            place = {"seed": chance.getrandbits(32), "cpus": cpus(job.threads, chance)}
            plans = {batch: (cycles[batch], models) for batch, models in still.items() if models}
            times, done = _asked(job, loaded, round={**place, "batches": plans})["times"], done + 1
            for batch in plans:
                for model, runs in times[str(batch)].items():
                    raw[batch].setdefault(model, []).append(runs)
                still[batch] = _open(contest, raw[batch], settings)
            lasted = time.monotonic() - started
            if progress is not None:
                progress(runner(job.runner).TITLE, done, ends - time.monotonic())
    except KeyboardInterrupt as stop:
        raise StoppedError(_cases(job, contest, raw, settings, memory)) from stop
    except WorkerError as error:  # hours of rounds are not lost with the last one
        error.cases = _cases(job, contest, raw, settings, memory)
        raise
    return _cases(job, contest, raw, settings, memory)


def _cases(
    job: Job,
    contest: Contest,
    raw: Mapping[int, Raw],
    settings: Settings,
    memory: Mapping[int, Mapping[str, int]],
) -> list[Case]:
    named = job.runner, runner(job.runner).TITLE
    return [
        case_of(contest, named, batch, times, margin=settings.margin, memory=memory.get(batch, {}))
        for batch, times in raw.items()
        if times
    ]


def _asked(job: Job, models: Sequence[str], **request: Any) -> dict[str, Any]:
    """The answer of a new process that loads these models, in this order."""
    files = {model: job.files[model] for model in models if job.files}
    modules = {model: job.modules[model] for model in models if job.modules}
    with Worker(replace(job, files=files, modules=modules)) as worker:
        return worker.ask(**request)


def _cycles(job: Job, contest: Contest, batches: Sequence[int], settings: Settings) -> dict[int, int]:
    """Cycles of a round at every batch size, from one cycle of each, which counts for nothing else."""
    place = {"seed": settings.seed, "cpus": cpus(settings.threads, random.Random(settings.seed))}
    once = dict.fromkeys(batches, (1, (contest.base,)))
    times = _asked(job, [contest.base], round={**place, "batches": once})["times"]
    fitting = {batch: round(ROUND_NS / times[str(batch)][contest.base][0]) for batch in batches}
    return {batch: settings.cycles or min(max(n, CYCLES[0]), CYCLES[1]) for batch, n in fitting.items()}


def _open(contest: Contest, raw: Raw, settings: Settings) -> tuple[str, ...]:
    """The models of the next round: the base and who is not decided yet; none after the last round, or once subject and control are."""
    base = raw.get(contest.base, [])
    if settings.rounds is not None and len(base) >= settings.rounds:
        return ()
    undecided = [m for m in contest.models if m != contest.base and len(raw.get(m, [])) == len(base)]
    if is_look(len(base)):
        looks = {m: decided(log_ratios(raw[m], base), settings.margin) for m in undecided}
        undecided = [m for m, look in looks.items() if look.position == "open"]
    return (contest.base, *undecided) if {contest.subject, contest.control} & set(undecided) else ()


def cpus(threads: int, chance: random.Random) -> list[int]:
    """So many of the CPUs that this process may use, at random: not every round is on the same. Empty: the system decides."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(chance.sample(sorted(os.sched_getaffinity(0)), threads))


def cpus_allowed() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
