"""A vision transformer pre-trained on clothes (Fashion-MNIST) learns scanned digits with Hydra: train, convert, prove, compare."""

import sys
from pathlib import Path

import timm
import torch
from fashion_base import BASE, NAME, SHAPE, pretrained
from flow import compare_vit, convert, logits, train
from real_data import digits

from reparam_export.training import adapter_parameters, attach, save, trainable

FOLDER = Path("pipelines-out")
RANK, SCALE, DROPOUT, EPOCHS, RATE, HELD_OUT, SEED = 8, 2.0, 0.1, 20, 5e-3, 497, 0
TO: tuple[str, ...] = ("--to", "onnx", "--to", "trt")


def main() -> int:
    """The number of predictions that differ between the unfused, the fused and the exported model."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # faster for so small a model, and the same numbers on any count of cores
    out, model = FOLDER / "hydra_vit", pretrained(FOLDER)
    images, classes = digits()
    new, truth = {"image": images[:HELD_OUT]}, classes[:HELD_OUT]
    base = logits(lambda x: model(x["image"]), new)
    attach(model, "hydra", "hydra-vit", rank=RANK, scale=SCALE, dropout=DROPOUT, train="head")
    print(f"training {trainable(model)} parameters, {adapter_parameters(model)} of them Hydra's")
    train(model, {"image": images[HELD_OUT:]}, classes[HELD_OUT:], epochs=EPOCHS, rate=RATE)
    save(model, FOLDER / "hydra_vit.pt", base=BASE)
    convert(FOLDER / "hydra_vit.pt", out, new, *TO)
    plain = timm.create_model(NAME, **SHAPE)
    return compare_vit(base, "base, its head knows clothes", (model, plain), new, truth, out)


if __name__ == "__main__":
    sys.exit(main() > 0)
