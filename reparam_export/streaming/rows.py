"""Folding a few rows at a time: b + y, y = left right + b * (gate_left gate_right), each entry rounded once and checked as it is stored.

The product y is computed in float32 when the storage has 16 bits. What that may cost is bounded (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1): |error of y| <= e. A stored value s is proven to be the rounding of the exact b + y when
|(b - s) + y| + e is less than half a unit in the last place. The few entries for which that cannot be decided are computed again in
float64 (Ziv, "Fast evaluation of elementary mathematical functions with correctly rounded last bit", 1991), so the result is that of
float64 throughout. ``s`` is read back from the very bytes that are written. Each product is probed with random vectors (Freivalds 1977).

From bfloat16 to bfloat16 the same is done by compiled loops (``kernel.py``). So that their word is not the only one, some entries of every
block, drawn at random, are computed again in float64, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import numpy as np

from reparam_export.affine import Factors
from reparam_export.streaming import kernel
from reparam_export.streaming.formats import (
    BF16,
    F16,
    F32,
    F64,
    Array,
    Format,
    half_ulp,
    largest,
    refuse_overflow,
    rounded,
    wide,
    widen,
)
from reparam_export.streaming.kernel import PROBES

ENTRIES = 1 << 17  # of one block: its buffers stay in the processor's cache
SPAN = 8  # blocks whose stored values are kept together, to be settled and written in one go
PANEL = kernel.COLUMNS  # of one matrix product, which is fastest in near-square pieces
DRAWN = 32  # entries of a block that are computed again whatever the compiled check says
TINY = 1e-37  # covers what underflow of a product of float32 may lose


class FaultError(Exception):
    """A stored entry that is not the rounding of the exact value, or a product that is not the product."""

    def __init__(self, row: int, column: int, expected: float, found: float, ratio: float) -> None:
        super().__init__(f"[{row}, {column}]: expected {expected!r}, found {found!r}")
        self.row, self.column, self.expected, self.found, self.ratio = row, column, expected, found, ratio


@dataclass
class Product:
    """left @ right in stored orientation, (rows, k) and (k, columns), in float64 and in the dtype of the computation."""

    left: Array
    right: Array
    dtype: type[np.generic]
    columns: Array  # right, one row per column, for single entries
    probed: Array  # left's half of the expected probes: right @ x, (k, PROBES)
    size: Array  # per row: bound of |left| |right| in any column
    length: Array  # per row: bound of the norm of the row

    @classmethod
    def of(cls, factors: tuple[Factors, ...], probes: Array, dtype: type[np.generic]) -> Product | None:
        """The sum of the factors' products as one; None for no factors. probes: (columns, PROBES) float64."""
        if not factors:
            return None
        left = np.concatenate([np.asarray(pair[0], np.float64) for pair in factors], axis=1)
        right = np.concatenate([np.asarray(pair[1], np.float64) for pair in factors])
        norms = np.linalg.norm(left, axis=1)
        return cls(
            left, right, dtype, np.ascontiguousarray(right.T), right @ probes,
            norms * float(np.linalg.norm(right, axis=0).max(initial=0)), norms * float(np.linalg.norm(right)),
        )  # fmt: skip

    @property
    def width(self) -> int:
        return int(self.right.shape[1])

    @cached_property
    def quick(self) -> tuple[Array, Array]:
        """left and right in the dtype of the computation."""
        return self.left.astype(self.dtype), np.ascontiguousarray(self.right.astype(self.dtype))

    @cached_property
    def packed(self) -> kernel.Pair:
        """left and right for the compiled loops."""
        return kernel.Pair.of(self.left, self.right)

    def bound(self, rows: slice, roundoff: float) -> Array:
        """Of the error of an entry, per row: k products and sums, and the factors' own rounding."""
        found: Array = (self.left.shape[1] + 4) * roundoff * self.size[rows]
        return found

    def entries(self, rows: Array, columns: Array) -> Array:
        """Single entries in float64."""
        found: Array = np.einsum("nk,nk->n", self.left[rows], self.columns[columns])
        return found


