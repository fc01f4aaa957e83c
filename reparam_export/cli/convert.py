"""``reparam-export convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from reparam_export.cli._latency import BENCH, bench_stage, gate, seconds
from reparam_export.cli._options import (
    AGAIN,
    CHECKPOINT,
    DTYPE,
    EXPECTED,
    EXPORT,
    JSON,
    OUT,
    SAMPLES,
    WITNESS,
    out_folder,
    recipe_of_call,
)
from reparam_export.cli._stages import (
    check_export,
    console_of,
    export_stage,
    fuse_stage,
    proven,
    report_stage,
    verify_stage,
)


@click.command(__name__.rpartition(".")[2])
@CHECKPOINT
@DTYPE
@SAMPLES
@WITNESS
@EXPECTED
@EXPORT
@BENCH
@OUT
@AGAIN
@JSON
def command(
    out: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    dtype: str | None,
    inputs: Path | None,
    count: int,
    seed: int,
    witness: str,
    expected: Path | None,
    bench: bool,
    max_time: str,
    **given: Any,
) -> None:
    """Fuse, verify, export and report in one go; with --bench, measure too."""
    from reparam_export.folder import prepare, same_samples, witnessed
    from reparam_export.latency.rounds import Settings
    from reparam_export.verification import check_given

    console, settings = console_of(as_json), Settings(max_time=seconds(max_time))
    options = {name: given.pop(name) for name in ("targets", "precision", "opset", "batch", "gpu")}
    builder = check_export(options)
    if builder:
        console.line(f"engine: {builder}")
    recipe = recipe_of_call(dtype=dtype, **given)
    folder = out_folder(out, recipe)
    done = prepare(folder, recipe, resume=resume, overwrite=overwrite)
    if "fused" not in done:
        fuse_stage(
            console,
            recipe,
            folder,
            resume="begun" in done,
            witness=witness,
            verifying=True,
            targets=options["targets"],
            check=lambda checkpoint: check_given(checkpoint, inputs, expected),
        )
    try:
        known = "proof" in done and same_samples(folder, inputs, count, seed) and witnessed(folder, witness, expected)
        code = recipe.base
        model = (
            proven(folder, code)
            if known
            else verify_stage(console, folder, inputs, count, seed, witness, expected, code)
        )
        artifacts = export_stage(console, model, folder, **options)
        found = bench_stage(console, folder, options["precision"], settings, base=code) if bench else None
    finally:
        if (folder / "fused.json").is_file():
            written = report_stage(console, folder)
    console.result(
        {
            "folder": str(folder),
            "verdict": written.verdict,
            "latency": written.latency,
            "report": str(written.html),
            "artifacts": artifacts,
            "measurement": found,
        }
    )
    if found is not None:
        gate(found)
