"""``reparam-export report``."""

from __future__ import annotations

from pathlib import Path

import click

from reparam_export.cli._options import FOLDER, JSON
from reparam_export.cli._stages import console_of, report_stage
from reparam_export.errors import EquivalenceError


@click.command(__name__.rpartition(".")[2])
@FOLDER
@JSON
def command(folder: Path, as_json: bool) -> None:
    """Write report.html, report.md and junit.xml from what the other commands left in FOLDER."""
    console = console_of(as_json)
    written = report_stage(console, folder)
    console.result({"folder": str(folder), "verdict": written.verdict, "report": str(written.html)})
    if written.verdict in ("wrong", "unproven"):
        raise EquivalenceError(written.headline)
