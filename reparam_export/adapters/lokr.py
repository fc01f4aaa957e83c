"""LoKr: y = W x + b + s (C (x) B) x with the Kronecker product (x), so W' = W + s C (x) B and b' = b.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2024. C and B may
each be a low-rank product; B of a convolution may have a core T for its kernel: B = sum_ij T_ijk P_ip Q_jr.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, drawn, parts
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    scale: float
    w1: Tensor | None = None  # C (a, b)
    w1_a: Tensor | None = None  # (a, r)
    w1_b: Tensor | None = None  # (r, b)
    w2: Tensor | None = None  # B (c, d), out = a c, in = b d; d counts the kernel of a convolution
    w2_a: Tensor | None = None  # (c, r), or (r, c) with a core
    w2_b: Tensor | None = None  # (r, d), or (r, d / kernel) with a core
    t2: Tensor | None = None  # (r, r, kernel)


def factors(p: Params) -> tuple[Tensor, Tensor]:
    """C (a, b) and B (c, d)."""
    C = p.w1 if p.w1 is not None else _given(p.w1_a) @ _given(p.w1_b)  # noqa: N806
    if p.t2 is not None:
        kernel = _given(p.w2_a).T @ (p.t2.permute(2, 0, 1) @ _given(p.w2_b))  # (kernel, c, channels)
        return C, kernel.permute(1, 2, 0).reshape(kernel.shape[1], -1)
    return C, p.w2 if p.w2 is not None else _given(p.w2_a) @ _given(p.w2_b)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    C, B = factors(p)  # noqa: N806
    y = C @ x.reshape(*x.shape[:-1], C.shape[1], B.shape[1]) @ B.T  # (C (x) B) vec(X) = vec(C X B^T), rows first
    return base(x) + p.scale * y.reshape(*x.shape[:-1], -1)


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    C, B = factors(p)  # noqa: N806
    return base.plus(Affine(p.scale * torch.kron(C.contiguous(), B.contiguous())))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    a, b = p.w1.shape if p.w1 is not None else (_given(p.w1_a).shape[0], _given(p.w1_b).shape[1])
    c, d = out_features // a, in_features // b
    whole = a * c == out_features and b * d == in_features
    left = _ranked("w1", p.w1_a, p.w1_b, (a, b)) if p.w1 is None else {"w1": (a, b)}
    if p.w2 is not None:
        return left | {"w2": (c, d) if whole else ()}
    if p.t2 is None:
        return left | (_ranked("w2", p.w2_a, p.w2_b, (c, d)) if whole else {})
    rank, other, kernel = (int(n) for n in p.t2.shape)
    fits = whole and d % kernel == 0
    return left | {"w2_a": (rank, c), "w2_b": (other, d // kernel), "t2": (rank, other, kernel) if fits else ()}


def initial(base: Affine, rank: int, *, factor: int = 4, scale: float = 1.0, init: str = "kaiming") -> Params:
    """As LyCORIS: C (factor, factor) and B's way down random, B's way up zero. factor: a divisor of in and out."""
    c, d = parts("factor", base.out_features, factor), parts("factor", base.in_features, factor)
    like = base.weight
    w1 = drawn(like.new_empty(factor, factor), init)
    return Params(float(scale), w1=w1, w2_a=like.new_zeros(c, rank), w2_b=drawn(like.new_empty(rank, d), init))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out, inn = base.out_features, base.in_features
    a, b = ((draw.integer(0, 2) and next((k for k in (2, 3, 5, 7) if n % k == 0), 1)) or 1 for n in (out, inn))
    c, d, r = out // a, inn // b, draw.integer(1, 4)
    left: dict[str, Any] = (
        {"w1": draw.tensor(a, b)} if seed % 2 else {"w1_a": draw.tensor(a, r), "w1_b": draw.tensor(r, b)}
    )
    kernel = next((k for k in (2, 3, 7) if d % k == 0), 1)
    right: dict[str, Any] = (
        {"w2": draw.tensor(c, d)},
        {"w2_a": draw.tensor(c, r), "w2_b": draw.tensor(r, d)},
        {"w2_a": draw.tensor(r, c), "w2_b": draw.tensor(r, d // kernel), "t2": draw.tensor(r, r, kernel)},
    )[seed % 3]
    return Params(0.4 + seed % 3, **left, **right)


def describe(p: Params) -> dict[str, Any]:
    ranks = [t for t in (p.w1_b, p.w2_b) if t is not None]
    return ({"rank": int(ranks[-1].shape[0])} if ranks else {}) | {"scale": p.scale}


def _ranked(name: str, a: Tensor | None, b: Tensor | None, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    rank = int(_given(b).shape[0])
    return {f"{name}_a": (size[0], rank), f"{name}_b": (rank, size[1])}


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a factor of the Kronecker product is missing")
    return tensor
