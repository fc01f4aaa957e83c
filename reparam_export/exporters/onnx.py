"""ONNX: write a plain module with its parameters under their own names, run a file, compare two graphs.

Every parameter is one initializer under its state-dict name, bit for bit. What ``MatMul`` needs transposed is stored
transposed; the file's metadata lists those names (``transposed``, JSON) and the tensors the forward never reads
(``unused``, JSON). So a fused model exports to the base's graph, and weights can be swapped in the file by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.calls import experts, foreign
from reparam_export.errors import ExportError, MissingBackendError, UsageError
from reparam_export.exporters._differences import differences as differences
from reparam_export.exporters._files import placed
from reparam_export.models import Input, Signature, plain

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from torch import Tensor, nn

EXTERNAL = 1_900_000_000  # bytes of weights; protobuf refuses a file above 2**31


def write(
    model: nn.Module,
    signature: Signature,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    external: int = EXTERNAL,
) -> None:
    """Export ``model`` (in eval mode, in the dtype it is stored in) to ``path``.

    ``example`` holds one tensor per input name. Named axes are dynamic; one of size 1 in the example is doubled for
    tracing. Weights of more than ``external`` bytes together go to ``<path>.data``, streamed. Nothing is left behind
    on failure. Raises ExportError when the model cannot be traced, when a named axis turns out fixed, when the disk
    refuses, or when a tensor of the state dict does not stand in the file bit for bit.
    """
    busy = [name for name, module in model.named_modules() if module.training]
    if busy:
        raise ExportError(
            f"cannot export: {len(busy)} modules are in training mode, the first is {busy[0]!r}; call model.eval()"
        )
    from reparam_export.exporters._lean import lean

    graph = _traced(model, signature, example, opset)
    with _quiet(), foreign(f"the ONNX graph of {type(model).__name__}", "simplified by onnxscript", ExportError):
        read = lean(graph, model.state_dict().keys())
    unused = [names[0] for names in _distinct(model) if not read & set(names)]
    graph.metadata_props.update({**(metadata or {}), "unused": json.dumps(unused)})
    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    save(graph, path, external=size > external, check=lambda file: _same_weights(model, file, unused))


def save(graph: ir.Model, path: Path, *, external: bool, check: Callable[[Path], None] | None = None) -> None:
    """Write ``graph`` next to ``path``, have it checked, then rename it (and ``<path>.data``) into place."""
    import onnx
    import onnx_ir as ir

    with placed(path, also=(f"{path.name}.data",)) as folder:
        file = folder / path.name
        ir.save(graph, file, external_data=f"{path.name}.data" if external else None)
        try:
            onnx.checker.check_model(str(file))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{path.name}: onnx.checker refuses the exported graph: {error}") from error
        if check is not None:
            check(file)


def _traced(model: nn.Module, signature: Signature, example: Mapping[str, Tensor], opset: int | None) -> ir.Model:
    """The unoptimised graph of ``model`` with the names of the signature."""
    import torch

    tensors = tuple(_example(i, example) for i in signature.inputs)
    axes = tuple({n: a for n, a in enumerate(i.shape) if isinstance(a, str)} for i in signature.inputs)
    wrapper = plain(model, signature).eval()
    try:
        with _quiet(), torch.no_grad(), experts(model, "capture", signature.experts):
            program = torch.onnx.export(
                wrapper,
                tensors,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=[i.name for i in signature.inputs],
                output_names=list(signature.outputs),
                dynamic_shapes=(axes,),
            )
    except Exception as error:  # torch.export raises anything, from RuntimeError to its own user errors
        why = _fixed(error, signature) or _short(error)
        raise ExportError(f"torch.onnx cannot export {type(model).__name__}: {why}") from error
    if program is None:
        raise ExportError(f"torch.onnx returned no program for {type(model).__name__}")
    graph: ir.Model = program.model
    _named(graph, signature)
    return graph


def _named(graph: ir.Model, signature: Signature) -> None:
    """Check inputs, outputs and axes against the signature; give the parameters their state-dict names."""
    found = [str(v.name) for v in graph.graph.inputs], [str(v.name) for v in graph.graph.outputs]
    wanted = [i.name for i in signature.inputs], list(signature.outputs)
    if found != wanted:
        raise ExportError(f"the traced graph has inputs and outputs {found}, the signature says {wanted}")
    for value, given in zip(graph.graph.inputs, signature.inputs, strict=True):
        for axis, name in enumerate(given.shape):
            size = None if value.shape is None else value.shape[axis]
            if isinstance(name, str) and isinstance(size, int):
                raise ExportError(
                    f"input {given.name!r}: axis {axis} ({name!r}) came out fixed at {size}; the code depends on that "
                    f"size. Fix the size in the signature, or make the forward independent of it"
                )
    weights = {value.name: value for value in graph.graph.initializers.values()}
    names = {str(name).removeprefix("model.") for name in weights}
    for node in graph.graph:
        for value in node.outputs:
            if value.name in names and value not in graph.graph.outputs:
                value.name = f"{value.name}:value"
    for label, value in weights.items():
        value.name = str(label).removeprefix("model.")


def _example(given: Input, example: Mapping[str, Tensor]) -> Tensor:
    if given.name not in example:
        raise UsageError(f"the example lacks input {given.name!r}; it has {sorted(example)}")
    tensor = example[given.name]
    if tensor.dim() != len(given.shape):
        raise UsageError(
            f"example of {given.name!r} has {tensor.dim()} axes, the signature has {len(given.shape)}: {given.shape}"
        )
    for axis, name in enumerate(given.shape):
        if isinstance(name, str) and tensor.shape[axis] == 1:  # torch.export takes an axis of size 1 for a constant
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor


def _same_weights(model: nn.Module, file: Path, unused: Collection[str]) -> None:
    """Raise ExportError unless every tensor of the state dict that the graph reads stands in ``file`` bit for bit."""
    import numpy as np
    import onnx_ir as ir

    loaded = ir.load(file)
    held, transposed = loaded.graph.initializers, set(json.loads(loaded.metadata_props["transposed"]))
    for names, tensor in _distinct(model).items():
        name = next((n for n in names if n in held), None)
        if name is None and not set(names) & set(unused):
            raise ExportError(f"{file.name}: {names[0]!r} of the model is not in the exported graph under its name")
        stored = held[name].const_value if name is not None else None
        if stored is not None and not np.array_equal(_bits(stored.numpy()), _words(tensor, name in transposed)):
            raise ExportError(f"{file.name}: initializer {name!r} differs from the model's tensor of that name")


def _distinct(model: nn.Module) -> dict[tuple[str, ...], Tensor]:
    """The state dict with tied tensors, which are one tensor under several names, together."""
    tensors = model.state_dict()
    names: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        names.setdefault(place, []).append(name)
    return {tuple(same): tensors[same[0]] for same in names.values()}


def _words(tensor: Tensor, transposed: bool) -> np.ndarray[Any, Any]:
    """A tensor as the unsigned integers of its bits (numpy has no bf16)."""
    import torch

    held = tensor.detach().cpu()
    held = held.t() if transposed else held
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return _bits(held.contiguous().view(words[held.element_size()]).numpy())


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx and onnxscript off the console: they print progress, and log what they skip."""
    import contextlib
    import io
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _fixed(error: BaseException, signature: Signature) -> str | None:
    """In words of the signature: an axis that the model's code makes a Python number of; None for another error."""
    import re

    found = re.findall(r"inferred a static shape of (\d+) for dimension inputs\[(\d+)\]\.shape\[(\d+)\]", _short(error))
    if not found:
        return None
    size, number, axis = map(int, found[0])
    given = signature.inputs[number]
    return (
        f"its code fixes axis {axis} ({given.shape[axis]!r}) of input {given.name!r} at the size it is captured with, {size}: somewhere "
        "it makes a Python number of it, as [0] * batch_size does, so no one graph holds for every size. Change that line of the model "
        "(a py: base may return a changed one), or take the fused weights as they are, with --to safetensors"
    )


