"""The weight proof: each touched module's stored weight against the exact fused layer, which is ``apply`` in float64.

Small layers are read out entry by entry, by pushing 0 and the unit vectors through ``apply``; large ones are probed with random
Gaussian vectors (Freivalds 1977). The rounding of float64 itself is bounded by running ``apply`` on absolute values
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): |fl(f) - f| <= gamma_n f(|.|), gamma_n = n u / (1 - n u).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import Step, fused, unfused
from reparam_export.affine import CHUNK, Affine, map_tensors, units
from reparam_export.assembly import reach, stacks
from reparam_export.checkpoints import Adapter, by_site
from reparam_export.layouts import site_of
from reparam_export.rounding import round_once
from reparam_export.verification.certificate import CarriedEvidence, LayerEvidence, Verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

EXHAUSTIVE_LIMIT = 2**35  # multiply-adds of one read-out (in * in * out); beyond it a layer is probed
PROBES = 8
MISS = 1e-6  # chance of missing a row whose error is above ``detectable``
U64 = 2.0**-53  # unit roundoff of float64


@dataclass(frozen=True)
class Exact:
    """The exact fused layer in float64, as the specifications of its adapters compute it, one on top of the other."""

    base: Affine
    steps: tuple[Step, ...]

    @cached_property
    def before(self) -> Affine:
        """What all adapters but the last make."""
        return unfused(self.base, self.steps[:-1])

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.steps[-1].apply(x, self.before)
        return y

    def uncertainty(self, x: Tensor) -> Tensor:
        """How far float64 rounding can take ``self(x)`` from the true value, entry by entry."""
        n = len(self.steps) * (2 * (self.base.in_features + self.base.out_features) + 16)
        bound: Tensor = self.steps[-1].size(x, self.before) * (n * U64 / (1 - n * U64))
        return bound


def exact_layer(module: nn.Module, *adapters: Adapter) -> Exact:
    """The specification of one stack of adapters on the base's module, in float64."""
    import torch

    site = site_of(module, adapters[0])
    base = site.affine(site.of(module), torch.float64)
    ((rows, steps),) = stacks(adapters, torch.float64)
    return Exact(base.rows(*rows) if rows else base, tuple(steps))


def prove_layer(
    module: nn.Module,
    adapter: Adapter | Sequence[Adapter],
    tensors: Mapping[str, Tensor],
    *,
    seed: int,
    limit: int = EXHAUSTIVE_LIMIT,
) -> LayerEvidence:
    """The evidence for one adapter, or for a stack of them. module: the base's; tensors: the fused weights by name."""
    import torch

    stack = (adapter,) if isinstance(adapter, Adapter) else tuple(adapter)
    site = site_of(module, stack[0])
    exact = exact_layer(module, *stack)
    rows = reach(stack)
    stored = site.affine(tensors).rows(*rows) if rows else site.affine(tensors)
    inn, out = exact.base.in_features, exact.base.out_features
    with torch.no_grad():
        numbers = read_out(exact, stored) if inn * inn * out <= limit else probe(exact, stored, seed)
    return LayerEvidence(
        module=stack[0].site,
        kind=" + ".join(a.kind if a.weight == 1 else f"{a.weight:g} {a.kind}" for a in stack),
        tensors=tuple(n for n in (site.tensor, site.bias) if n and n in tensors),
        shape=(out, inn),
        dtype=str(stored.weight.dtype).removeprefix("torch."),
        entries=stored.weight.numel() + (0 if stored.bias is None else stored.bias.numel()),
        **numbers,
    )


