"""Train a ViT on handwritten digits, adapt it to the same digits turned and inverted, convert it, compare: ``make demo``.

Everything is real: scikit-learn's 1797 scanned digits, a Hydra adapter, the command line, and 497 held-out scans.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from reparam_export.training import attach, save, trainable

FOLDER = Path("demo")
NAME = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
BASE = f"timm:{NAME}?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
TARGETS = ("blocks.*.attn.proj", "blocks.*.mlp.fc2")
RANK, SCALE = 8, 0.5
BASE_EPOCHS, ADAPTER_EPOCHS, BATCH, RATE, SEED = 15, 15, 64, 3e-3, 0
HELD_OUT = 497
TO = ("onnx", "trt")


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 32, 32) float32 in [-1, 1], in a shuffled order, and their labels (1797,) int64."""
    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None]
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(images)))
    return F.interpolate(images, scale_factor=4, mode="nearest")[order], torch.tensor(data.target)[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Train what is not frozen; returns the model in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def answers(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The predicted class of every image, in batches of 64."""
    return torch.cat([model(part).argmax(1) for part in images.split(64)])


def main() -> None:
    """The whole way, from data to table."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # faster for a model this small, and the same bits on any number of cores
    upright, labels = digits()
    turned = -upright.rot90(1, (2, 3))  # the second task: light on dark becomes dark on light, a quarter turn
    known, unseen, truth = slice(HELD_OUT, None), turned[:HELD_OUT], labels[:HELD_OUT]
    model = train(timm.create_model(NAME, **SHAPE), upright[known], labels[known], BASE_EPOCHS)
    print(f"base: {float((answers(model, upright[:HELD_OUT]) == truth).float().mean()):.1%} on held-out upright digits")
    predicted = {"base, with its own head": answers(model, unseen)}
    attach(model, "hydra", TARGETS, rank=RANK, scale=SCALE, train="head")
    print(f"Hydra adapter and head: {trainable(model)} of {sum(p.numel() for p in model.parameters())} parameters train")
    predicted["adapted, unfused"] = answers(train(model, turned[known], labels[known], ADAPTER_EPOCHS), unseen)
    save(model, FOLDER / "ckpt.pt", base=BASE)
    np.save(FOLDER / "samples.npy", unseen.numpy())
    convert = ["convert", f"{FOLDER}/ckpt.pt", *(word for target in TO for word in ("--to", target))]
    options = ["--inputs", f"{FOLDER}/samples.npy", "-o", f"{FOLDER}/out", "--overwrite"]
    subprocess.run([sys.executable, "-m", "reparam_export", *convert, *options], check=True)
    plain = timm.create_model(NAME, **SHAPE).eval()
    plain.load_state_dict(load_file(FOLDER / "out" / "fused.safetensors"))
    predicted["fused, plain timm model"] = answers(plain, unseen)
    session = onnxruntime.InferenceSession(FOLDER / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    predicted["ONNX"] = answers(lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), unseen)
    for name, classes in predicted.items():
        print(f"{name:26} {float((classes == truth).float().mean()):6.1%} of {HELD_OUT} held-out turned, inverted digits")
    _, adapted, *exported = predicted.values()
    differing = int(torch.stack([adapted != classes for classes in exported]).any(0).sum())
    print(f"adapted, fused and ONNX differ on {differing} of {HELD_OUT} samples; report: {FOLDER}/out/report.html")
    if differing:
        sys.exit(1)


if __name__ == "__main__":
    main()
