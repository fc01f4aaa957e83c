"""The measurement of ``latency.json``, held against what the folder has and what is proven of it now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_export.latency.measurement import Measurement

if TYPE_CHECKING:
    from reparam_export.report.evidence import Exported

NO_PROGRAM = "safetensors"  # the only target that holds weights alone: there is nothing in it to time


@dataclass(frozen=True)
class Measured:
    """The latency as it was written down. ``stale``: why it says nothing about what is in the folder now, "" when it does.

    ``timed``: which file the times are of, in words.
    """

    measurement: Measurement
    stale: str
    timed: str


def measured(
    found: Measurement, folder: Path, weights_sha256: str, unproven: str, exported: Sequence[Exported]
) -> Measured:
    """unproven: why the weights of this folder are not proven now, "" when they are. exported: all that ``artifact.json`` lists."""
    if found.weights_sha256 != weights_sha256:
        stale = "it was measured with other weights"
    elif unproven:
        stale = f"what was timed is not proven any more: {unproven}"
    else:
        stale = _of_other_files(found, exported)
    return Measured(found, stale, _timed(found, folder, exported))


def _of_other_files(found: Measurement, exported: Sequence[Exported]) -> str:
    """Why the times are not of the exported files; without a program among them there is none to be taken for."""
    programs = [e for e in exported if e.artifact.target != NO_PROGRAM and not e.artifact.failure]
    if not found.artifact_sha256 and programs:
        first = programs[0].artifact
        return (
            f"the exported {first.path} ({first.precision}) was not timed, but a file that was written for the "
            f"measurement{f', in {found.precision}' if found.precision else ''}"
        )
    timed, engine = _entry("onnx", found.artifact_sha256, exported), _entry("trt", found.engine_sha256, exported)
    if found.artifact_sha256 and timed is None:
        return "it was measured with another export"
    if found.structure and found.structure.engines and engine is None:
        return "it was measured with another engine"
    for each in (timed, engine):
        if each is not None and not each.passed:
            return f"what was timed is not proven any more: {each.artifact.path} {each.stale or 'did not pass its own proof'}"
    return ""


def _timed(found: Measurement, folder: Path, exported: Sequence[Exported]) -> str:
    """A file that was taken away is still the one of that digest, as for its proof; the reader is told where it is not."""
    if not found.artifact_sha256:
        precision = f" in {found.precision}" if found.precision else ""
        return f"a file that was written{precision} for the measurement, not an exported one"
    timed = _entry("onnx", found.artifact_sha256, exported)
    digest = f"sha256 {found.artifact_sha256[:12]}"
    if timed is None:
        return f"an exported file of {digest}"
    gone = "" if (folder / timed.artifact.path).exists() else ", which is not in this folder any more"
    return f"{timed.artifact.path} ({timed.artifact.precision}, {digest}){gone}"


def _entry(target: str, sha256: str, exported: Sequence[Exported]) -> Exported | None:
    """The entry of the exported file that was timed; None for a digest that none has, or none at all."""
    same = (e for e in exported if e.artifact.target == target and e.artifact.sha256 == sha256)
    return next(same, None) if sha256 else None
