"""The second witness as the commands speak of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam_export.console import Console
    from reparam_export.verification.certificate import WitnessEvidence


def witness_lines(console: Console, heard: Sequence[WitnessEvidence]) -> None:
    """Who read the checkpoint a second time; never silent where nobody did."""
    from reparam_export.report.witness import agreed

    for each in heard:
        console.line(f"witness: {agreed(each)}" if each.who else f"no second witness: {each.absent}")
        for note in each.notes:
            console.line(f"note: {note}")
