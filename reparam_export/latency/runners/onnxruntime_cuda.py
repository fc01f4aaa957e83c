"""onnxruntime's CUDA provider: inputs and outputs stay on the GPU, time is that between two CUDA events on its stream.

Written against the documented API; it has not been executed, for want of a GPU.
"""

from __future__ import annotations

from typing import Any

from reparam_export.latency.runners import Inputs, Job, Place, Prepare, Run
from reparam_export.latency.runners._cuda import no_gpu, timed

TITLE = "onnxruntime, CUDA"
TAKES = "onnx"


def missing() -> str:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider; install onnxruntime-gpu"
    return no_gpu()


def load(job: Job) -> Place:
    import onnxruntime as ort
    import torch

    ort.set_default_logger_severity(4)

    def place(model: str) -> Prepare:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        own = {"user_compute_stream": str(stream.cuda_stream), "use_tf32": "0"}
        providers = [("CUDAExecutionProvider", own), "CPUExecutionProvider"]
        session: Any = ort.InferenceSession(job.files[model], providers=providers)

        def prepare(inputs: Inputs) -> Run:
            binding = session.io_binding()
            held = {name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in inputs.items()}
            for name, value in held.items():
                binding.bind_ortvalue_input(name, value)
            for output in session.get_outputs():
                binding.bind_output(output.name, "cuda")
            return timed(lambda: session.run_with_iobinding(binding), stream)

        return prepare

    return place
