"""Are two ONNX graphs the same program?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_export.errors import ExportError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    Operator = tuple[str, str, str]  # domain, type, overload

SHOWN = 80  # characters of an attribute's value in a message


def differences(a: Path, b: Path) -> list[str]:
    """What differs: operators in order, attributes, edges up to renaming, shapes and dtypes of inputs and initializers.

    The bodies of the local functions that are called, the subgraphs of If, Loop and Scan, and the opset of every domain in
    use are part of the program. Empty when the two are the same one. Values of initializers (not those of Constant nodes),
    names of edges and metadata are not compared. Raises ExportError for what cannot be read.
    """
    left, right = loaded(a), loaded(b)
    programs = _Programs(left, right)
    return _opsets(left.graph, right.graph, "") + _graphs(left.graph, right.graph, programs, "")


def loaded(path: Path) -> ir.Model:
    """An ONNX file, external data unread until it is asked for. Raises ExportError, also for sparse initializers."""
    import onnx
    import onnx_ir as ir

    try:
        proto = onnx.load(str(path), load_external_data=False)
        model = ir.from_proto(proto)
    except Exception as error:  # protobuf's own types
        raise ExportError(f"{path}: cannot be read as ONNX ({type(error).__name__}: {error})") from error
    sparse = ", ".join(name for graph in (proto.graph, *proto.functions) for name in _sparse(graph))
    if sparse:  # onnx_ir drops them without a word
        raise ExportError(f"{path}: cannot be compared: the initializer {sparse} is sparse; store it as a dense tensor")
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, path.parent)
    return model


def _sparse(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[str]:
    """Names of the sparse initializers of a graph and of its subgraphs; a function has them in its subgraphs only."""
    yield from (tensor.values.name for tensor in getattr(graph, "sparse_initializer", ()))
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _sparse(subgraph)


def functions_of(model: ir.Model) -> dict[Operator, ir.Function]:
    """The local functions of a file, by what a node that calls one is: ``node.op_identifier()``."""
    return {(_domain(f.domain), f.name, f.overload): f for f in model.functions.values()}


def _domain(name: str) -> str:
    """ONNX's own domain has two names; onnx_ir knows that of nodes, and not of functions and opsets."""
    return "" if name == "ai.onnx" else name


class _Programs:
    """Two files: their functions, and which value of one stands for which of the other, both ways."""

    def __init__(self, left: ir.Model, right: ir.Model) -> None:
        self.functions = functions_of(left), functions_of(right)
        self.called: set[Operator] = set()  # functions whose bodies have been compared
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


def _graphs(one: ir.Graph | ir.Function, two: ir.Graph | ir.Function, programs: _Programs, where: str) -> list[str]:
    """Two main graphs, two subgraphs or two function bodies. A subgraph's edges to outer values are edges as any other.

    ``where``: in front of every difference, "" for the main graph.
    """
    found = []
    for what, x, y in (("inputs", one.inputs, two.inputs), ("outputs", one.outputs, two.outputs), ("nodes", one, two)):
        if len(x) != len(y):
            found.append(f"{where}{what}: {len(x)} against {len(y)}")
    for first, second in zip(one.inputs, two.inputs, strict=False):
        found += programs.match(first, second, f"{where}input {first.name!r}")
    for number, (node, other) in enumerate(zip(one, two, strict=False)):
        found += _nodes(node, other, programs, f"{where}node {number}")
    for first, second in zip(one.outputs, two.outputs, strict=False):
        found += programs.match(first, second, f"{where}output {first.name!r}")
    return found


def _nodes(one: ir.Node, two: ir.Node, programs: _Programs, where: str) -> list[str]:
    if one.op_identifier() != two.op_identifier():
        return [f"{where}: {one.op_type} against {two.op_type}"]
    where = f"{where} ({one.op_type})"
    found = []
    for what, x, y in (("inputs", one.inputs, two.inputs), ("outputs", one.outputs, two.outputs)):
        if len(x) != len(y):
            found.append(f"{where}: {len(x)} {what} against {len(y)}")
    found += _attributes(one, two, where)
    for number, (given, other) in enumerate(zip(one.inputs, two.inputs, strict=False)):
        found += programs.match(given, other, f"{where} input {number}")
    held = dict(subgraphs(two))
    for name, graph in subgraphs(one):
        found += _graphs(graph, held[name], programs, f"{where} {name} ") if name in held else []
    found += _bodies(one, programs, where)
    for number, (made, another) in enumerate(zip(one.outputs, two.outputs, strict=False)):
        found += programs.match(made, another, f"{where} output {number}")
    return found


def _bodies(call: ir.Node, programs: _Programs, where: str) -> list[str]:
    """The local function that a node calls, if it is one; at its first call, since it is the same at every other."""
    key = call.op_identifier()
    one, two = (functions.get(key) for functions in programs.functions)
    if key in programs.called or one is two:  # both None: an operator of the runtime
        return []
    programs.called.add(key)
    if one is None or two is None:
        return [f"{where}: a local function in one file and not in the other"]
    where = f"{where} body "
    return _opsets(one, two, where) + _attributes(one, two, where.rstrip()) + _graphs(one, two, programs, where)


def _opsets(one: ir.Graph | ir.Function, two: ir.Graph | ir.Function, where: str) -> list[str]:
    """The version of every domain in use, subgraphs included: the same operator may do another thing in another opset."""
    from onnx_ir.traversal import RecursiveGraphIterator

    used = {node.domain for graph in (one, two) for node in RecursiveGraphIterator(graph)}
    left, right = ({_domain(name): v for name, v in graph.opset_imports.items()} for graph in (one, two))
    return [
        f"{where}opset of {domain or 'ai.onnx'} is {left.get(domain)} against {right.get(domain)}"
        for domain in sorted(used)
        if left.get(domain) != right.get(domain)
    ]


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The graphs among the attributes of a node, by the name that differences and weights give them."""
    import onnx_ir as ir

    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from ((f"{name}[{number}]", graph) for number, graph in enumerate(attribute.as_graphs()))


def _attributes(one: ir.Node | ir.Function, two: ir.Node | ir.Function, where: str) -> list[str]:
    """Attributes of two nodes, or those that two functions take, with their defaults."""
    left, right = ({name: _text(a) for name, a in held.attributes.items()} for held in (one, two))
    return [
        f"{where}: attribute {name!r} is {_short(left.get(name))} against {_short(right.get(name))}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def _text(attribute: ir.Attr) -> str:
    """Type and value of an attribute; in a function it may instead name one of the function's own."""
    value = f"that of {attribute.ref_attr_name}" if attribute.is_ref() else repr(_value(attribute))
    return f"{attribute.type} {value}"


def _short(text: str | None) -> str:
    return "missing" if text is None else text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _value(attribute: ir.Attr) -> object:
    """As something whose text is its value. Of graphs only how many: their text has memory addresses, see ``_nodes``."""
    import onnx_ir as ir

    if attribute.type == ir.AttributeType.TENSOR:
        return _content(attribute.as_tensor())
    if attribute.type == ir.AttributeType.TENSORS:
        return [_content(tensor) for tensor in attribute.as_tensors()]
    if attribute.type == ir.AttributeType.GRAPH:
        return 1
    return len(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else attribute.value


def _content(tensor: ir.TensorProtocol) -> object:
    """Type, shape and bytes."""
    import onnx_ir as ir

    content = tuple(tensor.string_data()) if isinstance(tensor, ir.StringTensor) else tensor.tobytes()
    return tensor.dtype, tuple(tensor.shape.numpy()), content
