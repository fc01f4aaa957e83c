"""What the measurement says, in the words and rows that every view of the report shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from reparam_export.latency.measurement import Case, Measurement, Size
from reparam_export.latency.statistics import Ratio
from reparam_export.report.evidence import Evidence
from reparam_export.report.measured import Measured
from reparam_export.report.numbers import count, plural, size

TONES = {"no added cost": "exact", "added cost": "wrong", "undecided": "unproven", "withheld": "unproven"}
PLACES = {"within": "within the margin", "above": "above it", "below": "below it", "open": "not decided"}


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, and a cell a column; ``group`` is what several rows have in common."""

    name: str
    cells: tuple[str, ...]
    group: str = ""


def sentence(measured: Measured) -> str:
    """The verdict with the interval that carries it: the one that comes closest to the margin, or goes beyond it."""
    found = measured.measurement
    if measured.stale:
        return f"Latency not known: {measured.stale}; run bench again"
    case = telling(found)
    ratio = case.ratio(found.contest.subject)
    cost = f"{found.contest.subject} adds {change(ratio)} to the base's time ({between(ratio)})"
    start = f"Latency {'not decided' if found.verdict in ('undecided', 'withheld') else f'proven: {found.verdict}'}"
    why = f"; {case.said}" if case.verdict in ("undecided", "withheld") else f", margin {share(found.margin)}"
    where = "in the worst case, " if len(found.cases) > 1 else ""
    return f"{start}; {where}{case.title}, batch {count(case.batch)}: {cost}{why}; timed: {measured.timed}"


def tone(measured: Measured) -> str:
    """The CSS class of the verdict."""
    return "unproven" if measured.stale else TONES[measured.measurement.verdict]


def state(measured: Measured) -> str:
    """The verdict in a word, for the folder as it is now."""
    return "not known" if measured.stale else measured.measurement.verdict


def said(measured: Measured, case: Case) -> str:
    """The verdict on a case in words. One of other files is not repeated: a line of a table is read without its heading."""
    return "not known" if measured.stale else case.said


def failure(case: Case, subject: str) -> str:
    """Why a case is no success, "" when it is one."""
    if case.verdict == "no added cost":
        return ""
    return f"{name_of(case)}: {case.said}, {subject} / base {factor(case.ratio(subject))}"


def failures(evidence: Evidence) -> Iterator[str]:
    """A sentence for each case in which the fused model costs more than its base."""
    if evidence.latency is not None and not evidence.latency.stale:
        found = evidence.latency.measurement
        yield from (failure(c, found.contest.subject) for c in found.cases if c.verdict == "added cost")


def telling(found: Measurement) -> Case:
    """The case with the worst verdict; of those, the one whose interval reaches furthest from 1."""
    worst = [case for case in found.cases if case.verdict == found.verdict]

    def reach(case: Case) -> float:
        ratio = case.ratio(found.contest.subject)
        return max(ratio.high, 1 / ratio.low) if ratio.low > 0 else float("inf")

    return max(worst, key=reach)


def throughputs(found: Measurement) -> tuple[tuple[str, ...], list[Row]]:
    """The table of the papers: samples a second. The base's at its median run time, the others' by their ratio to it.

    Medians of all runs would compare quiet minutes of one model with busy ones of another; ratios are of neighbours.
    """
    models, rows = shown_models(found), []
    for case in found.cases:
        base = next(times.throughput for times in case.times if times.model == found.contest.base)
        factors = [1 / case.ratio(model).ratio for model in models[1:]]
        rows.append(Row(name_of(case), (rate(base), *(f"{rate(base * f)} ({percent(f - 1)})" for f in factors))))
    return models, rows


def ratio_rows(found: Measurement) -> list[Row]:
    """Every ratio to the base: factor, interval, rounds, spread of a round, where the test found it; grouped by case."""
    return [
        Row(
            f"{ratio.over} / {ratio.under}",
            (
                f"{ratio.ratio:.4f}",
                f"{ratio.low:.4f} to {ratio.high:.4f}" if ratio.within else "not known",
                count(ratio.rounds),
                f"{100 * ratio.spread:.1f} %" if ratio.within else "not known",
                PLACES[ratio.look.position],
            ),
            name_of(case),
        )
        for case in found.cases
        for ratio in case.ratios
    ]


def times_rows(found: Measurement) -> list[Row]:
    """Every model's run times: p50, p90, p99, runs, memory; grouped by case."""
    return [
        Row(t.model, (*map(milliseconds, (t.p50, t.p90, t.p99)), count(t.runs), size(t.memory)), name_of(case))
        for case in found.cases
        for t in case.times
    ]


