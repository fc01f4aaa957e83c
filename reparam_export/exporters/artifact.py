"""What an export leaves behind, as written to ``artifact.json`` (a list, one entry per file)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reparam_export.verification.certificate import OutputEvidence


@dataclass(frozen=True)
class EngineAudit:
    """What stands inside a TensorRT plan, found without running it."""

    fused_tensors: int  # tensors that folding changed
    bitwise: tuple[str, ...]  # found bit for bit, contiguous, in the plan (as stored or transposed)
    relaid: tuple[str, ...]  # not found as such: the builder re-laid them out
    adapter_tensors_found: tuple[str, ...]  # must be empty
    precisions: dict[str, int]  # dtype -> number of layer outputs in the network the builder took


@dataclass(frozen=True)
class Artifact:
    """One exported file with the evidence that it is the verified model."""

    target: str  # "onnx", "trt", "safetensors"
    path: str  # relative to the output folder
    precision: str  # "fp32", "fp16", "bf16", or "as stored"
    size: int  # bytes, external data included
    sha256: str
    weights_sha256: str  # of the verified weights it was made from
    ran: bool  # it was executed here against the reference; False: audited only
    note: str  # one line for the user: what was done, and what could not be
    outputs: tuple[OutputEvidence, ...] = ()
    audit: EngineAudit | None = None
    kept_fp32: tuple[tuple[str, str], ...] = ()  # (node or tensor, reason)
    details: dict[str, Any] = field(default_factory=dict)  # opset, nodes, capabilities, builder, profile, seconds ...
