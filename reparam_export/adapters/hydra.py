"""Hydra: y = h + s P(x) + t S(h), h = W x + b, so W' = W + s P + t S W and b' = b + s p + t (S b + q).

P (parallel, with bias p) and S (sequential, with bias q) are low-rank pairs, each optional; s and t are their scales, one and the
same in the authors' vtab1k code. Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
2023, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, bottleneck_shapes, initial_pair
from reparam_export.affine import Affine, Bottleneck, LowRank, Tensor
from reparam_export.errors import UsageError

DROPOUT = "after"
BRANCHES = ("both", "parallel", "sequential")


@dataclass(frozen=True)
class Params:
    parallel: Bottleneck | None  # in -> r -> out
    sequential: Bottleneck | None  # out -> r -> out
    parallel_scale: Any  # a number, or a tensor of one entry (learnable)
    sequential_scale: Any


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    h = base(x)
    y = h
    if p.parallel is not None:
        y = y + p.parallel_scale * p.parallel(x)
    if p.sequential is not None:
        y = y + p.sequential_scale * p.sequential(h)
    return y


def fuse(base: Affine, p: Params) -> Affine:
    fused = base
    if p.parallel is not None:
        fused = fused.plus(p.parallel.down.then(p.parallel.up).times(p.parallel_scale))
    if p.sequential is not None:
        fused = fused.plus(base.then(p.sequential.down).then(p.sequential.up).times(p.sequential_scale))
    return fused


def low_rank(base: Affine, p: Params) -> LowRank:
    pairs: list[tuple[Bottleneck, Any]] = []
    if p.parallel is not None:
        pairs.append((p.parallel, p.parallel_scale))
    if p.sequential is not None:
        pairs.append((Bottleneck(base.then(p.sequential.down), p.sequential.up), p.sequential_scale))
    return LowRank.of(base, *pairs)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    if p.parallel is not None:
        expected |= bottleneck_shapes("parallel", p.parallel, in_features, out_features)
    if p.sequential is not None:
        expected |= bottleneck_shapes("sequential", p.sequential, out_features, out_features)
    for name in ("parallel_scale", "sequential_scale"):
        scale = getattr(p, name)
        if hasattr(scale, "shape"):
            expected[name] = tuple(scale.shape) if len(scale.shape) == 0 else (1,)
    return expected


def initial(
    base: Affine,
    rank: int,
    *,
    scale: float = 1.0,
    learnable_scale: bool = False,
    branches: str = "both",
    sequential_rank: int | None = None,
    bias: bool = True,
    init: str = "xavier",
) -> Params:
    """Down random, up and biases zero, both scales the same number.

    The defaults are those of the authors' vtab1k code; their CLIP code has init="normal", rank 2 and, if asked for,
    learnable scales from 1.0; their RoBERTa code init="kaiming", bias=False, rank 4 and sequential_rank 8.
    """
    if branches not in BRANCHES:
        raise UsageError(f"branches {branches!r}: expected one of {', '.join(BRANCHES)}")
    out, inn = base.out_features, base.in_features

    def pair(rank: int, width: int) -> Bottleneck:
        return initial_pair(base.weight, rank, width, out, init=init, bias=bias)

    def start() -> Any:
        return base.weight.new_full((1,), scale) if learnable_scale else float(scale)

    return Params(
        None if branches == "sequential" else pair(rank, inn),
        None if branches == "parallel" else pair(sequential_rank or rank, out),
        0.0 if branches == "sequential" else start(),
        0.0 if branches == "parallel" else start(),
    )


def branches(base: Affine, p: Params) -> dict[str, Tensor]:
    found = {}
    if p.parallel is not None:
        found["parallel"] = p.parallel.down.then(p.parallel.up).times(p.parallel_scale).weight
    if p.sequential is not None:
        found["sequential"] = base.then(p.sequential.down).then(p.sequential.up).times(p.sequential_scale).weight
    return found


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out, inn = base.out_features, base.in_features
    branches = draw.choice(("both", "both", "parallel", "sequential"))
    return Params(
        None if branches == "sequential" else draw.bottleneck(draw.integer(1, 5), inn, out, bias=seed % 2 == 0),
        None if branches == "parallel" else draw.bottleneck(draw.integer(1, 5), out, out, bias=seed % 3 != 0),
        0.3 + seed % 4,
        draw.tensor(1),
    )


def describe(p: Params) -> dict[str, Any]:
    branches: dict[str, tuple[Bottleneck | None, Any]] = {
        "parallel": (p.parallel, p.parallel_scale),
        "sequential": (p.sequential, p.sequential_scale),
    }
    return {name: {"rank": b.rank, "scale": float(scale)} for name, (b, scale) in branches.items() if b is not None}
