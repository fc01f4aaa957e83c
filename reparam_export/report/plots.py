"""Plots as inline SVG that take their colours from the page, so that one picture serves light and dark.

Matplotlib draws in sentinel colours; each is then replaced by a CSS variable. Positions on the logarithmic axes are
computed here, because zero and NaN need a place of their own: zero below the lowest decade, NaN above the highest.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reparam_export.report.numbers import number, percent
from reparam_export.report.statement import share_of_bound
from reparam_export.verification.certificate import LayerEvidence, OutputEvidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID, BAND = "#010101", "#020202", "#030303", "#040404"
VERDICTS = {"exact": "#050505", "rounded": "#060606", "wrong": "#070707"}
SECOND = "#080808"  # the colour of a second series; the first has that of "rounded"
VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    GRID: "--line",
    BAND: "--band",
    VERDICTS["exact"]: "--exact",
    VERDICTS["rounded"]: "--rounded",
    VERDICTS["wrong"]: "--wrong",
    SECOND: "--warn",
}
OUTPUTS_DRAWN = 24
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reparam-export",
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis with a place for zero and one for what is not a number."""

    low: int
    high: int
    zero: bool
    odd: bool

    def at(self, value: float) -> float:
        """The position of a value, in decades."""
        if not math.isfinite(value):
            return self.high + self.gap
        return self.low - self.gap if value <= 0 else math.log10(value)

    @property
    def gap(self) -> float:
        """How far the two places lie outside, so that their names keep clear of the decades'."""
        return max(0.6, 0.2 * (self.high - self.low))

    @property
    def limits(self) -> tuple[float, float]:
        low = self.low - (1.5 * self.gap if self.zero else 0.15)
        return low, self.high + (1.5 * self.gap if self.odd else 0.15)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """The name of every decade, or of every second, third ..., and of the two places beside them."""
        step = max(1, math.ceil((self.high - self.low) / most))
        marks = [(float(k), "1" if k == 0 else f"1e{k}") for k in range(self.low, self.high + 1) if k % step == 0]
        below = [(self.low - self.gap, "0")] if self.zero else []
        return below + marks + ([(self.high + self.gap, "NaN, inf")] if self.odd else [])


def scale(values: Sequence[float]) -> Scale:
    """Whole decades around the values, two at least."""
    logs = [math.log10(value) for value in values if math.isfinite(value) and value > 0]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (-1, 0)
    return Scale(
        low=min(low, high - 2),
        high=high,
        zero=any(value <= 0 for value in values),
        odd=any(not math.isfinite(value) for value in values),
    )


def layer_plot(layers: Sequence[LayerEvidence], *, narrow: bool) -> str:
    """A dot per layer: its worst error as a share of its bound, and below it what survived of its change."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph the drawing font lacks: the browser has it
        figure = Figure(figsize=(3.9, 4.4) if narrow else (9.6, 4.2))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        margins(figure, left=0.75, right=0.12, top=0.3, bottom=0.5, between=0.35)
        _draw_ratios(above, layers)
        _draw_survival(below, layers)
        label = (
            f"Two plots over {len(layers)} layers. Above, the worst error of each layer as a share of its bound, on a "
            f"logarithmic axis; the bound is 1 and {sum(not layer.passed for layer in layers)} layers are wrong. "
            f"Below, the share of the adapter's change that the storage format keeps."
        )
        return svg(figure, "layers-narrow" if narrow else "layers-wide", label, {} if narrow else _layer_titles(layers))


def output_plot(outputs: Sequence[OutputEvidence], *, narrow: bool) -> str:
    """A row per model, output and batch: noise floor and bound as marks, the error as a dot."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = sorted(outputs, key=share_of_bound, reverse=True)[:OUTPUTS_DRAWN]
    shown = [output for output in outputs if output in shown]
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        height = 0.65 + 0.5 * len(shown)
        figure = Figure(figsize=(3.9 if narrow else 9.6, height))
        axes = figure.subplots()
        margins(figure, left=0.05, right=0.12, top=0.05, bottom=0.3)
        _draw_outputs(axes, shown, letters=40 if narrow else 90)
        label = (
            f"Output error of {len(shown)} comparisons between noise floor and bound on a logarithmic axis; "
            f"{sum(not output.passed for output in shown)} are beyond the bound. The table below has the numbers."
        )
        return svg(figure, "outputs-narrow" if narrow else "outputs-wide", label, {})


