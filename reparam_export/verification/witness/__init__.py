"""The second witness: the adapter as somebody else's code reads it, held against our own reading.

The proof of the weights is relative to our reading of the file: a scale misread is misread by ``apply`` and by ``fuse`` alike. So the
library that wrote the file reads it once more, and both readings must agree. One library, one file; a witness is a module with

    LOOKS_AT                        the formats that it knows, in words
    accepts(checkpoint) -> bool     is it of those?
    testify(subject) -> evidence    raises MissingBackendError without its library, UnableError where it cannot read the file
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from reparam_export import plugins
from reparam_export.checkpoints import Checkpoint
from reparam_export.errors import EquivalenceError, MissingBackendError, UsageError
from reparam_export.files import sha256
from reparam_export.verification.certificate import WitnessEvidence

if TYPE_CHECKING:
    import torch
    from torch import nn

    from reparam_export.models import Signature
    from reparam_export.verification.outputs import Reference

LIMIT = 1 << 28  # entries of the layers that are compared in numbers; beyond it a seeded choice of them is
MODES = ("auto", "required", "none")
OTHERS = "--expected FILE.npz or --witness py:FILE.py:FUNCTION bears witness"


class UnableError(Exception):
    """The witness cannot read this file, or not on this base; its text says why, in one line."""


@dataclass(frozen=True)
class Subject:
    """What a witness is shown. The base's numbers may be on torch's meta device; ``layer`` brings those of one module.

    checkpoint: with its adapters bound to the base. fresh: the base as it is without the checkpoint, built anew; on a skeleton, zeros stand
    for weights. layer: one module of the base with the whole tensors of the checkpoint in place, our side. reference: what our unfused
    model answers, where there is one. unfused: our unfused model in one dtype.
    """

    checkpoint: Checkpoint
    fresh: Callable[[], nn.Module]
    layer: Callable[[str], nn.Module]
    signature: Signature | None = None
    reference: Reference | None = None
    unfused: Callable[[torch.dtype], nn.Module] | None = None
    seed: int = 0
    limit: int = LIMIT
    numbers: frozenset[str] | None = None  # the modules whose numbers are to be had, on a skeleton; None: those of all


class Witness(Protocol):
    """What ``plugins.load("verification.witness", name)`` returns."""

    LOOKS_AT: str

    def accepts(self, checkpoint: Checkpoint) -> bool: ...
    def testify(self, subject: Subject) -> WitnessEvidence: ...


def hear(subject: Subject, wanted: str = "auto", expected: str | Path | None = None) -> tuple[WitnessEvidence, ...]:
    """What the witnesses say; one entry that says why where there is none.

    wanted: "auto", "required" (raises EquivalenceError where there is none), "none" or "py:FILE.py:FUNCTION". expected: an .npz file of
    inputs and answers.
    """
    check_mode(wanted)
    own = _own_code(subject, wanted, expected)
    if wanted == "none":
        return own or (WitnessEvidence(absent="none was wanted (--witness none)"),)
    library = _library(subject)
    heard = (library, *own) if library.who or not own else own
    if wanted == "required":
        check_present(subject.checkpoint, heard)
    return heard


def check_present(checkpoint: Checkpoint, heard: Sequence[WitnessEvidence]) -> None:
    """Raises EquivalenceError where there is no witness."""
    if not any(each.who for each in heard):
        raise EquivalenceError(f"{checkpoint.path}: no second witness, and one is required: {heard[0].absent}")


def check_heard(checkpoint: Checkpoint, heard: Sequence[WitnessEvidence], wanted: str) -> None:
    """Raises EquivalenceError where a witness differs, or is required and absent."""
    if wanted == "required":
        check_present(checkpoint, heard)
    found = [text for each in heard for text in each.differences]
    if found:
        raise EquivalenceError(
            f"{checkpoint.path}: the second witness reads the checkpoint in another way in {len(found)} places: {'; '.join(found[:3])}; "
            "nothing was written",
            layer=found[0].partition(":")[0],
        )


def known(checkpoint: Checkpoint) -> bool:
    """Is there a library that is known to read such a checkpoint?"""
    return any(each.accepts(checkpoint) for each in _libraries())


def _libraries() -> list[Witness]:
    names = plugins.names("verification.witness")
    return [cast(Witness, plugins.load("verification.witness", name)) for name in names]


def check_mode(wanted: str) -> None:
    """Raises UsageError for a word that is none of MODES, and names no code."""
    if wanted not in MODES and not wanted.startswith("py:"):
        raise UsageError(f"--witness {wanted!r}: expected {', '.join(MODES)} or py:FILE.py:FUNCTION")


def _own_code(subject: Subject, wanted: str, expected: str | Path | None) -> tuple[WitnessEvidence, ...]:
    """What the user's own training code says: the model that it makes, the answers that it gave."""
    from reparam_export.verification.witness import _code

    heard = []
    if wanted.startswith("py:"):
        heard.append(_code.model_of_code(subject, wanted))
    if expected is not None:
        path = Path(expected)
        assert subject.signature is not None
        answers = _code.read_answers(path, subject.signature)
        heard.append(_code.expected_answers(subject, answers, path.name, f"sha256 {sha256(path)[:12]}"))
    recorded = _code.answers_of_checkpoint(subject.checkpoint.expected) if subject.unfused else None
    if recorded is not None and wanted != "none":
        heard.append(_code.expected_answers(subject, recorded, "the answers in the checkpoint", ""))
    return tuple(heard)


def _library(subject: Subject) -> WitnessEvidence:
    """The library that wrote the file."""
    for witness in _libraries():
        if witness.accepts(subject.checkpoint):
            try:
                return witness.testify(subject)
            except (MissingBackendError, UnableError) as reason:
                return WitnessEvidence(absent=str(reason))
    return WitnessEvidence(absent=f"{_why_none(subject.checkpoint)}; {OTHERS}")


def _why_none(checkpoint: Checkpoint) -> str:
    """Why no library reads this checkpoint again, in words."""
    parts = checkpoint.members or (checkpoint,)
    alone = [replace(part, members=(), recipe=replace(part.recipe, weight=1.0, others=())) for part in parts]
    if all(known(part) for part in alone):
        return "a stack or a weight is read again for peft's folders alone, and these are others"
    formats = ", ".join(dict.fromkeys(part.format for part in alone if not known(part)))
    return f"{formats} checkpoints are read by no library that is known here (known: {'; '.join(w.LOOKS_AT for w in _libraries())})"
