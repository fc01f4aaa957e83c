"""Rounding once: float64 to the nearest storage value, ties to even.

``tensor.to(bfloat16)`` of a float64 goes through float32 and rounds twice: about one entry in 130,000 comes out as the wrong neighbour.
Here the way through float32 is rounded to odd, which makes the second rounding the only one that counts (Boldo and Melquiond,
"Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``, each entry the nearest to it. Only float64 to 16 bits needs more than ``to``."""
    import torch

    if value.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    single = value.float()
    gap = value - single.double()
    inexact = (gap != 0) & gap.isfinite() & ((single.view(torch.int32) & 1) == 0)
    side = torch.where(gap > 0, torch.inf, -torch.inf).to(torch.float32)
    return torch.where(inexact, torch.nextafter(single, side), single).to(dtype)
