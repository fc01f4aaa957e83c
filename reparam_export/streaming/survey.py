"""How much of an adapter's change each storage format would keep, layer by layer, measured on the weights; nothing is written."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

from reparam_export.errors import FusionError
from reparam_export.fusion import ENOUGH, Kept
from reparam_export.streaming.formats import BY_SHORT, Format
from reparam_export.streaming.forms import Touched
from reparam_export.streaming.layers import Buffers, fold_layer
from reparam_export.streaming.plan import Plan
from reparam_export.streaming.work import workers


def survey(plan: Plan, formats: Sequence[str] = tuple(BY_SHORT)) -> dict[str, dict[str, Kept]]:
    """module -> format -> what it keeps. Raises EquivalenceError, FusionError as folding does."""
    from threadpoolctl import threadpool_limits

    local = threading.local()

    def measure(touched: Touched) -> dict[str, Kept]:
        buffers = local.__dict__.setdefault("buffers", Buffers())
        return {short: kept(touched, BY_SHORT[short], buffers) for short in formats}

    with threadpool_limits(1), ThreadPoolExecutor(workers(), "survey") as pool:
        return dict(zip(plan.touched, pool.map(measure, plan.touched.values()), strict=True))


def kept(touched: Touched, target: Format, buffers: Buffers) -> Kept:
    """One layer in one format; nothing where the fused weight exceeds its range."""
    name = f"{touched.module}.weight"
    try:
        evidence = fold_layer(
            touched, {name: target}, lambda *_: None, buffers, crc32(touched.module.encode())
        ).evidence
    except FusionError as error:
        if "not finite" not in str(error):
            raise
        return Kept(0.0, 0.0)
    return Kept(evidence.survival, evidence.change)


def narrowest(found: Mapping[str, Kept]) -> str:
    """The first format, of those in the order narrowest first, that keeps enough of a layer's change; fp32 when none does."""
    return next((short for short, of in found.items() if of.share >= ENOUGH), "fp32")


def one_for_all(plan: Plan) -> tuple[str | None, str]:
    """The narrowest format in which every layer keeps enough, for a target that has one dtype; None when the base is stored so already.

    And why, in words. A Hugging Face folder is such a target: stock loaders cast all of it to the one dtype of its config.
    """
    said = []
    for short in BY_SHORT:
        found = survey(plan, (short,))
        module, worst = min(((m, of[short]) for m, of in found.items()), key=lambda item: item[1].share)
        said.append(f"{short} keeps {worst.share:.1%} of the change of {module}, the least")
        if worst.share >= ENOUGH or short == "fp32":
            already = all(t.weight.code == BY_SHORT[short].code for t in plan.touched.values())
            return None if already else short, "; ".join(said)
    raise AssertionError("fp32 is the last")
