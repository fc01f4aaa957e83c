"""The kinds against their papers' formulas in 40 digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import formulas
import formulas_of_rotations
import numpy as np
import pytest
import torch
from formulas import Matrix, numbers, zeros

from reparam_export.adapters import kind
from reparam_export.affine import Affine, tensors_of, to_dtype

SIZES = [(6, 8), (8, 6), (6, 6), (12, 4), (4, 12)]
OF_FORMULAS = [
    "adalora",
    "beft",
    "decomposed",
    "deft",
    "delora",
    "dora",
    "full",
    "glora_lycoris",
    "glora_peft",
    "gralora",
    "hira",
    "ia3",
    "locon",
    "loha",
    "lokr",
    "miss",
    "randlora",
    "shira",
    "ssf",
    "tokens",
    "vblora",
    "vera",
]
OF_ROTATIONS = ["boft", "c3a", "fourierft", "hra", "oft", "road", "waveft"]
FORMULAS: dict[str, Callable[..., tuple[Matrix, Matrix]]] = {
    **{name: getattr(formulas, name) for name in OF_FORMULAS},
    **{name: getattr(formulas_of_rotations, name) for name in OF_ROTATIONS},
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(6))
def test_fused_weights_are_the_formula_rounded_once(name: str, seed: int) -> None:
    out, inn = SIZES[seed % len(SIZES)]
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(out, generator=g).double() if seed % 2 and name != "tokens" else None
    layer = Affine(torch.randn(out, inn, generator=g).double(), bias)
    params = to_dtype(to_dtype(kind(name).example(seed, layer), torch.float32), torch.float64)
    t = {field: numbers(tensor) for field, tensor in tensors_of(params).items()}
    b = zeros(out) if bias is None else numbers(bias)
    weight, expected = FORMULAS[name](numbers(layer.weight), b, t, params)
    if name == "glora_peft" and bias is None:
        expected = b  # C, D and E need a bias
    fused = kind(name).fuse(layer, params)
    rounded = np.vectorize(lambda v: np.float32(float(v)))
    assert np.array_equal(fused.weight.float().numpy(), rounded(weight))
    found = torch.zeros(out) if fused.bias is None else fused.bias.float()
    assert np.array_equal(found.numpy(), rounded(expected))


@pytest.mark.parametrize("name", FORMULAS)
def test_the_uncertainty_bounds_the_error_of_float64(name: str) -> None:
    """The forward's own error against 40 digits, on entries where it cancels, is within what the proof allows it."""
    from reparam_export.adapters import Step
    from reparam_export.verification.weights import Exact

    worst = 0.0
    for seed in range(6):
        out, inn = SIZES[seed % len(SIZES)]
        layer = Affine(torch.randn(out, inn, generator=torch.Generator().manual_seed(seed)).double())
        params = kind(name).example(seed, layer)
        t = {field: numbers(tensor) for field, tensor in tensors_of(params).items()}
        weight, bias = FORMULAS[name](numbers(layer.weight), zeros(out), t, params)
        if name == "glora_peft":
            bias = zeros(out)
        exact_layer = Exact(layer, (Step(kind(name), params),))
        x = torch.randn(3, inn, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        error = np.abs(numbers(exact_layer(x)) - (numbers(x) @ weight.T + bias)).astype(float)
        worst = max(worst, float((error / exact_layer.uncertainty(x).numpy()).max()))
    assert worst < 1
    assert math.isfinite(worst)
