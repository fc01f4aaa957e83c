"""RoAd: y = R (W x + b) with R 2 x 2 blocks, scaled rotations of pairs of outputs, so W' = R W and b' = R b.

Liao et al., "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", 2024. Output k of a
group's first half and of its second half are a pair: y_k = c_k h_k - s_k h_k', y_k' = c_k' h_k' + s_k' h_k with c = a cos t, s = a sin t.
road_1 shares t and a within a pair, road_2 has one for each output, road_4 others for the cosine than for the sine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor
from reparam_export.errors import UsageError

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # numbers for each output


@dataclass(frozen=True)
class Params:
    theta: Tensor  # (out / 2,), (out,) or (2 out,)
    alpha: Tensor
    variant: str  # road_1, road_2 or road_4
    group: int  # outputs of a group, even


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return _turn(base(x), *_factors(p), p.group)


def fuse(base: Affine, p: Params) -> Affine:
    cosine, sine = _factors(p)
    weight = _turn(base.weight.T, cosine, sine, p.group).T
    return Affine(weight, None if base.bias is None else _turn(base.bias, cosine, sine, p.group))


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    """The numbers under the sine and the cosine are rounded too, so their sizes are those of the amplitudes."""
    first, second = _amplitudes(p)
    h = base.size(abs(x))
    return abs(first) * h + abs(second) * abs(_quarter_turn(h, p.group))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    fits = p.group > 0 and p.group % 2 == 0 and out_features % p.group == 0
    size = (int(out_features * SIZES[p.variant]),) if fits else ()
    return {"theta": size, "alpha": size}


def initial(base: Affine, *, variant: str = "road_1", group: int = 2) -> Params:
    """No turn, no scaling. group: an even divisor of out."""
    if variant not in SIZES or group < 2 or group % 2 or base.out_features % group:
        raise UsageError(
            f"variant {variant!r}, group {group}: expected one of {', '.join(SIZES)} and an even divisor of {base.out_features}"
        )
    size = int(base.out_features * SIZES[variant])
    return Params(base.weight.new_zeros(size), base.weight.new_ones(size), variant, group)


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out = base.out_features
    variant = ("road_1", "road_2", "road_4")[seed % 3]
    group = next((g for g in (4, 6, 2) if out % g == 0), 2)
    size = int(out * SIZES[variant])
    return Params(draw.tensor(size), draw.tensor(size), variant, group)


def describe(p: Params) -> dict[str, Any]:
    return {"variant": p.variant, "group": p.group}


def _amplitudes(p: Params) -> tuple[Tensor, Tensor]:
    """a of the cosine and of the sine, (out,) each."""
    return _per_output(p.alpha, p)


def _factors(p: Params) -> tuple[Tensor, Tensor]:
    """c = a cos t and s = a sin t, (out,) each."""
    (first, second), (one, other) = _amplitudes(p), _per_output(p.theta, p)
    return first * one.cos(), second * other.sin()


def _per_output(values: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    if p.variant == "road_1":
        halves = values.reshape(-1, 1, p.group // 2).expand(-1, 2, -1).reshape(-1)
        return halves, halves
    if p.variant == "road_2":
        return values, values
    cosine, sine = values.reshape(-1, 2, p.group).unbind(1)
    return cosine.reshape(-1), sine.reshape(-1)


def _turn(h: Tensor, cosine: Tensor, sine: Tensor, group: int) -> Tensor:
    return cosine * h + sine * _quarter_turn(h, group)


def _quarter_turn(h: Tensor, group: int) -> Tensor:
    """(h, h') of each group's halves as (-h', h)."""
    import torch

    first, second = h.reshape(*h.shape[:-1], -1, 2, group // 2).unbind(-2)
    return torch.stack((-second, first), dim=-2).reshape(h.shape)
