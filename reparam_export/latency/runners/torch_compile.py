"""The torch module under ``torch.compile``, one program for every model and batch size; else as ``torch_eager``."""

from __future__ import annotations

import os
import shutil
from typing import Any

from reparam_export.latency.runners import Job, Place, torch_eager
from reparam_export.latency.runners._cuda import no_gpu

TITLE = "torch, compiled"
TAKES = "torch"


def missing() -> str:
    compiler = os.environ.get("CXX", "g++")
    if no_gpu() and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler} here"
    return ""


def load(job: Job) -> Place:
    return torch_eager.load(job, _compiled)


def _compiled(name: str, call: Any) -> torch_eager.Call:
    """A code object of its own: dynamo looks up what it compiled by code object, and the search must not cost one model more."""
    import torch

    call.__code__ = call.__code__.replace(co_name=f"run_{name}".replace(" ", "_"))
    made: torch_eager.Call = torch.compile(call, dynamic=False)
    return made
