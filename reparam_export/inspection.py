"""What ``inspect`` says: format, kinds, touched modules, ranks, scales, what is missing, and whether it can be folded.

Safetensors files and PEFT folders are read without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reparam_export.affine import Bottleneck
from reparam_export.checkpoints import Adapter, Checkpoint, non_finite, settings_of, zeros
from reparam_export.errors import FusionError

if TYPE_CHECKING:
    from reparam_export.analysis import BranchAnalysis
    from reparam_export.checkpoints import Recipe
    from reparam_export.console import Console


def inspect_checkpoint(recipe: Recipe) -> dict[str, Any]:
    """Everything that can be said of the checkpoint without its base. JSON types. Raises CheckpointError."""
    try:
        checkpoint = recipe.read(inspecting=True)
    except FusionError as error:
        return {"path": recipe.checkpoint, "foldable": False, "reasons": [str(error)]}
    missing = [{"setting": m.setting, "found_in": m.found_in, "option": m.option} for m in checkpoint.missing]
    if checkpoint.base is None:
        missing.append(
            {"setting": "base", "found_in": "the training script", "option": "--base SPEC (and --base-weights FILE)"}
        )
    bad = non_finite(checkpoint)
    reasons = [f"{m['setting']} is missing (found in {m['found_in']}): {m['option']}" for m in missing] + [
        f"{name}: NaN or infinity" for name in bad
    ]
    if untrained(checkpoint):
        reasons.append(
            "the adapter changes nothing: on every module one of its factors is zero; it was never trained, or saved before it was"
        )
    described = checkpoint.describe()
    return {
        **described,
        "base": checkpoint.base,
        "adapters": [_adapter(checkpoint, i) for i in range(len(checkpoint.adapters))],
        "replaced": {name: list(tensor.shape) for name, tensor in checkpoint.replaced.items()},
        "missing": missing,
        "zero": zeros(checkpoint),
        "non_finite": bad,
        "foldable": not reasons,
        "reasons": reasons,
    }


def untrained(checkpoint: Checkpoint) -> bool:
    """Is every adapter a product of two with a zero in it (LoRA as it starts), and is there nothing else?"""
    return bool(checkpoint.adapters) and not checkpoint.replaced and all(map(_is_zero, checkpoint.adapters))


def _is_zero(adapter: Adapter) -> bool:
    pair = getattr(adapter.params, "pair", None)
    if not isinstance(pair, Bottleneck) or adapter.kind != "lora":
        return False
    biases = (pair.up.bias, pair.down.bias)
    return not any(b is not None and bool((b != 0).any()) for b in biases) and not all(
        bool((side.weight != 0).any()) for side in (pair.up, pair.down)
    )


def inspect_survival(recipe: Recipe) -> dict[str, Any]:
    """For each dtype the share of the adapter's change that storing in it keeps: overall, least, and by layer. Reads the base's weights.

    Raises CheckpointError, FusionError: the base must be there, and the adapters must fold into it.
    """
    from reparam_export.fusion import NARROWEST_FIRST, fuse, survival_of
    from reparam_export.streaming import NotStreamableError, plan_of
    from reparam_export.streaming.survey import survey

    checkpoint = recipe.read_lightly()
    try:
        found = survey(plan_of(checkpoint, None))
        return {short: survival_of({module: of[short] for module, of in found.items()}) for short in NARROWEST_FIRST}
    except NotStreamableError:
        checkpoint = recipe.read()
        return {short: survival_of(fuse(checkpoint, short).kept) for short in NARROWEST_FIRST}


def show_survival(console: Console, found: dict[str, Any]) -> None:
    """The same for a person."""
    from reparam_export.report.numbers import percent

    rows = [
        (module, *(percent(of["layers"][module]) for of in found.values()))
        for module in next(iter(found.values()))["layers"]
    ]
    for name in ("least", "overall"):
        rows.append((f"({name})", *(percent(of[name]) for of in found.values())))
    console.table("Share of the change that storage keeps", ("module", *found), rows)


def show(console: Console, found: dict[str, Any]) -> None:
    """The same for a person."""
    console.line(f"checkpoint: {found['path']}")
    if "format" in found:
        kinds = ", ".join(f"{name} x {count}" for name, count in found["kinds"].items())
        console.line(f"format: {found['format']} ({kinds})")
        for line in in_order(found["stack"]):
            console.line(line)
        console.line(f"base: {found['base'] or 'not named in the checkpoint'}")
        console.line(f"ranks: {', '.join(map(str, found['rank'])) or '-'}")
        for note in found["notes"]:
            console.line(f"note: {note}")
        rows = [(a["module"], a["kind"], _settings(a["settings"])) for a in found["adapters"]]
        console.table("Touched modules", ("module", "kind", "settings"), rows)
        for name, shape in found["replaced"].items():
            console.line(f"replaces: {name} {tuple(shape)}")
        for name in found["zero"]:
            console.line(f"zero: {name}")
    for reason in found["reasons"]:
        console.line(f"open: {reason}")
    console.line(f"can be folded: {'yes' if found['foldable'] else 'not yet' if 'format' in found else 'no'}")


def show_analysis(console: Console, branches: Sequence[BranchAnalysis]) -> None:
    """One row a branch; the columns are defined in ``analysis.py``."""
    columns = (
        "module", "branch", "share", "norm", "of weight", "rank", "effective rank",
        "writes alike", "chance", "reads alike", "chance", "amplification",
    )  # fmt: skip
    rows = [
        (
            b.module, b.branch, f"{b.share:.3f}", f"{b.norm:.3g}", f"{b.relative_norm:.2%}", b.rank, f"{b.effective_rank:.1f}",
            f"{b.similarity_out:.3f}", f"{b.chance_out:.3f}", f"{b.similarity_in:.3f}", f"{b.chance_in:.3f}", f"{b.amplification:.3g}",
        )
        for b in branches
    ]  # fmt: skip
    console.table("Branches", columns, rows)


def in_order(stack: list[dict[str, Any]]) -> list[str]:
    """One line for each checkpoint of a stack, in the order they act."""
    return [f"{n}. {m['path']} ({m['format']}), weight {m['weight']:g}" for n, m in enumerate(stack, 1)]


def _adapter(checkpoint: Checkpoint, index: int) -> dict[str, Any]:
    adapter = checkpoint.adapters[index]
    return {
        "module": adapter.site,
        "kind": adapter.kind,
        "rows": None if adapter.rows is None else list(adapter.rows),
        "settings": settings_of(adapter),
    }


def _settings(settings: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for name, value in settings.items():
        if isinstance(value, dict):
            parts.append(
                f"{name}: {_settings(value)}" if name != "path" else " ".join(f"{k}={v}" for k, v in value.items())
            )
        else:
            shown = value if not isinstance(value, float) else "missing" if math.isnan(value) else f"{value:g}"
            parts.append(f"{name}={shown}")
    return "; ".join(parts)
