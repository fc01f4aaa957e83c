"""A touched module by its factors, in the orientation in which its weight is stored, and the proof that the factors are the adapter.

The factors' map is compared with the kind's own unfused ``apply`` in float64 on random vectors: every output, when nothing is multiplied
entry by entry with W; else on some rows of W, the first among them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reparam_export.adapters import kind, low_rank
from reparam_export.affine import Affine, Factors, LowRank, map_tensors, tensors_of
from reparam_export.checkpoints import Adapter
from reparam_export.errors import FusionError
from reparam_export.fit import check_shapes
from reparam_export.streaming.formats import Array, Format, wide
from reparam_export.streaming.matrix import Mapped, Nothing, Watch
from reparam_export.streaming.shards import Stored, of_tensor

VECTORS = 3
SAMPLED = 64  # rows of W on which factors of gates are compared
U64 = 2.0**-53


class PartedError(Exception):
    """The factors are not the adapter: an output of the two differs by more than float64 explains."""

    def __init__(self, row: int, expected: float, found: float, ratio: float) -> None:
        super().__init__(f"output row {row}: expected {expected!r}, found {found!r}")
        self.row, self.expected, self.found, self.ratio = row, expected, found, ratio


@dataclass(frozen=True)
class Touched:
    """One module with its adapters. ``transposed``: its weight is stored (in, out), as in Conv1D and embeddings."""

    module: str
    adapters: tuple[Adapter, ...]
    weight: Stored
    bias: Stored | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def kinds(self) -> str:
        return " + ".join(dict.fromkeys(a.kind for a in self.adapters))

    def bias64(self) -> Array | None:
        return None if self.bias is None else wide(self.bias.values(), format_of(self.bias))


@dataclass(frozen=True)
class Form:
    """W' = W + added + W * gates in stored orientation, and the whole fused bias (out,), float64."""

    added: tuple[Factors, ...]
    gates: tuple[Factors, ...]
    bias: Array | None
    ratio: float  # worst disagreement of the factors with ``apply``, over its bound
    seconds: float  # of this thread that the comparison took


def format_of(stored: Stored) -> Format:
    """The float format of a tensor. Raises FusionError for whole numbers."""
    from reparam_export.streaming.formats import FORMATS

    if not stored.is_float:
        raise FusionError(
            f"{stored.name}: an adapter sits on a tensor of {stored.code}; only floating point weights can be folded"
        )
    return FORMATS[stored.code]


def params64(adapter: Adapter) -> Any:
    """The adapter's Params as float64 numpy arrays, whatever holds them."""
    return map_tensors(adapter.params, array64)


def array64(tensor: Any) -> Array:
    """A torch tensor or numpy array (bfloat16 included) in float64; indices as int64."""
    stored = of_tensor("adapter", tensor)
    if not stored.is_float:
        return np.asarray(tensor).astype(np.int64)
    return wide(stored.values(), format_of(stored))


def creates_bias(touched: Touched) -> bool | None:
    """Does folding give a module without bias one? None where only folding itself can tell (a kind without factors)."""
    if touched.bias is not None:
        return False
    found = False
    for adapter in touched.adapters:
        whole = Nothing(touched.shape)
        part = whole[slice(*adapter.rows)] if adapter.rows else whole
        check_shapes(touched.module, Affine(part), adapter)
        form = _shown(adapter, part.shape, None)
        if form is None:
            return None
        found |= form.bias is not None
    return found


def _shown(adapter: Adapter, shape: tuple[int, int], bias: Array | None) -> LowRank | None:
    """The factors of a layer of zeros with an adapter of zeros: which there are, at no cost."""
    zeros = map_tensors(adapter.params, lambda t: np.broadcast_to(0.0, tuple(t.shape)))
    return low_rank(adapter.kind, Affine(Nothing(shape), bias), zeros)


def form_of(touched: Touched, seed: int) -> Form | None:
    """The module's factors, proven; None when a kind has none. Raises PartedError, FusionError."""
    out = touched.shape[0]
    whole = Mapped(touched.weight.values(), format_of(touched.weight), touched.transposed)
    bias = touched.bias64()
    added: list[Factors] = []
    gates: list[Factors] = []
    ratio = seconds = 0.0
    for number, adapter in enumerate(touched.adapters):
        start, stop = adapter.rows or (0, out)
        part = Affine(whole[start:stop], None if bias is None else bias[start:stop])
        check_shapes(touched.module, part, adapter)
        params = params64(adapter)
        x = np.random.default_rng(seed + number).standard_normal((1 + VECTORS, part.in_features))
        x[0] = 0
        shown = _shown(adapter, part.weight.shape, part.bias)
        if shown is not None and not shown.gates:  # then W enters the forward by products alone
            part.weight.watch = Watch(x)
        form = low_rank(adapter.kind, part, params)
        if form is None:
            return None
        started = time.thread_time()
        ratio = max(ratio, _agreement(adapter.kind, part, params, form, x))
        seconds += time.thread_time() - started
        added += [_spread(f, (start, stop), out) for f in form.added]
        gates += [_spread(f, (start, stop), out) for f in form.gates]
        if form.bias is not None:
            bias = np.zeros(out) if bias is None else bias.copy()
            bias[start:stop] = form.bias
    stored = [tuple(_stored(f, touched.transposed) for f in each) for each in (added, gates)]
    return Form(stored[0], stored[1], bias, ratio, seconds)