def margins(figure: Figure, *, left: float, right: float, top: float, bottom: float, between: float = 0.0) -> None:
    """In inches: the labels are known, so no layout engine has to measure them."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    rows = len(figure.axes)
    if between:
        inner = (height - top - bottom - between * (rows - 1)) / rows
        figure.subplots_adjust(hspace=between / inner)


def _draw_ratios(axes: Axes, layers: Sequence[LayerEvidence]) -> None:
    axis = scale([1.0, *(layer.bound_ratio for layer in layers)])
    axes.set_ylim(*axis.limits)
    axes.set_yticks([place for place, _ in axis.ticks()], [name for _, name in axis.ticks()])
    axes.axhspan(0, axis.limits[1], color=BAND, linewidth=0, zorder=0)
    axes.axhline(0, color=VERDICTS["wrong"], linewidth=1.2, zorder=1)
    _dots(axes, layers, [axis.at(layer.bound_ratio) for layer in layers])
    axes.set_title("Worst error, as a share of its bound (1)", loc="left", fontsize=11, color=INK)


def _draw_survival(axes: Axes, layers: Sequence[LayerEvidence]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    finite = [layer.survival for layer in layers if math.isfinite(layer.survival)]
    low, high = min([*finite, 1.0]), max([*finite, 1.0])
    margin = max(high - low, 0.001) * 0.2
    bottom = min(low, 0.999) - margin
    heights = [layer.survival if math.isfinite(layer.survival) else bottom for layer in layers]
    axes.set_ylim(bottom, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.5g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.axhline(1, color=GRID, linewidth=1, zorder=1)
    axes.set_xlim(0.3, len(layers) + 0.7)
    axes.set_xlabel("layer, as numbered in the table")
    _dots(axes, layers, heights)
    axes.set_title("Share of the adapter's change kept", loc="left", fontsize=11, color=INK)


def _dots(axes: Axes, layers: Sequence[LayerEvidence], heights: list[float]) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.scatter(
        range(1, len(layers) + 1),
        heights,
        s=[46 if not layer.passed else (26 if len(layers) <= 60 else 13) for layer in layers],
        c=[VERDICTS[layer.verdict] for layer in layers],
        linewidths=0,
        zorder=3,
        clip_on=False,
        urls=[f"#layer-{index}" for index in range(1, len(layers) + 1)],
    )


def _draw_outputs(axes: Axes, outputs: Sequence[OutputEvidence], *, letters: int) -> None:
    axis = scale([value for output in outputs for value in (output.error, output.floor, output.bound)])
    axes.set_xlim(*axis.limits)
    axes.set_ylim(len(outputs) - 0.35, -0.75)
    ticks = axis.ticks(most=4 if letters < 50 else 8)
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for row, output in enumerate(outputs):
        floor, bound, error = (axis.at(value) for value in (output.floor, output.bound, output.error))
        colour = VERDICTS["exact" if output.passed else "wrong"]
        name = _short(f"{output.model} · {output.output} · batch {output.batch}", letters)
        axes.text(axis.limits[0], row - 0.3, name, fontsize=10, va="bottom", color=INK)
        axes.plot([axis.limits[0], bound], [row, row], color=GRID, linewidth=5, solid_capstyle="butt", zorder=1)
        axes.plot([floor, floor], [row - 0.2, row + 0.2], color=QUIET, linewidth=1.6, zorder=2)
        axes.plot([bound, bound], [row - 0.2, row + 0.2], color=VERDICTS["wrong"], linewidth=1.6, zorder=2)
        axes.scatter([error], [row], s=36, c=[colour], linewidths=0, zorder=3, clip_on=False)


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters // 2]}…{text[-letters // 2 + 1 :]}"


def _layer_titles(layers: Sequence[LayerEvidence]) -> dict[str, str]:
    return {
        f"#layer-{index}": f"{index}. {layer.module}: {layer.verdict}, error {number(layer.max_error)}, "
        f"{number(layer.bound_ratio)} of its bound, {percent(layer.survival)} kept"
        for index, layer in enumerate(layers, 1)
    }


def svg(figure: Figure, name: str, label: str, titles: dict[str, str]) -> str:
    """The SVG element alone: page colours, page font, ids of its own, a tooltip on every linked dot."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<!--.*?-->", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = re.sub(r'font: ((?:\w+ )*?)([\d.]+)px [^;"]+', r"font-size: \2px", text)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, f"var({variable})")
    text = _own_ids(text, name)
    dot = r'<a href="(#layer-\d+)"[^>]*>\s*<path d="([^"]+)"[^>]*(style="[^"]+")/>'
    text = re.sub(dot, lambda found: _dot(found[1], found[2], found[3], titles.get(found[1], "")), text)
    box = re.search(r'viewBox="([^"]+)"', text)
    head = f'<svg class="{name}" viewBox="{box[1] if box else ""}" role="img" aria-label="{html.escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).strip()


def _dot(link: str, path: str, style: str, title: str) -> str:
    """A circle instead of eight curves, with its tooltip; the link opens, inside the same ``<a>``."""
    points = [float(found) for found in re.findall(r"-?[\d.]+", path)]
    across, down = points[::2], points[1::2]
    x, y, radius = (min(across) + max(across)) / 2, (min(down) + max(down)) / 2, (max(down) - min(down)) / 2
    tooltip = f"<title>{html.escape(title)}</title>" if title else ""
    return f'<a href="{link}" tabindex="-1">{tooltip}<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {style}/>'


def _own_ids(text: str, name: str) -> str:
    """Several plots share one page: ids nobody refers to go, the others get the plot's name in front."""
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'(href="#|url\(#)(?!layer-)([\w-]+)', lambda found: f"{found[1]}{name}-{found[2]}", text)
