"""The output proof: a model's outputs against the unfused adapted model in float64, in units of the noise floor.

    reference  the unfused model in float64, with nothing inside it cast to float32
    floor      how far that same unfused model is from the reference when it runs in the storage precision
    bound      MULTIPLE x max(floor, u max|reference|), u the unit roundoff of that precision
    draws      one run's error is one draw of many roundings; in a network that magnifies some of them it can be a lucky one. Before
               anything is called wrong, DRAWS more are made, each with weights moved as far as one rounding moves them, and the largest
               counts (the idea of Parker's Monte Carlo arithmetic, 1997, and of Vignes' CESTAC): it is the model's own sensitivity

Two runs of one network that differ in the order of their roundings are each about one floor away from the truth; three bits more
than that is no longer rounding. A bound as large as the outputs themselves decides nothing, and is refused. An output that the adapter
moves by no more than the bound decides nothing either, since the plain base would pass: it is named as vacuous.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from reparam_export.batches import ROWS, Axes, chosen, fits
from reparam_export.calls import Step, experts, foreign
from reparam_export.errors import FusionError
from reparam_export.float64 import pure_float64
from reparam_export.models import Signature, outputs_of_call
from reparam_export.verification.certificate import OutputEvidence

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MULTIPLE = 8.0
DRAWS = 4
OF_DTYPES = re.compile(
    r"dtype|scalar type|data type|\b(?:float|double|half|bfloat16)\b|overflow|type torch\.", re.IGNORECASE
)
Run = Callable[[Mapping[str, "Tensor"]], Sequence["Tensor"]]


@dataclass(frozen=True)
class Reference:
    """Inputs, and what the unfused adapted model answers in float64. ``floors``: its own error in storage precision, per output."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]  # float64
    floors: Mapping[str, float]
    dtype: str  # the storage precision that the floors belong to
    axes: Mapping[str, Axes] = field(default_factory=dict)  # of outputs that are not one row a sample
    moved: Mapping[str, float] = field(default_factory=dict)  # how far the adapter takes each output from the base's

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def answer(self, output: str, index: Tensor) -> Tensor:
        """What the model answers to the samples of ``index`` in one batch."""
        return chosen(self.outputs[output], self.axes.get(output, ROWS), index)

    def bound(self, output: str, floor: float, roundoff: float) -> float:
        """The largest error that rounding explains."""
        return MULTIPLE * max(floor, roundoff * _largest(self.outputs[output]))


def run(
    model: nn.Module, signature: Signature, inputs: Mapping[str, Tensor], dtype: torch.dtype, step: int = 8
) -> tuple[Tensor, ...]:
    """The model's outputs, ``step`` samples at a time, or all in one batch where an output is not one row a sample.

    Float inputs are cast to dtype; in float64 nothing inside is cast to float32. Raises FusionError with what the model raises, and for an
    output that has not the shape of its samples.
    """
    import torch

    parts = []
    count = len(next(iter(inputs.values())))
    step = count if signature.axes else step
    wide = dtype == torch.float64
    needs: Step = "float64" if wide else "run"
    name = type(model).__name__
    with (
        torch.inference_mode(),
        pure_float64(made=True) if wide else nullcontext(),
        experts(model, needs, signature.experts),
    ):
        for start in range(0, count, step):
            batch = (inputs[i.name][start : start + step] for i in signature.inputs)
            tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
            with foreign(name, f"run in {str(dtype).removeprefix('torch.')}"):
                found = _answered(model, signature, tensors, wide)
            for output, tensor in zip(signature.outputs, found, strict=True):
                if not fits(tensor, signature.axes.get(output, ROWS), len(tensors[0])):
                    raise FusionError(
                        f"{name}: output {output} has shape {tuple(tensor.shape)} for {len(tensors[0])} samples; expected a row for each"
                    )
            parts.append(found)
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _answered(model: nn.Module, signature: Signature, tensors: tuple[Tensor, ...], wide: bool) -> tuple[Tensor, ...]:
    """One call; where a model in float64 cannot be called with torch's default dtype wide, again with the default that it knows.

    Only what torch says of dtypes has another try, and where that fails, too, it is the first that is raised.
    """
    import torch

    try:
        return outputs_of_call(model, signature, tensors)
    except RuntimeError as error:
        if not wide or not OF_DTYPES.search(str(error)):
            raise
        first = error
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return outputs_of_call(model, signature, tensors)
    except RuntimeError:
        raise first from None
    finally:
        torch.set_default_dtype(default)


def check_apart(model: nn.Module, signature: Signature, reference: Reference) -> None:
    """Raises FusionError for an output that depends on which samples are in a batch together, in another way than each with each.

    Allowed is what rounding costs the unfused model in its storage precision, one part in MULTIPLE of the bound: below it, the batch that
    an answer is compared in has no part in the verdict.
    """
    import torch

    if not signature.axes:
        return
    index = torch.arange(reference.samples)[:2]
    for few in (index[:1], index):
        found = run(model, signature, {name: tensor[few] for name, tensor in reference.inputs.items()}, torch.float64)
        for name, tensor in zip(signature.outputs, found, strict=True):
            expected = reference.answer(name, few)
            allowed = reference.bound(name, reference.floors[name], roundoff(reference.dtype)) / MULTIPLE
            if not distance(tensor, expected) <= allowed:
                raise FusionError(
                    f"{type(model).__name__}: output {name} answers a sample otherwise when others are in the batch with it, so no "
                    "two batches can be compared; give a py: function that returns a model without it"
                )


