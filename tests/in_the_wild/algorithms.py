"""LyCORIS' own algorithms, on linear layers, convolutions with and without groups, and norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import test_grouped
import test_lycoris

from .made import Made, Wild, answers
from .models import draw


def of(name: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        model = test_lycoris.trained(test_lycoris.ALGORITHMS[name], folder / "net.safetensors")
        inputs = {"x": draw(3, 4, 9, 7)}
        options = {"base": test_lycoris.spec(folder), "inputs": test_lycoris.INPUTS}
        return Made(folder / "net.safetensors", inputs, answers(model, x=inputs["x"].double()), options)

    return make


def in_groups(name: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        model = test_grouped.trained(test_grouped.ALGORITHMS[name], folder / "net.safetensors")
        inputs = {"x": draw(3, 4, 12, 10)}
        options = {"base": test_grouped.spec(folder), "inputs": test_grouped.INPUTS}
        return Made(folder / "net.safetensors", inputs, answers(model, x=inputs["x"].double()), options)

    return make


NAMES = ("locon with cores", "locon decomposed by input", "loha", "lokr", "glora", "norms too")
ALGORITHMS = [Wild(name, "LyCORIS", of(name), "LyCORIS") for name in NAMES] + [
    Wild(f"{name}, convolutions in groups", "LyCORIS", in_groups(name), "LyCORIS") for name in ("lora", "loha")
]
