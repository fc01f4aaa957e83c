"""Fold adapters into base weights, prove it, export it.

import reparam_export as rx

checkpoint = rx.read("ckpt.pt")
weights = rx.fuse(checkpoint)
model = rx.verify(checkpoint, weights)
artifact = rx.export(model, "onnx", "out")
report = rx.write_report("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reparam_export.checkpoints import Adapter as Adapter
    from reparam_export.checkpoints import Checkpoint as Checkpoint
    from reparam_export.checkpoints import read as read
    from reparam_export.checkpoints._stack import stacked as stacked
    from reparam_export.comparison import Comparison as Comparison
    from reparam_export.comparison import compare as compare
    from reparam_export.exporters import export as export
    from reparam_export.exporters.artifact import Artifact as Artifact
    from reparam_export.fusion import FusedWeights as FusedWeights
    from reparam_export.fusion import fuse as fuse
    from reparam_export.latency import bench as bench
    from reparam_export.latency.measurement import Measurement as Measurement
    from reparam_export.modules import fuse_module as fuse_module
    from reparam_export.report import Report as Report
    from reparam_export.report import write_report as write_report
    from reparam_export.streaming import plan_of as plan_of
    from reparam_export.streaming import stream as stream
    from reparam_export.verification import VerifiedModel as VerifiedModel
    from reparam_export.verification import verify as verify

_HOME = {
    "Adapter": "checkpoints",
    "Checkpoint": "checkpoints",
    "read": "checkpoints",
    "stacked": "checkpoints._stack",
    "FusedWeights": "fusion",
    "fuse": "fusion",
    "fuse_module": "modules",
    "plan_of": "streaming",
    "stream": "streaming",
    "VerifiedModel": "verification",
    "verify": "verification",
    "Artifact": "exporters.artifact",
    "export": "exporters",
    "Comparison": "comparison",
    "compare": "comparison",
    "Measurement": "latency.measurement",
    "bench": "latency",
    "Report": "report",
    "write_report": "report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reparam_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reparam_export.{_HOME[name]}"), name)
