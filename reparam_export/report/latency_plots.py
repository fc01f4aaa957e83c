"""The two pictures of the latency: how run times are spread, and how far each ratio lies from the margin."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reparam_export.latency.measurement import Case, Measurement
from reparam_export.latency.statistics import Ratio
from reparam_export.report.latency import between, change, name_of, shown_models
from reparam_export.report.plots import BAND, GRID, INK, QUIET, STYLE, VERDICTS, margins, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
BETWEEN = 0.72  # inches between two rows of small plots
SHOWN = (0.5, 95.0)  # percentiles of all runs between which times are drawn; what is beyond stands in the table
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def times_plot(found: Measurement, *, narrow: bool) -> str:
    """A small plot a case: how the run times of every model are spread, each with its median."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = 1 if narrow else min(3, len(found.cases))
    rows = math.ceil(len(found.cases) / columns)
    models = shown_models(found)
    each = 0.75 + 0.42 * len(models)
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(3.9 if narrow else 9.6, rows * each + 0.1))
        grid = figure.subplots(rows, columns, squeeze=False)
        margins(figure, left=0.75, right=0.12, top=0.3, bottom=0.35)
        height = (rows * each - 0.55 - BETWEEN * (rows - 1)) / rows
        figure.subplots_adjust(hspace=BETWEEN / height, wspace=0.36)
        flat = [axes for line in grid for axes in line]
        for axes, case in zip(flat, found.cases, strict=False):
            _draw_times(axes, case, models, found.contest.subject)
        for axes in flat[len(found.cases) :]:
            axes.set_axis_off()
        label = (
            f"Run times of {', '.join(models)} in {len(found.cases)} small plots, one for each runner and batch size, in "
            "milliseconds, the median of each marked. The tables below have the numbers."
        )
        return svg(figure, "times-narrow" if narrow else "times-wide", label, {})


def ratios_plot(found: Measurement, *, narrow: bool) -> str:
    """A row for every ratio of every case: its interval over rounds against the margin."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [(case, ratio) for case in found.cases for ratio in case.ratios]
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(3.9 if narrow else 9.6, 0.62 + 0.3 * len(lines) + 0.34 * len(found.cases)))
        axes = figure.subplots()
        margins(figure, left=1.05 if narrow else 1.2, right=0.3 if narrow else 2.2, top=0.05, bottom=0.32)
        _draw_ratios(axes, found, numbers=not narrow)
        label = (
            f"Time over that of the base, {len(lines)} ratios with their intervals, and the margin of "
            f"{100 * found.margin:g} % around no change. The table below has the numbers."
        )
        return svg(figure, "ratios-narrow" if narrow else "ratios-wide", label, {})


def colour(ratio: Ratio, subject: str) -> str:
    """The subject's as its verdict, the unfused model's and the control's always the same."""
    if ratio.over == subject:
        return {"above": VERDICTS["wrong"], "open": QUIET}.get(ratio.look.position, VERDICTS["exact"])
    return QUIET if ratio.over.endswith("again") else VERDICTS["rounded"]


def _draw_times(axes: Axes, case: Case, models: Sequence[str], subject: str) -> None:
    import numpy as np

    runs = {m: np.concatenate([np.asarray(r) for r in case.raw[m]]) / 1e6 for m in models if m in case.raw}
    every = np.concatenate(list(runs.values()))
    low, high = (float(p) for p in np.percentile(every, SHOWN))
    low, high = (low, high) if high > low else (low * 0.99, high * 1.01)
    colours = dict.fromkeys(models, VERDICTS["rounded"]) | {models[0]: QUIET, subject: VERDICTS["exact"]}
    edges = np.linspace(low, high, BINS + 1)
    for row, (model, times) in enumerate(runs.items()):
        heights, _ = np.histogram(times, edges)
        top = 0.8 * heights / max(int(heights.max()), 1)
        axes.stairs(row + 1 - top, edges, baseline=row + 1, fill=True, color=colours[model], alpha=0.45, linewidth=0)
        middle = float(np.median(times))
        axes.plot([middle, middle], [row + 0.15, row + 1], color=colours[model], linewidth=1.8, solid_capstyle="butt")
        axes.axhline(row + 1, color=GRID, linewidth=0.8, zorder=0)
    axes.set_xlim(low, high)
    axes.set_ylim(len(runs) + 0.02, 0)
    axes.set_yticks([row + 0.72 for row in range(len(runs))], list(runs))
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(length=0, labelcolor=QUIET)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(f"{name_of(case)}, ms", loc="left", fontsize=11, color=INK, x=-0.02)


