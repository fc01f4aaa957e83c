"""``reparam-export compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reparam_export.cli._latency import MEASURE, gate, settings_of, show, watched
from reparam_export.cli._options import CODE, JSON
from reparam_export.cli._stages import console_of
from reparam_export.errors import EquivalenceError, UsageError

if TYPE_CHECKING:
    from reparam_export.comparison import Comparison, OutputChange
    from reparam_export.console import Console

PARTS = ("weights", "outputs", "graph", "latency")
SHOWN = 20


@click.command(__name__.rpartition(".")[2])
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Samples for both; default: of A's proof, else random.",
)
@click.option("--no-latency", is_flag=True, help="Do not measure.")
@click.option(
    "--fail-on", type=click.Choice(PARTS), multiple=True, help="Exit 1 if this differs (latency: B costs more)."
)
@CODE
@MEASURE
@JSON
def command(
    a: Path,
    b: Path,
    inputs: Path | None,
    no_latency: bool,
    fail_on: tuple[str, ...],
    base: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what changed from A to B, two output folders, ONNX files or engines: weights, outputs, graph, latency."""
    from reparam_export import compare

    console = console_of(as_json)
    if no_latency and "latency" in fail_on:
        raise UsageError(
            "--no-latency and --fail-on latency: what is not measured cannot be judged; leave one of them out"
        )
    given, settings = settings_of(options)
    with console.stage("compare") as advance:
        latency = not no_latency
        found = compare(
            a,
            b,
            inputs=inputs,
            latency=latency,
            settings=settings,
            progress=watched(advance, settings),
            base=base,
            **given,
        )
    _show(console, found)
    console.result({**_plain(found), "changed": found.changed})
    _gate(found, fail_on)


def _show(console: Console, found: Comparison) -> None:
    if found.tensors:
        console.line(f"weights: {len(found.weights)} of {found.tensors} tensors differ")
    rows = [
        (w.name, w.a, "" if w.a == w.b else w.b, str(w.entries), f"{w.largest:.3g}", f"{w.relative:.3g}")
        for w in found.weights[:SHOWN]
    ]
    if rows:
        head = ("tensor", "A", "B, where another", "entries", "largest change", "relative change")
        console.table("Tensors that differ, the most changed first", head, rows)
    if len(found.weights) > SHOWN:
        console.line(f"and {len(found.weights) - SHOWN} more; --json has all of them")
    for output in found.outputs:
        console.line(f"output {output.output}: {_said(output)}")
    if found.nodes:
        said = "; ".join(found.graph[:5]) or "the same program"
        console.line(f"graph: {found.nodes[0]} against {found.nodes[1]} nodes: {said}")
    for note in found.notes:
        console.line(f"note: {note}")
    if found.latency:
        show(console, found.latency)


def _said(output: OutputChange) -> str:
    if output.largest is None and output.a and output.b:
        return f"{output.a} in A, {output.b} in B"
    if output.largest is None:
        return f"only in A ({output.a})" if output.a else f"only in B ({output.b})"
    same = "" if output.agree is None else f", same class for {output.agree:.2%}"
    return f"differs by {output.largest:.3g} at most, of {output.magnitude:.3g}{same} ({output.samples} samples)"


def _gate(found: Comparison, fail_on: tuple[str, ...]) -> None:
    """Raises EquivalenceError, AddedCostError or UndecidedError for a part that must not differ and does, or is not known."""
    for part in fail_on:
        if part not in found.changed:
            raise EquivalenceError(f"{part} could not be compared: {'; '.join(found.notes) or 'it was not measured'}")
        if part == "latency" and found.latency:
            gate(found.latency)
        elif found.changed[part]:
            raise EquivalenceError(f"{part} differ between {found.a} and {found.b}", evidence=found)


def _plain(found: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found)