@dataclass
class _Tally:
    """The worst of all entries compared so far."""

    ceiling: float
    exact: int = 0
    undecided: bool = False  # an entry differs from the rounded exact value by more than float64 can excuse
    error: float = 0.0
    ratio: float = 0.0
    worst: dict[str, Any] | None = None

    def add(self, name: str, stored: Tensor, true: Tensor, unsure: Tensor, start: int, transposed: bool) -> None:
        import torch

        error = (stored.double() - true).abs()
        unsure = unsure.clamp_max(self.ceiling)  # beyond it, cancellation inside the adapter leaves nothing to prove
        half = half_ulp(true, stored.dtype)
        same = stored == round_once(true, stored.dtype)
        self.exact += int(same.sum())
        self.undecided |= bool((~same & ~(error <= half + unsure)).any())
        # faithful rounding: one of the two neighbours of the exact value
        ratio = error / (2 * half + unsure)
        ratio = torch.where(error == 0, torch.zeros_like(ratio), ratio).nan_to_num(nan=math.inf, posinf=math.inf)
        at = int(ratio.argmax())
        top = float(ratio.flatten()[at])
        self.error = max(self.error, float(error.nan_to_num(nan=math.inf).max()))
        if top > self.ratio or self.worst is None:
            self.ratio = max(top, self.ratio)
            index = [int(i) for i in torch.unravel_index(torch.tensor(at), ratio.shape)]
            index[-1 if len(index) == 1 else 0] += start
            self.worst = {
                "tensor": name,
                "index": index[::-1] if transposed else index,
                "expected": float(true.flatten()[at]),
                "found": float(stored.flatten()[at]),
            }


def read_out(exact: Exact, stored: Affine) -> dict[str, Any]:
    """Every entry of the exact layer, against every stored entry; columns of W at a time."""
    import torch

    inn = exact.base.in_features
    tally = _Tally(ceiling(stored.weight))
    bias, bias_unsure = _bias(exact, stored, tally)
    kept = changed = 0.0
    for start in range(0, inn, CHUNK):
        stop = min(start + CHUNK, inn)
        unit = units(start, stop, inn, torch.float64)
        true = exact(unit) - bias
        unsure = exact.uncertainty(unit) + bias_unsure
        columns = stored.weight[:, start:stop].T
        tally.add("weight", columns, true, unsure, start, True)
        change = true - exact.base.weight[:, start:stop].T
        change = torch.where(change.abs() > unsure, change, 0.0)  # not the rounding of float64
        kept += float((change * (columns.double() - exact.base.weight[:, start:stop].T)).sum())
        changed += float((change * change).sum())
    verdict: Verdict = "wrong" if tally.ratio > 1 else "rounded" if tally.undecided else "exact"
    return {
        "method": "exhaustive",
        "exact_entries": tally.exact,
        "max_error": tally.error,
        "bound_ratio": tally.ratio,
        "survival": kept / changed if changed > 0 else 1.0,
        "change": changed,
        "verdict": verdict,
        "worst": tally.worst,
    }


def _bias(exact: Exact, stored: Affine, tally: _Tally) -> tuple[Tensor, Tensor]:
    """The exact bias and its uncertainty, after comparing the stored one (none at all is 0) entry by entry."""
    import torch

    zero = torch.zeros(1, exact.base.in_features, dtype=torch.float64)
    bias, unsure = exact(zero)[0], exact.uncertainty(zero)[0]
    if stored.bias is not None:
        tally.add("bias", stored.bias, bias, unsure, 0, False)
    else:
        tally.add("bias", torch.zeros_like(bias).to(stored.weight.dtype), bias, unsure, 0, False)
        tally.exact = 0
    return bias, unsure