@dataclass
class Tally:
    """What was seen of one weight so far."""

    kept: float = 0.0  # <stored - W, exact - W>
    changed: float = 0.0  # |exact - W|^2
    error: float = 0.0  # largest |stored - exact|
    ratio: float = 0.0  # worst error over its bound, one unit in the last place
    probe_ratio: float = 0.0  # worst probe over its bound
    detectable: float = 0.0  # largest row error that all probes would miss with chance 1e-6
    norm: float = 0.0  # |stored|^2 of a row, on average over the first ones
    undecided: int = 0  # entries computed again in float64
    probing: float = 0.0  # seconds that the probes took


@dataclass
class Fold:
    """One weight to be folded, in stored orientation."""

    values: Array  # raw, (rows, columns)
    source: Format
    target: Format
    added: Product | None
    gates: Product | None
    probes: Array  # (columns, PROBES), in the dtype of the computation
    lengths: Array  # of the probes: their norms, and their sums of sizes
    chance: np.random.Generator  # draws entries
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def of(cls, values: Array, source: Format, target: Format, factors: tuple[Any, Any], seed: int) -> Fold:
        """factors: those that are added and those of the gates, both in stored orientation."""
        dtype = np.float32 if target.size == 2 and source is not F64 else np.float64
        chance = np.random.default_rng(seed)
        probes = chance.standard_normal((values.shape[1], PROBES)).astype(np.float32)
        exact = probes.astype(np.float64)
        lengths = np.stack([np.linalg.norm(exact, axis=0), np.abs(exact).sum(axis=0)])
        added, gates = (Product.of(f, exact, dtype) for f in factors)
        return cls(values, source, target, added, gates, np.ascontiguousarray(probes.astype(dtype)), lengths, chance)

    @cached_property
    def packed_probes(self) -> Array:
        """The probes for the compiled loops."""
        return kernel.packed_probes(self.probes)

    @property
    def compiled(self) -> bool:
        return self.source is BF16 and self.target is BF16

    @property
    def roundoff(self) -> float:
        return 2.0**-24 if self.probes.dtype == np.float32 else 2.0**-53


