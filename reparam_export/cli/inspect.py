"""``reparam-export inspect``."""

from __future__ import annotations

from typing import Any

import click

from reparam_export.cli._options import CHECKPOINT, JSON, recipe_of_call
from reparam_export.cli._stages import console_of


@click.command(__name__.rpartition(".")[2])
@CHECKPOINT
@click.option(
    "--survival", is_flag=True, help="Read the base too: the share of every layer's change that each dtype would keep."
)
@JSON
def command(as_json: bool, survival: bool, **given: Any) -> None:
    """Say what a checkpoint holds, what is missing, and whether it can be folded."""
    from reparam_export.inspection import inspect_checkpoint, inspect_survival, show, show_survival

    console, recipe = console_of(as_json), recipe_of_call(**given)
    found = inspect_checkpoint(recipe)
    show(console, found)
    if survival:
        found["survival"] = inspect_survival(recipe)
        show_survival(console, found["survival"])
    console.result(found)
