"""Train a ViT on scanned digits, adapt it to digits turned by 90 degrees, convert it, compare: ``make demo``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

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
NAME, SHAPE = "vit_tiny_patch16_224", {"img_size": 32, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 3}
BASE = f"timm:{NAME}?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
TARGETS, RANK, SCALE = ("blocks.*.attn.proj", "blocks.*.mlp.fc2"), 8, 2.0
BASE_EPOCHS, BASE_RATE, ADAPTER_EPOCHS, ADAPTER_RATE, BATCH, SEED = 30, 1e-3, 20, 5e-3, 64, 0
TARGETS_OF_EXPORT = ("--to", "onnx", "--to", "trt")
HELD_OUT = 497  # of scikit-learn's 1797 digits; neither task trains on them


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 32, 32) float32 in [-1, 1] and their classes (1797,) int64, in a fixed random order."""
    data = load_digits()
    order = np.random.default_rng(SEED).permutation(len(data.images))
    images = torch.from_numpy(data.images[order]).float()[:, None] / 8 - 1
    return F.interpolate(images, scale_factor=4.0), torch.from_numpy(data.target[order])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Train what is not frozen; leaves the model in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=rate)
    steps = [part for _ in range(epochs) for part in torch.randperm(len(images)).split(BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps))
    for part in steps:
        optimizer.zero_grad()
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def answers(model: Any, images: Tensor) -> Tensor:
    """The class that the model gives to each image."""
    return torch.cat([model(part).argmax(1) for part in images.split(BATCH)])


def main() -> None:
    """Print the table; exit 1 if folding or exporting changed any answer."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # faster for so small a model, and the same numbers on any count of cores
    upright, labels = digits()
    turned = upright.rot90(1, (2, 3))
    model = timm.create_model(NAME, num_classes=10, **SHAPE)
    train(model, upright[HELD_OUT:], labels[HELD_OUT:], BASE_EPOCHS, BASE_RATE)
    table = {"base, on upright digits": answers(model, upright[:HELD_OUT])}
    table["base, as it is (its own head)"] = answers(model, turned[:HELD_OUT])
    attach(model, "hydra", TARGETS, rank=RANK, scale=SCALE, train="head")
    print(
        f"Hydra adapter and head: {trainable(model)} of {sum(p.numel() for p in model.parameters())} parameters train"
    )
    train(model, turned[HELD_OUT:], labels[HELD_OUT:], ADAPTER_EPOCHS, ADAPTER_RATE)
    table["adapted, not fused"] = adapted = answers(model, turned[:HELD_OUT])
    save(model, FOLDER / "ckpt.pt", base=BASE)
    np.save(FOLDER / "samples.npy", turned[:HELD_OUT].numpy())
    words = ("convert", FOLDER / "ckpt.pt", "--inputs", FOLDER / "samples.npy", "-o", FOLDER / "out", "--overwrite")
    subprocess.run([sys.executable, "-m", "reparam_export", *words, *TARGETS_OF_EXPORT], check=True)
    plain = timm.create_model(NAME, num_classes=10, **SHAPE).eval()
    plain.load_state_dict(load_file(FOLDER / "out" / "fused.safetensors"))
    session = onnxruntime.InferenceSession(FOLDER / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    table["fused, in the plain timm model"] = fused = answers(plain, turned[:HELD_OUT])
    table["ONNX, in onnxruntime"] = onnx = answers(
        lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), turned[:HELD_OUT]
    )
    for name, classes in table.items():
        print(f"{name:32}{(classes == labels[:HELD_OUT]).float().mean():6.1%} of {HELD_OUT} held-out digits")
    differing = int(((adapted != fused) | (adapted != onnx)).sum())
    print(
        f"adapted, fused and ONNX answer differently on {differing} of them; report: {FOLDER / 'out' / 'report.html'}"
    )
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
