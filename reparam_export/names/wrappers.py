"""What wrappers put into the names of a state dict, taken out again.

module.                                        torch.nn.DataParallel, DistributedDataParallel, DeepSpeed: in front of all
_orig_mod.                                     torch.compile: in front of what was compiled, anywhere
_fsdp_wrapped_module.  _checkpoint_wrapped_module.    FSDP, activation checkpointing: anywhere
X.lora_A.NAME.weight                           peft's own layers, with the name of the adapter
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from reparam_export.names.once import renamed_once

INNER = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module", "_dpp_module")
)
OUTER = "module"
HEAD = ("base_model", "model")  # peft's own, around which wrappers may stand
ADAPTER = re.compile(  # the layers of LoRA, which most people name; "default" with any other
    r"(?P<own>.+\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?P<name>[^.]+)(?P<end>\.(?:weight|bias))?"
    r"|(?P<any>.+)\.default(?P<last>\.(?:weight|bias))?"
)
V = TypeVar("V")


def unwrapped(tensors: Mapping[str, V], path: Path) -> dict[str, V]:
    """The tensors under the names that they have without wrappers, in the same order.

    Raises TensorMismatchError when two of them come out as one.
    """
    plain = dict(zip(tensors, plain_names(list(tensors)), strict=True))
    advice = (
        f"so they are once the wrappers' names ({', '.join(sorted(INNER))}, {OUTER}) and the adapter's are taken out; save the state dict "
        "of the model itself"
    )
    return renamed_once(tensors, plain.__getitem__, path, advice)


def plain_names(names: Sequence[str]) -> list[str]:
    """The names without what wrappers put in; ``module.`` only where all names have it in front."""
    split = [[part for part in name.split(".") if part not in INNER] for name in names]
    while split and all(_outer(parts) is not None for parts in split):
        split = [_without_outer(parts) for parts in split]
    return _unnamed([".".join(parts) for parts in split])


def has_outer(names: Sequence[str]) -> bool:
    """Have all of them ``module.`` in front, which is taken for a wrapper's?"""
    split = [[part for part in name.split(".") if part not in INNER] for name in names]
    return bool(split) and all(_outer(parts) is not None for parts in split)


def _outer(parts: Sequence[str]) -> int | None:
    """Where ``module`` stands in front, or after peft's own names; None where it does not, or nothing would be left."""
    at = len(HEAD) if tuple(parts[: len(HEAD)]) == HEAD else 0
    return next((n for n in (at, 0) if len(parts) > n + 1 and parts[n] == OUTER), None)


def _without_outer(parts: Sequence[str]) -> list[str]:
    at = _outer(parts)
    assert at is not None
    return [*parts[:at], *parts[at + 1 :]]


def _unnamed(names: Sequence[str]) -> list[str]:
    """The names without that of the adapter in them, where there is one adapter."""
    if len(several(names)) > 1:
        return list(names)
    return [_without_adapter(name) for name in names]


def _without_adapter(name: str) -> str:
    match = ADAPTER.fullmatch(name)
    if match is None or match["name"] in ("weight", "bias"):
        return name
    return f"{match['own'] or match['any']}{match['end'] or match['last'] or ''}"


def several(names: Iterable[str]) -> list[str]:
    """The names of the adapters in a state dict of peft's own layers, in order."""
    found = (match["name"] for name in names if (match := ADAPTER.fullmatch(name)))
    return [name for name in dict.fromkeys(found) if name not in ("weight", "bias", None)]
