"""Files that people have: fold, export, and onnxruntime against the library that wrote the file, unfused, in float64.

    python -m benchmarks.in_the_wild          benchmarks/results/in_the_wild.md, three minutes

``tests/in_the_wild`` makes the files; ``tests/checkpoints/test_in_the_wild.py`` folds every one of them again.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import onnxruntime

import reparam_export as rx
from reparam_export.errors import ReparamError
from reparam_export.models import Input

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "in_the_wild.md"
TITLE = """# Files that people have

Public reports of other projects, rebuilt small with random numbers. Each is folded, proven and exported; the error is that of `model.onnx`,
run by onnxruntime on the CPU, against the unfused answers, max |a - b| over the largest. Made by `python -m benchmarks.in_the_wild`.

"""
FOLDED = (
    "| file | who writes it | changed | proof | second witness | held against | error |\n"
    "|---|---|--:|---|---|---|--:|\n"
)
REFUSAL = "\nAnd what cannot be folded, or not as it is:\n\n| file | who writes it | what is said, with exit code 3 or 4 |\n|---|---|---|\n"

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "checkpoints")]
from in_the_wild import WILD  # type: ignore[import-not-found,no-redef]  # noqa: E402
from in_the_wild.made import Made, Wild  # type: ignore[import-not-found]  # noqa: E402
from in_the_wild.refused import REFUSED, Refused  # type: ignore[import-not-found]  # noqa: E402


def row(wild: Wild) -> str:
    """One line of the table of what is folded."""
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
    changed = f"{len(certificate.layers)} matrices"
    return (
        f"| {wild.name} | {wild.who} | {changed} | {certificate.verdict} | {witness} | {wild.judge} | {error:.0e} |\n"
    )


def run(file: Path, made: Made, inputs: tuple[Input, ...]) -> np.ndarray:
    """The first output; a mask of ones where the graph wants one."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in made.inputs.items()}
    for name in {i.name for i in inputs} - feed.keys():  # masks
        feed[name] = np.ones_like(feed[name.replace("attention_mask", "input_ids")])
    names = [i.name for i in session.get_inputs()]
    found: np.ndarray = session.run(None, {name: feed[name] for name in names})[0]
    return found


def refusal(refused: Refused) -> str:
    """One line of the table of what is refused."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, options = refused.make(Path(folder))
        try:
            rx.fuse(rx.read(path, **options))
        except ReparamError as error:
            said = str(error).replace(f"{folder}/", "")
            return f"| {refused.name} | {refused.who} | {said} |\n"
    raise AssertionError(f"{refused.name} was folded")


def main() -> None:
    """Write the tables, and print every row as soon as it is made."""
    text = TITLE
    for part in chain([FOLDED], map(row, WILD), [REFUSAL], map(refusal, REFUSED)):
        print(part, end="", flush=True)
        text += part
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
