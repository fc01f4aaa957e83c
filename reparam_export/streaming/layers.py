"""One touched module: folded, proven and written, some rows at a time where its kinds have factors, else as a whole in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from reparam_export.errors import EquivalenceError, FusionError
from reparam_export.streaming.formats import Array, Format, finite, refuse_overflow, rounded
from reparam_export.streaming.forms import Form, PartedError, Touched, form_of, format_of
from reparam_export.streaming.kernel import PROBES
from reparam_export.streaming.rows import SPAN, FaultError, Fold, Tally, Workspace, fold_rows
from reparam_export.streaming.rows import workspace as new_workspace
from reparam_export.verification.certificate import LayerEvidence

MISS = 1e-6  # chance of missing a row whose error is above ``detectable``
QUANTILE = NormalDist().inv_cdf(0.5 + MISS ** (1 / PROBES) / 2)  # all probes are below it with that chance
DECIDED = 0.5  # of the bound, one unit in the last place: below it is the error of every entry that was decided at once
WIDTHS = 2  # of layers that a thread keeps buffers for: a model has hardly more
Write = Callable[[str, int, Array], None]  # (tensor name, bytes from its start, raw values)


@dataclass
class Buffers:
    """Workspaces of one thread, by what they fit."""

    kept: dict[tuple[Any, ...], Workspace] = field(default_factory=dict)

    def of(self, fold: Fold) -> Workspace:
        key = (fold.values.shape[1], fold.probes.dtype, fold.target)
        if key not in self.kept:
            if len(self.kept) == WIDTHS:
                self.kept.clear()  # memory stays small
            self.kept[key] = new_workspace(fold)
        return self.kept[key]


@dataclass(frozen=True)
class Folded:
    """What one module gave. ``bias``: the whole fused bias, rounded; None without one."""

    evidence: LayerEvidence
    bias_changed: bool
    proving: float = 0.0  # seconds of the thread that probes took, but for those that a compiled loop sums on its way


def fold_layer(touched: Touched, targets: Mapping[str, Format], write: Write, buffers: Buffers, seed: int) -> Folded:
    """Fold one module and write its weight and its bias, those of them that ``targets`` names, in that format.

    Raises EquivalenceError (with the evidence of this layer) and FusionError.
    """
    try:
        form = form_of(touched, seed)
        if form is None:
            from reparam_export.streaming.whole import fold_whole

            return fold_whole(touched, targets, write, seed)
        tally = _weight(touched, form, targets, write, buffers, seed)
        changed = _bias(touched, form.bias, targets, write)
    except FaultError as fault:
        raise refusal(
            touched, [fault.row, fault.column], fault.expected, fault.found, fault.ratio, transposed=touched.transposed
        ) from fault
    except PartedError as parted:
        raise refusal(
            touched, [parted.row], parted.expected, parted.found, parted.ratio, tensor="output row"
        ) from parted
    except (TypeError, ValueError, IndexError, AttributeError, KeyError, OverflowError, ArithmeticError) as error:
        raise FusionError(f"{touched.module}: the adapter cannot be folded: {type(error).__name__}: {error}") from error
    return Folded(evidence_of(touched, targets, tally, form), changed, tally.probing + form.seconds)


def _weight(
    touched: Touched, form: Form, targets: Mapping[str, Format], write: Write, buffers: Buffers, seed: int
) -> Tally:
    name = f"{touched.module}.weight"
    source = format_of(touched.weight)
    fold = Fold.of(touched.weight.values(), source, targets.get(name, source), (form.added, form.gates), seed)
    if name not in targets:
        return fold.tally
    work = buffers.of(fold)
    rows, columns = fold.values.shape
    step = work.rows * SPAN
    try:
        for start in range(0, rows, step):
            write(name, start * columns * fold.target.size, fold_rows(fold, work, start, min(start + step, rows)))
    except FusionError as error:
        raise refuse_overflow(name, fold.target) from error
    return fold.tally


def _bias(touched: Touched, bias: Array | None, targets: Mapping[str, Format], write: Write) -> bool:
    """Write the fused bias; whether it is another than the base's, or than zeros where there was none."""
    name = f"{touched.module}.bias"
    if bias is None:
        if name in targets:  # a switch of the config gives it one all the same
            write(name, 0, np.zeros(touched.shape[0], targets[name].raw))
        return False
    before = touched.bias64()
    if name in targets:
        raw = rounded(bias, targets[name])
        if not finite(raw, targets[name]):
            raise refuse_overflow(name, targets[name])
        write(name, 0, raw)
    return bool(np.any(bias != (0 if before is None else before)))


def evidence_of(touched: Touched, targets: Mapping[str, Format], tally: Tally, form: Form) -> LayerEvidence:
    """The numbers of a weight that was folded by rows. All of its entries are proven to be correctly rounded, or it would have failed."""
    entries = math.prod(touched.weight.shape) if f"{touched.module}.weight" in targets else 0
    entries += touched.shape[0] if f"{touched.module}.bias" in targets and form.bias is not None else 0
    norm = math.sqrt(tally.norm) or 1.0
    return LayerEvidence(
        module=touched.module,
        kind=touched.kinds,
        tensors=tuple(targets),
        shape=touched.shape,
        dtype=next(iter(targets.values())).torch,
        method="probes",
        entries=entries,
        exact_entries=entries,
        max_error=tally.error,
        bound_ratio=max(DECIDED, tally.ratio, tally.probe_ratio, form.ratio),
        survival=tally.kept / tally.changed if tally.changed > 0 else 1.0,
        verdict="exact",
        probes=PROBES,
        detectable=tally.detectable / QUANTILE / norm,
        change=tally.changed,
    )


def refusal(
    touched: Touched,
    index: list[int],
    expected: float,
    found: float,
    ratio: float,
    *,
    tensor: str = "weight",
    transposed: bool = False,
) -> EquivalenceError:
    """The error for a layer that is not the trained one."""
    worst = {"tensor": tensor, "index": index, "expected": expected, "found": found}
    evidence = LayerEvidence(
        touched.module, touched.kinds, (f"{touched.module}.weight",), touched.shape, touched.weight.code, "probes", 0, 0,
        abs(found - expected), ratio, 0.0, "wrong", PROBES, 0.0, worst,
    )  # fmt: skip
    return EquivalenceError(
        f"{touched.module} ({touched.kinds}) is not the trained layer: {tensor}{index} is {found!r}, the exact value is {expected!r}, "
        f"{ratio:.3g} times the rounding bound; nothing was kept",
        layer=touched.module,
        evidence=evidence,
    )
