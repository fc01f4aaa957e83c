"""How a candidate of a GLoRA supernet is best evaluated: folded into the plain model, or along its path in the supernet.

    python -m benchmarks.search            prints the table and writes benchmarks/results/search.json

Both evaluate the same random candidates in turn, in one process with one thread; the ratio is that of the pairs, so that a machine
that is busy now and then does not decide.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import nn

from reparam_export.training import Fused, Unfused, accuracy, supernet

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from fashion_base import NAME, SHAPE

CASES: dict[str, dict[str, Any]] = {"ViT of the pipeline": SHAPE, "ViT-Tiny/16": {"img_size": 224, "num_classes": 10}}
IMAGES = {"ViT of the pipeline": (64, 512), "ViT-Tiny/16": (4, 16)}  # evaluated on few and on many of them
RANK, CANDIDATES, SEED = 4, 7, 0
RESULTS = Path(__file__).parent / "results" / "search.json"


def measure(shape: dict[str, Any], images: int) -> dict[str, float]:
    """Median seconds of one evaluation each way, and the median ratio of the pairs."""
    torch.manual_seed(SEED)
    net = supernet(timm.create_model(NAME, **shape).eval(), rank=RANK)
    for parameter in net.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    size = (images, shape.get("in_chans", 3), shape["img_size"], shape["img_size"])
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.randn(size).split(64)]
    fused, unfused = Fused(net, accuracy(batches)), Unfused(net, accuracy(batches))
    draw = random.Random(SEED)
    pairs = []
    for number in range(CANDIDATES + 1):
        candidate, seconds = net.space.drawn(draw), {}
        for name, evaluate in (("fused", fused), ("unfused", unfused)):
            started = time.perf_counter()
            evaluate(candidate)
            seconds[name] = time.perf_counter() - started
        if number:  # the first warms up
            pairs.append(seconds)
    return {
        "fused": median(p["fused"] for p in pairs),
        "unfused": median(p["unfused"] for p in pairs),
        "ratio": median(p["unfused"] / p["fused"] for p in pairs),
    }


def main() -> None:
    """Print and keep the table."""
    torch.set_num_threads(1)
    rows = {f"{name}, {n} images": measure(shape, n) for name, shape in CASES.items() for n in IMAGES[name]}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"torch": torch.__version__, "candidates": CANDIDATES, "rows": rows}, indent=1) + "\n"
    )
    print("| evaluated on | along the path, s | folded, s | folded is faster by |\n|---|--:|--:|--:|")
    for name, row in rows.items():
        print(f"| {name} | {row['unfused']:.3f} | {row['fused']:.3f} | {row['ratio']:.2f} x |")


if __name__ == "__main__":
    main()
