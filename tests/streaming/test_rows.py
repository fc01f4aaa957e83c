"""Folding by rows: the very bytes of float64 rounded once, in every format, and faults that are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from reparam_export.errors import FusionError
from reparam_export.rounding import round_once
from reparam_export.streaming import kernel, rows
from reparam_export.streaming.formats import BF16, F16, F32, F64, Format, finite, half_ulp, rounded, wide
from reparam_export.streaming.rows import FaultError, Fold, fold_rows, workspace
from reparam_export.verification.weights import half_ulp as half_ulp_of_torch

Mutate = Callable[[str, str], None]
STORED = "store i16 %stored, ptr %out.i, align 2"  # where the compiled loop rounds
DTYPES = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}


def raw_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.element_size() == 2 else tensor.numpy()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ENTRIES", 4096)
    monkeypatch.setattr(rows, "PANEL", 64)


def case(source: Format, target: Format, *, gates: bool, seed: int, size: float = 1e-2) -> tuple[Fold, np.ndarray]:
    """A weight of 150 x 201 with a change of rank 5, and the exact fused weight in float64."""
    generator = np.random.default_rng(seed)
    raw = rounded(generator.standard_normal((150, 201)) * 0.02, source)
    base = wide(raw, source)
    left, right = generator.standard_normal((150, 5)), size * 0.02 * generator.standard_normal((5, 201))
    left_gate, right_gate = generator.standard_normal((150, 2)), size * generator.standard_normal((2, 201))
    exact = base + left @ right + (base * (left_gate @ right_gate) if gates else 0)
    return Fold.of(raw, source, target, (((left, right),), ((left_gate, right_gate),) if gates else ()), seed), exact


def folded(fold: Fold) -> np.ndarray:
    work = workspace(fold)
    step = work.rows * rows.SPAN
    return np.concatenate([fold_rows(fold, work, s, min(s + step, 150)).copy() for s in range(0, 150, step)])


@pytest.mark.parametrize("target", [BF16, F16, F32], ids=lambda f: f.short)
@pytest.mark.parametrize("source", [BF16, F16, F32, F64], ids=lambda f: f.short)
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_the_bytes_are_those_of_float64_rounded_once(source: Format, target: Format, gates: bool) -> None:
    for seed in range(3):
        fold, exact = case(source, target, gates=gates, seed=seed)
        found = folded(fold)
        assert np.array_equal(found, raw_of(round_once(torch.from_numpy(exact), DTYPES[target])))
        base, stored = wide(fold.values, source), wide(found, target)
        change = exact - base
        survival = float((change * (stored - base)).sum() / (change * change).sum())
        assert abs(fold.tally.kept / fold.tally.changed - survival) < 1e-3
        assert fold.tally.error == pytest.approx(np.abs(stored - exact).max(), rel=1e-3)


@pytest.mark.usefixtures("small_blocks")
def test_a_change_far_below_the_format_is_decided_like_any_other() -> None:
    for size in (1e-4, 1e-7, 0.0):
        fold, exact = case(F32, BF16, gates=False, seed=1, size=size)
        assert np.array_equal(folded(fold), raw_of(round_once(torch.from_numpy(exact), torch.bfloat16)))


@pytest.mark.usefixtures("small_blocks")
def test_exact_ties_go_to_even() -> None:
    """A base in float32 that lies on midpoints of bfloat16, and a change of exactly nothing."""
    low = torch.randn(150, 201, generator=torch.Generator().manual_seed(0)).bfloat16()
    middle = (low.double() + torch.nextafter(low, torch.full_like(low, torch.inf)).double()) / 2
    raw = middle.float().numpy()
    fold = Fold.of(raw, F32, BF16, (((np.zeros((150, 1)), np.zeros((1, 201))),), ()), 0)
    assert np.array_equal(folded(fold), raw_of(middle.float().bfloat16()))


@pytest.mark.usefixtures("small_blocks")
def test_what_exceeds_the_format_is_refused() -> None:
    fold, _ = case(F32, F16, gates=False, seed=1)
    fold.values[17, 30] = 70_000.0
    with pytest.raises(FusionError):
        folded(fold)
    fold.values[17, 30] = np.nan
    with pytest.raises(FusionError):
        folded(fold)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("source", [BF16, F32], ids=lambda f: f.short)
def test_a_wrong_entry_of_the_rounded_block_is_named(
    monkeypatch: pytest.MonkeyPatch, source: Format, compiled_with: Mutate
) -> None:
    fold, exact = case(source, BF16, gates=True, seed=2)
    honest = rows.narrow

    def faulty(*given: Any) -> None:
        honest(*given)
        out = given[2].reshape(-1, 201)
        if len(out) > 7:
            out[7, 30] += 2  # two units in the last place

    monkeypatch.setattr(rows, "narrow", faulty)
    compiled_with(
        STORED,
        f"""
  %raw.here = load i16, ptr %raw.i, align 2
  %column.here = icmp eq i64 %i, 30
  %value.here = icmp eq i16 %raw.here, {int(fold.values[7, 30])}
  %here = and i1 %column.here, %value.here
  %wrong = select i1 %here, i16 2, i16 0
  %odd = add i16 %stored, %wrong
  store i16 %odd, ptr %out.i, align 2""",
    )
    with pytest.raises(FaultError) as caught:
        folded(fold)
    assert (caught.value.row, caught.value.column) == (7, 30)
    assert caught.value.expected == pytest.approx(exact[7, 30], rel=1e-12)
    assert caught.value.ratio > 1


@pytest.mark.usefixtures("small_blocks")
def test_a_compiled_check_that_sees_nothing_is_not_the_only_one(compiled_with: Mutate) -> None:
    """Every stored value one unit off, and a check that finds nothing: some entries are computed again in float64 all the same."""
    fold, _ = case(BF16, BF16, gates=False, seed=2)
    compiled_with(STORED, "%odd = add i16 %stored, 1\n  store i16 %odd, ptr %out.i, align 2")
    compiled_with("%unsure = and <16 x i1> %open, %inside", "%unsure = and <16 x i1> zeroinitializer, %inside")
    with pytest.raises(FaultError):
        folded(fold)


SHAPES = [(1, 1), (3, 16), (5, 31), (17, 513), (33, 1040), (2, 2048)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("k", "gate_k"), [(1, 0), (40, 0), (5, 3), (0, 2), (0, 0)])
def test_bfloat16_of_any_shape_is_that_of_float64(shape: tuple[int, int], k: int, gate_k: int) -> None:
    """Compiled loops take 4 rows, 32 columns and tiles of 16 x 512 at a time; what is left over is a matter of its own."""
    generator = np.random.default_rng(k)
    raw = rounded(generator.standard_normal(shape) * 0.02, BF16)
    base = wide(raw, BF16)

    def pairs(n: int) -> tuple[Any, ...]:
        left, right = generator.standard_normal((shape[0], n)), 1e-3 * generator.standard_normal((n, shape[1]))
        return ((left, right),) if n else ()

    added, gates = pairs(k), pairs(gate_k)
    exact = base + sum((left @ right for left, right in added), np.zeros(shape))
    exact += base * sum((left @ right for left, right in gates), np.zeros(shape))
    fold = Fold.of(raw, BF16, BF16, (added, gates), 0)
    found = fold_rows(fold, workspace(fold), 0, shape[0])
    assert np.array_equal(found, raw_of(round_once(torch.from_numpy(exact), torch.bfloat16)))
    assert fold.tally.changed == pytest.approx(((exact - base) ** 2).sum(), rel=1e-4)
    kept = ((exact - base) * (wide(found, BF16) - base)).sum()
    assert fold.tally.kept == pytest.approx(kept, rel=1e-3, abs=1e-4 * fold.tally.changed)
    assert fold.tally.error == pytest.approx(np.abs(wide(found, BF16) - exact).max(), rel=1e-3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-38, 1e-40, 1e30])
def test_bfloat16_of_any_size_is_that_of_float64(size: float) -> None:
    """The smallest numbers have no float for half their spacing, so nothing is decided at once; the largest are next to infinity."""
    generator = np.random.default_rng(0)
    raw = rounded(generator.standard_normal((150, 201)) * size, BF16)
    raw[0, :5] = 0x8000, 0x0000, 0x0001, 0x8001, 0x0080
    left, right = generator.standard_normal((150, 5)), size * 1e-3 * generator.standard_normal((5, 201))
    fold = Fold.of(raw, BF16, BF16, (((left, right),), ()), 0)
    exact = wide(raw, BF16) + left @ right
    assert np.array_equal(folded(fold), raw_of(round_once(torch.from_numpy(exact), torch.bfloat16)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("source", [BF16, F32], ids=lambda f: f.short)
def test_what_float32_would_decide_wrongly_is_left_to_float64(source: Format) -> None:
    """Every exact value lies next to a midpoint, nearer than the float32 product is to its own: terms of size 1 that nearly cancel."""
    generator = np.random.default_rng(0)
    raw = rounded(np.abs(generator.standard_normal((150, 201))) * 0.02 + 1e-3, BF16)
    base = wide(raw, BF16)
    middle = half_ulp(base, BF16)[0]  # one row of the change serves all rows of a base whose rows are alike
    raw, base = np.tile(raw[:1], (150, 1)), np.tile(base[:1], (150, 1))
    big = generator.standard_normal(201)
    near = middle * (1 + 1e-9 * generator.standard_normal(201))
    left, right = np.tile([[1 / 3, 1.0]], (150, 1)), np.stack([big, near - big / 3])
    exact = base + left @ right
    given = raw if source is BF16 else base.astype(np.float32)
    fold = Fold.of(given, source, BF16, (((left, right),), ()), 0)
    assert np.array_equal(folded(fold), raw_of(round_once(torch.from_numpy(exact), torch.bfloat16)))
    assert fold.tally.undecided >= exact.size


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("odd", [0x7F80, 0xFF80, 0x7FC0, 0x7F7F])
def test_bfloat16_that_is_not_finite_or_becomes_so_is_refused(odd: int) -> None:
    fold, _ = case(BF16, BF16, gates=False, seed=1)
    fold.values[17, 30] = odd
    if odd == 0x7F7F:
        fold = Fold.of(fold.values, BF16, BF16, (((np.full((150, 1), 1e37), np.ones((1, 201))),), ()), 0)
    with pytest.raises(FusionError):
        folded(fold)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [2e-3, 1e-1, np.nan])
def test_a_wrong_entry_of_a_product_is_named(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    fold, _ = case(F32, BF16, gates=False, seed=3)
    honest = np.matmul

    def faulty(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
        honest(left, right, out=out)
        if len(out) > 11:
            out[11, 5] += np.float32(size)

    monkeypatch.setattr(rows.np, "matmul", faulty)
    with pytest.raises(FaultError) as caught:
        folded(fold)
    assert caught.value.row == 11
    assert caught.value.column % 64 == 5


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("by", [0.1, 1.0, np.nan])
def test_a_wrong_compiled_product_is_named(compiled_with: Mutate, by: float, gates: bool) -> None:
    """One factor's entry is read wrongly: it is the row's largest output that is furthest off."""
    fold, _ = case(BF16, BF16, gates=gates, seed=3)
    of = fold.gates if gates else fold.added
    assert of is not None
    value = np.float32(of.left[11, 1])
    compiled_with(
        "  %one = insertelement <16 x float> poison, float %value, i64 0\n",
        f"""
  %here = fcmp oeq float %value, {constant(value)}
  %read = select i1 %here, float {constant(value * np.float32(1 + by))}, float %value
  %one = insertelement <16 x float> poison, float %read, i64 0
