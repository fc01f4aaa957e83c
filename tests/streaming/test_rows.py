"""Folding by rows: the very bytes of float64 rounded once, in every format, and faults that are seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reparam_export.errors import FusionError
from reparam_export.rounding import round_once
from reparam_export.streaming import rows
from reparam_export.streaming.formats import BF16, F16, F32, F64, Format, finite, half_ulp, rounded, wide
from reparam_export.streaming.rows import FaultError, Fold, fold_rows, workspace
from reparam_export.verification.weights import half_ulp as half_ulp_of_torch

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
def test_a_wrong_entry_of_the_rounded_block_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rows.narrow

    def faulty(z: Any, target: Format, out: np.ndarray, spare: Any) -> None:
        honest(z, target, out, spare)
        if len(out) > 7:
            out[7, 30] += 2  # two units in the last place

    fold, exact = case(BF16, BF16, gates=True, seed=2)
    monkeypatch.setattr(rows, "narrow", faulty)
    with pytest.raises(FaultError) as caught:
        folded(fold)
    assert (caught.value.row, caught.value.column) == (7, 30)
    assert caught.value.expected == pytest.approx(exact[7, 30], rel=1e-12)
    assert caught.value.ratio > 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [2e-3, 1e-1, np.nan])
def test_a_wrong_entry_of_a_product_is_named(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    fold, _ = case(BF16, BF16, gates=False, seed=3)
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
    assert finite(raw, of)
    for odd in (np.nan, np.inf, -np.inf):
        assert not finite(rounded(np.array([1.0, odd]), of), of)
    assert np.isnan(wide(rounded(np.array([np.nan]), of), of)).all()
