"""What every pipeline does: train, convert on the command line, and compare the unfused, the fused and the exported model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

Inputs = Mapping[str, Tensor]  # by the name the exported model has for them


def train(
    model: Any, inputs: Inputs, targets: Tensor, *, epochs: float, rate: float, batch: int = 64, call: Any = None
) -> Any:
    """Train what is not frozen, with AdamW and one cycle of the learning rate; returns the model, in eval mode.

    call: a batch of inputs -> logits (..., classes); default: the model on the first input. targets (samples, ...) int64.
    """
    call = call or (lambda part: model(next(iter(part.values()))))
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=rate)
    total = max(1, round(epochs * len(targets) / batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total + 1)
    order: list[int] = []
    for _ in range(total):
        if len(order) < batch:
            order = torch.randperm(len(targets)).tolist()
        chosen, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        logits = call({name: tensor[chosen] for name, tensor in inputs.items()})
        cross_entropy(logits.flatten(0, -2), targets[chosen].flatten()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def logits(call: Callable[[Inputs], Tensor], inputs: Inputs, batch: int = 16) -> Tensor:
    """What a model answers to all samples, (samples, ..., classes)."""
    count = len(next(iter(inputs.values())))
    return torch.cat([call({n: t[i : i + batch] for n, t in inputs.items()}) for i in range(0, count, batch)])


def onnx(path: Path) -> Callable[[Inputs], Tensor]:
    """An exported file as a model to call."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return lambda inputs: torch.from_numpy(
        session.run(None, {n: t.numpy() for n, t in inputs.items() if n in names})[0]
    )


def convert(checkpoint: Path, out: Path, samples: Inputs, *options: object) -> None:
    """``reparam-export convert``, with the held-out samples as what is proven; ends the program when that fails."""
    path = checkpoint.with_suffix(".npz")
    np.savez(path, **{name: tensor.numpy() for name, tensor in samples.items()})
    words = ("convert", checkpoint, "--inputs", path, "-o", out, "--overwrite", *options)
    done = subprocess.run([sys.executable, "-m", "reparam_export", *map(str, words)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def compare_vit(base: Tensor, title: str, models: tuple[Any, Any], new: Inputs, truth: Tensor, out: Path) -> int:
    """``compare`` for a vision transformer: models: the adapted one, and a plain one that takes the fused weights in ``out``.

    base: the logits of the base, shown as ``title``.
    """
    adapted, plain = models
    plain.load_state_dict(load_file(out / "fused.safetensors"))
    answers = {
        title: base,
        "adapted, not fused": logits(lambda x: adapted(x["image"]), new),
        "fused, in the plain timm model": logits(lambda x: plain.eval()(x["image"]), new),
        "ONNX": logits(onnx(out / "model.onnx"), new),
    }
    return compare(answers, truth, out)


def compare(answers: Mapping[str, Tensor], truth: Tensor, out: Path) -> int:
    """Print accuracy and loss of each model, and on how many predictions those after the first differ; returns that number.

    answers: logits by name: the base, the adapted model unfused, the fused one, the exported one.
    """
    for name, found in answers.items():
        right = float((found.argmax(-1) == truth).float().mean())
        loss = float(cross_entropy(found.flatten(0, -2), truth.flatten()))
        print(f"{name:36}{right:8.2%} right, loss {loss:.4f}")
    adapted, *others = [*answers.values()][1:]
    best = adapted.topk(2).values
    differing = torch.stack([o.argmax(-1) != adapted.argmax(-1) for o in others]).any(0)
    worst = max(float((o - adapted).abs().max()) for o in others)
    print(
        f"adapted, fused and ONNX differ on {int(differing.sum())} of {truth.numel()} predictions; largest difference {worst:.1e}"
    )
    if differing.any():  # by rounding: no class can overtake another that is further away than twice the difference
        margin = float((best[..., 0] - best[..., 1])[differing].max())
        print(f"  there the two best classes are at most {margin:.1e} apart; the report counts them too")
    print(f"report: {out / 'report.html'}")
    return int(differing.sum())
