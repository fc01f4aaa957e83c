"""Are two ONNX graphs the same program?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def differences(a: Path, b: Path) -> list[str]:
    """What differs: operators in order, attributes, edges up to renaming, shapes and dtypes of inputs and initializers.

    Empty when the two are the same program. Values of weights, names of edges and metadata are not compared.
    """
    import onnx_ir as ir

    left, right = ir.load(a).graph, ir.load(b).graph
    pairs = _Pairs()
    found = []
    for what, one, two in (("inputs", left.inputs, right.inputs), ("outputs", left.outputs, right.outputs)):
        if len(one) != len(two):
            found.append(f"{what}: {len(one)} against {len(two)}")
    if len(left) != len(right):
        found.append(f"nodes: {len(left)} against {len(right)}")
    for x, y in zip(left.inputs, right.inputs, strict=False):
        found += pairs.match(x, y, f"input {x.name!r}")
    for number, (first, second) in enumerate(zip(left, right, strict=False)):
        found += _nodes(first, second, pairs, f"node {number}")
    for x, y in zip(left.outputs, right.outputs, strict=False):
        found += pairs.match(x, y, f"output {x.name!r}")
    return found


class _Pairs:
    """Which value of one graph stands for which of the other, both ways."""

    def __init__(self) -> None:
        self.there: dict[ir.Value, ir.Value] = {}
        self.back: dict[ir.Value, ir.Value] = {}

    def match(self, x: ir.Value | None, y: ir.Value | None, where: str) -> list[str]:
        if x is None or y is None:
            return [] if x is y else [f"{where}: {x and x.name!r} against {y and y.name!r}"]
        if self.there.setdefault(x, y) is not y or self.back.setdefault(y, x) is not x:
            return [f"{where}: edge {x.name!r} against {y.name!r}"]
        fixed = x.is_initializer() or y.is_initializer() or x.is_graph_input()
        if fixed and _kind(x) != _kind(y):
            return [f"{where}: {x.name!r} is {_kind(x)} against {y.name!r} {_kind(y)}"]
        return []


def _kind(value: ir.Value) -> tuple[str, str, str]:
    """Input or initializer, dtype, shape; an initializer's are those of its tensor, whatever is declared elsewhere."""
    held = value.const_value
    return "initializer" if held is not None else "edge", str((held or value).dtype), str((held or value).shape)


def _nodes(one: ir.Node, two: ir.Node, pairs: _Pairs, where: str) -> list[str]:
    if (one.domain, one.op_type, one.overload) != (two.domain, two.op_type, two.overload):
        return [f"{where}: {one.op_type} against {two.op_type}"]
    where = f"{where} ({one.op_type})"
    found = []
    if len(one.inputs) != len(two.inputs) or len(one.outputs) != len(two.outputs):
        found.append(f"{where}: {len(one.inputs)} inputs against {len(two.inputs)}")
    if str(sorted(_attributes(one))) != str(sorted(_attributes(two))):
        found.append(f"{where}: attributes {sorted(_attributes(one))} against {sorted(_attributes(two))}")
    for number, (x, y) in enumerate(zip(one.inputs, two.inputs, strict=False)):
        found += pairs.match(x, y, f"{where} input {number}")
    for number, (x, y) in enumerate(zip(one.outputs, two.outputs, strict=False)):
        found += pairs.match(x, y, f"{where} output {number}")
    return found


def _attributes(node: ir.Node) -> list[tuple[str, str]]:
    return [(name, str(_value(a))) for name, a in node.attributes.items()]


def _value(attribute: ir.Attr) -> object:
    """An attribute as something that compares by value; a tensor by its type, shape and bytes."""
    value = attribute.value
    tobytes = getattr(value, "tobytes", None)
    return value if tobytes is None else (value.dtype, tuple(value.shape.numpy()), tobytes())
