"""A module whose kind has no factors: the whole layer in float64, as ``fuse`` in memory folds it, with the same proof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reparam_export.affine import Affine, map_tensors
from reparam_export.assembly import stacks
from reparam_export.checkpoints import Adapter
from reparam_export.fusion import fold_affine
from reparam_export.streaming.formats import Format, finite, refuse_overflow, wide
from reparam_export.streaming.forms import Touched, array64, format_of
from reparam_export.streaming.layers import Folded, Write, refusal
from reparam_export.streaming.shards import of_tensor
from reparam_export.verification.certificate import LayerEvidence


def fold_whole(touched: Touched, targets: Mapping[str, Format], write: Write, seed: int) -> Folded:
    """As ``fold_layer``, in torch. Raises EquivalenceError, FusionError."""
    import torch

    base = base64(touched)
    adapters = adapters64(touched)
    fused = fold_affine(base, adapters)
    names = (f"{touched.module}.weight", f"{touched.module}.bias")
    weight_format = targets.get(names[0], format_of(touched.weight))
    stored = _stored(fused, weight_format, targets.get(names[1], weight_format))
    evidence = _evidence(touched, targets, _proofs(touched, adapters, (base, stored), seed), stored)
    if not evidence.passed:
        at = evidence.worst or {}
        raise refusal(
            touched,
            at.get("index", []),
            at.get("expected", math.nan),
            at.get("found", math.nan),
            evidence.bound_ratio,
            tensor=at.get("tensor", "weight"),
        )
    for name, tensor in zip(
        names, (stored.weight.T if touched.transposed else stored.weight, stored.bias), strict=True
    ):
        if name in targets:
            _write(name, tensor, targets[name], touched.shape[0], write)
    bias = fused.bias
    same = bias is None or torch.equal(bias, torch.zeros_like(bias) if base.bias is None else base.bias)
    return Folded(evidence, not same)


def base64(touched: Touched) -> Affine:
    """The base's own layer in float64 torch tensors."""
    import torch

    values = wide(touched.weight.values(), format_of(touched.weight))
    bias = touched.bias64()
    matrix = torch.from_numpy(values.T if touched.transposed else values)
    return Affine(matrix, None if bias is None else torch.from_numpy(bias))


def adapters64(touched: Touched) -> list[Adapter]:
    """The adapters with float64 torch tensors; indices stay integers."""
    return [replace(a, params=map_tensors(a.params, tensor64)) for a in touched.adapters]


def tensor64(tensor: Any) -> Any:
    """A float64 torch tensor of an adapter's; indices stay integers."""
    import torch

    stored = of_tensor("adapter", tensor)
    return torch.from_numpy(array64(tensor)) if stored.is_float else torch.as_tensor(tensor)


def _stored(fused: Affine, weight: Format, bias: Format) -> Affine:
    import torch

    from reparam_export.rounding import round_once

    rounded = None if fused.bias is None else round_once(fused.bias, getattr(torch, bias.torch))
    return Affine(round_once(fused.weight, getattr(torch, weight.torch)), rounded)


def _proofs(
    touched: Touched, adapters: Sequence[Adapter], pair: tuple[Affine, Affine], seed: int
) -> list[dict[str, Any]]:
    """The numbers of the weight proof, adapter by adapter. pair: the base and what is stored."""
    import torch

    from reparam_export.verification.weights import EXHAUSTIVE_LIMIT, Exact, probe, read_out

    out, inn = touched.shape
    numbers = []
    for rows, steps in stacks(adapters, torch.float64):
        part, held = (affine.rows(*rows) if rows else affine for affine in pair)
        exact = Exact(part, tuple(steps))
        with torch.no_grad():
            numbers.append(read_out(exact, held) if inn * inn * out <= EXHAUSTIVE_LIMIT else probe(exact, held, seed))
    return numbers


def _evidence(
    touched: Touched, targets: Mapping[str, Format], numbers: Sequence[Mapping[str, Any]], stored: Affine
) -> LayerEvidence:
    """The evidence of a module out of that of its adapters."""
    worst = max(numbers, key=lambda n: float(n["bound_ratio"]))
    changed = math.fsum(n["change"] for n in numbers)
    kept = math.fsum(n["survival"] * n["change"] for n in numbers)
    order = ("wrong", "rounded", "exact")
    return LayerEvidence(
        module=touched.module,
        kind=touched.kinds,
        tensors=tuple(targets),
        shape=touched.shape,
        dtype=str(stored.weight.dtype).removeprefix("torch."),
        method=worst["method"],
        entries=stored.weight.numel() + (0 if stored.bias is None else stored.bias.numel()),
        exact_entries=sum(n["exact_entries"] for n in numbers),
        max_error=max(n["max_error"] for n in numbers),
        bound_ratio=worst["bound_ratio"],
        survival=kept / changed if changed > 0 else 1.0,
        verdict=min((n["verdict"] for n in numbers), key=order.index),
        probes=max(n.get("probes", 0) for n in numbers),
        detectable=max(n.get("detectable", 0.0) for n in numbers),
        worst=worst["worst"],
        change=changed,
    )


def _write(name: str, tensor: Any, of: Format, length: int, write: Write) -> None:
    """A torch tensor in its raw form; zeros for a bias that a switch of the config brings. Raises FusionError when it is not finite."""
    import torch

    if tensor is None:
        write(name, 0, np.zeros(length, of.raw))
        return
    raw = tensor.contiguous().view(torch.int16 if of.size == 2 else tensor.dtype).numpy().view(of.raw)
    if not finite(raw, of):
        raise refuse_overflow(name, of)
    write(name, 0, raw)