def measure_floors(reference: Mapping[str, Tensor], unfused: Sequence[Tensor]) -> dict[str, float]:
    """The unfused model's error in storage precision, per output."""
    return {name: distance(found, reference[name]) for name, found in zip(reference, unfused, strict=True)}


def jolt(model: nn.Module, seed: int) -> nn.Module:
    """A copy with one in twelve of the numbers moved to a neighbour in its dtype: in the mean square as far as one rounding moves it."""
    import torch

    model = copy.deepcopy(model)  # its tensors are the checkpoint's and the base's
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point():
                side = torch.randint(0, 24, tensor.shape, generator=generator, dtype=torch.int8).to(tensor.device)
                step = (0.75 * torch.finfo(tensor.dtype).eps) * ((side == 0).double() - (side == 1).double())
                tensor.copy_(tensor.double() * (1 + step))
    return model


def judged_again(evidence: OutputEvidence, reference: Reference) -> OutputEvidence:
    """The same run by the floors of ``reference``."""
    floor = reference.floors[evidence.output]
    bound = reference.bound(evidence.output, floor, roundoff(evidence.dtype))
    passed = passes(evidence.error, floor, bound, evidence.magnitude)
    return replace(evidence, floor=floor, bound=bound, passed=passed)


def compare(
    model: str,
    run_batch: Run,
    reference: Reference,
    batch: int,
    *,
    floors: Mapping[str, float] | None = None,
    dtype: str | None = None,
) -> tuple[OutputEvidence, ...]:
    """Run a model at one batch size on all samples (repeated to fill a batch) and compare every output."""
    import torch

    count = reference.samples
    rounds = max(1, math.ceil(count / batch)) if batch <= count else 1
    index = torch.arange(rounds * batch) % count
    columns: list[list[Tensor]] = []
    expected: list[list[Tensor]] = []
    for few in index.reshape(rounds, batch):
        columns.append(list(run_batch({name: tensor[few] for name, tensor in reference.inputs.items()})))
        expected.append([reference.answer(name, few) for name in reference.outputs])
    found, wanted = ([_joined(parts) for parts in zip(*rows, strict=True)] for rows in (columns, expected))
    floors = reference.floors if floors is None else floors
    return tuple(
        _evidence(model, name, *pair, reference, batch, floors[name], dtype or reference.dtype)
        for name, pair in zip(reference.outputs, zip(found, wanted, strict=True), strict=True)
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One output's answers to all batches as one tensor, batch after batch."""
    import torch

    return torch.cat([part[None] if part.ndim == 0 else part for part in parts])


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found - expected|; infinite for a NaN, an infinity or another shape."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return math.inf
    return float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0


def passes(error: float, floor: float, bound: float, magnitude: float) -> bool:
    """Within a bound that means something: where a model that answers 0 would be within it too, only equality passes."""
    return math.isfinite(floor) and error <= bound and (bound < magnitude or error == 0)


def roundoff(dtype: str) -> float:
    """u of a precision by its torch name."""
    import torch

    return torch.finfo(getattr(torch, dtype)).eps / 2


def _evidence(
    model: str, name: str, found: Tensor, expected: Tensor, reference: Reference, batch: int, floor: float, dtype: str
) -> OutputEvidence:
    error = distance(found, expected)
    bound = reference.bound(name, floor, roundoff(dtype))
    classes = expected.ndim >= 2 and expected.shape[-1] > 1 and found.shape == expected.shape
    same, margins = predictions(found, expected) if classes else (None, expected.new_empty(0))
    return OutputEvidence(
        model=model,
        output=name,
        batch=batch,
        samples=reference.samples,
        dtype=dtype,
        magnitude=_largest(expected),
        error=error,
        floor=floor,
        bound=bound,
        agree=None if same is None else float(same.double().mean()),
        differing=len(margins),
        margin=float(margins.max()) if len(margins) else None,
        passed=passes(error, floor, bound, _largest(expected)),
        moved=reference.moved.get(name),
    )


def predictions(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Where the two predict the same class (last axis), and for the others how far apart the two classes are in ``expected``.

    A margin of no more than twice the error is rounding: the reference itself can hardly tell the two classes apart.
    """
    chosen, true = found.argmax(-1, keepdim=True), expected.argmax(-1, keepdim=True)
    same = (chosen == true).squeeze(-1)
    margins = (expected.gather(-1, true) - expected.gather(-1, chosen)).squeeze(-1)
    return same, margins[~same]


def first_parting(
    models: tuple[nn.Module, nn.Module, nn.Module],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    signature: Signature,
    inputs: Mapping[str, Tensor],
    modules: Sequence[str],
) -> str | None:
    """The first of ``modules``, in the order they run, where the fused model leaves the reference by more than the bound.

    models: the unfused one in float64, the unfused one in storage precision, the fused one; dtypes: what each runs in.
    """
    import torch

    few = {name: tensor[:2] for name, tensor in inputs.items()}
    traces = [_trace(m, signature, few, d, modules) for m, d in zip(models, dtypes, strict=True)]
    for name, expected in traces[0].items():
        floor = distance(traces[1][name], expected)
        bound = MULTIPLE * max(floor, torch.finfo(dtypes[1]).eps / 2 * _largest(expected))
        if not distance(traces[2][name], expected) <= bound:
            return name
    return None


def _trace(
    model: nn.Module, signature: Signature, inputs: Mapping[str, Tensor], dtype: torch.dtype, modules: Sequence[str]
) -> dict[str, Tensor]:
    """The output of each named module in one run, in the order they ran."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in modules:

        def keep(_: nn.Module, __: object, output: Any, name: str = name) -> None:
            if hasattr(output, "double"):
                outputs.setdefault(name, output.detach().double())

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        run(model, signature, inputs, dtype)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0
