"""The graph proof: the fused model has the base's operators, attributes, edges and shapes; what folding had to add is listed.

Both are captured by ``torch.export`` on the same example. Multiply-adds are torch's own count (``FlopCounterMode``, two per multiply-add).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from reparam_export.calls import experts, foreign
from reparam_export.models import Signature, float_dtype, plain
from reparam_export.verification.certificate import GraphEvidence

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 5  # differences listed


def compare_graphs(
    base: nn.Module,
    fused: nn.Module,
    signature: Signature,
    inputs: Mapping[str, Tensor],
    created: Sequence[str],
    untied: Mapping[str, str] | None = None,
) -> GraphEvidence:
    """base: the plain base, where each created bias stands as zeros, and each untied tensor on its own. Both are left as they were.

    untied: names that are tensors of their own now -> the tensor that each was one with.
    """
    example = tuple(_cast(inputs[i.name][:1], base) for i in signature.inputs)
    captured = [capture(model, signature, example) for model in (base, fused)]
    lines = [describe(nodes) for nodes in captured]
    differences = [f"node {i}: base {a}, fused {b}" for i, (a, b) in enumerate(zip(*lines, strict=False)) if a != b]
    if len(lines[0]) != len(lines[1]):
        differences.append(f"{len(lines[0])} nodes in the base, {len(lines[1])} in the fused model")
    sizes = {name: tuple(tensor.shape) for name, tensor in fused.state_dict().items()}
    created = [name for name in created if name in sizes]
    added = [f"{name} {sizes[name]}: a bias that the base does not have" for name in created]
    added += [f"{name} {sizes[name]}: one tensor with {holder} in the base" for name, holder in (untied or {}).items()]
    new = [fused.get_parameter(name) for name in (*created, *(untied or {}))]
    extra, extra_bytes = sum(p.numel() for p in new), sum(p.numel() * p.element_size() for p in new)
    return GraphEvidence(
        nodes_base=len(lines[0]),
        nodes_fused=len(lines[1]),
        operators=dict(Counter(_operator(node.target) for node in captured[1] if node.op == "call_function")),
        differences=tuple(differences[:SHOWN]),
        added=tuple(added),
        parameters_base=parameters(base) - extra,
        parameters_fused=parameters(fused),
        bytes_base=stored_bytes(base) - extra_bytes,
        bytes_fused=stored_bytes(fused),
        macs_base=multiply_adds(base, signature, example),
        macs_fused=multiply_adds(fused, signature, example),
    )


def _operator(target: Any) -> str:
    """``aten.add.Tensor``, or the plain name of a Python function."""
    return str(target) if not isinstance(target, BuiltinFunctionType) else target.__name__


def capture(model: nn.Module, signature: Signature, example: tuple[Tensor, ...]) -> list[Any]:
    """The nodes of the exported graph. Raises FusionError when torch cannot capture the model."""
    import torch

    with (
        foreign(f"{type(model).__name__}: its graph", "captured by torch.export"),
        warnings.catch_warnings(),
        torch.no_grad(),
        experts(model, "capture", signature.experts),
    ):
        warnings.simplefilter("ignore")
        return list(torch.export.export(plain(model, signature), example, strict=False).graph.nodes)


def describe(nodes: Sequence[Any]) -> list[str]:
    """One line per node: operator, edges by node number, attributes, result shape and dtype."""
    import torch.fx

    numbers = {node: i for i, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{numbers[n]}")
        value = node.meta.get("val")
        values = value if isinstance(value, tuple | list) else (value,)
        shapes = [f"{tuple(v.shape)}:{v.dtype}" for v in values if hasattr(v, "shape")]
        name = node.target if node.op in ("placeholder", "get_attr") else ""
        lines.append(f"{node.op} {name or node.target} {arguments} -> {shapes}")
    return lines


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def multiply_adds(model: nn.Module, signature: Signature, example: tuple[Tensor, ...]) -> int:
    """Multiply-adds of one call on the example (batch 1), as torch counts them.

    Attention is computed by plain products meanwhile: torch does not count its fused operators on a CPU.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    own = experts(model, "capture", signature.experts)
    with (
        foreign(type(model).__name__, "run while its multiply-adds are counted"),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        own,
    ):
        plain(model, signature)(*example)
    return int(counter.get_total_flops()) // 2


def _cast(tensor: Tensor, model: nn.Module) -> Tensor:
    return tensor.to(float_dtype(model)) if tensor.is_floating_point() else tensor
