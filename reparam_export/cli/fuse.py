"""``reparam-export fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from reparam_export.cli._options import AGAIN, CHECKPOINT, DTYPE, JSON, OUT, out_folder, recipe_of_call
from reparam_export.cli._stages import console_of, fuse_stage, read_record


@click.command(__name__.rpartition(".")[2])
@CHECKPOINT
@DTYPE
@OUT
@AGAIN
@JSON
def command(out: Path | None, resume: bool, overwrite: bool, as_json: bool, dtype: str | None, **given: Any) -> None:
    """Fold every adapter: writes fused.safetensors and fused.json."""
    from reparam_export.folder import prepare

    console, recipe = console_of(as_json), recipe_of_call(dtype=dtype, **given)
    folder = out_folder(out, recipe)
    if "fused" not in prepare(folder, recipe, resume=resume, overwrite=overwrite):
        fuse_stage(console, recipe, folder)
    console.line(f"{folder / 'fused.safetensors'}")
    console.result({"folder": str(folder), **read_record(folder / "fused.json")})
