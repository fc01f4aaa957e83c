"""Few-shot, transfer and domain shift in the small: base, linear probe, LoRA, Hydra and GLoRA at like numbers of parameters.

    python -m benchmarks.adapters          half an hour on one core; prints the table, writes benchmarks/results/adapters.json

A vision transformer of 455,050 parameters is pre-trained on Fashion-MNIST (or on scikit-learn's digits), then adapted to another
task with few samples; accuracy on held-out samples, mean and range over the seeds. It says which method does better on toys of this
size, and nothing about ImageNet; differences below the range between seeds mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from reparam_export.training import Fused, Search, accuracy, adapter_parameters, attach, search, supernet

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from fashion_base import NAME, SHAPE, pretrained
from flow import train
from real_data import digits, fashion

RESULTS = Path(__file__).parent / "results" / "adapters.json"
SEEDS, STEPS, BATCH, RATE, HELD_OUT = (0, 1, 2), 400, 32, 5e-3, 497
ONE_PATH = {"A": "vector", "B": "LoRA_1", "C": "none", "D": "none", "E": "none"}
SEARCH = Search(population=16, select=4, mutations=6, crossovers=6, epochs=5, max_parameters=11_000)
Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is learnt: training and test samples; ``base``: the pre-trained model it starts from."""

    base: str
    learnt: Samples
    tested: Samples


def tasks() -> dict[str, Task]:
    """Few-shot, transfer both ways, and two shifts of the domain."""
    scans, clothes, new_clothes = digits(), fashion(), fashion(train=False)
    held_out, rest = (tuple(t[:HELD_OUT] for t in scans), tuple(t[HELD_OUT:] for t in scans))
    few = tuple(t[:300] for t in clothes)
    test = tuple(t[:2000] for t in new_clothes)

    def noisy(samples: Samples) -> Samples:
        noise = torch.randn(samples[0].shape, generator=torch.Generator().manual_seed(0))
        return samples[0] + 0.8 * noise, samples[1]

    def turned(samples: Samples) -> Samples:
        return samples[0].rot90(1, (2, 3)), samples[1]

    return {
        "few-shot: clothes to digits, 5 of each": Task("clothes", shots(rest, 5), held_out),  # type: ignore[arg-type]
        "transfer: clothes to digits, 1300": Task("clothes", rest, held_out),  # type: ignore[arg-type]
        "transfer: digits to clothes, 1300": Task("digits", tuple(t[:1300] for t in clothes), test),  # type: ignore[arg-type]
        "shift: clothes to noisy ones, 300": Task("clothes", noisy(few), noisy(test)),  # type: ignore[arg-type]
        "shift: clothes to turned ones, 300": Task("clothes", turned(few), turned(test)),  # type: ignore[arg-type]
    }


def shots(samples: Samples, each: int) -> Samples:
    """The first ``each`` samples of every class."""
    chosen = torch.cat([(samples[1] == c).nonzero().flatten()[:each] for c in samples[1].unique()])
    return samples[0][chosen], samples[1][chosen]


def bases(folder: Path) -> dict[str, nn.Module]:
    """The two pre-trained models."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SHAPE)
    images, classes = digits()
    train(model, {"image": images[HELD_OUT:]}, classes[HELD_OUT:], epochs=30, rate=1e-3)
    return {"clothes": pretrained(folder), "digits": model}


def learn(model: nn.Module, samples: Samples, steps: int = STEPS) -> nn.Module:
    """Train what is not frozen for so many steps."""
    epochs = steps * BATCH / len(samples[1])
    trained: nn.Module = train(
        model, {"image": samples[0]}, samples[1], epochs=epochs, rate=RATE, batch=min(BATCH, len(samples[1]))
    )
    return trained


def untouched(model: nn.Module, task: Task) -> nn.Module:
    """As it was pre-trained, head and all."""
    return model


def linear_probe(model: nn.Module, task: Task) -> nn.Module:
    """The head alone."""
    model.requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)
    return learn(model, task.learnt)


def adapter(kind: str, targets: str, **settings: Any) -> Callable[[nn.Module, Task], nn.Module]:
    """An attached adapter and the head."""

    def method(model: nn.Module, task: Task) -> nn.Module:
        return learn(attach(model, kind, targets, train="head", **settings), task.learnt)

    return method


def searched(model: nn.Module, task: Task) -> nn.Module:
    """A supernet for as many steps, the best path of a search on a fifth of the samples, trained on for half as many."""
    count = len(task.learnt[1])
    order = torch.randperm(count)
    judged, learnt = (
        (task.learnt[0][part], task.learnt[1][part]) for part in order.tensor_split([max(10, count // 5)])
    )
    net = supernet(model, rank=1, train="head", seed=int(torch.randint(2**31, ())))
    learn(net.model, learnt)
    found = search(net.space, Fused(net, accuracy([judged])), SEARCH)
    return learn(net.fix(found.best).model, task.learnt, STEPS // 2)


METHODS: dict[str, Callable[[nn.Module, Task], nn.Module]] = {
    "base": untouched,
    "linear probe": linear_probe,
    "LoRA": adapter("lora", "hydra-vit", rank=4, scale=2.0),
    "Hydra": adapter("hydra", "hydra-vit", rank=2, scale=2.0),
    "GLoRA, one path": adapter("glora", "glora", rank=1, path=ONE_PATH),
    "GLoRA, searched": searched,
}


def measure(method: str, task: Task, base: nn.Module, seed: int) -> dict[str, float]:
    """Accuracy on the test samples, and the parameters of the adapter."""
    torch.manual_seed(seed)
    model = METHODS[method](copy.deepcopy(base), task)
    right = accuracy(
        [(task.tested[0][i : i + 100], task.tested[1][i : i + 100]) for i in range(0, len(task.tested[1]), 100)]
    )
    return {"accuracy": right(model.eval()), "parameters": adapter_parameters(model)}


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--folder", type=Path, default=Path("pipelines-out"), help="where the pre-trained model is kept"
    )
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    models, found = bases(folder), {}
    print("| task | " + " | ".join(METHODS) + " |\n|---|" + "--:|" * len(METHODS))
    for name, task in tasks().items():
        row = {
            m: [measure(m, task, models[task.base], s) for s in (SEEDS if m != "base" else SEEDS[:1])] for m in METHODS
        }
        found[name] = row
        print(f"| {name} | " + " | ".join(map(cell, row.values())) + " |", flush=True)
    sizes = {m: sorted({int(r["parameters"]) for row in found.values() for r in row[m]}) for m in METHODS}
    print("| parameters, without the head | " + " | ".join(span(s) for s in sizes.values()) + " |")
    RESULTS.parent.mkdir(exist_ok=True)
    settings = {"seeds": SEEDS, "steps": STEPS, "batch": BATCH, "rate": RATE, "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"settings": settings, "tasks": found}, indent=1) + "\n")


def cell(runs: list[dict[str, float]]) -> str:
    """Mean accuracy, and lowest and highest, in per cent."""
    values = [100 * run["accuracy"] for run in runs]
    return f"{sum(values) / len(values):.1f}" + (
        f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    )


def span(sizes: list[int]) -> str:
    """One size, or the least and the most."""
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


if __name__ == "__main__":
    main()
