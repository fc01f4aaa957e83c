"""Any affine module f at all: b' = f(0) and W'^T = f(I) - f(0), in float64, after testing that f is affine.

An affine map is known completely by what it does to 0 and to the unit vectors. The test: f(x + y) - f(y) = f(x) - f(0) on random
x, y of several sizes, no dependence on batch or position, the same answer twice. A module that fails it is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from reparam_export.affine import Affine, Tensor, map_tensors
from reparam_export.errors import NotAffineError

CHUNK = 512  # unit vectors pushed through at a time


@dataclass(frozen=True)
class Params:
    module: Any  # nn.Module: rows (..., in) -> (..., out); it holds its own base layer
    name: str = "module"


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    import torch

    module = copy.deepcopy(p.module).to(x.dtype).eval()
    with torch.no_grad():
        return module(x)


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    module = copy.deepcopy(p.module).double().eval()
    with torch.no_grad():
        deviation, allowed = affinity(module, base.in_features)
        if not deviation <= allowed:
            raise NotAffineError(
                f"{p.name}: {type(p.module).__name__} is not an affine map: f(x + y) - f(y) and f(x) - f(0) differ by "
                f"{deviation:.1e} of the output, at most {allowed:.1e} is rounding; it gates, routes or activates and "
                "cannot be folded",
                modules=(p.name,),
                reason=f"deviation {deviation:.1e} > {allowed:.1e}",
            )
        probed = _probe(module, base.in_features)
        return map_tensors(probed, lambda t: t.to(base.weight.dtype))


def affinity(module: Any, in_features: int, seed: int = 0) -> tuple[float, float]:
    """How far a float64 module is from affine, and how far rounding may take it; both relative to the output's size.

    The allowance is that of a module which computes in float32 inside: in_features * 2**-24.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    deviation = 0.0
    for size in (1.0, 1e-2, 1e2):
        x, y = (size * torch.randn(4, 3, in_features, generator=generator, dtype=torch.float64) for _ in range(2))
        zero = module(torch.zeros_like(x))
        parts = module(x + y), module(y), module(x), zero
        scale = max(float(part.abs().max()) for part in parts)
        gaps = (
            parts[0] - parts[1] - (parts[2] - zero),
            module(x[2:3, 1:2]) - parts[2][2:3, 1:2],  # alone, or in a batch at some position
            zero - zero[:1, :1],
            module(x) - parts[2],
        )
        worst = max(float(gap.abs().max()) for gap in gaps)
        deviation = max(deviation, worst / scale if scale > 0 else worst)
        if not all(bool(part.isfinite().all()) for part in parts):
            deviation = float("nan")
            break
    return deviation, max(in_features, 16) * 2.0**-24


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {}


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    """Size of what is summed in ``apply``: the module is opaque, so its outputs stand for its inner sums."""
    return apply(x, base, p).abs() + 2 * apply(0 * x, base, p).abs()


def example(seed: int, base: Affine) -> Params:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    inner = nn.Linear(base.in_features, base.out_features).double()
    return Params(nn.Sequential(inner, nn.Linear(base.out_features, base.out_features).double()), "example")


def describe(p: Params) -> dict[str, Any]:
    return {"module": type(p.module).__name__}


def _probe(module: Any, in_features: int) -> Affine:
    import torch

    bias = module(torch.zeros(1, in_features, dtype=torch.float64))[0]
    columns = []
    for start in range(0, in_features, CHUNK):
        stop = min(start + CHUNK, in_features)
        unit = torch.zeros(stop - start, in_features, dtype=torch.float64)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
        columns.append(module(unit) - bias)
    return Affine(torch.cat(columns).T.contiguous(), bias if bool((bias != 0).any()) else None)
