"""Counting what a model does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam_export.models import Input, Signature
from reparam_export.verification.graph import multiply_adds


class Attention(nn.Module):
    """One head over its own input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x))


def test_attention_is_counted() -> None:
    tokens, width = 7, 16
    signature = Signature((Input("x", ("batch", tokens, width)),), ("y",))
    found = multiply_adds(Attention(width).eval(), signature, (torch.zeros(1, tokens, width),))
    assert found == 2 * tokens * tokens * width + tokens * width * width
