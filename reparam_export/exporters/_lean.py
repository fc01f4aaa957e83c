"""Optimise an exported graph without losing, merging or renaming a parameter.

The passes are onnxscript's own, less those that compute with weights or with numbers that are only nearly what they look for: constant
folding stops at parameters, batch norms are not folded into convolutions, zero biases are not dropped, two equal parameters stay two,
and ``x + 1e-15``, which keeps a division from 0/0, stays (onnxscript takes all below 1e-8 for 0).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx_ir.passes import PassManager, Sequential


def lean(model: ir.Model, parameters: Collection[str]) -> frozenset[str]:
    """Optimise ``model`` in place; returns the parameters that the graph reads; the others are dropped.

    ``parameters`` are the names of the initializers to be kept as they are. Those that were stored transposed are
    listed in the metadata, key ``transposed``, as JSON.
    """
    from onnxscript.rewriter import onnx_fusions

    Sequential(passes.InlinePass(), passes.RemoveUnusedNodesPass())(model)
    _drop_idle_squeezes(model.graph)
    held = set(parameters) & set(model.graph.initializers)
    _passes(held)(model)
    onnx_fusions.fuse(model)
    transposed = sorted(_transpose(model.graph, held))
    _share_constants(model.graph, held)
    Sequential(
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model)
    _name_nodes(model.graph)
    model.metadata_props["transposed"] = json.dumps(transposed)
    return frozenset(held)


def _passes(held: Collection[str]) -> Any:
    """What ``torch.onnx.export(optimize=True)`` runs, with the weights left alone."""
    from onnxscript import rewriter
    from onnxscript.optimizer import _constant_folding as folding
    from onnxscript.rewriter.rules import common

    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if not _changes_numbers(rule, common)]

    def fold(node: ir.Node) -> bool | None:
        """Only constants that are no parameters may be folded; ``None`` leaves it to the pass."""
        return False if any(v is not None and v.name in held for v in node.inputs) else None

    step = PassManager(
        [
            folding.FoldConstantsPass(
                shape_inference=True,
                input_size_limit=folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
                output_size_limit=folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
                should_fold=fold,
            ),
            rewriter.RewritePass(rules),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            passes.RemoveUnusedOpsetsPass(),
        ],
        steps=2,
        early_stop=True,
    )
    return Sequential(
        step,
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.CommonSubexpressionEliminationPass(),
    )


def _changes_numbers(rule: Any, common: Any) -> bool:
    """Batch norm folding changes weights; the others drop a number, or a parameter, that is 0 or 1 or nearly so."""
    starts = ("fuse_batchnorm", "remove_optional_bias")
    named = any(rule is getattr(common, name) for name in common.__all__ if name.startswith(starts))
    return named or any(rule is other for other in common._no_op.rules)


def _drop_idle_squeezes(graph: ir.Graph) -> None:
    """Take out each Squeeze of an axis that is not of size 1: torch's does nothing there, its exporter writes it, ONNX refuses it."""
    for node in [node for node in graph if node.op_type == "Squeeze" and node.domain == ""]:
        before, after = node.inputs[0], node.outputs[0]
        shapes = None if before is None else before.shape, after.shape
        if before is None or shapes[0] is None or shapes[1] is None or len(shapes[0]) != len(shapes[1]):
            continue
        same = ir.node("Identity", [before])
        (kept,) = same.outputs
        kept.shape, kept.type = after.shape, after.type
        graph.insert_before(node, same)
        after.replace_all_uses_with(kept, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        kept.name = after.name


def _transpose(graph: ir.Graph, held: Collection[str]) -> list[str]:
    """Store a matrix transposed when every reader transposes it; returns the names."""
    done = []
    for name in held:
        value = graph.initializers.get(name)
        tensor = value.const_value if value is not None else None
        if value is None or tensor is None or len(tensor.shape) != 2 or value.is_graph_output():
            continue
        readers = value.consumers()
        if not readers or not all(n.op_type == "Transpose" and n.domain == "" and _perm(n) == [1, 0] for n in readers):
            continue
        if any(node.outputs[0].is_graph_output() for node in readers):
            continue
        value.const_value = _turned(tensor)
        value.shape = ir.Shape(list(reversed(tensor.shape.numpy())))
        for node in readers:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
        done.append(name)
    return done


def _turned(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The transpose, computed when it is written, one tensor in memory at a time."""
    import numpy as np

    def turn() -> ir.Tensor[Any]:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(turn, tensor.dtype, ir.Shape(list(reversed(tensor.shape.numpy()))), name=tensor.name)


def _perm(node: ir.Node) -> list[int]:
    attribute = node.attributes.get("perm")
    return [1, 0] if attribute is None else list(attribute.as_ints())


def _share_constants(graph: ir.Graph, held: Collection[str], limit: int = 1024) -> None:
    """Merge equal small constants that are no parameters."""
    seen: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if name in held or tensor is None or tensor.nbytes > limit or value.is_graph_output():
            continue
        first = seen.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.initializers.pop(name)


def _name_nodes(graph: ir.Graph) -> None:
    """Every node gets a name of its own: builders and reports refer to nodes by name."""
    for number, node in enumerate(graph):
        node.name = f"{node.op_type}_{number}"