""",
    )
    with pytest.raises(FaultError) as caught:
        folded(fold)
    assert caught.value.row == 11
    assert np.isnan(by) or caught.value.column == np.abs(of.right[1]).argmax()
    assert not caught.value.ratio <= 1


def constant(value: float) -> str:
    """A float as LLVM writes it: the bits of the same double."""
    return f"0x{np.float64(value).view(np.uint64):016X}"


@pytest.mark.parametrize("of", [BF16, F16, F32], ids=lambda f: f.short)
def test_formats_are_those_of_torch(of: Format) -> None:
    """Rounding, widening and spacing against torch and against ``round_once``."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator, dtype=torch.float64) * torch.logspace(
        -30, 4, 5000, dtype=torch.float64
    )
    raw = rounded(values.numpy(), of)
    assert np.array_equal(raw, raw_of(round_once(values, DTYPES[of])))
    assert np.array_equal(rounded(values.float().numpy(), of), raw_of(values.float().to(DTYPES[of])))
    assert np.array_equal(wide(raw, of), round_once(values, DTYPES[of]).double().numpy())
    normal = values[values.abs() >= torch.finfo(DTYPES[of]).tiny]
    assert np.array_equal(half_ulp(normal.numpy(), of), half_ulp_of_torch(normal, DTYPES[of]).numpy())
    if of is BF16:
        part = raw.reshape(50, 100)[3:, 10:43]
        assert np.array_equal(kernel.widen(part, np.empty(5000)), wide(part, of))
    assert finite(raw, of)
    for odd in (np.nan, np.inf, -np.inf):
        assert not finite(rounded(np.array([1.0, odd]), of), of)
    assert np.isnan(wide(rounded(np.array([np.nan]), of), of)).all()
