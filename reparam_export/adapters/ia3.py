"""IA3: y = l * (W x + b) on the outputs, so W' = diag(l) W and b' = l * b; or y = W (l * x) + b on the inputs, so W' = W diag(l).

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022, section 3.3: outputs of
keys and values, inputs of the second feed-forward layer. On the inputs of a convolution there is one number for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor
from reparam_export.errors import UsageError


@dataclass(frozen=True)
class Params:
    l: Tensor  # noqa: E741  (out,), (in,) or (channels,)
    side: str  # "output", "input", or "channels": the inputs of a convolution, which are in = channels * kernel numbers


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) * p.l if p.side == "output" else base(x * _spread(base, p))


def fuse(base: Affine, p: Params) -> Affine:
    if p.side != "output":
        return Affine(base.weight * _spread(base, p), base.bias)
    return Affine(base.weight * p.l[:, None], None if base.bias is None else base.bias * p.l)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    channels = int(p.l.shape[0])
    if p.side == "channels" and channels and in_features % channels == 0:
        return {"l": (channels,)}
    return {"l": (out_features if p.side == "output" else in_features,)}


def initial(base: Affine, *, side: str = "output") -> Params:
    """Ones. side: "output", as for keys and values, or "input", as for the second layer of an MLP."""
    if side not in ("output", "input"):
        raise UsageError(f"side {side!r}: expected output or input")
    return Params(base.weight.new_ones(base.out_features if side == "output" else base.in_features), side)


def example(seed: int, base: Affine) -> Params:
    side = ("output", "input", "channels")[seed % 3]
    inn = base.in_features
    channels = next((inn // k for k in (2, 3, 7) if inn % k == 0), inn)
    return Params(Draw(seed).tensor({"output": base.out_features, "input": inn, "channels": channels}[side]), side)


def describe(p: Params) -> dict[str, Any]:
    return {"side": "output" if p.side == "output" else "input"}


def _spread(base: Affine, p: Params) -> Tensor:
    """One number for each input: that of its channel."""
    return p.l.repeat_interleave(base.in_features // len(p.l))