def probe(exact: Exact, stored: Affine, seed: int) -> dict[str, Any]:
    """The closed form in float64 against ``apply`` on PROBES random vectors, then every stored entry against the closed form.

    Freivalds' test at float64's own precision: |fuse(x) - apply(x)| <= what float64 rounding explains, row by row.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    inn = exact.base.in_features
    x = torch.randn(PROBES, inn, generator=generator, dtype=torch.float64)
    closed = fused(exact.base, exact.steps)
    true = exact(x)
    bound = exact.uncertainty(x) + inn * U64 * map_tensors(closed, torch.abs)(x.abs())
    ratio = ((closed(x) - true).abs() / bound).nan_to_num(nan=math.inf)
    at = [int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape)]
    tally = _Tally(ceiling(stored.weight))
    _bias(exact, stored, tally)
    nothing = torch.zeros((), dtype=torch.float64)
    tally.add("weight", stored.weight, closed.weight, nothing.expand_as(closed.weight), 0, False)
    change = closed.weight - exact.base.weight
    kept, changed = (float((change * (w - exact.base.weight)).sum()) for w in (stored.weight.double(), closed.weight))
    # a row error e is missed by one probe when |N(0, |e|^2)| <= bound, by all with that chance to the power PROBES
    quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(MISS ** (1 / PROBES), dtype=torch.float64)))
    norms = closed.weight.norm(dim=1).clamp_min(1e-300)
    parted = float(ratio.max()) > 1
    return {
        "method": "probes",
        "exact_entries": tally.exact,
        "max_error": tally.error,
        "bound_ratio": max(tally.ratio, float(ratio.max())),
        "survival": kept / changed if changed > 0 else 1.0,
        "change": changed,
        "verdict": "wrong" if parted or tally.ratio > 1 else "rounded" if tally.undecided else "exact",
        "probes": PROBES,
        "detectable": float((bound.amax(dim=0) / quantile / norms).max()),
        "worst": {
            "tensor": "output row",
            "index": [at[1]],
            "expected": float(true[*at]),
            "found": float(closed(x)[*at]),
        }
        if parted
        else tally.worst,
    }


def ceiling(stored: Tensor) -> float:
    """The most that float64's uncertainty may excuse: half a unit in the last place of the layer's largest stored weight."""
    finite = stored.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()
    return float(half_ulp(finite.max(), stored.dtype)) if stored.numel() else 0.0


def uncovered(module: nn.Module, adapters: Sequence[Adapter], tensors: Mapping[str, Tensor]) -> list[str]:
    """What of a touched module's tensors no adapter acts on and is not the base's, rounded once. Empty when nothing.

    adapters: those on one tensor of the module: outputs outside their rows, and matrices of a stack without any.
    """
    import torch

    site = site_of(module, adapters[0])
    own = site.of(module)
    if site.tensor not in tensors or tensors[site.tensor].shape != own[site.tensor].shape:
        return [f"{site.tensor}: missing or of another shape"]
    different = []
    if site.expert is not None:
        free = torch.ones(len(own[site.tensor]), dtype=torch.bool)
        free[[a.expert for a in adapters]] = False
        if not torch.equal(tensors[site.tensor][free], round_once(own[site.tensor][free], tensors[site.tensor].dtype)):
            different.append(f"{site.tensor}: matrices without an adapter differ")
    for group in by_site(adapters).values():
        if any(a.rows is None for a in group):
            continue
        place = site_of(module, group[0])
        base, found = place.affine(own, torch.float64), place.affine(tensors)
        free = torch.ones(base.out_features, dtype=torch.bool)
        for a in group:
            start, stop = a.rows or (0, base.out_features)
            free[start:stop] = False
        if not torch.equal(found.weight[free], round_once(base.weight[free], found.weight.dtype)):
            different.append(f"{place.tensor}: rows outside the adapted ones differ")
        nothing = torch.zeros(base.out_features, dtype=found.weight.dtype)
        was, now = (nothing if b is None else b for b in (base.bias, found.bias))
        if not torch.equal(now[free], round_once(was[free], now.dtype)):
            different.append(f"{place.bias}: rows outside the adapted ones differ")
    return different


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of ``dtype`` at each float64 value: the most that rounding once to nearest can move it."""
    import torch

    info = torch.finfo(dtype)
    mantissa, exponent = torch.frexp(value.abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(mantissa, info.eps / 4), exponent)  # value = m 2^e, 1/2 <= m < 1


def prove_carried(
    base: Mapping[str, Tensor],
    fused: Mapping[str, Tensor],
    touched: set[str],
    replaced: Mapping[str, Tensor],
    storage: torch.dtype | None,
) -> CarriedEvidence:
    """Every tensor that no adapter touches: the base's (or, when replaced, the checkpoint's) rounded once to its storage dtype."""
    import torch

    different = [f"{name}: in the base, not in the fused weights" for name in base if name not in fused]
    different += [
        f"{name}: in the fused weights, not in the base" for name in fused if name not in base and name not in touched
    ]
    for name, tensor in base.items():
        dtype = storage if storage is not None and tensor.is_floating_point() else tensor.dtype
        if name in fused and fused[name].dtype != dtype:
            different.append(f"{name}: stored as {fused[name].dtype}, expected {dtype}")
    compared = 0
    for name, tensor in base.items():
        if name in touched or name not in fused:
            continue
        compared += 1
        expected = replaced.get(name, tensor)
        if expected.is_floating_point():
            expected = round_once(expected, fused[name].dtype)
        if not torch.equal(expected, fused[name]):
            different.append(f"{name}: differs")
    return CarriedEvidence(compared, max(0, compared - len(different)), tuple(sorted(replaced)), tuple(different))
