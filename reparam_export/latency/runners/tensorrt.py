"""TensorRT engines on this machine's GPU: a new context in every round, time is that between two CUDA events.

An engine is the choice of a builder that times its kernels, so two engines of one ONNX file can differ. The control is
therefore a second build of the base, not the same engine twice. Written against TensorRT's documented API; it has not been
executed, for want of a GPU.
"""

from __future__ import annotations

from pathlib import Path

from reparam_export.latency.runners import Inputs, Job, Place, Prepare, Run
from reparam_export.latency.runners._cuda import no_gpu, timed

TITLE = "TensorRT"
TAKES = "engine"


def missing() -> str:
    from reparam_export.errors import MissingBackendError
    from reparam_export.exporters.tensorrt import backend

    if no_gpu():
        return f"{no_gpu()}: engines are built ahead of time and audited, not run"
    try:
        backend()
    except MissingBackendError as error:
        return str(error)
    return ""


def load(job: Job) -> Place:
    import torch

    from reparam_export.exporters.tensorrt import Runner

    def place(model: str) -> Prepare:
        engine = Runner(Path(job.files[model]), builder=job.builder).__enter__()  # until the process ends

        def prepare(inputs: Inputs) -> Run:
            engine.bind({name: torch.from_numpy(array).cuda() for name, array in inputs.items()})
            engine.stream.wait_stream(torch.cuda.current_stream())
            return timed(engine.launch, engine.stream)

        return prepare

    return place
