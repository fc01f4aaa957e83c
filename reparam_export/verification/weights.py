"""The weight proof: each touched module's stored weight against the exact fused layer, which is ``apply`` in float64.

Small layers are read out entry by entry, by pushing 0 and the unit vectors through ``apply``; large ones are probed with random
Gaussian vectors (Freivalds 1977). The rounding of float64 itself is bounded by running ``apply`` on absolute values
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): |fl(f) - f| <= gamma_n f(|.|), gamma_n = n u / (1 - n u).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import Kind, kind
from reparam_export.affine import Affine, map_tensors
from reparam_export.checkpoints import Adapter
from reparam_export.layouts import affine_of, layout_of, matrix
from reparam_export.rounding import round_once
from reparam_export.verification.certificate import CarriedEvidence, LayerEvidence, Verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

EXHAUSTIVE_LIMIT = 2**35  # multiply-adds of one read-out (in * in * out); beyond it a layer is probed
PROBES = 8
MISS = 1e-6  # chance of missing a row whose error is above ``detectable``
CHUNK = 256  # unit vectors at a time
U64 = 2.0**-53  # unit roundoff of float64


@dataclass(frozen=True)
class Exact:
    """The exact fused layer in float64, as its specification computes it."""

    spec: Kind
    base: Affine
    params: Any
    name: str

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.spec.apply(x, self.base, self.params)
        return y

    def uncertainty(self, x: Tensor) -> Tensor:
        """How far float64 rounding can take ``self(x)`` from the true value, entry by entry."""
        import torch

        magnitude = getattr(self.spec, "magnitude", None)
        if magnitude is not None:
            size = magnitude(x, self.base, self.params)
        else:
            absolute = (map_tensors(value, torch.abs, abs) for value in (self.base, self.params))
            size = self.spec.apply(x.abs(), *absolute)
        n = 2 * (self.base.in_features + self.base.out_features) + 16
        bound: Tensor = size * (n * U64 / (1 - n * U64))
        return bound


def exact_layer(module: nn.Module, adapter: Adapter) -> Exact:
    """The specification of one adapter on the base's module, in float64."""
    import torch

    base = affine_of(module, layout_of(adapter.module, module), torch.float64)
    part = base.rows(*adapter.rows) if adapter.rows else base
    params = map_tensors(adapter.params, lambda t: t.to(torch.float64))
    return Exact(kind(adapter.kind), part, params, adapter.module)


def prove_layer(
    module: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor], *, seed: int, limit: int = EXHAUSTIVE_LIMIT
) -> LayerEvidence:
    """The evidence for one adapter. module: the base's; tensors: the fused weights by name."""
    import torch

    exact = exact_layer(module, adapter)
    stored = stored_affine(module, adapter, tensors)
    inn, out = exact.base.in_features, exact.base.out_features
    with torch.no_grad():
        numbers = read_out(exact, stored) if inn * inn * out <= limit else probe(exact, stored, seed)
    return LayerEvidence(
        module=adapter.module,
        kind=adapter.kind,
        tensors=tuple(n for n in (f"{adapter.module}.weight", f"{adapter.module}.bias") if n in tensors),
        shape=(out, inn),
        dtype=str(stored.weight.dtype).removeprefix("torch."),
        entries=stored.weight.numel() + (0 if stored.bias is None else stored.bias.numel()),
        **numbers,
    )


def stored_affine(module: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]) -> Affine:
    """The fused module's own map, in its storage dtype."""
    weight = matrix(tensors[f"{adapter.module}.weight"], layout_of(adapter.module, module))
    whole = Affine(weight, tensors.get(f"{adapter.module}.bias"))
    return whole.rows(*adapter.rows) if adapter.rows else whole


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
        unit = torch.zeros(stop - start, inn, dtype=torch.float64)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
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
    closed = exact.spec.fuse(exact.base, exact.params)
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
    """Rows of a touched module that no adapter acts on and that are not the base's, rounded once. Empty when all are."""
    import torch

    name = adapters[0].module
    if any(a.rows is None for a in adapters):
        return []
    base = affine_of(module, layout_of(name, module), torch.float64)
    weight = matrix(tensors[f"{name}.weight"], layout_of(name, module))
    free = torch.ones(len(weight), dtype=torch.bool)
    for adapter in adapters:
        start, stop = adapter.rows or (0, len(weight))
        free[start:stop] = False
    bias = torch.zeros(len(weight), dtype=torch.float64) if base.bias is None else base.bias
    found = tensors.get(f"{name}.bias", torch.zeros(len(weight), dtype=weight.dtype))
    different = []
    if not torch.equal(weight[free], round_once(base.weight[free], weight.dtype)):
        different.append(f"{name}.weight: rows outside the adapted ones differ")
    if not torch.equal(found[free], round_once(bias[free], found.dtype)):
        different.append(f"{name}.bias: rows outside the adapted ones differ")
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
            expected = round_once(expected.to(tensor.dtype), fused[name].dtype)
        if not torch.equal(expected, fused[name]):
            different.append(f"{name}: differs")
    return CarriedEvidence(compared, max(0, compared - len(different)), tuple(sorted(replaced)), tuple(different))
