"""``reparam-export export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from reparam_export.cli._options import CODE, EXPORT, FOLDER, JSON
from reparam_export.cli._stages import check_export, console_of, export_stage, proven


@click.command(__name__.rpartition(".")[2])
@FOLDER
@CODE
@EXPORT
@JSON
def command(folder: Path, base: str | None, as_json: bool, **options: Any) -> None:
    """Write proven weights as ONNX, a TensorRT engine or safetensors, and prove the file."""
    console = console_of(as_json)
    builder = check_export(options)
    if builder:
        console.line(f"engine: {builder}")
    artifacts = export_stage(console, proven(folder, base), folder, **options)
    console.result({"folder": str(folder), "artifacts": artifacts})
