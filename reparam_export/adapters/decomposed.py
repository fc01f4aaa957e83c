"""Weight-decomposed LoCon, LoHa or LoKr: y = V' x + b, V' = m V / |V| with V = W + s D, so W' = V' and b' = b.

DoRA's decomposition around any of the changes D of LyCORIS (its ``dora_scale``). side "out": |V| and m are of each row, one for an
output; "in": of each input channel, over all outputs and the kernel. As LyCORIS does, eps of the number format is added to |V|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters import locon as locon_kind
from reparam_export.adapters import loha, lokr
from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor, map_tensors


@dataclass(frozen=True)
class Params:
    m: Tensor  # (out,) or (channels,)
    side: str  # "out" or "in"
    locon: locon_kind.Params | None = None  # D, one of the three
    loha: loha.Params | None = None
    lokr: lokr.Params | None = None


def change(p: Params) -> tuple[Any, Any]:
    """The kind of D, and its Params."""
    found = [(k, q) for k, q in ((locon_kind, p.locon), (loha, p.loha), (lokr, p.lokr)) if q is not None]
    if len(found) != 1 or p.side not in ("out", "in"):
        raise ValueError(f"side {p.side!r} and {len(found)} changes; expected out or in, and one")
    return found[0]


def norms(V: Tensor, p: Params) -> Tensor:  # noqa: N803
    """|V| of each output (out,), or of each channel (channels,)."""
    import torch

    parts = V if p.side == "out" else V.reshape(len(V), len(p.m), -1).transpose(0, 1).flatten(1)
    return parts.norm(dim=1) + torch.finfo(V.dtype).eps


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    inner, q = change(p)
    c = p.m / norms(inner.fuse(base.linear(), q).weight, p)
    into, out = (_spread(c, base), 1.0) if p.side == "in" else (1.0, c)
    y = out * inner.apply(x * into, base.linear(), q)
    return y if base.bias is None else y + base.bias


def fuse(base: Affine, p: Params) -> Affine:
    inner, q = change(p)
    V = inner.fuse(base.linear(), q).weight  # noqa: N806
    c = p.m / norms(V, p)
    return Affine(V * _spread(c, base) if p.side == "in" else c[:, None] * V, base.bias)


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    """c (|W| + |s D|) |x|, once for the product and once, by the relative error of the norm, for c."""
    inner, q = change(p)
    norm = norms(inner.fuse(base.linear(), q).weight, p)
    terms = inner.fuse(base.size.linear(), map_tensors(q, abs, abs))
    c = abs(p.m) / norm * (1 + norms(terms.weight, p) / norm)
    y = terms(abs(x) * _spread(c, base)) if p.side == "in" else c * terms(abs(x))
    return y if base.bias is None else y + base.size.bias


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    inner, q = change(p)
    name = next(n for n in ("locon", "loha", "lokr") if getattr(p, n) is q)
    expected: dict[str, tuple[int, ...]] = {"m": (out_features,)}
    if p.side == "in":
        channels = int(p.m.shape[0])
        expected["m"] = (channels if channels and in_features % channels == 0 else in_features,)
    return expected | {f"{name}.{n}": shape for n, shape in inner.shapes(out_features, in_features, q).items()}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    name, inner = (("locon", locon_kind), ("loha", loha), ("lokr", lokr))[seed % 3]
    side = "in" if seed % 2 else "out"
    kernel = next((k for k in (2, 3) if seed % 4 == 1 and base.in_features % k == 0), 1)
    m = draw.tensor(base.out_features if side == "out" else base.in_features // kernel)
    return Params(m, side, **{name: inner.example(seed, base)})


def describe(p: Params) -> dict[str, Any]:
    inner, q = change(p)
    return {**inner.describe(q), "decomposed": f"by {p.side}put"}


def _spread(c: Tensor, base: Affine) -> Tensor:
    """A number for each channel as one for each entry of a patch."""
    return c.repeat_interleave(base.in_features // len(c))
