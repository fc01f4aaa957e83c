"""The same with GLoRA: a supernet of all paths, a search for the best, and its three best candidates converted from one file."""

import shutil
import sys
from pathlib import Path

import timm
import torch
from fashion_base import BASE, NAME, SHAPE, pretrained
from flow import compare_vit, convert, logits, train
from real_data import digits

from reparam_export.training import Fused, Search, accuracy, save, search, supernet, trainable

FOLDER = Path("pipelines-out")
RANK, EPOCHS, RATE, HELD_OUT, CHOSEN_ON, SEED = 4, 60, 5e-3, 497, 300, 0
SEARCH = Search(population=20, select=5, mutations=8, crossovers=8, epochs=6, max_parameters=40_000)
CANDIDATES, TO = 3, ("--to", "onnx")


def main() -> int:
    """The number of predictions that differ between the unfused, the fused and the exported models."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = pretrained(FOLDER)
    images, classes = digits()
    new, truth = {"image": images[:HELD_OUT]}, classes[:HELD_OUT]
    base = logits(lambda x: model(x["image"]), new)
    net = supernet(model, rank=RANK, train="head", seed=SEED)
    print(f"training {trainable(model)} parameters of {net.space.size:.1e} candidates")
    learnt = slice(HELD_OUT + CHOSEN_ON, None)
    train(model, {"image": images[learnt]}, classes[learnt], epochs=EPOCHS, rate=RATE)
    save(model, FOLDER / "glora_vit.pt", base=BASE)
    judged = slice(HELD_OUT, HELD_OUT + CHOSEN_ON)
    measure = accuracy([(images[judged], classes[judged])])
    shutil.rmtree(FOLDER / "search", ignore_errors=True)  # that of a former run; after a kill, it would go on
    found = search(net.space, Fused(net, measure), SEARCH, folder=FOLDER / "search")
    differing = 0
    for place in range(CANDIDATES):
        print(f"candidate {place}: {found.accuracy[place]:.1%} in the search, {found.parameters[place]} parameters")
        out = FOLDER / f"glora_vit-{place}"
        convert(FOLDER / "glora_vit.pt", out, new, "--config", found.checkpoint, "--candidate", place, *TO)
        net.fix(found.top[place])
        plain = timm.create_model(NAME, **SHAPE)
        differing += compare_vit(base, "base, its head knows clothes", (model, plain), new, truth, out)
    return differing


if __name__ == "__main__":
    sys.exit(main() > 0)
