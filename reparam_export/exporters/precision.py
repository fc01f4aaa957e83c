"""fp16 and bf16: a mixed-precision copy of an fp32 ONNX file.

No maintained converter was usable for both. ``onnxruntime.transformers.float16`` knows no bf16, clamps overflowing
weights without a word, rounds tiny ones away from zero, and rounds between two nodes that both stay fp32;
``modelopt.onnx.autocast`` pins onnx and onnxruntime below what the exporter needs. What is needed is small: decide
which nodes stay fp32 (``_keep``), give every value the type of its producer, and cast where the types part. Inputs and
outputs of the model keep fp32; every weight that is lowered is rounded once, to nearest even, under its own name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reparam_export.errors import ExportError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

Precision = Literal["fp16", "bf16"]
LARGEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention")


def lower(
    source: Path,
    path: Path,
    precision: Precision,
    *,
    samples: Sequence[Mapping[str, np.ndarray[Any, Any]]] = (),
    external: int | None = None,
) -> tuple[tuple[str, str], ...]:
    """Write ``source`` (fp32) in ``precision`` to ``path``; returns (weight or node, reason) for each thing kept fp32.

    ``samples`` are inputs on which the activations are measured, in fp32; without them only weights and constants can
    be found out of range. Weights of more than ``external`` bytes together go to ``<path>.data``.
    Raises UsageError for an unknown precision, ExportError for a source that is not fp32 or has control flow.
    """
    import onnx_ir as ir

    from reparam_export.exporters._keep import kept
    from reparam_export.exporters.onnx import EXTERNAL, save

    if precision not in LARGEST:
        raise UsageError(f"unknown precision {precision!r}; there are: {', '.join(LARGEST)}")
    low = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16
    model = _read(source)
    keep = kept(model, low, LARGEST[precision], measured(source, samples) if samples else {})
    _retype(model.graph, {item for item in keep if isinstance(item, ir.Node)}, low)
    model.metadata_props["precision"] = precision
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    save(model, path, external=size > (EXTERNAL if external is None else external))
    return tuple((str(item.name), reason) for item, reason in keep.items())


def _read(source: Path) -> ir.Model:
    """The fp32 graph with the type of every value. Raises ExportError for what cannot be lowered."""
    import onnx_ir as ir
    from onnx_ir.passes import common as passes

    model = ir.load(source)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.ShapeInferencePass()(model)
    for node in model.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ExportError(
                f"{source.name}: {node.op_type} {node.name!r} has a subgraph; only straight graphs can be lowered"
            )
        for value in node.outputs:
            if value.dtype is None and value.uses():
                raise ExportError(f"{source.name}: the type of {value.name!r} ({node.op_type}) is unknown")
    halves = [
        v.name for v in model.graph.initializers.values() if v.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    ]
    if halves:
        raise ExportError(
            f"{source.name} is not fp32: {len(halves)} initializers are half precision, the first is {halves[0]!r}"
        )
    return model


def _retype(graph: ir.Graph, keep: Collection[ir.Node], low: ir.DataType) -> None:
    """Give the results of nodes outside ``keep`` the type ``low``, and cast where a reader wants the other type."""
    import onnx_ir as ir

    from reparam_export.exporters._keep import floating

    nodes = list(graph)
    wants = {
        (n, i): (ir.DataType.FLOAT if n in keep else low) for n in nodes for i, v in enumerate(n.inputs) if floating(v)
    }
    for value in list(graph.initializers.values()):
        if floating(value):
            _lower_weight(graph, value, {wants[use.node, use.idx] for use in value.uses()}, low)
    for node in nodes:
        if node not in keep:
            if "to" in node.attributes and node.attributes["to"].as_int() == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", int(low))
            for value in node.outputs:
                if floating(value):
                    value.dtype = low
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for (node, number), want in wants.items():
        source = node.inputs[number]
        if source is not None and source.dtype != want and node.op_type not in ("Shape", "Size"):
            if (source, want) not in casts:
                casts[source, want] = cast(graph, source, want)
            node.replace_input_with(number, casts[source, want])
    for number, value in enumerate(graph.outputs):
        if value.dtype == low:
            name, value.name = value.name, f"{value.name}:{low.name.lower()}"
            graph.outputs[number] = cast(graph, value, ir.DataType.FLOAT, name)


def _lower_weight(graph: ir.Graph, value: ir.Value, wanted: set[ir.DataType], low: ir.DataType) -> None:
    """Round a weight to ``low`` when some reader wants it so; a single number that is also wanted in fp32 is copied."""
    import onnx_ir as ir

    tensor = value.const_value
    if low not in wanted or tensor is None or value.is_graph_output():
        return
    if ir.DataType.FLOAT in wanted and tensor.size == 1:
        return  # stays fp32: eps must not be rounded for the norm; the others read it through a cast
    value.const_value = rounded(tensor, low)
    value.dtype = low


def rounded(tensor: ir.TensorProtocol, low: ir.DataType) -> ir.LazyTensor:
    """The fp32 tensor rounded to nearest even, computed when it is written."""
    import onnx_ir as ir

    def turn() -> ir.Tensor[Any]:
        return ir.Tensor(tensor.numpy().astype(low.numpy()), dtype=low, name=tensor.name)

    return ir.LazyTensor(turn, low, ir.Shape(list(tensor.shape.numpy())), name=tensor.name)


def cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str | None = None) -> ir.Value:
    """A Cast node right behind ``value``; returns its result."""
    import onnx_ir as ir

    name = name or f"{value.name}:{dtype.name.lower()}"
    result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[result], name=f"Cast:{name}")
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph.node(0), node)
    else:
        graph.insert_after(producer, node)
    return result


def measured(source: Path, samples: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> dict[str, float]:
    """The largest finite |value| of every fp32 activation of ``source`` on ``samples``, by name."""
    import numpy as np
    import onnx_ir as ir

    from reparam_export.exporters._keep import floating
    from reparam_export.exporters.onnx import session

    model = _read(source)
    graph = model.graph
    values = [v for n in graph for v in n.outputs if floating(v) and v.uses()]
    zero = ir.Value(
        name="measured:zero",
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.float32(0), name="measured:zero"),
    )
    graph.register_initializer(zero)
    graph.outputs.clear()
    for number, value in enumerate(values):
        steps = [ir.node("IsInf", [value]), ir.node("Abs", [value])]
        steps.append(ir.node("Where", [steps[0].outputs[0], zero, steps[1].outputs[0]]))
        steps.append(ir.node("ReduceMax", [steps[2].outputs[0]], {"keepdims": 0}))
        steps[3].outputs[0].name = f"measured:{number}"
        steps[3].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        steps[3].outputs[0].shape = ir.Shape([])
        graph.extend(steps)
        graph.outputs.append(steps[3].outputs[0])
    run = session(ir.to_proto(model).SerializeToString(), source.parent)
    peaks = np.max([[float(x) for x in run.run(None, dict(sample))] for sample in samples], axis=0)
    return {str(v.name): float(peak) for v, peak in zip(values, peaks, strict=True)}


def emulated(path: Path) -> bytes:
    """A fp16 or bf16 file as a serialised fp32 graph that rounds where the file's graph does, for a run on the CPU.

    Every operator with 16-bit results is computed in fp32 and its results are rounded by a Cast: what hardware with
    fp32 accumulation computes. onnxruntime's CPU provider has no bf16 operators, and takes many fp16 ones in fp32 without
    rounding between them, so an overflow would go unseen. Weights keep their stored values; external data is still read
    from the file's folder.
    """
    import onnx_ir as ir

    model = ir.load(path)
    graph = model.graph
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for value in [*graph.initializers.values(), *graph.inputs]:
        if value.dtype in halves:
            _read_through(graph, value, value)
    for node in list(graph):
        for value in node.outputs:
            dtype = value.dtype
            if dtype is not None and dtype in halves:
                half = value
                if node.op_type != "Cast":
                    value.dtype = ir.DataType.FLOAT
                    half = cast(graph, value, dtype, f"{value.name}:rounded")
                _read_through(graph, value, half)
    result: bytes = ir.to_proto(model).SerializeToString()
    return result


def _read_through(graph: ir.Graph, value: ir.Value, halves: ir.Value) -> None:
    """Let every reader of ``value`` read ``halves`` cast to fp32 instead."""
    import onnx_ir as ir

    readers = [use for use in value.uses() if use.node is not halves.producer()]
    wide = cast(graph, halves, ir.DataType.FLOAT, f"{value.name}:wide")
    for use in readers:
        use.node.replace_input_with(use.idx, wide)


def precisions(path: Path) -> dict[str, int]:
    """Matrix products and convolutions by the dtype they compute in, such as {"float16": 48, "float32": 1}."""
    import onnx_ir as ir

    found: dict[str, int] = {}
    for node in ir.load(path).graph:
        dtype = node.outputs[0].dtype
        if node.op_type in PRODUCTS and dtype is not None:
            found[str(dtype.numpy())] = found.get(str(dtype.numpy()), 0) + 1
    return found


def weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of the initializers by dtype, such as {"float16": 11038720, "float32": 57600, "int64": 96}."""
    import onnx_ir as ir

    found: dict[str, int] = {}
    for value in ir.load(path).graph.initializers.values():
        if value.const_value is not None:
            name = str(value.const_value.dtype.numpy())
            found[name] = found.get(name, 0) + value.const_value.nbytes
    return found


def holds(path: Path, *dtypes: str) -> bool:
    """Does a weight or an edge of the graph have one of these dtypes, such as ``"bfloat16"``?"""
    import onnx_ir as ir

    graph = ir.load(path).graph
    values = [*graph.initializers.values(), *graph.inputs, *(v for node in graph for v in node.outputs)]
    return any(v.dtype is not None and v.dtype != ir.DataType.STRING and str(v.dtype.numpy()) in dtypes for v in values)
