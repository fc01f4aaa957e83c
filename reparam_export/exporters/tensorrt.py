"""TensorRT: build an engine from an ONNX file, and run it where there is a GPU.

With the full ``tensorrt`` and a GPU the engine is built natively, for that GPU. Otherwise ``tensorrt_rtx`` builds ahead
of time, on any machine, one plan for the GPUs named by compute capability. The network is strongly typed: the precision
of every layer is the ONNX file's, no flag changes it, and TF32 is off.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reparam_export.errors import ExportError, MissingBackendError, UsageError
from reparam_export.exporters._files import placed

if TYPE_CHECKING:
    import numpy as np

GPUS = ("sm80", "sm86", "sm89", "sm120")  # sm75 refuses fp32 matrix products
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
WANTED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def write(
    onnx_path: Path,
    path: Path,
    *,
    log: Path,
    precision: str = "fp32",
    gpus: Sequence[str] | None = None,
    batch: tuple[int, int, int] = (1, 8, 64),
    axes: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Build ``onnx_path`` into the plan ``path`` and return how: builder, GPUs, profile, seconds, size, layer types.

    ``gpus`` are compute capabilities such as ``"sm89"``; ``None`` means the GPU of this machine when the full
    ``tensorrt`` is installed and there is one, else ``GPUS``. ``batch`` is (smallest, usual, largest); ``axes`` gives
    (usual, largest) for every other dynamic axis, by its name. All messages of parser and builder go to ``log``.
    Raises UsageError for an unknown GPU or a missing axis, MissingBackendError when no builder is installed, ExportError
    with the builder's own words when it refuses, and when ``precision`` is not what the matrix products compute in.
    """
    trt, native = backend(gpus)
    names = () if native else tuple(gpus or GPUS)
    capabilities = _capabilities(trt, names)
    started = time.perf_counter()
    with _logger(trt, log) as logger:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_path.resolve())):
            raise ExportError(f"{trt.__name__} cannot parse {onnx_path.name}: {_errors(parser)}; all messages are in {log}")
        types = _types(trt, network)
        _require(types["products"], precision, onnx_path.name)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        profile = _profile(builder, network, config, batch, axes or {})
        if names:
            config.num_compute_capabilities = len(capabilities)
            for number, capability in enumerate(capabilities):
                config.set_compute_capability(capability, number)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ExportError(f"{trt.__name__} cannot build {onnx_path.name} for {names or 'this GPU'}: {logger.said()}; all messages are in {log}")
    with placed(path) as folder:
        (folder / path.name).write_bytes(memoryview(plan))
    return {
        "builder": trt.__name__,
        "version": trt.__version__,
        "gpus": list(names) or [_this_gpu()],
        "profile": profile,
        "tf32": False,
        "seconds": round(time.perf_counter() - started, 3),
        "size": path.stat().st_size,
        "precisions": types["outputs"],
        "products": types["products"],
    }


def backend(gpus: Sequence[str] | None = None) -> tuple[ModuleType, bool]:
    """The builder and whether it builds natively. Raises MissingBackendError when none is installed."""
    import torch

    wanted = [("tensorrt", True)] if gpus is None and torch.cuda.is_available() else []
    for name, native in (*wanted, ("tensorrt_rtx", False)):
        try:
            return importlib.import_module(name), native
        except ModuleNotFoundError as error:
            if error.name != name:
                raise MissingBackendError(f"{name} is installed but broken: {error}", package=name, extra="trt") from error
    raise MissingBackendError(
        "no TensorRT builder is installed; install the extra 'trt' (tensorrt-rtx, builds on any machine), "
        "or 'tensorrt' on a machine with a GPU",
        package="tensorrt-rtx",
        extra="trt",
    )


def available(trt: ModuleType) -> dict[str, Any]:
    """The GPUs a builder can build for ahead of time, by name."""
    members = getattr(trt, "ComputeCapability", None)
    found = {} if members is None else dict(members.__members__)
    return {name.lower(): value for name, value in found.items() if name not in ("NONE", "CURRENT")}


def _capabilities(trt: ModuleType, names: Sequence[str]) -> list[Any]:
    known = available(trt)
    for name in names:
        if name.lower() not in known:
            full = name.lower() in ("sm90", "sm100", "sm103")
            hint = "; build on that GPU with the full 'tensorrt' and without naming a GPU" if full else ""
            raise UsageError(f"{trt.__name__} {trt.__version__} cannot build for {name!r}; there are: {', '.join(sorted(known, key=_number))}{hint}")
    return [known[name.lower()] for name in names]


def _number(name: str) -> int:
    return int("".join(c for c in name if c.isdigit()) or 0)


@contextmanager
def _logger(trt: ModuleType, log: Path) -> Iterator[Any]:
    """A TensorRT logger that writes to ``log``, appending, and remembers the errors."""

    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self, file: Any) -> None:
            trt.ILogger.__init__(self)
            self.file = file
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.file.write(f"{severity.name}: {message}\n")
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def said(self) -> str:
            return " | ".join(self.errors) or "it gave no reason"

    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write the log {log}: {error}") from error
    with file:
        yield Logger(file)


def _errors(parser: Any) -> str:
    found = [parser.get_error(number) for number in range(parser.num_errors)]
    return " | ".join(f"{e.desc()} (node {e.node_name()!r}, {e.node_operator()})" for e in found) or "it gave no reason"


