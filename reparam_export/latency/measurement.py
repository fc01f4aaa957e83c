"""What a run of ``bench`` found: raw times, what follows from them, and where they were taken; ``latency.json`` holds it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from reparam_export.latency.statistics import Ratio, judged, log_ratios

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["no added cost", "added cost", "undecided", "withheld"]
WORST_FIRST: tuple[Verdict, ...] = ("added cost", "withheld", "undecided", "no added cost")
Rounds = Sequence[Sequence[int]]  # nanoseconds: rounds, each with one time for every cycle


@dataclass(frozen=True)
class Contest:
    """Who is compared: ``subject`` and ``others`` with ``base``; ``control`` is the base once more."""

    base: str
    control: str
    subject: str
    others: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        return (self.base, self.control, *self.others, self.subject)


@dataclass(frozen=True)
class Times:
    """The run times of one model, over all runs of all rounds, in milliseconds. Throughput: samples a second at the median."""

    model: str
    runs: int
    p50: float
    p90: float
    p99: float
    throughput: float
    memory: int | None = None  # bytes of a fresh process with this model alone, at its peak; on a GPU, of the GPU


@dataclass(frozen=True)
class Case:
    """One runner at one batch size. ``raw``: nanoseconds by model, round and cycle."""

    runner: str
    title: str  # of the runner, for readers
    batch: int
    verdict: Verdict
    said: str  # the verdict in words, with what is missing for one
    ratios: tuple[Ratio, ...]  # the subject's first, the control's last
    times: tuple[Times, ...]
    raw: dict[str, list[list[int]]]

    def ratio(self, over: str) -> Ratio:
        """The ratio of that model to the base."""
        return next(r for r in self.ratios if r.over == over)


@dataclass(frozen=True)
class Size:
    """What one model consists of, as its ONNX file and as its torch module."""

    model: str
    nodes: int
    operators: dict[str, int]
    initializers: int
    file_bytes: int
    parameters: int  # of the module, tied ones once
    stored_bytes: int  # of the module's parameters and buffers
    multiply_adds: int  # at batch 1, as torch.utils.flop_counter counts: matrix products and convolutions


@dataclass(frozen=True)
class Structure:
    """Base, adapted and fused side by side. ``differences``: of the fused file from the base's; none: the same program."""

    sizes: tuple[Size, ...]
    differences: tuple[str, ...]
    added: tuple[str, ...]  # tensors that fusion had to create, such as a bias
    engines: tuple[dict[str, Any], ...] = ()  # what TensorRT makes of each model
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """The result of ``bench``. ``skipped``: runners that could not be used here, and why."""

    contest: Contest
    margin: float  # relative, 0.01 is 1 %
    confidence: float  # of the intervals
    verdict: Verdict
    cases: tuple[Case, ...]
    skipped: dict[str, str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: float
    weights_sha256: str = ""  # of the fused weights that were timed
    artifact_sha256: str = ""  # of the exported file that was timed as "fused"; empty: one that was written for it
    structure: Structure | None = None
    notes: tuple[str, ...] = ()


def case_of(
    contest: Contest,
    runner: tuple[str, str],
    batch: int,
    raw: Mapping[str, Rounds],
    *,
    margin: float,
    memory: Mapping[str, int],
) -> Case:
    """The case with its statistics. runner: its name and title. raw: as in ``Case``, one round at least."""
    ratios = ratios_of(contest, raw, margin)
    verdict, said = verdict_of(ratios[0], ratios[-1])
    times = tuple(_times(m, batch, raw[m], memory.get(m)) for m in contest.models if m in raw)
    kept = {model: [[int(t) for t in cycles] for cycles in rounds] for model, rounds in raw.items()}
    return Case(*runner, batch, verdict, said, ratios, times, kept)


def ratios_of(contest: Contest, raw: Mapping[str, Rounds], margin: float) -> tuple[Ratio, ...]:
    """Every model's ratio to the base: the subject's first, the control's last."""
    order = (contest.subject, *contest.others, contest.control)
    base = raw[contest.base]
    return tuple(judged(m, contest.base, log_ratios(raw[m], base), margin) for m in order if m in raw)


def verdict_of(subject: Ratio, control: Ratio) -> tuple[Verdict, str]:
    """The verdict on the subject, given only where the control, which is the base itself, was found to be within the margin."""
    at, again = subject.look.position, control.look.position
    if again in ("above", "below"):
        said = f"the base measured twice differs from itself by {control.ratio - 1:+.1%}; this machine is too noisy"
        return "withheld", f"withheld: {said}"
    if at == "open":
        return "undecided", f"undecided: {_needs(max(subject.more or 0, control.more or 0))}"
    if again == "open":
        return (
            "withheld",
            f"withheld: the base measured twice is not yet within the margin, {_needs(control.more or 0)}",
        )
    if at == "above":
        return "added cost", "added cost"
    return "no added cost", "no added cost" if at == "within" else "no added cost: faster than the base"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of them. "no added cost" needs every case, so that it is as certain as each of them alone."""
    return next(v for v in WORST_FIRST if v in verdicts)


def from_json(content: Mapping[str, Any]) -> Measurement:
    """The measurement in ``latency.json``. Raises ValueError for anything else."""
    from reparam_export.latency._json import build

    return build(Measurement, content)


def _needs(rounds: int) -> str:
    return f"needs about {rounds:,} more rounds"


def _times(model: str, batch: int, rounds: Rounds, memory: int | None) -> Times:
    import numpy as np

    runs: np.ndarray[Any, Any] = np.concatenate([np.asarray(cycles) for cycles in rounds]) / 1e6
    p50, p90, p99 = (float(p) for p in np.percentile(runs, (50, 90, 99)))
    return Times(model, len(runs), p50, p90, p99, batch * 1000 / p50, memory)
