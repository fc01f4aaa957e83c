"""One side of a comparison: an output folder, an ONNX file or an engine; its tensors, its inputs, and how it is run."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.errors import UsageError
from reparam_export.models import read_arrays

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]
    Shape = tuple[int | str, ...]

FREE_AXIS = 16  # size of a dynamic axis other than the batch, when no inputs are given
SAMPLES = 16


@dataclass(frozen=True)
class Side:
    """``tensors`` opens its weights, one at a time; an engine's have no names."""

    path: Path
    onnx: Path | None
    engine: Path | None
    tensors: Callable[[], Iterator[tuple[str, Array]]] | None

    @property
    def folder(self) -> bool:
        """Is it an output folder, from which a torch module can be built?"""
        return self.path.is_dir()

    @cached_property
    def inputs(self) -> dict[str, tuple[Shape, str]]:
        """Shape and numpy dtype of the inputs of its ONNX file by name; empty without one."""
        import onnx

        found: dict[str, tuple[Shape, str]] = {}
        for value in onnx.load(str(self.onnx), load_external_data=False).graph.input if self.onnx else ():
            tensor = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
            found[value.name] = shape, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return found


def side(path: Path) -> Side:
    """What a path is. Raises UsageError."""
    from reparam_export.folder import FUSED, weights_at

    if path.is_dir() and (path / FUSED).is_file():
        found = [path / name if (path / name).is_file() else None for name in ("model.onnx", "model.engine")]
        return Side(path, found[0], found[1], lambda: _of_safetensors(weights_at(path)))
    if path.is_file() and path.suffix == ".onnx":
        return Side(path, path, None, lambda: _of_onnx(path))
    if path.is_file() and path.suffix in (".engine", ".plan", ".trt"):
        return Side(path, None, path, None)
    raise UsageError(f"{path}: expected an output folder of reparam-export, an .onnx file or an .engine file")


def samples_for(left: Side, inputs: Path | None) -> dict[str, Array]:
    """Inputs by name: those given, else those of the proof in the left side's folder, else random ones for its ONNX file.

    Raises UsageError for inputs that are not the file's, and for an engine without any.
    """
    import numpy as np

    from reparam_export.folder import REFERENCE

    place = left.path if left.folder else left.path.parent
    if inputs is not None:
        given = read_arrays(inputs, next(iter(left.inputs)) if len(left.inputs) == 1 else None)
        why = refused(left, given)
        if why:
            raise UsageError(f"inputs {inputs}: {why}")
        return given
    if (place / REFERENCE).is_file():
        with np.load(place / REFERENCE) as arrays:
            return {n.removeprefix("input:"): arrays[n] for n in arrays.files if n.startswith("input:")}
    if left.onnx is None:
        raise UsageError(f"{left.path}: nothing says what its inputs are; pass them with --inputs FILE.npz")
    chance = np.random.default_rng(0)
    drawn: dict[str, Array] = {}
    for name, (shape, dtype) in left.inputs.items():
        free = [FREE_AXIS if axis else SAMPLES for axis in range(len(shape))]
        sizes = [size if isinstance(size, int) else free[axis] for axis, size in enumerate(shape)]
        kind = np.dtype(dtype)
        whole = np.issubdtype(kind, np.integer) or kind == np.bool_
        drawn[name] = (chance.integers(0, 2, sizes) if whole else chance.standard_normal(sizes)).astype(kind)
    return drawn


def answers(one: Side, samples: Mapping[str, Array], *, engine: bool) -> dict[str, Array]:
    """Its outputs by name, of its engine on the GPU or of its ONNX file by onnxruntime. Raises ExportError."""
    from reparam_export.exporters import onnx, tensorrt

    if engine and one.engine is not None:
        with tensorrt.Runner(one.engine) as on_gpu:
            return on_gpu.run(dict(samples))
    if one.onnx is None:
        raise UsageError(f"{one.path}: holds no ONNX file; run export --to onnx")
    with onnx.Runner(one.onnx) as runner:
        return runner.run(dict(samples))


def refused(one: Side, samples: Mapping[str, Array]) -> str | None:
    """Why a side's ONNX file does not take the samples: other names, shapes or dtypes. None: it takes them."""
    if one.onnx is None:
        return None
    if one.inputs.keys() != samples.keys():
        return f"{one.path} takes {', '.join(sorted(one.inputs))}; the samples are {', '.join(samples)}"
    for name, (shape, dtype) in one.inputs.items():
        given = samples[name]
        fits = [isinstance(size, str) or size == n for size, n in zip(shape, given.shape, strict=False)]
        if len(shape) != given.ndim or not all(fits) or str(given.dtype) != dtype:
            expected, found = (f"{'x'.join(map(str, s))} {d}" for s, d in ((shape, dtype), (given.shape, given.dtype)))
            return f"{one.path} takes {name} as {expected}; the samples are {found}"
    return None


def _of_safetensors(paths: Sequence[Path]) -> Iterator[tuple[str, Array]]:
    from reparam_export.files import load_safetensors

    for path in paths:
        yield from load_safetensors(path, numpy=True)[0].items()


def _of_onnx(path: Path) -> Iterator[tuple[str, Array]]:
    """Initializers by name, those of subgraphs with where they stand before it (``if_node/then_branch/w2``).

    A local function cannot hold initializers, so its constants are its weights (``domain/function/w``); anywhere else a
    constant is part of the program. A name that is there twice, as two nodes of one name make it, is numbered.
    """
    from reparam_export.exporters._differences import loaded

    model = loaded(path)
    seen: Counter[str] = Counter()
    held = [_held(model.graph, "", constants=False)]
    for function in model.functions.values():
        where = "/".join(part for part in function.identifier() if part)
        held.append(_held(function.graph, f"{where}/", constants=True))
    for name, tensor in itertools.chain.from_iterable(held):
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", tensor.numpy()


def _held(graph: ir.Graph, where: str, *, constants: bool) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """The tensors of a graph and its subgraphs by place and name, those of Constant nodes too if told so."""
    from onnx_ir.convenience import get_const_tensor

    from reparam_export.exporters._differences import subgraphs

    for name, value in graph.initializers.items():
        if value.const_value is not None:
            yield f"{where}{name}", value.const_value
    for number, node in enumerate(graph):
        tensor = get_const_tensor(node.outputs[0]) if constants and node.op_type == "Constant" else None
        if tensor is not None:
            yield f"{where}{node.outputs[0].name}", tensor
        for name, subgraph in subgraphs(node):
            yield from _held(subgraph, f"{where}{node.name or f'{node.op_type}_{number}'}/{name}/", constants=constants)
