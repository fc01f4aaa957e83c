"""The torch module itself, in eager mode; on the GPU where there is one (replayed as a CUDA graph, timed by events).

Every model has its own copies of all its tensors. The part for a GPU is written against torch's documented API and has not
been executed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.latency.runners import Inputs, Job, Place, Prepare, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reparam_export.models import Signature

Call = Callable[..., tuple["Tensor", ...]]
TITLE = "torch, eager"
TAKES = "torch"


def missing() -> str:
    return ""


def load(job: Job, compiled: Callable[[str, Call], Call] = lambda model, call: call) -> Place:
    import torch

    from reparam_export.models import outputs_of_call

    torch.set_num_threads(job.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = _modules(job, device)

    def place(model: str) -> Prepare:
        module, signature = held[model]
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()

        def prepare(inputs: Inputs) -> Run:
            arrays = (torch.from_numpy(inputs[i.name]).to(device) for i in signature.inputs)
            tensors = [t.to(getattr(torch, job.dtype)) if t.is_floating_point() else t for t in arrays]
            call = compiled(f"{model}_{len(tensors[0])}", lambda *given: outputs_of_call(module, signature, given))
            return _replayed(call, tensors) if device == "cuda" else _timed(call, tensors)

        return prepare

    return place


def _modules(job: Job, device: str) -> dict[str, tuple[nn.Module, Signature]]:
    """Every model of the job with its signature; each folder is opened once."""
    import torch

    from reparam_export.assembly import base_of, settled
    from reparam_export.folder import load_fused
    from reparam_export.latency.contenders import module_of

    opened = {
        folder: load_fused(Path(folder), base=job.code) for folder in {folder for folder, _ in job.modules.values()}
    }
    signatures = {folder: base_of(settled(checkpoint)).build()[1] for folder, (checkpoint, _) in opened.items()}
    dtype = getattr(torch, job.dtype)
    return {
        model: (module_of(*opened[folder], which).to(device, dtype), signatures[folder])
        for model, (folder, which) in job.modules.items()
    }


def _timed(call: Call, tensors: list[Tensor]) -> Run:
    import torch

    def run() -> int:
        with torch.inference_mode():
            started = time.perf_counter_ns()
            call(*tensors)
            return time.perf_counter_ns() - started

    return run


def _replayed(call: Call, tensors: list[Tensor]) -> Run:
    import torch

    from reparam_export.latency.runners._cuda import timed

    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph: Any = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # lazily made handles and autotuning must not be captured
                call(*tensors)
        with torch.cuda.graph(graph, stream=stream):
            call(*tensors)

    def replay() -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return timed(replay, stream)
