"""The user's own training code as the witness: the adapted model that it makes, or inputs with the answers that it gave.

    --witness py:FILE.py:FUNCTION   returns the adapted model as it was trained, unfused; run in float64 against our reference
    --expected FILE.npz             inputs and answers by name (``output:NAME`` where an output is called as an input), and ``dtype``, the
                                    precision that the answers were made in, where that is not the one of the array

Code is named on the command line, never in a file. Answers are held to 8 times what rounding in their precision costs our unfused model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.batches import ROWS
from reparam_export.errors import CheckpointError, ReparamError, UsageError
from reparam_export.files import sha256
from reparam_export.models import Base, checked_inputs, read_arrays
from reparam_export.verification.certificate import WitnessEvidence
from reparam_export.verification.outputs import MULTIPLE, distance, passes, roundoff, run
from reparam_export.verification.witness import Subject, UnableError
from reparam_export.verification.witness._whole import whole_parted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reparam_export.models import Signature

PRECISIONS = ("float64", "float32", "bfloat16", "float16")
Answers = tuple[dict[str, "Tensor"], dict[str, "Tensor"], str]  # inputs, answers, precision


def model_of_code(subject: Subject, spec: str) -> WitnessEvidence:
    """The model that the user's function returns. Raises UsageError, CheckpointError for one that cannot be had or called."""
    from reparam_export.bases import py

    file = spec.partition(":")[2].rpartition(":")[0]
    try:
        model = py.skeleton(Base(spec=spec))
    except ReparamError as error:
        raise type(error)(str(error).replace("base ", "witness ", 1)) from error
    try:
        whole = whole_parted(model, subject, spec)
    except UnableError as error:
        raise CheckpointError(f"--witness {error}; expected the adapted model, called as its base is") from error
    return WitnessEvidence(
        who=spec,
        version=f"sha256 {sha256(Path(file))[:12]}",
        outputs=whole.outputs,
        output_error=whole.error,
        output_bound=whole.bound,
        differences=whole.differences,
    )


def read_answers(path: Path, signature: Signature) -> Answers:
    """Inputs and answers of an ``.npz`` file. Raises UsageError for anything that the base's signature does not know."""
    import numpy as np
    import torch

    arrays = read_arrays(path, None)
    precision = str(arrays.pop("dtype", "")).removeprefix("torch.")
    outputs = set(signature.outputs)
    inputs = {i.name for i in signature.inputs}
    answers = {
        n.removeprefix("output:"): a for n, a in arrays.items() if n.startswith("output:") or n in outputs - inputs
    }
    wrong = [n for n, a in answers.items() if n not in outputs or not np.issubdtype(a.dtype, np.floating) or not a.size]
    if not answers or wrong:
        raise UsageError(
            f"expected answers {path}: expected floating point arrays of one or more of the outputs {', '.join(sorted(outputs))}; found "
            f"{', '.join(wrong or arrays) or 'none'}"
        )
    given = {n.removeprefix("input:"): a for n, a in arrays.items() if n.removeprefix("input:") in inputs}
    left = set(arrays) - set(given) - {f"input:{n}" for n in given} - set(answers) - {f"output:{n}" for n in answers}
    if left:
        raise UsageError(f"expected answers {path}: {sorted(left)[0]} is neither an input nor an output of the base")
    stored = [str(a.dtype) for a in answers.values() if str(a.dtype) in PRECISIONS]
    precision = precision or next(iter(stored), "float32")
    if precision not in PRECISIONS:
        raise UsageError(f"expected answers {path}: dtype {precision!r}: expected one of {', '.join(PRECISIONS)}")
    precision = max(precision, *stored, key=roundoff)  # what is stored in fewer bits has no more than these
    tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in answers.items()}
    return checked_inputs(path, given, signature), tensors, precision


def check_answers(path: Path, base: nn.Module, signature: Signature) -> None:
    """Raises UsageError for an ``.npz`` file whose names or shapes are not those of this base, by one run of it on the first sample."""
    import torch

    inputs, answers, _ = read_answers(path, signature)
    samples = len(next(iter(inputs.values())))
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.get_default_dtype())
    found = dict(zip(signature.outputs, run(base, signature, first, dtype), strict=True))
    for name, answer in _under_our_names(answers, signature.outputs).items():
        shape = list(found[name].shape)
        for axis, count in signature.axes.get(name, ROWS):
            shape[axis] = count * samples
        if list(answer.shape) != shape:
            raise UsageError(
                f"expected answers {path}: {name} has shape {tuple(answer.shape)}; expected {tuple(shape)}, as the base answers to "
                f"{samples} samples"
            )


def expected_answers(subject: Subject, answers: Answers, who: str, version: str) -> WitnessEvidence:
    """Answers of the user's own training code against ours, within the precision that they were made in."""
    import torch

    assert subject.signature is not None
    assert subject.unfused is not None
    inputs, theirs, precision = answers
    theirs = _under_our_names(theirs, subject.signature.outputs)
    dtype = getattr(torch, precision)
    exact, noisy = (
        dict(zip(subject.signature.outputs, run(subject.unfused(d), subject.signature, inputs, d), strict=True))
        for d in (torch.float64, dtype)
    )
    worst, at, differences = 0.0, 0.0, []
    for name, answer in theirs.items():
        size = float(exact[name].abs().max())
        floor = distance(noisy[name], exact[name])
        bound = MULTIPLE * max(floor, roundoff(precision) * size)
        error = distance(answer, exact[name])
        if error / (bound or 1.0) >= worst / (at or 1.0):
            worst, at = error / (size or 1.0), bound / (size or 1.0)
        if not passes(error, floor, bound, size):
            differences.append(f"output {name}: {_said(who, answer, exact[name], error, bound, size, precision)}")
    return WitnessEvidence(
        who=who,
        version=version,
        outputs=len(theirs),
        output_error=worst,
        output_bound=at,
        differences=tuple(differences),
    )


def _under_our_names(theirs: dict[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """One answer to a base of one output is that, whatever either calls it."""
    return {outputs[0]: next(iter(theirs.values()))} if len(theirs) == len(outputs) == 1 else theirs


def _said(who: str, answer: Tensor, ours: Tensor, error: float, bound: float, size: float, precision: str) -> str:
    if answer.shape != ours.shape:
        return f"{who} has shape {tuple(answer.shape)}, our unfused model answers with {tuple(ours.shape)}"
    return (
        f"the answers in {who} and those of our unfused model differ by {error:.3g}, the largest is {size:.3g} (at most {bound:.3g} is "
        f"rounding in {precision})"
    )


def answers_of_checkpoint(expected: Mapping[str, Any]) -> Answers | None:
    """What ``save()`` recorded in the checkpoint itself; None without it."""
    if not expected:
        return None
    return dict(expected["inputs"]), dict(expected["outputs"]), str(expected["dtype"])