def _short(error: BaseException) -> str:
    """What the innermost error says, in one line: those around it say that torch.onnx failed, and what to report to whom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [f"{type(error).__name__}:", *(line.strip() for line in str(error).splitlines() if line.strip())]
    return " ".join(lines)[:600]


class Runner:
    """One onnxruntime session, as a context manager: ``with Runner(path) as run: run.run({"input": array})``.

    On the CPU, a file with fp16 or bf16 operators runs as ``precision.emulated(path)``: every such operator is computed
    in fp32 and its result rounded, since the CPU provider lacks bf16 and leaves out roundings of fp16.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path = path
        self.threads = threads
        self._session: Any = None

    def __enter__(self) -> Runner:
        from reparam_export.exporters.precision import emulated, holds

        if not self.path.is_file():
            raise ExportError(f"there is no file {self.path}")
        soft = not _gpu() and holds(self.path, "float16", "bfloat16")
        self._session = session(emulated(self.path) if soft else self.path, self.path.parent, self.threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Every output by name. Arrays must have the dtypes of the graph's inputs. Raises ExportError."""
        if self._session is None:
            raise ExportError(f"{self.path.name}: the runner is not open; use it in a with statement")
        names = [o.name for o in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # onnxruntime's exception classes are not public
            raise ExportError(f"{self.path.name}: onnxruntime failed to run it: {error}") from error


def _gpu() -> bool:
    """Is there a GPU, and an onnxruntime that can use it?"""
    import onnxruntime as ort
    import torch

    return bool(torch.cuda.is_available()) and "CUDAExecutionProvider" in ort.get_available_providers()


def session(model: Path | bytes, folder: Path, threads: int | None = None) -> Any:
    """An onnxruntime session, on CUDA where there is a GPU. ``folder`` holds the external data of a model in bytes."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingBackendError(
            "onnxruntime cannot be imported; install onnxruntime-gpu", package="onnxruntime-gpu", extra="none"
        ) from error
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    gpu = _gpu()
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu else ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=providers)
    except Exception as error:  # onnxruntime's exception classes are not public
        raise ExportError(
            f"onnxruntime cannot load {model if isinstance(model, Path) else 'the model'}: {error}"
        ) from error
