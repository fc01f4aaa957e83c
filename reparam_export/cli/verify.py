"""``reparam-export verify``."""

from __future__ import annotations

from pathlib import Path

import click

from reparam_export.cli._options import CODE, EXPECTED, FOLDER, JSON, SAMPLES, WITNESS
from reparam_export.cli._stages import console_of, read_record, verify_stage


@click.command(__name__.rpartition(".")[2])
@FOLDER
@CODE
@SAMPLES
@WITNESS
@EXPECTED
@JSON
def command(
    folder: Path,
    base: str | None,
    inputs: Path | None,
    count: int,
    seed: int,
    witness: str,
    expected: Path | None,
    as_json: bool,
) -> None:
    """Prove that the fused weights in FOLDER are the trained model: writes verification.json."""
    console = console_of(as_json)
    try:
        verify_stage(console, folder, inputs, count, seed, witness, expected, base)
    finally:
        if (folder / "verification.json").is_file():
            console.result({"folder": str(folder), **read_record(folder / "verification.json")})
