"""What a model can be timed on: one runner, one file. A runner is a module with

TITLE            for readers
TAKES            "onnx" files, "torch" modules or an "engine"
missing()        why it cannot run here, "" when it can
load(job)        in the timing process, once: returns place
place(model)     once a model, in memory of its own: returns prepare
prepare(inputs)  once a batch size: returns run
run()            runs the model once and returns nanoseconds
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from reparam_export import plugins

if TYPE_CHECKING:
    import numpy as np

Inputs = Mapping[str, "np.ndarray[Any, Any]"]
Run = Callable[[], int]
Prepare = Callable[[Inputs], Run]
Place = Callable[[str], Prepare]


@dataclass(frozen=True)
class Job:
    """What a timing process is told once. ``modules``: (output folder, "base", "adapted" or "fused") by model."""

    runner: str
    inputs: str  # .npz, one array per input
    files: dict[str, str]  # ONNX files or engines by model
    modules: dict[str, tuple[str, str]]
    dtype: str = "float32"  # of torch modules
    threads: int = 1
    builder: str | None = None  # the package that built the engines
    code: str | None = None  # the ``py:`` base of the modules


class Runner(Protocol):
    """What ``plugins.load("latency.runners", name)`` returns; see above."""

    TITLE: str
    TAKES: str

    def missing(self) -> str: ...

    def load(self, job: Job) -> Place: ...


def runner(name: str) -> Runner:
    """The runner of that name. Raises UsageError that lists what there is."""
    return cast(Runner, plugins.load("latency.runners", name))


def names() -> tuple[str, ...]:
    return plugins.names("latency.runners")
