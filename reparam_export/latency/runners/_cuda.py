"""Time on a GPU, by CUDA events. Written against torch's documented API; not executed, for want of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from reparam_export.latency.runners import Run


def no_gpu() -> str:
    """Why nothing can run on a GPU here, "" when it can."""
    import torch

    return "" if torch.cuda.is_available() else "there is no GPU here"


def timed(call: Callable[[], object], stream: Any) -> Run:
    """Nanoseconds between an event before and one after what ``call`` puts on the stream."""
    import torch

    def run() -> int:
        before, after = (cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(2))
        before.record(stream)
        call()
        after.record(stream)
        after.synchronize()
        return int(before.elapsed_time(after) * 1e6)

    return run
