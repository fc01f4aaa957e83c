"""``compare`` on small hand-made ONNX files: local functions, subgraphs, opsets, and outputs that vanish or change shape."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_cli import error_of, run

from reparam_export.comparison import compare
from reparam_export.comparison.sides import side
from reparam_export.exporters.onnx import differences
from reparam_export.latency.contenders import file_facts

Node = onnx.NodeProto
EYE = np.eye(4, dtype=np.float32)
OWN = "local"  # the domain of the functions below


def tensor(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def rows(name: str, width: int | str | None = 4) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])


def write(
    path: Path,
    nodes: Sequence[Node],
    weights: Sequence[onnx.TensorProto] = (),
    *,
    outputs: Sequence[onnx.ValueInfoProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 17,
) -> Path:
    """A checked file with the input ``x`` (n x 4) and the output ``y``."""
    graph = helper.make_graph(nodes, "g", inputs or [rows("x")], outputs or [rows("y", None)], weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(OWN, 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def function(name: str, nodes: Sequence[Node], opset: int = 17, **attributes: Any) -> onnx.FunctionProto:
    """``v = name(x, w)``."""
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(OWN, 1)]
    return helper.make_function(OWN, name, ["x", "w"], ["v"], nodes, opsets, **attributes)


def calling(path: Path, *functions: onnx.FunctionProto, times: int = 1, **attributes: Any) -> Path:
    """``y = F(...F(x, w), w)``."""
    names = ["x", *(f"y{n}" for n in range(1, times)), "y"]
    nodes = [helper.make_node("F", [a, "w"], [b], domain=OWN, **attributes) for a, b in itertools.pairwise(names)]
    return write(path, nodes, [tensor("w", EYE)], functions=functions)


PRODUCT = helper.make_node("MatMul", ["x", "w"], ["v"])
DETOUR = (  # the same answers by four nodes
    helper.make_node("MatMul", ["x", "w"], ["p"]),
    helper.make_node("MatMul", ["x", "w"], ["q"]),
    helper.make_node("Sub", ["p", "q"], ["zero"]),
    helper.make_node("Add", ["p", "zero"], ["v"]),
)


def branching(
    path: Path,
    operator: str = "Add",
    scale: float = 1.0,
    *,
    shape: tuple[int, ...] = (4,),
    operand: str = "h",
    constant: float = 2.0,
    name: str = "if_node",
) -> Path:
    """``y = h + w2 if sum(x) > 0 else h * c``, ``h = relu(x)``: an initializer in one branch, a Constant in the other."""
    then_nodes = [helper.make_node(operator, [operand, "w2"], ["t"])]
    else_nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor("", constant)),
        helper.make_node("Mul", ["h", "c"], ["e"]),
    ]
    out = [[helper.make_tensor_value_info(o, TensorProto.FLOAT, None)] for o in "te"]
    then_branch = helper.make_graph(then_nodes, "then", [], out[0], [tensor("w2", np.full(shape, scale))])
    else_branch = helper.make_graph(else_nodes, "else", [], out[1])
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], name=name, then_branch=then_branch, else_branch=else_branch),
    ]
    return write(path, nodes, [tensor("zero", 0.0)])


def two_outputs(path: Path, width: int | None, *, classes: int = 4) -> Path:
    """``out = x W``, and ``feat``, the first ``width`` columns of x, unless that is None."""
    nodes, outputs = [helper.make_node("MatMul", ["x", "w"], ["out"])], [rows("out", classes)]
    weights = [tensor("w", np.eye(4, classes))]
    if width is not None:
        nodes.append(helper.make_node("MatMul", ["x", "cut"], ["feat"]))
        outputs.append(rows("feat", width))
        weights.append(tensor("cut", np.eye(4, width)))
    return write(path, nodes, weights, outputs=outputs)


def test_what_is_not_onnx_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a file of ONNX")
    result = run("compare", tmp_path / "a.onnx", tmp_path / "a.onnx", "--no-latency")
    assert result.exit_code == 5
    assert "cannot be read as ONNX" in error_of(result)


# graph: local functions


def test_the_bodies_of_local_functions_are_part_of_the_program(tmp_path: Path) -> None:
    a = calling(tmp_path / "a.onnx", function("F", [PRODUCT]))
    b = calling(tmp_path / "b.onnx", function("F", DETOUR))
    result = run("compare", a, b, "--no-latency", "--fail-on", "graph")
    assert result.exit_code == 1
    assert "1 against 4 nodes" in result.stdout
    assert "the same program" not in result.stdout
    assert run("compare", a, a, "--no-latency", "--fail-on", "graph").exit_code == 0


def test_a_function_that_a_function_calls_is_part_of_the_program(tmp_path: Path) -> None:
    outer = function("F", [helper.make_node("G", ["x", "w"], ["v"], domain=OWN)])
    a = calling(tmp_path / "a.onnx", function("G", [PRODUCT]), outer)
    b = calling(tmp_path / "b.onnx", function("G", DETOUR), outer)
    assert differences(a, a) == []
    assert any("body" in line for line in differences(a, b))


def test_a_function_that_one_file_lacks_is_named(tmp_path: Path) -> None:
    a = calling(tmp_path / "a.onnx", function("F", [PRODUCT]))
    b = calling(tmp_path / "b.onnx")
    assert [line for line in differences(a, b) if "local function" in line]
    assert [line for line in differences(b, a) if "local function" in line]


@pytest.mark.parametrize("spelled", ["", "ai.onnx"])
def test_a_function_in_onnx_s_own_domain_is_found_under_both_of_its_names(tmp_path: Path, spelled: str) -> None:
    files = []
    for name, nodes in (("a", [PRODUCT]), ("b", DETOUR)):
        own = helper.make_function("ai.onnx", "F", ["x", "w"], ["v"], nodes, [helper.make_opsetid("", 17)])
        call = helper.make_node("F", ["x", "w"], ["y"], domain=spelled)
        graph = helper.make_graph([call], "g", [rows("x")], [rows("y")], [tensor("w", EYE)])
        model = helper.make_model(graph, functions=[own], opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / f"{name}.onnx")
        files.append(tmp_path / f"{name}.onnx")
    assert differences(*files)
    assert [file_facts(file)[0] for file in files] == [1, 4]


def test_attributes_of_a_function_are_compared_by_what_they_refer_to_and_by_default(tmp_path: Path) -> None:
    def scaled(refers: str, default: float) -> onnx.FunctionProto:
        node = helper.make_node("LeakyRelu", ["x"], ["v"])
        node.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name=refers)
        defaults = [helper.make_attribute(name, default) for name in ("slope", "other")]
        return function("F", [node], attribute_protos=defaults)

    first = calling(tmp_path / "a.onnx", scaled("slope", 0.5), slope=0.1)
    for name, refers, default in (("refers", "other", 0.5), ("default", "slope", 0.25)):
        assert differences(first, calling(tmp_path / f"{name}.onnx", scaled(refers, default), slope=0.1)), name
    assert differences(first, calling(tmp_path / "same.onnx", scaled("slope", 0.5), slope=0.1)) == []


def test_node_counts_follow_every_call_and_every_subgraph(tmp_path: Path) -> None:
    outer = function(
        "F", [helper.make_node("G", ["x", "w"], ["u"], domain=OWN), helper.make_node("Relu", ["u"], ["v"])]
    )
    nested = calling(tmp_path / "nested.onnx", function("G", DETOUR), outer, times=3)
    assert file_facts(nested)[:3] == (15, {"Add": 3, "MatMul": 6, "Relu": 3, "Sub": 3}, 1)
    operators = {"Add": 1, "Constant": 1, "Greater": 1, "If": 1, "Mul": 1, "ReduceSum": 1, "Relu": 1}
    assert file_facts(branching(tmp_path / "if.onnx"))[:3] == (7, operators, 2)


def test_functions_that_call_each_other_are_an_error_and_not_a_hang(tmp_path: Path) -> None:
    from reparam_export.errors import ExportError

    body = [helper.make_node("F", ["x", "w"], ["v"], domain=OWN)]
    graph = helper.make_graph(
        [helper.make_node("F", ["x", "w"], ["y"], domain=OWN)], "g", [rows("x")], [rows("y")], [tensor("w", EYE)]
    )
    model = helper.make_model(graph, functions=[function("F", body)], ir_version=9)
    onnx.save(model, tmp_path / "a.onnx")
    assert differences(tmp_path / "a.onnx", tmp_path / "a.onnx") == []
    with pytest.raises(ExportError, match="calls itself"):
        file_facts(tmp_path / "a.onnx")


# graph: opsets


def test_another_opset_of_a_domain_in_use_is_another_program(tmp_path: Path) -> None:
    a, b = (
        write(tmp_path / f"{opset}.onnx", [helper.make_node("Relu", ["x"], ["y"])], opset=opset) for opset in (17, 13)
    )
    result = run("compare", a, b, "--no-latency", "--fail-on", "graph")
    assert result.exit_code == 1
    assert "opset of ai.onnx is 17 against 13" in result.stdout


def test_the_opset_of_a_domain_that_nothing_uses_does_not_matter(tmp_path: Path) -> None:
    a = write(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    model = onnx.load(a)
    model.opset_import[1].version = 2
    model.opset_import[0].domain = "ai.onnx"  # the same domain by its other name
    onnx.save(model, tmp_path / "b.onnx")
    assert differences(a, tmp_path / "b.onnx") == []


def test_the_opset_inside_a_function_counts(tmp_path: Path) -> None:
    a, b = (calling(tmp_path / f"{opset}.onnx", function("F", [PRODUCT], opset)) for opset in (17, 13))
    assert [line for line in differences(a, b) if "opset of ai.onnx is 17 against 13" in line]


# graph: subgraphs


def test_a_file_with_a_branch_is_the_same_program_as_itself(tmp_path: Path) -> None:
    a, b = branching(tmp_path / "a.onnx"), branching(tmp_path / "b.onnx", scale=3.0, name="another_name")
    assert differences(a, a) == []
    assert differences(a, b) == [], "weights and names may differ"
    assert run("compare", a, a, "--no-latency", "--fail-on", "graph").exit_code == 0


@pytest.mark.parametrize(
    "change", [{"operator": "Mul"}, {"shape": (1, 4)}, {"operand": "x"}, {"constant": 2.5}], ids=lambda c: next(iter(c))
)
def test_what_differs_in_a_branch_is_found(tmp_path: Path, change: dict[str, Any]) -> None:
    found = differences(branching(tmp_path / "a.onnx"), branching(tmp_path / "b.onnx", **change))
    assert found
    assert all("_branch" in line for line in found)
    assert "0x" not in str(found)


def test_a_loop_s_body_is_compared_with_its_inputs(tmp_path: Path) -> None:
    def looping(path: Path, swapped: bool) -> Path:
        info = helper.make_tensor_value_info
        inputs = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), rows("p"), rows("q")]
        order = ["q", "p"] if swapped else ["p", "q"]
        nodes = [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Sub", order, ["p2"]),
            helper.make_node("Identity", ["q"], ["q2"]),
        ]
        body = helper.make_graph(nodes, "body", inputs, [info("on", TensorProto.BOOL, []), rows("p2"), rows("q2")])
        times = numpy_helper.from_array(np.array(3), "times")
        return write(path, [helper.make_node("Loop", ["times", "", "x", "x"], ["y", "z"], body=body)], [times])

    a, same, other = (
        looping(tmp_path / f"{n}.onnx", swapped) for n, swapped in (("a", False), ("b", False), ("c", True))
    )
    assert differences(a, same) == []
    assert differences(a, other)
    assert file_facts(a)[0] == 4


# weights


def test_initializers_of_a_branch_are_among_the_weights(tmp_path: Path) -> None:
    a, b = branching(tmp_path / "a.onnx"), branching(tmp_path / "b.onnx", scale=3.0)
    found = compare(a, b, latency=False)
    assert found.tensors == 2
    assert [(w.name, w.entries, w.largest) for w in found.weights] == [("if_node/then_branch/w2", 4, 2.0)]
    assert run("compare", a, b, "--no-latency", "--fail-on", "weights").exit_code == 1


def test_a_node_without_a_name_is_named_by_its_place(tmp_path: Path) -> None:
    a, b = branching(tmp_path / "a.onnx", name=""), branching(tmp_path / "b.onnx", scale=3.0, name="")
    assert [w.name for w in compare(a, b, latency=False).weights] == ["If_3/then_branch/w2"]


def test_two_tensors_under_one_name_are_both_compared(tmp_path: Path) -> None:
    files = []
    for scale in (1.0, 3.0):
        files.append(branching(tmp_path / f"{scale}.onnx", scale=scale))
        model = onnx.load(files[-1])
        model.graph.initializer[0].name = model.graph.node[2].input[1] = "if_node/then_branch/w2"
        onnx.save(model, files[-1])
    assert compare(files[0], files[0], latency=False).changed["weights"] is False
    found = compare(*files, latency=False)
    assert found.tensors == 2
    assert [w.name for w in found.weights] == ["if_node/then_branch/w2 (2)"]


def test_constants_of_a_function_are_among_the_weights(tmp_path: Path) -> None:
    files = []
    for scale in (1.0, 3.0):
        body = [
            helper.make_node("Constant", [], ["c"], value=tensor("", np.full(4, scale))),
            helper.make_node("Constant", [], ["words"], value_strings=["a", "b"]),
            helper.make_node("Mul", ["x", "c"], ["v"]),
        ]
        files.append(calling(tmp_path / f"{scale}.onnx", function("F", body)))
    found = compare(*files, latency=False)
    assert found.tensors == 3
    assert [(w.name, w.largest) for w in found.weights] == [("local/F/c", 2.0)]
    assert found.changed["graph"], "a Constant's value is part of the program"


def test_a_function_s_constant_may_stand_in_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for scale in (1.0, 3.0):
        constant = helper.make_node("Constant", [], ["c"], value=tensor("c", np.full(4, scale)))
        path = calling(
            tmp_path / f"{scale}.onnx", function("F", [constant, helper.make_node("Mul", ["x", "c"], ["v"])])
        )
        outside = {"save_as_external_data": True, "size_threshold": 0, "convert_attribute": True}
        onnx.save(onnx.load(path), path, location=f"{scale}.data", **outside)
        files.append(path)
    assert (tmp_path / "3.0.data").is_file()
    monkeypatch.chdir("/")
    assert differences(files[0], files[0]) == []
    assert differences(*files)
    assert dict(side(files[1]).tensors())["local/F/c"].tolist() == [3.0] * 4  # type: ignore[misc]


# outputs


def test_an_output_that_vanished_is_a_changed_output(tmp_path: Path) -> None:
    a, b = two_outputs(tmp_path / "a.onnx", 2), two_outputs(tmp_path / "b.onnx", None)
    for left, right, shapes in ((a, b, ("16x2 float32", "")), (b, a, ("", "16x2 float32"))):
        found = {o.output: o for o in compare(left, right, latency=False).outputs}
        assert set(found) == {"out", "feat"}
        assert (found["feat"].a, found["feat"].b) == shapes
        assert found["feat"].largest is None
        assert found["out"].largest == 0
        result = run("compare", left, right, "--no-latency", "--fail-on", "outputs")
        assert result.exit_code == 1
        assert "outputs differ" in error_of(result)
        assert f"output feat: only in {'A' if left == a else 'B'} (16x2 float32)" in result.stdout
    shown = json.loads(run("compare", a, b, "--no-latency", "--json").stdout)
    assert shown["changed"]["outputs"] is True
    assert [o["output"] for o in shown["outputs"] if o["largest"] is None] == ["feat"]


def test_an_output_of_another_shape_is_a_changed_output(tmp_path: Path) -> None:
    a, b = two_outputs(tmp_path / "a.onnx", 2), two_outputs(tmp_path / "b.onnx", 3)
    found = compare(a, b, latency=False)
    assert found.changed["outputs"]
    assert [(o.output, o.a, o.b) for o in found.outputs if o.largest is None] == [
        ("feat", "16x2 float32", "16x3 float32")
    ]
    result = run("compare", a, b, "--no-latency", "--fail-on", "outputs")
    assert result.exit_code == 1
    assert "output feat: 16x2 float32 in A, 16x3 float32 in B" in result.stdout
    assert run("compare", a, a, "--no-latency", "--fail-on", "outputs").exit_code == 0


def test_the_only_output_in_another_shape_is_a_changed_output(tmp_path: Path) -> None:
    a, b = two_outputs(tmp_path / "a.onnx", None), two_outputs(tmp_path / "b.onnx", None, classes=3)
    assert run("compare", a, b, "--no-latency", "--fail-on", "outputs").exit_code == 1


def test_a_scalar_output_is_compared(tmp_path: Path) -> None:
    scalar = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])]
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    a = write(tmp_path / "a.onnx", nodes, outputs=scalar)
    assert [(o.samples, o.largest, o.a) for o in compare(a, a, latency=False).outputs] == [(1, 0.0, "scalar float32")]


def test_outputs_of_files_with_other_inputs_cannot_pass(tmp_path: Path) -> None:
    a = write(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    b = write(tmp_path / "b.onnx", [helper.make_node("Relu", ["z"], ["y"])], inputs=[rows("z")])
    result = run("compare", a, b, "--no-latency", "--fail-on", "outputs")
    assert result.exit_code == 1
    assert "outputs could not be compared" in error_of(result)
    assert run("compare", a, b, "--no-latency").exit_code == 0


@pytest.mark.parametrize("width", [3, 4])
def test_an_input_of_another_shape_or_type_cannot_pass(tmp_path: Path, width: int) -> None:
    a = write(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    dtype = TensorProto.FLOAT if width == 3 else TensorProto.DOUBLE
    other = helper.make_tensor_value_info("x", dtype, ["n", width])
    out = helper.make_tensor_value_info("y", dtype, ["n", None])
    b = write(tmp_path / "b.onnx", [helper.make_node("Relu", ["x"], ["y"])], inputs=[other], outputs=[out])
    result = run("compare", a, b, "--no-latency", "--fail-on", "outputs")
    assert result.exit_code == 1
    assert "outputs could not be compared" in error_of(result)
    found = "takes x as nx3 float32; the samples are 16x4 float32" if width == 3 else "takes x as nx4 float64"
    assert found in result.stdout
    np.save(tmp_path / "x.npy", np.zeros((2, width), np.float32 if width == 3 else np.float64))
    result = run("compare", a, a, "--no-latency", "--inputs", tmp_path / "x.npy")
    assert result.exit_code == 2
    assert "takes x as nx4 float32; the samples are 2x" in error_of(result)


def test_a_fixed_batch_is_kept_to(tmp_path: Path) -> None:
    fixed = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])
    a = write(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])], inputs=[fixed])
    assert [o.a for o in compare(a, a, latency=False).outputs] == ["3x4 float32"]


def test_sparse_initializers_are_refused_and_not_overlooked(tmp_path: Path) -> None:
    """onnx_ir leaves them out, so two files that differ in nothing else would be called the same."""
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    places = numpy_helper.from_array(np.asarray([0, 5], np.int64))
    sparse = helper.make_sparse_tensor(values, places, [4, 4])
    main = onnx.load(write(tmp_path / "a.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", EYE)]))
    del main.graph.initializer[:]
    main.graph.sparse_initializer.append(sparse)
    branch = onnx.load(branching(tmp_path / "b.onnx"))
    then = next(a.g for n in branch.graph.node for a in n.attribute if a.name == "then_branch")
    del then.initializer[:]
    sparse.values.name = "w2"
    then.sparse_initializer.append(sparse)
    for model, name in ((main, "w"), (branch, "w2")):
        onnx.save(model, tmp_path / "sparse.onnx")
        result = run("compare", tmp_path / "sparse.onnx", tmp_path / "sparse.onnx", "--no-latency")
        assert result.exit_code == 5
        assert f"the initializer {name} is sparse" in error_of(result)
