"""``reparam-export inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reparam_export.cli._options import CHECKPOINT, JSON, out_folder, recipe_of_call
from reparam_export.cli._stages import analyse_stage, console_of

if TYPE_CHECKING:
    from reparam_export.checkpoints import Recipe
    from reparam_export.console import Console


@click.command(__name__.rpartition(".")[2])
@CHECKPOINT
@click.option("--analyse", is_flag=True, help="What each branch does to the base's weights; needs the base.")
@click.option(
    "-o",
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="With --analyse: the output folder whose report gets the analysis; default: CHECKPOINT-fused, if it is there.",
)
@click.option(
    "--survival", is_flag=True, help="Read the base too: the share of every layer's change that each dtype would keep."
)
@JSON
def command(analyse: bool, out: Path | None, survival: bool, as_json: bool, **given: Any) -> None:
    """Say what a checkpoint holds, what is missing, and whether it can be folded."""
    from reparam_export.errors import UsageError
    from reparam_export.inspection import inspect_checkpoint, inspect_survival, show, show_survival

    if out is not None and not analyse:
        raise UsageError("-o goes with --analyse: a plain inspect writes nothing")
    console, recipe = console_of(as_json), recipe_of_call(**given)
    found = inspect_checkpoint(recipe)
    show(console, found)
    if survival:
        found["survival"] = inspect_survival(recipe)
        show_survival(console, found["survival"])
    if analyse:
        found["branches"] = _analysed(console, recipe, out)
    console.result(found)


def _analysed(console: Console, recipe: Recipe, out: Path | None) -> list[Any]:
    """The branches, also in the report of the checkpoint's output folder."""
    from reparam_export.folder import made_from

    folder = out or out_folder(None, recipe)
    known = made_from(folder, recipe, asked=out is not None)
    return analyse_stage(console, recipe, folder if known else None)
