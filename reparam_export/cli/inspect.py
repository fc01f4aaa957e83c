"""``reparam-export inspect``."""

from __future__ import annotations

from typing import Any

import click

from reparam_export.cli._options import CHECKPOINT, JSON, recipe_of_call
from reparam_export.cli._stages import console_of


@click.command(__name__.rpartition(".")[2])
@CHECKPOINT
@JSON
def command(as_json: bool, **given: Any) -> None:
    """Say what a checkpoint holds, what is missing, and whether it can be folded."""
    from reparam_export.inspection import inspect_checkpoint, show

    console = console_of(as_json)
    found = inspect_checkpoint(recipe_of_call(**given))
    show(console, found)
    console.result(found)
