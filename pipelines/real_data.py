"""Real data that a package or the machine ships: nothing here needs a model hub."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


def digits(size: int = 28, seed: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's scanned digits in a fixed random order: images (1797, 1, size, size) float32 in [-1, 1], classes (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    images = torch.from_numpy(data.images[order]).float()[:, None] / 8 - 1
    return torch.nn.functional.interpolate(images, size=(size, size)), torch.from_numpy(data.target[order])


def fashion(train: bool = True) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: images (60000 or 10000, 1, 28, 28) float32 in [-1, 1], classes.

    The files of Debian's dataset-fashion-mnist, which ``make`` puts into ``pipelines/data``; else torchvision downloads them.
    """
    from torchvision.datasets import FashionMNIST

    data = FashionMNIST(DATA, train=train, download=True)
    return data.data[:, None].float() / 127.5 - 1, data.targets


def docstrings(packages: tuple[str, ...], each: int) -> tuple[list[str], Tensor]:
    """First paragraphs of the docstrings of installed packages, and which package each is of, in a fixed random order."""
    texts: list[tuple[str, int]] = []
    for number, package in enumerate(packages):
        found: dict[str, None] = {}
        for file in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py")):
            if len(found) >= each:
                break
            if "test" not in str(file.relative_to(file.parents[1])):
                found |= dict.fromkeys(_paragraphs(file))
        texts += [(text, number) for text in [*found][:each]]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i][0] for i in order], torch.tensor([texts[i][1] for i in order])


def _paragraphs(file: Path) -> list[str]:
    nodes = [n for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    texts = [re.sub(r"\s+", " ", (ast.get_docstring(n) or "").split("\n\n")[0]).strip() for n in nodes]
    return [text for text in texts if 30 <= len(text) <= 300]


def manual() -> str:
    """The reference manual of the Python language, as ``help("assert")`` shows it: about 460,000 characters of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