class Workspace:
    """Buffers used again and again by one thread: for a block of rows, and for the stored values of SPAN blocks."""

    def __init__(self, rows: int, columns: int, dtype: np.dtype[Any], target: Format) -> None:
        self.rows = rows
        self.b, self.y, self.z, self.s, self.d, self.g = (np.empty((rows, columns), dtype) for _ in range(6))
        self.out = np.empty((SPAN * rows, columns), target.raw)
        self.which = np.empty(self.out.size + 1, np.int64)
        self.bits = np.zeros(-(-rows * columns // 8) * 8, bool)  # whole words, so that it can be searched by words


def fold_rows(fold: Fold, work: Workspace, start: int, stop: int) -> Array:
    """Rows start to stop, SPAN blocks at most, raw in the target format; a view of the workspace. Raises FaultError, FusionError."""
    out = work.out[: stop - start]
    step = len(out) if fold.compiled else work.rows
    fold_some = compiled_block if fold.compiled else fold_block
    unsure: list[Array] = []
    error = 0.0
    for first in range(start, stop, step):
        found, e = fold_some(fold, work, first, out[first - start : first - start + step])
        if len(found):
            unsure.append(found + (first - start) * out.shape[1])
        error = max(error, e)
    if unsure:
        settle(fold, np.concatenate(unsure), start, out, error)
    return out


def fold_block(fold: Fold, work: Workspace, start: int, out: Array) -> tuple[Array, float]:
    """One block of rows into ``out``; flat indices of the entries that are not decided, and the bound e that left them so."""
    n, tally = len(out), fold.tally
    b, y, z, s, d = (buffer[:n] for buffer in (work.b, work.y, work.z, work.s, work.d))
    rows = slice(start, start + n)
    widen(fold.values[rows], fold.source, b)
    top = 0.0
    if fold.added is not None:
        product(fold, fold.added, y, start)
    else:
        y.fill(0)
    if fold.gates is not None:
        gate, top = work.g[:n], float(max(-b.min(), b.max(), 0))
        product(fold, fold.gates, gate, start)
        np.multiply(gate, b, out=gate)
        np.add(y, gate, out=y)
    e = bound_of(fold, rows, top)
    np.add(b, y, out=z)
    narrow(z, fold.target, out, d)
    widen(out, fold.target, s)
    if start == 0:
        tally.norm = float(np.vdot(s, s)) / n
    np.subtract(b, s, out=d)
    np.add(d, y, out=d)  # exact - stored
    change = float(np.vdot(y, y))
    tally.changed += change
    tally.kept += change - float(np.vdot(y, d))
    np.abs(d, out=d)
    tally.error = max(tally.error, float(d.max(initial=0)))
    np.add(d, e, out=d)
    half_spacing(z, fold.target)
    return undecided(d, z, work), e


def compiled_block(fold: Fold, work: Workspace, start: int, out: Array) -> tuple[Array, float]:
    """``fold_block`` for bfloat16, compiled; the entries that are to be computed again hold some that were drawn."""
    tally = fold.tally
    rows = slice(start, start + len(out))
    raw = np.require(fold.values[rows], requirements=["C", "A"])
    e = bound_of(fold, rows, largest(raw, BF16) if fold.gates is not None else 0.0)
    single = float(np.nextafter(np.float32(e), np.float32(np.inf)))  # not less than e
    added, gates = (None if of is None else of.packed for of in (fold.added, fold.gates))
    seen = kernel.fold(raw, out, start, added, gates, fold.packed_probes, single, work.which)
    started = time.perf_counter()
    for of, found in ((fold.added, seen.found), (fold.gates, seen.gated)):
        if of is not None:
            judge(fold, of, found, rows, partial(kernel.multiplied, of.packed, of.width))
    tally.probing += time.perf_counter() - started
    if start == 0:
        stored = wide(out[: work.rows], BF16)
        tally.norm = float(np.vdot(stored, stored)) / len(stored)
    tally.changed += seen.change
    tally.kept += seen.change - seen.lost
    tally.error = max(tally.error, seen.error)
    drawn = fold.chance.integers(0, out.size, DRAWN * -(-out.size // ENTRIES))
    return np.concatenate([seen.unsure, drawn]), e


def bound_of(fold: Fold, rows: slice, top: float) -> float:
    """The bound e of the error of y in any entry of these rows; top: the size of the largest entry of b, asked for with gates only."""
    e = TINY if fold.probes.dtype == np.float32 else 0.0
    size = 0.0
    for of, by in ((fold.added, 1.0), (fold.gates, top)):
        if of is not None:
            e += float(of.bound(rows, fold.roundoff).max(initial=0)) * by
            size += float(of.size[rows].max(initial=0)) * by
    return e + 8 * fold.roundoff * size


def product(fold: Fold, of: Product, out: Array, start: int) -> None:
    """out = left @ right for these rows, probed. Raises FaultError."""
    left, right = of.quick
    rows = slice(start, start + len(out))
    for column in range(0, of.width, PANEL):
        np.matmul(left[rows], right[:, column : column + PANEL], out=out[:, column : column + PANEL])
    started = time.perf_counter()  # the clock of a thread takes longer to read than a probe takes
    found = np.zeros((len(out), PROBES))
    for column in range(0, of.width, PANEL):
        panel = slice(column, column + PANEL)
        found += out[:, panel] @ fold.probes[panel]
    judge(fold, of, found, rows, lambda row: cast(Array, out[row - start]))
    fold.tally.probing += time.perf_counter() - started


def judge(fold: Fold, of: Product, found: Array, rows: slice, row_of: Callable[[int], Array]) -> None:
    """Freivalds' test of these rows of a product; found: (rows, PROBES), its product with the probes, summed in float32 over a panel.

    row_of: a row of the product as it was found, to name the entry. Raises FaultError.
    """
    expected = of.left[rows] @ of.probed
    summed = 2 * (min(of.width, PANEL) + 4) * fold.roundoff * of.length[rows, None] * fold.lengths[0]
    tiny = TINY if fold.probes.dtype == np.float32 else 0
    bound = summed + (of.bound(rows, fold.roundoff)[:, None] + tiny) * fold.lengths[1]
    ratio = np.abs(found - expected) / np.maximum(bound, np.finfo(np.float64).tiny)
    worst = float(ratio.max(initial=0))
    if not worst <= 1:
        row = rows.start + int(np.argmax(np.nan_to_num(ratio, nan=np.inf).max(axis=1)))
        raise located(of, row_of(row), row, worst)
    fold.tally.probe_ratio = max(fold.tally.probe_ratio, worst)
    fold.tally.detectable = max(fold.tally.detectable, float(bound.max(initial=0)))


def located(of: Product, found: Array, row: int, ratio: float) -> FaultError:
    """The entry of a probed row that is furthest from the product in float64."""
    exact = of.left[row] @ of.right
    gap = np.nan_to_num(np.abs(found - exact), nan=np.inf)
    column = int(gap.argmax())
    return FaultError(row, column, float(exact[column]), float(found[column]), ratio)


def narrow(z: Array, target: Format, out: Array, spare: Array) -> None:
    """z rounded into ``out``; ties may go either way here, they are undecided. ``spare`` is overwritten."""
    if target is BF16 and z.dtype == np.float32:
        bits = spare.view(np.uint32)
        np.add(z.view(np.uint32), np.uint32(0x8000), out=bits)
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")
    elif target is BF16:
        out[...] = rounded(z, target)
    else:
        with np.errstate(over="ignore"):
            np.copyto(out.view(np.float16) if target is F16 else out, z, casting="same_kind")


def half_spacing(z: Array, target: Format) -> None:
    """z in place: half the target's spacing at z. Where that has no float of its own it is negative, so nothing is less."""
    if z.dtype == np.float32:
        bits: Any = z.view(np.uint32)
        np.bitwise_and(bits, 0x7F800000, out=bits)
        np.subtract(bits, target.digits << 23, out=bits)
    else:
        bits = z.view(np.uint64)
        np.bitwise_and(bits, 0x7FF << 52, out=bits)
        np.subtract(bits, target.digits << 52, out=bits)
    if target is F16 or (target is F32 and z.dtype == np.float64):
        least = 2.0 ** (target.least - target.digits)
        np.copyto(z, least, where=~(np.abs(z) >= least) | (z < 0))


def undecided(d: Array, half: Array, work: Workspace) -> Array:
    """Flat indices of entries for which d < half is not so; a NaN is one."""
    flags = work.bits[: d.size].reshape(d.shape)
    np.less(d, half, out=flags)
    end = -(-d.size // 8) * 8
    work.bits[d.size : end] = True
    words = np.flatnonzero(work.bits[:end].view(np.uint64) != 0x0101010101010101)
    if not len(words):
        return words
    each, inside = np.nonzero(work.bits[:end].reshape(-1, 8)[words] == 0)
    return words[each] * 8 + inside


def settle(fold: Fold, which: Array, start: int, out: Array, e: float) -> None:
    """Compute these entries again in float64, round them once and store them.

    Raises FaultError where what stood there is further off than e explains.
    """
    columns = out.shape[1]
    rows, column = which // columns + start, which % columns
    base = wide(fold.values[rows, column], fold.source)
    exact = base.copy()
    if fold.added is not None:
        exact += fold.added.entries(rows, column)
    if fold.gates is not None:
        exact += base * fold.gates.entries(rows, column)
    found = out.reshape(-1)[which]
    right = rounded(exact, fold.target)
    stored = wide(right, fold.target)
    if not np.isfinite(stored).all():
        raise refuse_overflow("an entry", fold.target)
    half = half_ulp(exact, fold.target)
    gap = np.abs(wide(found, fold.target) - exact)
    bad = np.flatnonzero(~(gap <= half + 2 * (e + fold.roundoff * np.abs(exact))))  # z itself was rounded
    if len(bad):
        at = int(bad[0])
        ratio = float(gap[at] / (2 * half[at]))
        raise FaultError(int(rows[at]), int(column[at]), float(exact[at]), float(wide(found, fold.target)[at]), ratio)
    out.reshape(-1)[which] = right
    fold.tally.undecided += len(which)
    fold.tally.ratio = max(fold.tally.ratio, float((np.abs(stored - exact) / (2 * half)).max()))


def workspace(fold: Fold) -> Workspace:
    """Buffers for a weight's blocks. How it is cut into blocks depends on its width alone, so the same input gives the same numbers."""
    columns = fold.values.shape[1]
    return Workspace(max(1, ENTRIES // max(1, columns)), columns, fold.probes.dtype, fold.target)
