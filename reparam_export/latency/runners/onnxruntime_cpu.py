"""onnxruntime's CPU provider: a session of each file."""

from __future__ import annotations

import time
from typing import Any

from reparam_export.latency.runners import Inputs, Job, Place, Prepare, Run

TITLE = "onnxruntime, CPU"
TAKES = "onnx"


def missing() -> str:
    return ""


def load(job: Job) -> Place:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)

    def place(model: str) -> Prepare:
        options = ort.SessionOptions()
        options.intra_op_num_threads = job.threads
        options.inter_op_num_threads = 1
        session: Any = ort.InferenceSession(job.files[model], options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]

        def prepare(inputs: Inputs) -> Run:
            given = dict(inputs)

            def run() -> int:
                started = time.perf_counter_ns()
                session.run(names, given)
                return time.perf_counter_ns() - started

            return run

        return prepare

    return place