def _profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int], axes: Mapping[str, tuple[int, int]]) -> dict[str, list[list[int]]]:
    """One optimisation profile over every dynamic axis; returns input -> [min, opt, max] shapes."""
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise UsageError(f"the batch profile must be smallest <= usual <= largest, all at least 1; it is {batch}")
    profile = builder.create_optimization_profile()
    shapes: dict[str, list[list[int]]] = {}
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        sizes = [_sizes(tensor, axis, size, batch, axes) for axis, size in enumerate(tensor.shape)]
        shapes[tensor.name] = [[size[which] for size in sizes] for which in range(3)]
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *map(tuple, shapes[tensor.name]))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"the optimisation profile {shapes} is refused")
    return shapes


def _sizes(tensor: Any, axis: int, size: int, batch: tuple[int, int, int], axes: Mapping[str, tuple[int, int]]) -> tuple[int, int, int]:
    if size != -1:
        return size, size, size
    name = tensor.get_dimension_name(axis)
    if axis == 0:
        return batch
    if name not in axes:
        raise UsageError(f"axis {axis} ({name!r}) of input {tensor.name!r} is dynamic; give its (usual, largest) size; given: {sorted(axes)}")
    return 1, axes[name][0], axes[name][1]


def _types(trt: ModuleType, network: Any) -> dict[str, dict[str, int]]:
    """Number of layer outputs by dtype: of all layers, and of matrix products and convolutions."""
    kinds = {getattr(trt.LayerType, n) for n in ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM")}
    found: dict[str, dict[str, int]] = {"outputs": {}, "products": {}}
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        for which in range(layer.num_outputs):
            name = DTYPES.get(layer.get_output(which).dtype.name, layer.get_output(which).dtype.name.lower())
            for group in ("outputs", "products") if layer.type in kinds else ("outputs",):
                found[group][name] = found[group].get(name, 0) + 1
    return found


def _require(products: Mapping[str, int], precision: str, name: str) -> None:
    if precision not in WANTED:
        raise UsageError(f"unknown precision {precision!r}; there are: {', '.join(WANTED)}")
    if products and WANTED[precision] not in products:
        raise ExportError(f"{name}: {precision} was asked for, but the network's matrix products are {dict(products)}; lower the ONNX file first")


def _this_gpu() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


class Runner:
    """An engine on this machine's GPU, as a context manager: ``with Runner(path) as run: run.run({"input": array})``.

    Raises MissingBackendError without a GPU or without the runtime that built the plan, ExportError when the plan is not
    for this GPU or a shape is outside its profile.
    """

    def __init__(self, path: Path, *, log: Path, builder: str = "tensorrt_rtx") -> None:
        self.path = path
        self.log = log
        self.builder = builder

    def __enter__(self) -> Runner:
        import torch

        if not torch.cuda.is_available():
            raise MissingBackendError(f"{self.path.name} needs a GPU to run and there is none here", package="cuda", extra="trt")
        try:
            self._trt = importlib.import_module(self.builder)
        except ModuleNotFoundError as error:
            raise MissingBackendError(f"{self.builder} is not installed", package=self.builder, extra="trt") from error
        self._open = _logger(self._trt, self.log)
        self._logger = self._open.__enter__()
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        self._context = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            said = self._logger.said()
            self.__exit__()
            raise ExportError(f"{self.path.name} cannot be loaded on {_this_gpu()}: {said}; all messages are in {self.log}")
        self._stream = torch.cuda.Stream()
        return self

    def __exit__(self, *_: object) -> None:
        self._context = self._engine = self._runtime = None  # in this order: each lives on the next
        self._open.__exit__(None, None, None)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Every output by name, bf16 outputs as float32. Inputs are copied to the GPU, outputs back."""
        import numpy as np
        import torch

        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in inputs.items()}
        return {name: (t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy() for name, t in self.run_on_gpu(tensors).items()}

    def run_on_gpu(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """CUDA tensors in, CUDA tensors out, nothing copied: what latency is measured on."""
        import torch

        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        given = [n for n in names if self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.INPUT]
        if sorted(given) != sorted(inputs):
            raise ExportError(f"{self.path.name} has the inputs {given}, given were {sorted(inputs)}")
        held: dict[str, Any] = {}
        for name in given:
            held[name] = inputs[name].to(self._dtype(name)).contiguous()
            if not self._context.set_input_shape(name, tuple(held[name].shape)):
                raise ExportError(f"{self.path.name}: shape {tuple(held[name].shape)} of {name!r} is outside the profile: {self._logger.said()}")
        missing = self._context.infer_shapes()
        if missing:
            raise ExportError(f"{self.path.name}: the shapes of {missing} are unknown")
        for name in names:
            if name not in held:
                held[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda")
            self._context.set_tensor_address(name, held[name].data_ptr())
        self._stream.wait_stream(torch.cuda.current_stream())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ExportError(f"{self.path.name} failed to run: {self._logger.said()}; all messages are in {self.log}")
        self._stream.synchronize()
        return {name: tensor for name, tensor in held.items() if name not in given}

    def _dtype(self, name: str) -> Any:
        import torch

        kinds = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool", "INT8": "int8", "UINT8": "uint8"}
        return getattr(torch, kinds[self._engine.get_tensor_dtype(name).name])
