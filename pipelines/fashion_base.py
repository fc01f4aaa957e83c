"""The base of the ViT pipelines: a small vision transformer, pre-trained on Fashion-MNIST, kept for the next run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from flow import logits, train
from real_data import fashion

NAME = "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 10,
}
BASE = f"timm:{NAME}?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
EPOCHS, RATE, IMAGES = 2, 1e-3, 60_000


def pretrained(folder: Path) -> torch.nn.Module:
    """The trained model, in eval mode; trained once for each folder, in about three minutes on one core."""
    path = folder / f"fashion-{EPOCHS}-{IMAGES}.pt"
    model = timm.create_model(NAME, **SHAPE)
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    images, classes = fashion()
    train(model, {"image": images[:IMAGES]}, classes[:IMAGES], epochs=EPOCHS, rate=RATE)
    held_out, truth = fashion(train=False)
    found = logits(lambda x: model(x["image"]), {"image": held_out[:1000]}, 64).argmax(1)
    print(
        f"pre-trained on {IMAGES} images of clothes: {float((found == truth[:1000]).float().mean()):.1%} right on new ones"
    )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()