def _draw_ratios(axes: Axes, found: Measurement, *, numbers: bool) -> None:
    from matplotlib.transforms import blended_transform_factory

    lines = [ratio for case in found.cases for ratio in case.ratios]
    finite = [v - 1 for r in lines for v in (r.low, r.high, r.ratio) if math.isfinite(v)]
    reach = max([2.5 * found.margin, *(abs(v) for v in finite)])
    left = min([-2.2 * found.margin, *finite])
    axes.set_xscale("symlog", linthresh=2 * found.margin, linscale=1.0)
    axes.set_xlim(left * 1.1, reach * 1.15)
    axes.axvspan(-found.margin, found.margin, color=VERDICTS["exact"], alpha=0.13, linewidth=0, zorder=0)
    axes.axvspan(found.margin, reach * 1.15, color=BAND, linewidth=0, zorder=0)
    axes.axvline(0, color=GRID, linewidth=1.2, zorder=1)
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    y = 0.0
    for case in found.cases:
        axes.text(0, y, name_of(case), fontsize=10, va="center", color=INK, transform=beside)
        y += 0.95
        for ratio in case.ratios:
            _draw_ratio(axes, ratio, y, colour(ratio, found.contest.subject))
            axes.text(-0.02, y, ratio.over, fontsize=10, va="center", ha="right", color=QUIET, transform=beside)
            if numbers:
                said = f"{change(ratio)}  ({between(ratio)})"
                axes.text(1.02, y, said, fontsize=9.5, va="center", color=QUIET, transform=beside)
            y += 0.9
        y += 0.25
    axes.set_ylim(y - 0.35, -0.6)
    axes.set_yticks([])
    _percent_ticks(axes, left, reach, found.margin, most=9 if numbers else 6)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _draw_ratio(axes: Axes, ratio: Ratio, y: float, colour: str) -> None:
    """The interval as a bar, the estimate as a dot; an unknown interval is the whole width."""
    low, high = axes.get_xlim()
    ends = [
        min(max(v - 1, low), high) if math.isfinite(v) else (low if v < 1 else high) for v in (ratio.low, ratio.high)
    ]
    axes.plot(ends, [y, y], color=colour, linewidth=3.2, solid_capstyle="butt", zorder=2)
    axes.scatter([ratio.ratio - 1], [y], s=34, c=[colour], linewidths=0, zorder=3)


def _percent_ticks(axes: Axes, left: float, reach: float, margin: float, *, most: int) -> None:
    """0, the margin on both sides, and round numbers further out, at most so many on the whole axis."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    marks = [-margin, 0.0, margin]
    place = axes.transScale.transform
    apart = (place((reach, 0))[0] - place((left, 0))[0]) / most
    for tick in (t for t in TICKS if t <= reach * 1.1):
        if place((tick, 0))[0] - place((marks[-1], 0))[0] >= apart:
            marks.append(tick)
    for tick in (-t for t in TICKS if -t >= left * 1.05):
        if place((marks[0], 0))[0] - place((tick, 0))[0] >= apart:
            marks.insert(0, tick)
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_major_formatter(FixedFormatter(["0" if m == 0 else f"{100 * m:+g} %" for m in marks]))
    axes.xaxis.set_minor_locator(NullLocator())
