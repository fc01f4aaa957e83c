"""LoHa: y = W x + b + s ((A1 B1) * (A2 B2)) x, so W' = W + s (A1 B1) * (A2 B2), ``*`` elementwise, and b' = b.

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2022, propositions 1 and, with
a core T for the kernel of a convolution, 3: each factor is then sum_ij T_ijk A_pi B_jr.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    a1: Tensor  # (out, r)
    b1: Tensor  # (r, in), or (r, in / kernel) with a core
    a2: Tensor
    b2: Tensor
    scale: float
    t1: Tensor | None = None  # (r, r, kernel)
    t2: Tensor | None = None


def factor(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """One factor (out, in) of the elementwise product."""
    if t is None:
        return a @ b
    kernel = a @ (t.permute(2, 0, 1) @ b)  # (kernel, out, channels)
    return kernel.permute(1, 2, 0).reshape(len(a), -1)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) + p.scale * Affine(factor(p.a1, p.b1, p.t1) * factor(p.a2, p.b2, p.t2))(x)


def fuse(base: Affine, p: Params) -> Affine:
    return base.plus(Affine(p.scale * (factor(p.a1, p.b1, p.t1) * factor(p.a2, p.b2, p.t2))))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for a, b, t in (("a1", "b1", "t1"), ("a2", "b2", "t2")):
        rank, core = int(getattr(p, b).shape[0]), getattr(p, t)
        kernel = 1 if core is None else int(core.shape[2])
        expected |= {a: (out_features, rank), b: (rank, in_features // kernel)}
        if core is not None:
            expected |= {t: (rank, rank, kernel if in_features % kernel == 0 else 0)}
    return expected


def initial(base: Affine, rank: int, *, scale: float = 1.0) -> Params:
    """As LyCORIS: A1 normal with deviation 0.1, B1 and B2 with 1, A2 zero."""
    from torch import nn

    like, out, inn = base.weight, base.out_features, base.in_features
    a1 = nn.init.normal_(like.new_empty(out, rank), std=0.1)
    b1, b2 = (nn.init.normal_(like.new_empty(rank, inn)) for _ in range(2))
    return Params(a1, b1, like.new_zeros(out, rank), b2, float(scale))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out, inn = base.out_features, base.in_features
    kernel = next((k for k in (3, 2) if seed % 3 == 0 and inn % k == 0), 1)
    ranks = draw.integer(1, 5), draw.integer(1, 5)
    a1, a2 = (draw.tensor(out, r) for r in ranks)
    b1, b2 = (draw.tensor(r, inn // kernel) for r in ranks)
    t1, t2 = (draw.tensor(r, r, kernel) if kernel > 1 else None for r in ranks)
    return Params(a1, b1, a2, b2, 0.4 + seed % 3, t1, t2)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.b1.shape[0]), "scale": p.scale} | ({"core": "tucker"} if p.t1 is not None else {})
