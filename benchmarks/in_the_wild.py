"""Files that people have: fold, export, and onnxruntime against the library that wrote the file, unfused, in float64.

    python -m benchmarks.in_the_wild          prints the table

``tests/checkpoints/in_the_wild.py`` makes the files; ``test_in_the_wild.py`` folds every one of them again.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnxruntime

import reparam_export as rx
from reparam_export.models import Input

ROOT = Path(__file__).parents[1]
HEAD = (
    "| file | who writes it | folded into | weights | second witness | error of `model.onnx` against its own library |\n"
    "|---|---|--:|---|---|--:|\n"
)

sys.path.insert(0, str(ROOT / "tests" / "checkpoints"))
from in_the_wild import WILD, Made, Wild  # type: ignore[import-not-found,no-redef]  # noqa: E402


def row(wild: Wild) -> str:
    """One line of the table. The error is max |a - b| over the largest output."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = wild.make(Path(folder))
        checkpoint = rx.read(made.path, **made.options)
        model = rx.verify(checkpoint, rx.fuse(checkpoint))
        rx.export(model, "onnx", f"{folder}/out", batch=(1, 2, 4))
        found = run(Path(folder) / "out" / "model.onnx", made, model.signature.inputs)
    expected = made.expected.numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    certificate = model.certificate
    witness = ", ".join(dict.fromkeys(w.who for w in certificate.witness if not w.absent)) or "none"
    return f"| {wild.name} | {wild.who} | {len(certificate.layers)} matrices | {certificate.verdict} | {witness} | {error:.0e} |\n"


def run(file: Path, made: Made, inputs: tuple[Input, ...]) -> np.ndarray:
    """The first output; a mask of ones where the graph wants one."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in made.inputs.items()}
    if any(i.name == "attention_mask" for i in inputs) and "attention_mask" not in feed:
        feed["attention_mask"] = np.ones_like(feed["input_ids"])
    names = [i.name for i in session.get_inputs()]
    found: np.ndarray = session.run(None, {name: feed[name] for name in names})[0]
    return found


def main() -> None:
    """Print the table, a row as soon as it is made."""
    print(HEAD, end="")
    for wild in WILD:
        print(row(wild), end="", flush=True)


if __name__ == "__main__":
    main()
