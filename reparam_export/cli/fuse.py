"""``reparam-export fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from reparam_export.cli._options import AGAIN, CHECKPOINT, DTYPE, JSON, OUT, WITNESS, out_folder, recipe_of_call
from reparam_export.cli._stages import console_of, fuse_stage, read_record


@click.command(__name__.rpartition(".")[2])
@CHECKPOINT
@DTYPE
@WITNESS
@OUT
@AGAIN
@click.option("--dry-run", is_flag=True, help="Print the plan (shards, bytes, memory, time) and stop.")
@JSON
def command(
    out: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    dtype: str | None,
    witness: str,
    **given: Any,
) -> None:
    """Fold every adapter: writes fused.json and, for a Hugging Face base, the folder hf, else fused.safetensors."""
    from reparam_export.folder import prepare

    console, recipe = console_of(as_json), recipe_of_call(dtype=dtype, **given)
    folder = out_folder(out, recipe)
    if dry_run:
        fuse_stage(console, recipe, folder, dry_run=True)
        return
    done = prepare(folder, recipe, resume=resume, overwrite=overwrite)
    if "fused" not in done:
        fuse_stage(console, recipe, folder, resume="begun" in done, witness=witness)
    record = read_record(folder / "fused.json")
    console.line(f"{folder / record.get('weights', 'fused.safetensors')}")
    console.result({"folder": str(folder), **record})
