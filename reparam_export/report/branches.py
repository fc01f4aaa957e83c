"""The branch analysis in the report: a table row a branch, and a plot over the layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reparam_export.analysis import BranchAnalysis
from reparam_export.report.plots import GRID, INK, QUIET, SECOND, STYLE, VERDICTS, margins, scale, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (VERDICTS["rounded"], SECOND)
TONES = ("rounded", "warn")  # the same as CSS classes of the page


def branch_names(analysis: Sequence[BranchAnalysis]) -> tuple[str, ...]:
    """The branches in the order they are coloured."""
    return tuple(dict.fromkeys(a.branch for a in analysis))


def numbered(analysis: Sequence[BranchAnalysis]) -> list[tuple[int, BranchAnalysis]]:
    """Each row with the number of its layer."""
    numbers = {module: n for n, module in enumerate(dict.fromkeys(a.module for a in analysis), 1)}
    return [(numbers[a.module], a) for a in analysis]


def branch_plot(analysis: Sequence[BranchAnalysis], *, narrow: bool) -> str:
    """Over the layers: each branch's share of the change, its likeness to the weight's own directions, what it amplifies."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layers = {a.module: number for number, a in numbered(analysis)}
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(3.9, 7.6) if narrow else (9.6, 7.6))
        axes = figure.subplots(4, 1, sharex=True)
        margins(figure, left=0.75, right=0.12, top=0.3, bottom=0.5, between=0.4)
        _share(axes[0], analysis, layers)
        written = [(a.similarity_out, a.chance_out) for a in analysis]
        read = [(a.similarity_in, a.chance_in) for a in analysis]
        _similarity(axes[1], analysis, layers, written, "Writes where the weight writes most (bar: chance)")
        _similarity(axes[2], analysis, layers, read, "Reads what the weight reads most (bar: chance)")
        _amplification(axes[3], analysis, layers)
        axes[3].set_xlim(0.3, len(layers) + 0.7)
        axes[3].set_xlabel("layer, as numbered in the table")
        label = (
            f"Four plots over {len(layers)} layers, a dot for each of the branches {', '.join(branch_names(analysis))}: share of "
            "the change, likeness of the directions it writes and reads to those of the pre-trained weight, and amplification."
        )
        return svg(figure, "branches-narrow" if narrow else "branches-wide", label, {})


def _share(axes: Axes, analysis: Sequence[BranchAnalysis], layers: dict[str, int]) -> None:
    _dots(axes, analysis, layers, [a.share for a in analysis])
    low, high = min([0.0, *(a.share for a in analysis)]), max([1.0, *(a.share for a in analysis)])
    axes.set_ylim(low - 0.08, high + 0.08)
    axes.axhline(0, color=GRID, linewidth=1, zorder=1)
    axes.set_title("Share of the layer's change", loc="left", fontsize=11, color=INK)


def _similarity(
    axes: Axes,
    analysis: Sequence[BranchAnalysis],
    layers: dict[str, int],
    found: Sequence[tuple[float, float]],
    title: str,
) -> None:
    _dots(axes, analysis, layers, [similarity for similarity, _ in found])
    places = [layers[a.module] for a in analysis]
    axes.scatter(places, [chance for _, chance in found], marker="_", s=60, c=QUIET, linewidths=1.4, zorder=2)
    top = max([0.2, *(similarity for similarity, _ in found)])
    axes.set_ylim(-0.08 * top, 1.1 * top)
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def _amplification(axes: Axes, analysis: Sequence[BranchAnalysis], layers: dict[str, int]) -> None:
    axis = scale([a.amplification for a in analysis])
    axes.set_ylim(*axis.limits)
    axes.set_yticks([place for place, _ in axis.ticks(3)], [name for _, name in axis.ticks(3)])
    _dots(axes, analysis, layers, [axis.at(a.amplification) for a in analysis])
    axes.set_title("Amplification of its directions", loc="left", fontsize=11, color=INK)


def _dots(axes: Axes, analysis: Sequence[BranchAnalysis], layers: dict[str, int], heights: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    order = branch_names(analysis)
    axes.grid(axis="y", color=GRID, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    finite = [(a, h) for a, h in zip(analysis, heights, strict=True) if math.isfinite(h)]
    offset = {name: 0.16 * (n - (len(order) - 1) / 2) for n, name in enumerate(order)}
    colours: list[Any] = [COLOURS[order.index(a.branch) % len(COLOURS)] for a, _ in finite]
    places = [layers[a.module] + offset[a.branch] for a, _ in finite]
    axes.scatter(places, [h for _, h in finite], s=26 if len(layers) <= 60 else 12, c=colours, linewidths=0, zorder=3)
