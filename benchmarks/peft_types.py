"""The README's table of peft's types: what is folded, how, and how far it is from peft's own unfused forward in float64.

    python -m benchmarks.peft_types        prints the table and puts it into README.md

The cases are made on the spot by peft (``tests/checkpoints/peft_types.py``); the recorded ones are folders and outputs in ``tests/data``.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import reparam_export as rx
from reparam_export.assembly import base_of, fused
from reparam_export.verification.outputs import run

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- peft types: made by python -m benchmarks.peft_types -->", "<!-- /peft types -->"
HEAD = (
    "| peft type | how | cases | unfused here - unfused peft | fused fp32 weights - unfused peft | recorded case | fused - recorded |\n"
    "|---|---|--:|--:|--:|---|--:|\n"
)

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "checkpoints")]
from conftest import CASES as RECORDED  # noqa: E402
from conftest import MORE_CASES, Case  # noqa: E402
from peft_types import CASES, PeftCase, answer  # noqa: E402

from reparam_export.checkpoints.peft_other import REFUSED  # noqa: E402


def made(case: PeftCase) -> tuple[float, float]:
    """Errors of our unfused reference and of the fused weights, relative to peft's largest output."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, adapted = case.make(Path(folder))
        weights = rx.fuse(checkpoint)
        model = rx.verify(checkpoint, weights, count=8)
        assert model.certificate.verdict == "exact", case.name
        inputs = dict(model.reference.inputs)
        expected = answer(copy.deepcopy(adapted), inputs)
        ((_, reference),) = model.reference.outputs.items()
        return relative(reference, expected), relative(folded(checkpoint, weights, inputs), expected)


def folded(checkpoint: rx.Checkpoint, weights: rx.FusedWeights, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the plain model with the fused weights answers, computed in float64."""
    module, signature = base_of(checkpoint).build()
    return run(fused(module, weights.by_every_name()).double(), signature, inputs, torch.float64)[0]


def recorded(case: Case) -> float:
    """Error of the fused weights against the recorded outputs, relative to the largest of them."""
    checkpoint = case.read()
    return relative(folded(checkpoint, rx.fuse(checkpoint), case.inputs()), case.expected())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())


def types() -> dict[str, list[PeftCase]]:
    """The cases of each type that are stored in float32; 16 bits have an error of their own."""
    found: dict[str, list[PeftCase]] = {}
    for case in CASES:
        if case.dtype == torch.float32:
            found.setdefault(case.kind, []).append(case)
    return dict(sorted(found.items()))


def recorded_cases() -> dict[str, list[Case]]:
    """The recorded folders by type."""
    found: dict[str, list[Case]] = {}
    for case in (*RECORDED.values(), *MORE_CASES.values()):
        config = case.folder / "adapter_config.json"
        if config.is_file():
            found.setdefault(json.loads(config.read_text())["peft_type"], []).append(case)
    return found


def row(kind: str, cases: list[PeftCase], on_disk: list[Case]) -> str:
    """One line of the table: the worst of its cases."""
    errors = [made(case) for case in cases]
    unfused, fp32 = (max(column) for column in zip(*errors, strict=True))
    probed = {case.probed for case in cases}
    how = (
        "closed form"
        if probed == {False}
        else "probed"
        if probed == {True}
        else "closed form; probed where it has none"
    )
    real = max(((recorded(case), case.name) for case in on_disk), default=None)
    told = (
        "| - | - |"
        if real is None
        else f"| {real[1]}{f' and {len(on_disk) - 1} more' if len(on_disk) > 1 else ''} | {real[0]:.0e} |"
    )
    return f"| {kind} | {how} | {len(cases)} | {unfused:.0e} | {fp32:.0e} {told}\n"


def main() -> None:
    """Print the table, and put it between its marks in README.md."""
    warnings.simplefilter("ignore")
    on_disk = recorded_cases()
    table = HEAD + "".join(row(kind, cases, on_disk.get(kind, [])) for kind, cases in types().items())
    print(table)
    refused = "\n".join(f"- {kind}: {reason}." for kind, reason in REFUSED.items())
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(
        f"{before}{BEGIN}\n{table}\nRefused, by name and with the modules:\n\n{refused}\n{END}{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
