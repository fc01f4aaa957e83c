"""What ``bench`` and ``compare`` share: the options of a measurement, how it is shown, and what it is worth as a gate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reparam_export.cli._options import stack
from reparam_export.errors import AddedCostError, UndecidedError, UsageError

if TYPE_CHECKING:
    from reparam_export.console import Console
    from reparam_export.latency.measurement import Measurement
    from reparam_export.latency.rounds import Progress, Settings
    from reparam_export.latency.statistics import Ratio

MEASURE = stack(
    click.option("--batch", metavar="LIST", default="1,4,16", help="Batch sizes, as in the papers.  [1,4,16]"),
    click.option("--margin", metavar="PERCENT", default="1%", help="Up to here a difference is none.  [1%]"),
    click.option("--max-time", metavar="TIME", default="15m", help="Of all runners: 90s, 15m, 2h.  [15m]"),
    click.option(
        "--runner", "runners", metavar="NAME", multiple=True, help="Repeatable; default: all that can run here."
    ),
    click.option("--threads", type=click.IntRange(1), default=1, help="Threads of a CPU runner, pinned.  [1]"),
    click.option("--rounds", type=click.IntRange(1), help="Stop after so many rounds, decided or not."),
    click.option(
        "--no-memory", is_flag=True, help="Do not look at the peak memory of every model: a few processes less."
    ),
    click.option("--seed", default=0, help="Seed of the random orders.  [0]"),
)

BENCH = stack(
    click.option("--bench", is_flag=True, help="Measure that fusing added no inference cost, as `bench` does."),
    click.option("--max-time", metavar="TIME", default="15m", help="Of --bench.  [15m]"),
)


def settings_of(options: Mapping[str, Any]) -> tuple[dict[str, Any], Settings]:
    """Keywords of ``bench`` and its settings. Raises UsageError for what cannot be read."""
    from reparam_export.latency.rounds import Settings

    sizes = options["batch"].split(",")
    if not all(size.isdecimal() for size in sizes):
        raise UsageError(f"--batch {options['batch']!r}: expected batch sizes, such as 1,4,16")
    settings = Settings(
        margin=_margin(options["margin"]),
        max_time=seconds(options["max_time"]),
        threads=options["threads"],
        seed=options["seed"],
        rounds=options["rounds"],
        memory=not options["no_memory"],
    )
    return {"batches": [int(size) for size in sizes], "runners": options["runners"]}, settings


def bench_stage(console: Console, folder: Path, precision: str | None, settings: Settings, **given: Any) -> Measurement:
    """Measure, write ``latency.json`` and show what was found. given: base, batches and runners of ``bench``."""
    from reparam_export import bench

    with console.stage("bench") as advance:
        progress = watched(advance, settings)
        found = bench(folder, precision=precision, settings=settings, progress=progress, **given)
    show(console, found)
    return found


def show(console: Console, found: Measurement) -> None:
    """One row a runner and batch size, then what could not be run and why."""
    subject, others, base = found.contest.subject, found.contest.others, found.contest.base
    head = (
        "runner",
        "batch",
        f"{base} ms",
        f"{subject} / {base}",
        *(f"{o} / {base}" for o in others),
        "rounds",
        "verdict",
    )
    rows = []
    for case in found.cases:
        ratios = [case.ratio(model) for model in (subject, *others)]
        middle = next(t.p50 for t in case.times if t.model == base)
        cells = (case.title, case.batch, f"{middle:.2f}", *map(interval, ratios), ratios[0].rounds, case.said)
        rows.append(tuple(map(str, cells)))
    console.table(f"Medians, and ratios with their {found.confidence:.0%} intervals", head, rows)
    for title, why in found.skipped.items():
        console.line(f"not run: {title}: {why}")
    for note in found.notes:
        console.line(f"note: {note}")
    console.line(f"{found.verdict} (margin {100 * found.margin:g} %)")


def interval(ratio: Ratio) -> str:
    """``1.0003 [0.9986, 1.0018]``."""
    if ratio.within is None:
        return f"{ratio.ratio:.4f} (one round)"
    return f"{ratio.ratio:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"


def gate(found: Measurement) -> None:
    """Nothing for "no added cost". Raises AddedCostError or UndecidedError with the case that stands in the way."""
    case = next(c for c in found.cases if c.verdict == found.verdict)
    ratio = case.ratio(found.contest.subject)
    where = f"{case.title}, batch {case.batch}: {ratio.over} / {ratio.under} is {interval(ratio)}"
    if found.verdict == "added cost":
        raise AddedCostError(f"added cost: {where}, margin {100 * found.margin:g} %")
    if found.verdict != "no added cost":
        raise UndecidedError(f"no verdict on the latency: {where}; {case.said}")


def watched(advance: Any, settings: Settings) -> Progress:
    import time

    started = time.monotonic()
    return lambda title, rounds, left: advance(int(time.monotonic() - started), int(settings.max_time))


def _margin(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if found is None:
        raise UsageError(f"--margin {text!r}: expected a percentage, such as 1% or 0.5%")
    return float(found[1]) / 100


def seconds(text: str) -> float:
    """``90s``, ``15m`` or ``2h``. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None:
        raise UsageError(f"--max-time {text!r}: expected seconds, minutes or hours, such as 90s, 15m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
