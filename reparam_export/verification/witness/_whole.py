"""A whole unfused model of somebody else's against our reference, once, on the same samples, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reparam_export.adapters.probed import exactly
from reparam_export.models import first_line
from reparam_export.verification.outputs import distance, run
from reparam_export.verification.witness import Subject

if TYPE_CHECKING:
    from torch import nn

OUTPUT_BOUND = 1e-6  # of the largest answer: float64 through a whole network loses far less, a misread setting far more


@dataclass(frozen=True)
class Whole:
    outputs: int = 0
    error: float = 0.0
    bound: float = OUTPUT_BOUND
    differences: tuple[str, ...] = ()


def whole_parted(model: nn.Module, subject: Subject, who: str) -> Whole:
    """The model's outputs on the reference's inputs; nothing where there is no reference, or no numbers."""
    import torch

    if subject.reference is None or subject.signature is None or any(p.is_meta for p in model.parameters()):
        return Whole()
    expected = subject.reference.outputs
    try:
        with exactly(torch.float64):
            found = run(model.double().eval(), subject.signature, subject.reference.inputs, torch.float64)
    except Exception as error:  # of a model of another library: many types, one meaning
        from reparam_export.verification.witness import UnableError

        raise UnableError(f"{who}: its model cannot be called: {first_line(error)}") from error
    worst, differences = 0.0, []
    for (name, ours), theirs in zip(expected.items(), found, strict=True):
        size = float(ours.abs().max()) if ours.numel() else 0.0
        gap = distance(theirs, ours)
        relative = gap / size if size > 0 else gap
        worst = max(worst, relative)
        if not relative <= OUTPUT_BOUND:
            differences.append(
                f"output {name}: the unfused model of {who} and ours differ by {gap:.3g}, the largest answer is {size:.3g} "
                f"(at most {OUTPUT_BOUND:g} of it is rounding)"
            )
    return Whole(len(expected), worst, OUTPUT_BOUND, tuple(differences))
