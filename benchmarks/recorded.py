"""The README's table of recorded checkpoints: onnxruntime's output against what the authors' own unfused code answered in float64.

    python -m benchmarks.recorded          prints the table and puts it into README.md

``tests/exporters/test_export.py`` makes the same comparison for every row.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

import reparam_export as rx

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- recorded: made by python -m benchmarks.recorded -->", "<!-- /recorded -->"
HEAD = (
    "| recorded checkpoint | format | folded into | weights | largest output | error of `model.onnx` | bound | wrong if not fused |\n"
    "|---|---|--:|---|--:|--:|--:|--:|\n"
)

sys.path.insert(0, str(ROOT / "tests"))
from conftest import CASES, Case  # noqa: E402


def row(case: Case) -> str:
    """One line of the table. Errors are max |a - b| against the recorded float64 outputs."""
    checkpoint = case.read()
    model = rx.verify(checkpoint, rx.fuse(checkpoint), case.inputs())
    with tempfile.TemporaryDirectory() as folder:
        artifact = rx.export(model, "onnx", folder, batch=(1, 2, 8))
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
        names = {i.name for i in session.get_inputs()}
        found = session.run(None, {n: t.numpy() for n, t in case.inputs().items() if n in names})[0]
    expected = case.expected().numpy()
    without = unadapted(case)
    error = np.abs(found - expected).max()
    return (
        f"| {case.name} | {checkpoint.format} | {len(model.certificate.layers)} layers | {model.certificate.verdict} "
        f"| {np.abs(expected).max():.1f} | {error:.1e} | {artifact.outputs[0].bound:.1e} | {np.abs(without - expected).max():.1f} |\n"
    )


def unadapted(case: Case) -> np.ndarray:
    """What the base answers when the adapter is left out (the checkpoint's own head in place)."""
    import torch

    from reparam_export.assembly import base_of, with_replaced
    from reparam_export.verification.outputs import run

    checkpoint = case.read()
    module, signature = base_of(checkpoint).build()
    model = with_replaced(module, checkpoint).double()
    return run(model, signature, case.inputs(), torch.float64)[0].numpy()


def main() -> None:
    """Print the table, and put it between its marks in README.md."""
    table = HEAD + "".join(row(case) for case in CASES.values())
    print(table)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
