"""``reparam-export report``."""

from __future__ import annotations

from pathlib import Path

import click

from reparam_export.cli._options import FOLDER, JSON
from reparam_export.cli._stages import console_of, report_stage
from reparam_export.errors import AddedCostError, EquivalenceError, UndecidedError


@click.command(__name__.rpartition(".")[2])
@FOLDER
@JSON
def command(folder: Path, as_json: bool) -> None:
    """Write report.html, report.md and junit.xml from what the other commands left in FOLDER."""
    console = console_of(as_json)
    written = report_stage(console, folder)
    console.result(
        {"folder": str(folder), "verdict": written.verdict, "latency": written.latency, "report": str(written.html)}
    )
    if written.verdict in ("wrong", "unproven"):
        raise EquivalenceError(written.headline)
    if written.latency == "added cost":
        raise AddedCostError(f"{folder}: added cost; see {written.html}")
    if written.latency not in ("no added cost", "not measured"):
        raise UndecidedError(f"{folder}: latency {written.latency}; see {written.html}")
