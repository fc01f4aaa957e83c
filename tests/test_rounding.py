"""Rounding once, against exact rational arithmetic: the two neighbours of a value, and which is nearer."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from reparam_export.rounding import round_once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e-12, -1e-12, 2.0**-45, -(2.0**-45)])
def test_a_value_beside_a_midpoint_goes_to_its_nearer_neighbour(dtype: torch.dtype, offset: float) -> None:
    low = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    high = torch.nextafter(low, torch.full_like(low, torch.inf))
    values = (low.double() + high.double()) / 2 * (1 + offset)
    found = round_once(values, dtype)
    for value, below, above, got in zip(values.tolist(), low.tolist(), high.tolist(), found.tolist(), strict=True):
        gaps = {n: abs(Fraction(value) - Fraction(n)) for n in (below, above)}
        assert gaps[got] == min(gaps.values()), (value, below, above, got)
    if offset:  # the trap is real: through float32, half of them come out wrong
        assert 100 < int((values.to(dtype) != found).sum()) < 400


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_needs_no_care_is_left_as_it_was(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e300, -1e-320, 65519.999999999], dtype=torch.float64)
    found = round_once(special, dtype)
    assert torch.equal(found[:6], special[:6].to(dtype))
    assert torch.equal(torch.signbit(found[:6]), torch.signbit(special[:6]))
    assert found[6] == (65504 if dtype == torch.float16 else special[6].to(dtype))
    assert bool(round_once(torch.tensor([torch.nan], dtype=torch.float64), dtype).isnan())
    random = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_once(random, dtype), random.to(dtype))  # from float32, torch rounds once
    ties = torch.arange(1, 200, 2, dtype=torch.float64) / 2 + 256  # exact ties of bfloat16 go to even
    assert torch.equal(round_once(ties, dtype), ties.float().to(dtype))
