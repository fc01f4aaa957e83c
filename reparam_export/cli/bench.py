"""``reparam-export bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from reparam_export.cli._latency import MEASURE, bench_stage, gate, settings_of
from reparam_export.cli._options import CODE, FOLDER, JSON
from reparam_export.cli._stages import console_of


@click.command(__name__.rpartition(".")[2])
@FOLDER
@CODE
@MEASURE
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), help="Default: the exported file's, else fp32."
)
@JSON
def command(folder: Path, base: str | None, precision: str | None, as_json: bool, **options: Any) -> None:
    """Measure that fusing added no inference cost: base, base again, unfused and fused, until there is a verdict.

    Exit code 0: no added cost. 1: added cost. 6: undecided within --max-time, or withheld because the machine is too noisy.
    """
    from dataclasses import asdict

    console = console_of(as_json)
    given, settings = settings_of(options)
    found = bench_stage(console, folder, precision, settings, base=base, **given)
    console.result({"folder": str(folder), **asdict(found)})
    gate(found)
