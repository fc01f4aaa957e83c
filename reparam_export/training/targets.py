"""Which layers of a model are adapted: by glob, by regular expression, or as the papers do.

"blocks.*.attn.proj"                       a glob, ``*`` and ``?`` as in file names (a ``*`` also matches dots)
re.compile(r"blocks\\.[0-5]\\..*proj")     a regular expression, matched against the whole name
"hydra-vit"                                one of PRESETS
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from reparam_export.assembly import tied_names
from reparam_export.errors import FusionError, SharedWeightError, UsageError
from reparam_export.layouts import layout_of

Targets = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
PRESETS: dict[str, re.Pattern[str]] = {
    # Hydra, section 4, and the authors' code: vtab1k set_hydra, elevater HydraMLP, nlu RobertaOutput
    "hydra-vit": re.compile(r"(.*\.)?(attn\.proj|mlp\.fc2)"),
    "hydra-clip": re.compile(r"visual\.(.*\.)?mlp\.c_proj"),
    "hydra-roberta": re.compile(r"(.*\.)?(?<!attention\.)output\.dense"),
    # GLoRA, set_glora: every linear layer whose last name does not hold "head"
    "glora": re.compile(r"(.*\.)?(?![^.]*head)[^.]+"),
}
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # may use a child's weight without calling it


def targeted(model: nn.Module, targets: Targets) -> list[str]:
    """The linear layers that the targets name, in the order of the model's modules.

    Raises UsageError for a target that names none or a layer that is never called, SharedWeightError for a tied weight.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if _is_linear(name, module)]
    chosen: set[str] = set()
    for target in listed(targets):
        found = [name for name in linear if matches(target, name)]
        if not found:
            shown = target.pattern if isinstance(target, re.Pattern) else target
            adapted = [
                n
                for n, m in modules.items()
                if matches(target, n) and isinstance(getattr(m, "adapter", None), nn.ParameterDict)
            ]
            others = [f"{n} ({type(m).__name__})" for n, m in modules.items() if n and matches(target, n)]
            if adapted:
                raise UsageError(f"target {shown!r}: {adapted[0]} has an adapter already; a layer takes one")
            what = f"matches no linear layer, only {', '.join(others[:3])}" if others else "matches no module"
            raise UsageError(f"target {shown!r} {what}; {nearest(shown, linear)}")
        chosen |= set(found)
    if not chosen:
        raise UsageError("no targets; name the linear layers to adapt, such as 'blocks.*.attn.proj'")
    for name in chosen:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, READS_WEIGHTS):
            raise UsageError(
                f"{name}: {type(parent).__name__} reads this layer's weight without calling the layer, so an adapter "
                "on it would have no effect; choose another target"
            )
    _check_shared(model, chosen)
    return [name for name in linear if name in chosen]


def trained_modules(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """The modules that are trained whole. Raises UsageError for a pattern that matches none with a parameter."""
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    chosen: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise UsageError(f"train {pattern!r} matches no module with parameters; {nearest(pattern, names)}")
        chosen += found
    return chosen


def listed(targets: Targets) -> list[str | re.Pattern[str]]:
    """The targets as a list."""
    return [targets] if isinstance(targets, str | re.Pattern) else list(targets)


def matches(target: str | re.Pattern[str], name: str) -> bool:
    """Is this the name of a module that the target means?"""
    pattern = PRESETS.get(target) if isinstance(target, str) else target
    return fnmatchcase(name, str(target)) if pattern is None else pattern.fullmatch(name) is not None


def nearest(pattern: str, names: Sequence[str]) -> str:
    """Names that the user may have meant, for an error message."""
    near = difflib.get_close_matches(pattern.replace("*", "0"), names, n=3, cutoff=0.4)
    return f"nearest names: {', '.join(near or names[:3]) or 'none'}; presets: {', '.join(PRESETS)}"


def _is_linear(name: str, module: nn.Module) -> bool:
    """A layer with a plain float matrix that multiplies the last axis of its input, and no adapter yet."""
    try:
        plain = bool(name) and layout_of(name, module) in ("linear", "transposed")
    except FusionError:
        return False
    weight = module._parameters.get("weight")
    return plain and weight is not None and weight.is_floating_point()


def _check_shared(model: nn.Module, layers: Iterable[str]) -> None:
    tied = tied_names(model)
    for name in layers:
        if f"{name}.weight" in tied:
            owners = tied[f"{name}.weight"]
            raise SharedWeightError(
                f"{' and '.join(owners)} are one tensor: folding an adapter into it would change both; choose another "
                "target, or untie them first",
                tensor=f"{name}.weight",
                owners=owners,
            )
