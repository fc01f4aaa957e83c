"""What an export leaves behind, as written to ``artifact.json`` (a list, one entry per file)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reparam_export.verification.certificate import OutputEvidence
from reparam_export.verification.engine import EngineAudit as EngineAudit


@dataclass(frozen=True)
class Artifact:
    """One exported file with the evidence that it is the verified model."""

    target: str  # "onnx", "trt", "safetensors", "genai"
    path: str  # relative to the output folder
    precision: str  # "fp32", "fp16", "bf16", or "as stored"
    size: int  # bytes, external data included
    sha256: str  # as files.exported_sha256
    weights_sha256: str  # of the verified weights it was made from
    ran: bool  # it was executed here against the reference; False: audited only
    note: str  # one line for the user: what was done, and what could not be
    outputs: tuple[OutputEvidence, ...] = ()
    failure: str = ""  # why the target that was asked for is not there
    audit: EngineAudit | None = None
    kept_fp32: tuple[tuple[str, str], ...] = ()  # (node or tensor, reason)
    details: dict[str, Any] = field(default_factory=dict)  # opset, nodes, capabilities, builder, profile, seconds ...


def failed(target: str, weights_sha256: str, reason: str) -> Artifact:
    """A target that was asked for and could not be had: it goes into ``artifact.json``, so that no report is green without it."""
    path = {"onnx": "model.onnx", "trt": "model.engine"}.get(target, target)
    return Artifact(target, path, "", 0, "", weights_sha256, ran=False, note="not written", failure=reason)
