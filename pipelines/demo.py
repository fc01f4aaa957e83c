"""Train a ViT on scanned digits, adapt it to digits turned by 90 degrees, convert it, compare: ``make demo``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from sklearn.datasets import load_digits

from reparam_export.training import attach, save, trainable

FOLDER, NAME = Path("demo"), "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {"img_size": 32, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
BASE = f"timm:{NAME}?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
HYDRA: dict[str, Any] = {"targets": ("blocks.*.attn.proj", "blocks.*.mlp.fc2"), "rank": 8, "scale": 2.0}
BASE_EPOCHS, BASE_RATE, ADAPTER_EPOCHS, ADAPTER_RATE, BATCH, SEED = 30, 1e-3, 20, 5e-3, 64, 0
HELD_OUT = 497  # of scikit-learn's 1797 digits; neither task trains on them
TO = ("--to", "onnx", "--to", "trt")


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 32, 32) float32 in [-1, 1] and their classes (1797,) int64, in a fixed random order."""
    data = load_digits()
    order = np.random.default_rng(SEED).permutation(len(data.images))
    images = torch.from_numpy(data.images[order]).float()[:, None] / 8 - 1
    return torch.nn.functional.interpolate(images, scale_factor=4.0), torch.from_numpy(data.target[order])


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, rate: float) -> Any:
    """Train what is not frozen; returns the model, in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=rate)
    steps = [part for _ in range(epochs) for part in torch.randperm(len(images)).split(BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps))
    for part in steps:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def answers(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The class that the model gives to each image."""
    return torch.cat([model(part).argmax(1) for part in images.split(BATCH)])


def main() -> None:
    """Print the table; exit 1 if folding or exporting changed any answer."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # faster for so small a model, and the same numbers on any count of cores
    (upright, labels), out = digits(), FOLDER / "out"
    turned, truth = upright.rot90(1, (2, 3)), labels[:HELD_OUT]
    model = train(timm.create_model(NAME, **SHAPE), upright[HELD_OUT:], labels[HELD_OUT:], BASE_EPOCHS, BASE_RATE)
    table = {"base, its head knows upright ones": answers(model, turned[:HELD_OUT])}
    attach(model, "hydra", train="head", **HYDRA)
    print(f"training {trainable(model)} of {sum(p.numel() for p in model.parameters())} parameters: Hydra and the head")
    train(model, turned[HELD_OUT:], labels[HELD_OUT:], ADAPTER_EPOCHS, ADAPTER_RATE)
    save(model, FOLDER / "ckpt.pt", base=BASE)
    np.save(FOLDER / "samples.npy", turned[:HELD_OUT].numpy())
    words = ("convert", FOLDER / "ckpt.pt", "--inputs", FOLDER / "samples.npy", "-o", out, "--overwrite", *TO)
    subprocess.run([sys.executable, "-m", "reparam_export", *words], check=True)
    plain = timm.create_model(NAME, checkpoint_path=str(out / "fused.safetensors"), **SHAPE).eval()
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    table["adapted, not fused"] = answers(model, turned[:HELD_OUT])
    table["fused, in the plain timm model"] = answers(plain, turned[:HELD_OUT])
    table["ONNX"] = torch.from_numpy(session.run(None, {"image": turned[:HELD_OUT].numpy()})[0]).argmax(1)
    for name, classes in table.items():
        print(f"{name:34}{(classes == truth).float().mean():7.1%} of {HELD_OUT} held-out turned digits")
    differing = int((torch.stack([*table.values()][1:]).diff(dim=0) != 0).any(0).sum())
    print(f"adapted, fused and ONNX differ on {differing} of {HELD_OUT} answers; report: {out / 'report.html'}")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