def structure_rows(found: Measurement) -> tuple[tuple[str, ...], list[Row], list[Row]]:
    """Models as columns; what each consists of; and how often each operator stands in its file."""
    if found.structure is None:
        return (), [], []
    sizes, engines = found.structure.sizes, found.structure.engines
    rows = [
        _sized("Nodes in the ONNX file", sizes, lambda s: count(s.nodes)),
        _sized("Initializers", sizes, lambda s: count(s.initializers)),
        _sized("Parameters", sizes, lambda s: count(s.parameters)),
        _sized("Bytes of parameters and buffers", sizes, lambda s: size(s.stored_bytes)),
        _sized("Multiply-adds, batch 1", sizes, lambda s: count(s.multiply_adds)),
        _sized("Size of the file", sizes, lambda s: size(s.file_bytes)),
    ]
    known = {e["model"]: e for e in engines}
    if known:
        layers = tuple(count(sum(known[s.model]["layers"].values())) if s.model in known else "–" for s in sizes)
        plans = tuple(size(known[s.model]["plan_bytes"]) if s.model in known else "–" for s in sizes)
        rows += [Row("TensorRT layers", layers), Row("Size of the engine", plans)]
    names = sorted({name for s in sizes for name in s.operators})
    operators = [Row(name, tuple(count(s.operators.get(name, 0)) for s in sizes)) for name in names]
    return tuple(s.model for s in sizes), rows, operators


def engine_rows(found: Measurement) -> tuple[tuple[str, ...], list[Row], list[str]]:
    """Models as columns; how many layers of each type TensorRT has for them; where that is known from."""
    engines = found.structure.engines if found.structure else ()
    types = sorted({name for engine in engines for name in engine["layers"]})
    rows = [Row(name, tuple(count(engine["layers"].get(name, 0)) for engine in engines)) for name in types]
    sources = dict.fromkeys(str(engine["source"]) for engine in engines)
    return tuple(str(engine["model"]) for engine in engines), rows, list(sources)


def machine_rows(found: Measurement) -> list[tuple[str, str]]:
    """Where and how times were taken."""
    machine, settings = dict(found.machine), found.settings
    before, after = machine.pop("before", {}), machine.pop("after", {})
    versions = machine.pop("versions", {})
    memory = machine.pop("memory", None)
    rows = [(key, str(value)) for key, value in machine.items() if value is not None]
    rows += [("memory", size(memory))] if isinstance(memory, int) else []
    rows += [
        (f"{key}, before and after", f"{before[key]}, {after.get(key)}") for key in before if before[key] is not None
    ]
    rows += [("threads", f"{settings.get('threads')}, pinned"), ("seed", str(settings.get("seed")))]
    rows += [
        ("measured in", f"{found.seconds:.0f} s"),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
    ]
    return rows


def shown_models(found: Measurement) -> tuple[str, ...]:
    """The models of the papers' table: the control is for the statistics only."""
    contest = found.contest
    return (contest.base, *contest.others, contest.subject)


def name_of(case: Case) -> str:
    """``onnxruntime, CPU, batch 1``."""
    return f"{case.title}, batch {count(case.batch)}"


def change(ratio: Ratio) -> str:
    """``+0.03 %``: the time that is added to the base's."""
    return f"{100 * (ratio.ratio - 1):+.2f} %"


def between(ratio: Ratio) -> str:
    """``-0.20 % to +0.18 %``."""
    if ratio.within is None:
        return "one round, no interval"
    return f"{100 * (ratio.low - 1):+.2f} % to {100 * (ratio.high - 1):+.2f} %"


def factor(ratio: Ratio) -> str:
    """``1.0003 (0.9986 to 1.0018)``."""
    if ratio.within is None:
        return f"{ratio.ratio:.4f} (one round)"
    return f"{ratio.ratio:.4f} ({ratio.low:.4f} to {ratio.high:.4f})"


def share(value: float) -> str:
    """A margin: ``1 %``."""
    return f"{100 * value:g} %"


def percent(value: float) -> str:
    """A change to one digit: ``-8.3 %``."""
    return f"{100 * value:+.1f} %"


def rate(value: float) -> str:
    """Samples a second: ``35.4``, ``1,204``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def milliseconds(value: float) -> str:
    """Three digits: ``28.2 ms``."""
    return f"{value:#.3g} ms" if value < 100 else f"{value:.0f} ms"


def factors(case: Case) -> str:
    """Every ratio of a case: ``fused / base 1.0003 (0.9986 to 1.0018), ...``."""
    return ", ".join(f"{ratio.over} / {ratio.under} {factor(ratio)}" for ratio in case.ratios)


def rounds_sentence(*cases: Case) -> str:
    """How much was measured."""
    most = max(ratio.rounds for case in cases for ratio in case.ratios)
    runs = sum(times.runs for case in cases for times in case.times)
    return f"{count(runs)} runs in {'up to ' if len(cases) > 1 else ''}{plural(most, 'round')}"


def _sized(name: str, sizes: Sequence[Size], cell: Callable[[Size], str]) -> Row:
    return Row(name, tuple(map(cell, sizes)))
