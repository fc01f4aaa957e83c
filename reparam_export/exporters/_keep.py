"""Which nodes of a graph must stay fp32 when the rest is lowered, and why.

wide weights      cannot be held by the format: the weight and whatever reads it
wide activations  measured, or carried on from a wide constant (the -3.4e38 of an attention mask)
norms, softmax    as one operator or decomposed
positions         angles of rotary embeddings: bf16 counts to 256, fp16 to 2048
no such operator  the operator set of the file does not define the operator for the format
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

FP32_OPERATORS = frozenset(
    {
        "BatchNormalization",
        "Bernoulli",
        "ConstantOfShape",
        "CumSum",
        "DequantizeLinear",
        "Exp",
        "EyeLike",
        "GRU",
        "GridSample",
        "GroupNormalization",
        "InstanceNormalization",
        "LSTM",
        "LayerNormalization",
        "Log",
        "LogSoftmax",
        "LpNormalization",
        "MeanVarianceNormalization",
        "Multinomial",
        "NonMaxSuppression",
        "QuantizeLinear",
        "RMSNormalization",
        "RNN",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Range",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Resize",
        "RoiAlign",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "Softmax",
        "Upsample",
    }
)
# A value out of range stays so through these; any other reader takes it in fp32 and is done with it.
CARRIERS = frozenset(
    {
        "Abs",
        "Add",
        "Cast",
        "CastLike",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
# What lies between the mean of the squares and the end of a decomposed norm.
NORM_OPERATORS = frozenset({"Add", "Cast", "Div", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"})

Kept = dict["ir.Node | ir.Value", str]


def kept(model: ir.Model, low: ir.DataType, largest: float, maxima: Mapping[str, float]) -> Kept:
    """Weights out of range, then nodes that stay fp32, each with its reason. ``maxima``: measured |value| by name."""
    graph = model.graph
    found = _wide_weights(graph, largest)
    large = {v for v in found if isinstance(v, ir.Value)}
    active = {name for name, size in maxima.items() if size > largest}
    for node in graph:
        sources = [v for v in node.inputs if v is not None and (v in large or v.name in active)]
        results = [v for v in node.outputs if v.name in active]
        if sources or results:
            where = f"reads {sources[0].name}" if sources else f"its result {results[0].name} is measured"
            found[node] = f"{where}, which is out of range" if sources else f"{where} out of range"
        if node.op_type in CARRIERS and any(v in large for v in sources):
            large.update(v for v in node.outputs if floating(v))
        if node.op_type in FP32_OPERATORS:
            found.setdefault(node, f"{node.op_type} is computed in fp32")
        elif not _defined(node, low, model.opset_imports.get("", 1)):
            found.setdefault(node, f"opset {model.opset_imports.get('', 1)} has no {low.name} {node.op_type}")
    found.update({n: "part of a norm" for n in _norms(graph) if n not in found})
    found.update({n: "position arithmetic" for n in _positions(graph) if n not in found})
    return {
        item: why
        for item, why in found.items()
        if isinstance(item, ir.Value) or any(map(floating, item.outputs)) or _reads(item)
    }


def floating(value: ir.Value | None) -> bool:
    """Is it an fp32 value?"""
    return value is not None and value.dtype == ir.DataType.FLOAT


def _reads(node: ir.Node) -> bool:
    return any(map(floating, node.inputs))


def _wide_weights(graph: ir.Graph, largest: float) -> Kept:
    import numpy as np

    found: Kept = {}
    for value in graph.initializers.values():
        if not floating(value) or value.const_value is None or value.const_value.size == 0:
            continue
        array = value.const_value.numpy()
        low, high = float(np.fmin.reduce(array, axis=None)), float(np.fmax.reduce(array, axis=None))
        if not np.isfinite((low, high)).all():
            array = array[np.isfinite(array)]
            low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if max(-low, high) > largest:
            found[value] = f"holds {high if high > -low else low:.6g}; the format ends at {largest:.6g}"
    return found


def _defined(node: ir.Node, low: ir.DataType, opset: int) -> bool:
    """Does the operator set define this operator for ``low`` where the node has fp32?"""
    import onnx

    if node.domain != "":
        return False
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for number, value in enumerate(values):
            kind = formal[min(number, len(formal) - 1)].type_str
            if floating(value) and f"tensor({low.name.lower()})" not in allowed.get(kind, {kind}):
                return False
    return True


def _norms(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes of decomposed norms: x * rsqrt(mean(x^2) + eps), with or without a mean, a scale and a shift."""
    for mean in graph:
        if mean.op_type != "ReduceMean":
            continue
        inside: list[ir.Node] = [mean]
        square = mean.inputs[0].producer() if mean.inputs[0] is not None else None
        known = set(mean.inputs)
        if square is not None and square.op_type in ("Pow", "Mul"):
            inside.append(square)
            known |= set(square.inputs)
        for node in inside:  # grows while it is read
            known |= set(node.outputs)
            for reader in (r for v in node.outputs for r in v.consumers()):
                others = (v for v in reader.inputs if floating(v) and v is not None)
                if (
                    reader.op_type in NORM_OPERATORS
                    and reader not in inside
                    and all(v in known or v.is_initializer() for v in others)
                ):
                    inside.append(reader)
        if any(node.op_type in ("Sqrt", "Reciprocal") for node in inside):
            yield from inside


def _positions(graph: ir.Graph) -> Iterator[ir.Node]:
    """Sines and cosines of integers, and all that leads from the integers to them."""
    counted: set[ir.Node] = set()
    for node in graph:
        sources = [v for v in node.inputs if floating(v) and v is not None]
        table = node.op_type == "Gather" and sources and sources[0].is_initializer()
        if not table and all(v.is_initializer() or v.producer() in counted for v in sources):
            counted.add(node)
    seen: set[ir.Node] = set()
    stack = [node for node in graph if node.op_type in ("Sin", "Cos")]
    while stack:
        node = stack.pop()
        if node in counted and node not in seen:
            seen.add(node)
            stack.extend(p for v in node.inputs if v is not None and (p := v.producer()) is not None)
    yield from (node for node in graph if node in seen)
