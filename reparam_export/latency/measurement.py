"""What a run of ``bench`` found: raw times, what follows from them, and where they were taken; ``latency.json`` holds it all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from reparam_export.latency.statistics import ALPHA, Ratio, decided, hodges_lehmann, judged, log_ratios, spread

if TYPE_CHECKING:
    import numpy as np

    from reparam_export.latency.statistics import Array

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
    engine_sha256: str = ""  # of the exported engine beside it; empty: there was none
    precision: str = ""  # of the files that were timed, "fp32", "fp16" or "bf16"; empty where it was not noted
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
    """The measurement in ``latency.json``, whole: whoever shows it need not look again.

    Raises ValueError for anything else, and for numbers or verdicts that do not follow from the raw times beside them. The
    intervals alone are not computed again, since 2000 resamples each take seconds; they must lie where resamples can.
    """
    from reparam_export.latency._json import build

    found = build(Measurement, content)
    contest = found.contest
    _require(len(set(contest.models)) == len(contest.models), f"contest names a model twice: {list(contest.models)}")
    _require(0 < found.margin < 1, f"margin {found.margin} is not between 0 and 1")
    _require(
        _same(found.confidence, 1 - 2 * ALPHA), f"confidence {found.confidence}, the intervals have {1 - 2 * ALPHA}"
    )
    _require(0 <= found.seconds < math.inf, f"seconds {found.seconds} are no duration")
    _require(len(found.cases) > 0, "cases: there is none")
    named = [(case.runner, case.batch) for case in found.cases]
    _require(len(set(named)) == len(named), f"a runner stands there twice with the same batch size: {named}")
    for case in found.cases:
        _check_case(case, contest, found.margin)
    worst = overall([case.verdict for case in found.cases])
    _require(found.verdict == worst, f"verdict {found.verdict!r}, its cases give {worst!r}")
    _check_facts(found)
    return found


def _check_case(case: Case, contest: Contest, margin: float) -> None:
    """Raises ValueError unless all that the case says follows from its raw times."""
    where, models = f"{case.runner}, batch {case.batch}", list(contest.models)
    _require(case.batch >= 1, f"{where}: the batch size is below 1")
    _check_raw(case.raw, contest, where)
    order = [contest.subject, *contest.others, contest.control]
    over = [r.over for r in case.ratios]
    _require(over == order, f"{where}: ratios of {over}, expected {order}")
    for ratio in case.ratios:
        _require(ratio.under == contest.base, f"{where}: a ratio to {ratio.under!r}, the base is {contest.base!r}")
        _check_ratio(ratio, log_ratios(case.raw[ratio.over], case.raw[contest.base]), margin, where)
    verdict, said = verdict_of(case.ratios[0], case.ratios[-1])
    _require(
        (case.verdict, case.said) == (verdict, said),
        f"{where}: verdict {case.verdict!r} ({case.said!r:.80}), its ratios give {verdict!r} ({said!r})",
    )
    _require(
        [t.model for t in case.times] == models, f"{where}: times of {[t.model for t in case.times]}, expected {models}"
    )
    for times in case.times:
        again = _times(times.model, case.batch, case.raw[times.model], times.memory)
        _require(_follows(times, again), f"{where}: the times of {times.model} do not follow from its raw times")
        _require((times.memory or 0) >= 0, f"{where}: the memory of {times.model} is below 0")


def _check_raw(raw: Mapping[str, Rounds], contest: Contest, where: str) -> None:
    """Every model's rounds are the base's first ones: as many cycles in each, and no further round. Raises ValueError."""
    _require(set(raw) == set(contest.models), f"{where}: raw times of {list(raw)}, expected {list(contest.models)}")
    cycles = [len(runs) for runs in raw[contest.base]]
    for model, rounds in raw.items():
        found = [len(runs) for runs in rounds]
        _require(0 not in (len(found), *found), f"{where}: a round of {model} is missing or empty in the raw times")
        _require(found == cycles[: len(found)], f"{where}: the raw times of {model} are not of the base's rounds")
        _require(min(map(min, rounds)) > 0, f"{where}: a raw time of {model} is not above 0")


def _check_ratio(ratio: Ratio, logs: Array, margin: float, where: str) -> None:
    """Raises ValueError unless the ratio follows from these rounds, and its interval can."""
    import numpy as np

    again = float(np.exp(hodges_lehmann(logs)))
    where = f"{where}: {ratio.over} / {ratio.under}"
    _require(ratio.rounds == len(logs), f"{where} is of {ratio.rounds} rounds, its raw times are of {len(logs)}")
    _require(_same(ratio.ratio, again), f"{where} is {ratio.ratio}, its raw times give {again:.6g}")
    varied = spread(logs)  # a difference of logarithms: where rounds are alike, rounding is all of it
    _require(_same(ratio.spread, varied, 1e-12), f"{where}: spread {ratio.spread}, its raw times give {varied:.6g}")
    lowest, highest = (float(np.exp(v)) for v in ((logs.min(), logs.max()) if len(logs) > 1 else (-math.inf, math.inf)))
    ends = _same(ratio.low, lowest) or ratio.low > lowest, _same(ratio.high, highest) or ratio.high < highest
    possible = all(ends) and ratio.low <= ratio.high and (len(logs) > 1 or ratio.within is None)
    _require(
        possible,
        f"{where}: an interval from {ratio.low} to {ratio.high}, its rounds lie from {lowest:.6g} to {highest:.6g}",
    )
    look, stated = decided(logs, margin), ratio.look
    _require(
        (stated.position, stated.rounds) == (look.position, look.rounds) and _same(stated.level, look.level),
        f"{where} is {stated.position!r} after {stated.rounds} rounds, its raw times are {look.position!r} after {look.rounds}",
    )
    _require(0 <= stated.p_within <= 1 and 0 <= stated.p_above <= 1, f"{where}: a p is not between 0 and 1")
    _require(
        (ratio.more is None) == (look.position != "open"),
        f"{where}: more rounds are stated for what is decided, or none",
    )
    _require(ratio.more is None or ratio.more > 0, f"{where}: needs {ratio.more} more rounds")


@dataclass(frozen=True)
class _Engine:
    """What every row of ``Structure.engines`` has."""

    model: str
    layers: dict[str, int]
    plan_bytes: int
    source: str


@dataclass(frozen=True)
class _Machine:
    """The parts of ``Measurement.machine`` that are more than a line of text."""

    memory: int | None = None
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)


def _check_facts(found: Measurement) -> None:
    """Raises ValueError for facts about machine and models that cannot be shown."""
    from reparam_export.latency._json import build

    counts = [build(_Machine, found.machine).memory or 0]
    for engine in (build(_Engine, e) for e in (found.structure.engines if found.structure else ())):
        counts += [engine.plan_bytes, *engine.layers.values()]
    for size in found.structure.sizes if found.structure else ():
        held = (size.nodes, size.initializers, size.file_bytes, size.parameters, size.stored_bytes, size.multiply_adds)
        counts += [*held, *size.operators.values()]
    _require(min(counts) >= 0, f"structure or machine: a count of {min(counts)}")


def _follows(times: Times, again: Times) -> bool:
    pairs = (
        (times.p50, again.p50),
        (times.p90, again.p90),
        (times.p99, again.p99),
        (times.throughput, again.throughput),
    )
    return times.runs == again.runs and all(_same(stated, found) for stated, found in pairs)


def _same(stated: float, found: float, least: float = 0.0) -> bool:
    """To within the rounding of another machine's arithmetic, or to ``least``. NaN is the same as nothing."""
    return math.isclose(stated, found, rel_tol=1e-9, abs_tol=least)


def _require(fits: bool, reason: str) -> None:
    if not fits:
        raise ValueError(reason)


def _needs(rounds: int) -> str:
    return f"needs about {rounds:,} more rounds"


def _times(model: str, batch: int, rounds: Rounds, memory: int | None) -> Times:
    import numpy as np

    runs: np.ndarray[Any, Any] = np.concatenate([np.asarray(cycles) for cycles in rounds]) / 1e6
    p50, p90, p99 = (float(p) for p in np.percentile(runs, (50, 90, 99)))
    return Times(model, len(runs), p50, p90, p99, batch * 1000 / p50, memory)
