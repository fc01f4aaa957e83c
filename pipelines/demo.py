"""Train a ViT on scanned digits, adapt it to digits turned by 90 degrees, convert it, compare: ``make demo``."""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from flow import compare_vit, convert, logits, train
from real_data import digits

from reparam_export.training import attach, save, trainable

FOLDER, NAME = Path("demo"), "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {"img_size": 32, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
BASE = f"timm:{NAME}?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
RANK, SCALE, BASE_EPOCHS, BASE_RATE, EPOCHS, RATE, SEED = 8, 2.0, 30, 1e-3, 20, 5e-3, 0
HELD_OUT, ALL = 497, None  # of scikit-learn's 1797 digits; neither task trains on the held-out ones
TO: tuple[str, ...] = ("--to", "onnx", "--to", "trt")


def main() -> int:
    """The number of answers that folding or exporting changed."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # faster for so small a model, and the same numbers on any count of cores
    out, model = FOLDER / "out", timm.create_model(NAME, **SHAPE)
    upright, classes = (tensor[:ALL] for tensor in digits(32))
    turned = upright.rot90(1, (2, 3))
    new, truth, rest = {"image": turned[:HELD_OUT]}, classes[:HELD_OUT], classes[HELD_OUT:]
    train(model, {"image": upright[HELD_OUT:]}, rest, epochs=BASE_EPOCHS, rate=BASE_RATE)
    base = logits(lambda x: model(x["image"]), new)
    attach(model, "hydra", "hydra-vit", rank=RANK, scale=SCALE, train="head")
    print(f"training {trainable(model)} of {sum(p.numel() for p in model.parameters())} parameters: Hydra and the head")
    train(model, {"image": turned[HELD_OUT:]}, rest, epochs=EPOCHS, rate=RATE)
    save(model, FOLDER / "ckpt.pt", base=BASE)
    convert(FOLDER / "ckpt.pt", out, new, *TO)
    plain = timm.create_model(NAME, **SHAPE)
    return compare_vit(base, "base, its head knows upright ones", (model, plain), new, truth, out)


if __name__ == "__main__":
    sys.exit(main() > 0)
