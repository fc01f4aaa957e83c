"""LyCORIS' own algorithms, on linear layers, convolutions with and without groups, and norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_grouped
import test_lycoris

from .made import Made, Wild, answers
from .models import draw


def of(nets: Any, name: str, *size: int) -> Callable[[Path], Made]:
    """A file of that algorithm, on the net of that module of tests, which takes inputs of this size."""

    def make(folder: Path) -> Made:
        file, x = folder / "net.safetensors", draw(*size)
        model = nets.trained(nets.ALGORITHMS[name], file)
        return Made(file, {"x": x}, answers(model, x=x.double()), {"base": nets.spec(folder), "inputs": nets.INPUTS})

    return make


NAMES = ("locon with cores", "locon decomposed by input", "loha", "lokr", "glora", "norms too")
ALGORITHMS = [
    *(Wild(name, "LyCORIS", of(test_lycoris, name, 3, 4, 9, 7), "LyCORIS") for name in NAMES),
    *(
        Wild(f"{name}, convolutions in groups", "LyCORIS", of(test_grouped, name, 3, 4, 12, 10), "LyCORIS")
        for name in ("lora", "loha")
    ),
]
