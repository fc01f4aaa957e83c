"""TensorRT: build an engine from an ONNX file, and run it where there is a GPU.

With the full ``tensorrt`` and a GPU the engine is built natively, for that GPU. Otherwise ``tensorrt_rtx`` builds ahead
of time, on any machine, one plan for the GPUs named by compute capability. The network is strongly typed: the precision
of every layer is the ONNX file's, no flag changes it, and TF32 is off.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from reparam_export.errors import ExportError, UsageError
from reparam_export.exporters._engines import Runner as Runner
from reparam_export.exporters._engines import backend as backend
from reparam_export.exporters._engines import messages, this_gpu
from reparam_export.exporters._files import placed
from reparam_export.fusion import DTYPES as PRECISIONS

GPUS = ("sm80", "sm86", "sm89", "sm120")  # sm75 refuses fp32 matrix products
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def write(
    onnx_path: Path,
    path: Path,
    *,
    log: Path,
    precision: str | None = None,
    gpus: Sequence[str] | None = None,
    batch: tuple[int, int, int] = (1, 8, 64),
    axes: Mapping[str, int | tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Build ``onnx_path`` into the plan ``path`` and return how: builder, GPUs, profile, seconds, size, layer types.

    ``gpus`` are compute capabilities such as ``"sm89"``; none means the GPU of this machine when the full ``tensorrt``
    is installed and there is one, else ``GPUS``. ``batch`` is (smallest, usual, largest); ``axes`` gives (usual,
    largest), or one number for both, for every other dynamic axis, by its name. ``precision`` ("fp32", "fp16", "bf16")
    is what the matrix products must compute in; ``None`` takes what the ONNX file's metadata say. All messages of
    parser and builder go to ``log``.
    Raises UsageError for an unknown GPU or a missing axis, MissingBackendError when no builder is installed,
    ExportError with the builder's own words when it refuses, and when the matrix products are not in ``precision``.
    """
    trt, native = backend(gpus or None)
    names = () if native else tuple(gpus or GPUS)
    capabilities = _capabilities(trt, names)
    started = time.perf_counter()
    with messages(trt, log) as logger:
        builder = trt.Builder(logger)
        network, _parser = _parsed(trt, builder, onnx_path, logger, log)
        types = _types(trt, network)
        _require(types["products"], precision or _stated(onnx_path), onnx_path.name)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        profile = _profile(builder, network, config, batch, axes or {})
        if names:
            config.num_compute_capabilities = len(capabilities)
            for number, capability in enumerate(capabilities):
                config.set_compute_capability(capability, number)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            target = ", ".join(names) or "this GPU"
            raise ExportError(
                f"{trt.__name__} cannot build {onnx_path.name} for {target}: {logger.said()}; all messages are in {log}"
            )
    with placed(path) as folder:
        (folder / path.name).write_bytes(memoryview(plan))
    seconds = round(time.perf_counter() - started, 3)
    return {
        "builder": trt.__name__,
        "version": trt.__version__,
        "ahead_of_time": not native,
        "gpus": list(names) or [this_gpu()],
        "profile": profile,
        "tf32": False,
        "seconds": seconds,
        "size": path.stat().st_size,
        "precisions": types["outputs"],
        "products": types["products"],
    }


def layers(onnx_path: Path, log: Path) -> dict[str, int]:
    """The layers that the builder is given for an ONNX file, by type. Raises MissingBackendError, ExportError."""
    trt, _ = backend()
    with messages(trt, log) as logger:
        builder = trt.Builder(logger)
        network, _parser = _parsed(trt, builder, onnx_path, logger, log)
        types = Counter(network.get_layer(number).type.name for number in range(network.num_layers))
        return dict(sorted(types.items()))


def check(gpus: Sequence[str]) -> str:
    """Which builder an export would use here, in one line; refuses early what ``write`` would refuse late.

    Raises UsageError for an unknown GPU, MissingBackendError when no builder is installed.
    """
    trt, native = backend(gpus or None)
    if native:
        return f"TensorRT {trt.__version__}, built natively for the GPU of this machine ({this_gpu()})"
    names = gpus or GPUS
    _capabilities(trt, names)
    return f"{trt.__name__} {trt.__version__}, built ahead of time for {', '.join(names)}"


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
            there = ", ".join(sorted(known, key=_number))
            raise UsageError(f"{trt.__name__} {trt.__version__} cannot build for {name!r}; there are: {there}{hint}")
    return [known[name.lower()] for name in names]


def _parsed(trt: ModuleType, builder: Any, onnx_path: Path, logger: Any, log: Path) -> tuple[Any, Any]:
    """The network, and the parser, which owns the weights and must live as long."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path.resolve())):
        raise ExportError(f"{trt.__name__} cannot parse {onnx_path.name}: {_errors(parser)}; all messages are in {log}")
    return network, parser


def _number(name: str) -> int:
    return int("".join(c for c in name if c.isdigit()) or 0)


def _errors(parser: Any) -> str:
    found = [parser.get_error(number) for number in range(parser.num_errors)]
    return " | ".join(f"{e.desc()} (node {e.node_name()!r}, {e.node_operator()})" for e in found) or "it gave no reason"


def _profile(
    builder: Any, network: Any, config: Any, batch: tuple[int, int, int], axes: Mapping[str, int | tuple[int, int]]
) -> dict[str, list[list[int]]]:
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


def _sizes(
    tensor: Any, axis: int, size: int, batch: tuple[int, int, int], axes: Mapping[str, int | tuple[int, int]]
) -> tuple[int, int, int]:
    if size != -1:
        return size, size, size
    name = tensor.get_dimension_name(axis)
    if axis == 0:
        return batch
    if name not in axes:
        raise UsageError(
            f"axis {axis} ({name!r}) of input {tensor.name!r} is dynamic; give its (usual, largest) size; "
            f"given: {sorted(axes)}"
        )
    given = axes[name]
    usual, largest = given if isinstance(given, tuple) else (given, given)
    return 1, usual, largest


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


def _stated(onnx_path: Path) -> str:
    """The precision that ``precision.lower`` wrote into the file, fp32 when it never saw it."""
    import onnx

    metadata = onnx.load(str(onnx_path), load_external_data=False).metadata_props
    return next((p.value for p in metadata if p.key == "precision"), "fp32")


def _require(products: Mapping[str, int], precision: str, name: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; there are: {', '.join(PRECISIONS)}")
    if products and PRECISIONS[precision] not in products:
        raise ExportError(
            f"{name}: {precision} was asked for, but the network's matrix products are {dict(products)}; "
            f"lower the ONNX file first"
        )
