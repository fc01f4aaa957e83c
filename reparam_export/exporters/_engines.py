"""The TensorRT packages: which one is used here, its messages, and running a plan with it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reparam_export.errors import ExportError, MissingBackendError

if TYPE_CHECKING:
    import numpy as np


def backend(gpus: Sequence[str] | None = None) -> tuple[ModuleType, bool]:
    """The builder and whether it builds natively. Raises MissingBackendError when none is installed."""
    import torch

    wanted = [("tensorrt", True)] if gpus is None and torch.cuda.is_available() else []
    for name, native in (*wanted, ("tensorrt_rtx", False)):
        try:
            return importlib.import_module(name), native
        except ModuleNotFoundError as error:
            if error.name != name:
                raise MissingBackendError(
                    f"{name} is installed but broken: {error}", package=name, extra="trt"
                ) from error
    raise MissingBackendError(
        "no TensorRT builder is installed; install the extra 'trt' (tensorrt-rtx, builds on any machine), "
        "or 'tensorrt' on a machine with a GPU",
        package="tensorrt-rtx",
        extra="trt",
    )


@contextmanager
def messages(trt: ModuleType, log: Path | None) -> Iterator[Any]:
    """A TensorRT logger that appends to ``log``, if there is one, and remembers the errors."""

    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self, file: Any) -> None:
            trt.ILogger.__init__(self)
            self.file = file
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if self.file is not None:
                self.file.write(f"{severity.name}: {message}\n")
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def said(self) -> str:
            return " | ".join(self.errors) or "it gave no reason"

    if log is None:
        yield Logger(None)
        return
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write the log {log}: {error}") from error
    with file:
        yield Logger(file)


def this_gpu() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _runtime(name: str | None) -> ModuleType:
    if name is None:
        return backend()[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingBackendError(
            f"{name}, which built the plan, is not installed", package=name, extra="trt"
        ) from error


class Runner:
    """An engine on this machine's GPU, as a context manager: ``with Runner(path) as run: run.run({"input": array})``.

    Raises MissingBackendError without a GPU or without the runtime that built the plan, ExportError when the plan is
    not for this GPU or a shape is outside its profile.
    """

    def __init__(self, path: Path, *, log: Path | None = None, builder: str | None = None) -> None:
        """``builder`` is the package that built the plan, as ``write`` returned it; ``None``: what it uses here."""
        self.path = path
        self.log = log
        self.builder = builder

    def __enter__(self) -> Runner:
        import torch

        if not torch.cuda.is_available():
            raise MissingBackendError(
                f"{self.path.name} needs a GPU to run and there is none here", package="cuda", extra="trt"
            )
        self._trt = _runtime(self.builder)
        self._open = messages(self._trt, self.log)
        self._logger = self._open.__enter__()
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        self._context: Any = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            said = self._logger.said()
            self.__exit__()
            raise ExportError(f"{self.path.name} cannot be loaded on {this_gpu()}: {said}")
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        self._context = self._engine = self._runtime = None  # in this order: each lives on the next
        self._open.__exit__(None, None, None)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Every output by name, bf16 outputs as float32. Inputs are copied to the GPU, outputs back."""
        import numpy as np
        import torch

        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in inputs.items()}
        return {
            name: (t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy()
            for name, t in self.run_on_gpu(tensors).items()
        }

    def run_on_gpu(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """CUDA tensors in, CUDA tensors out, nothing copied."""
        import torch

        results = self.bind(inputs)
        self.stream.wait_stream(torch.cuda.current_stream())
        self.launch()
        self.stream.synchronize()
        return results

    def bind(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Set CUDA tensors as inputs of the launches to come; returns the tensors that will hold the outputs."""
        import torch

        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        given = [n for n in names if self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.INPUT]
        if sorted(given) != sorted(inputs):
            raise ExportError(f"{self.path.name} has the inputs {given}, given were {sorted(inputs)}")
        held: dict[str, Any] = {}
        for name in given:
            held[name] = inputs[name].to(self._dtype(name)).contiguous()
            if not self._context.set_input_shape(name, tuple(held[name].shape)):
                said = self._logger.said()
                raise ExportError(
                    f"{self.path.name}: shape {tuple(held[name].shape)} of {name!r} is outside the profile: {said}"
                )
        missing = self._context.infer_shapes()
        if missing:
            raise ExportError(f"{self.path.name}: the shapes of {missing} are unknown")
        for name in names:
            if name not in held:
                held[name] = torch.empty(
                    tuple(self._context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda"
                )
            self._context.set_tensor_address(name, held[name].data_ptr())
        self._bound = held
        return {name: tensor for name, tensor in held.items() if name not in given}

    def launch(self) -> None:
        """Put one run on the stream: what latency is measured on."""
        if not self._context.execute_async_v3(self.stream.cuda_stream):
            raise ExportError(f"{self.path.name} failed to run: {self._logger.said()}")

    def layers(self) -> list[Any]:
        """What the engine's inspector says of every layer, as parsed JSON."""
        import json

        inspector = self._engine.create_engine_inspector()
        found = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return list(found.get("Layers", []))

    def _dtype(self, name: str) -> Any:
        import torch

        kinds = {
            "FLOAT": "float32",
            "HALF": "float16",
            "BF16": "bfloat16",
            "INT32": "int32",
            "INT64": "int64",
            "BOOL": "bool",
            "INT8": "int8",
            "UINT8": "uint8",
        }
        return getattr(torch, kinds[self._engine.get_tensor_dtype(name).name])