def _agreement(name: str, base: Affine, params: Any, form: LowRank, x: Array) -> float:
    """The worst difference of the factors' map from the kind's own forward on x, over its bound. Raises PartedError above 1."""
    try:
        if form.gates:
            raise TypeError("gates need the entries of W")
        which = np.arange(base.out_features)
        claimed, expected, size = _all_rows(name, base, params, form, x)
    except TypeError:  # the forward needs single entries of W
        chosen = np.random.default_rng(base.out_features).integers(0, base.out_features, SAMPLED)
        which = np.unique(np.concatenate([[0], chosen]))
        base = Affine(base.weight.rows(which), None if base.bias is None else base.bias[which])
        params, form = _rows_of_params(name, base, params, which), _rows_of_form(form, which)
        claimed, expected = form.fold(base)(x), kind(name).apply(x, base, params)
        size = kind(name).apply(np.abs(x), map_tensors(base, np.abs), map_tensors(params, np.abs, abs))
    n = 2 * (base.in_features + base.out_features) + 16
    ratio = np.abs(claimed - expected) / np.maximum(size * (n * U64 / (1 - n * U64)), np.finfo(np.float64).tiny)
    ratio = np.nan_to_num(ratio, nan=math.inf, posinf=math.inf)
    worst = float(ratio.max(initial=0))
    if not worst <= 1:
        vector, row = np.unravel_index(int(ratio.argmax()), ratio.shape)
        raise PartedError(int(which[row]), float(expected[vector, row]), float(claimed[vector, row]), worst)
    return worst


def _all_rows(name: str, base: Affine, params: Any, form: LowRank, x: Array) -> tuple[Array, Array, Array]:
    """Every output by the factors and by ``apply``, and the size of what is summed. Raises TypeError when apply needs entries of W."""
    if not base.weight.passes:  # the factors do not depend on W, so neither does what is compared
        base = Affine(Nothing(base.weight.shape), base.bias)
    expected = kind(name).apply(x, base, params)
    size = kind(name).apply(np.abs(x), _Sizes(base.weight, base.bias), map_tensors(params, np.abs, abs))
    claimed = base.linear()(x) + sum((x @ right.T) @ left.T for left, right in form.added)
    return claimed + (0 if form.bias is None else form.bias), expected, size


class _Sizes(Affine):
    """At least |W| |x| + |b|, from the largest entry of W alone."""

    def __call__(self, x: Any) -> Any:
        if isinstance(self.weight, Nothing):
            size = np.zeros((*x.shape[:-1], self.out_features))
        else:
            size = np.repeat(self.weight.largest() * x.sum(axis=-1, keepdims=True), self.out_features, axis=-1)
        return size if self.bias is None else size + np.abs(self.bias)

    def linear(self) -> Affine:
        return _Sizes(self.weight)


def _rows_of_params(name: str, base: Affine, params: Any, which: Array) -> Any:
    """The Params of the same adapter on some outputs only: what follows the number of outputs in its first axis is taken by rows.

    Raises FusionError for a kind whose outputs do not stand side by side.
    """
    inn = base.in_features
    found = tensors_of(params)
    follows = set()
    longer = kind(name).shapes(_LARGE + 1, inn, params)
    for tensor, shape in kind(name).shapes(_LARGE, inn, params).items():
        if shape != longer[tensor]:
            follows.add(tensor)
            if shape[1:] != longer[tensor][1:]:
                raise FusionError(f"{name}: {tensor} mixes outputs, so its rows cannot be taken apart")
    chosen = {id(found[tensor]) for tensor in follows}
    return map_tensors(params, lambda t: t[which] if id(t) in chosen else t)


_LARGE = 1 << 20


def _rows_of_form(form: LowRank, which: Array) -> LowRank:
    added, gates = (tuple((left[which], right) for left, right in fs) for fs in (form.added, form.gates))
    return LowRank(added, gates, None if form.bias is None else form.bias[which])


def _spread(factors: Factors, rows: tuple[int, int], out: int) -> Factors:
    """Factors of some outputs as factors of all: zero rows elsewhere."""
    left, right = factors
    if rows == (0, out):
        return factors
    whole = np.zeros((out, left.shape[1]))
    whole[slice(*rows)] = left
    return whole, right


def _stored(factors: Factors, transposed: bool) -> Factors:
    left, right = factors
    return (right.T, left.T) if transposed else factors


def modules_of(adapters: Sequence[Adapter]) -> dict[str, tuple[Adapter, ...]]:
    """The adapters of each touched module, in order."""
    names = dict.fromkeys(a.module for a in adapters)
    return {name: tuple(a for a in adapters if a.module == name) for name in names}
