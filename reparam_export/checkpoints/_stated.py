"""What the user states of the model that a file was trained in, held against the base's own configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from reparam_export.checkpoints import Adapter, Bind


def checked(path: Path, stated: Mapping[str, Any], of_config: Callable[[Any], Mapping[str, Any]]) -> Bind:
    """Leaves the adapters as they are once the base has said what it is.

    of_config: a configuration of transformers -> by the names of settings, what they must be; what it does not say is not in it.
    Raises UsageError for a setting that is another.
    """

    def bind(module: nn.Module, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        config = _config(module, [adapter.module for adapter in adapters])
        for name, own in {} if config is None else of_config(config).items():
            if name in stated and own is not None and stated[name] != own:
                given = stated[name] if isinstance(stated[name], str) else f"{stated[name]:g}"
                raise UsageError(
                    f"{path}: {name} is {given} as stated, and the base's configuration (model_type {config.model_type}) says {own}, so "
                    f"that the file's rows would be taken for others; pass --set {name}={own}, or the base that it was trained on"
                )
        return adapters

    return bind


def head_size(config: Any) -> int | None:
    """How many rows of q one head has."""
    said = getattr(config, "head_dim", None)
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    return said or (width // heads if width and heads else None)


def _config(module: nn.Module, names: Sequence[str]) -> Any:
    """The configuration of the smallest part of the model that all these modules are in and that has one, of its text decoder."""
    common = next(iter(names), "").split(".")
    for name in names:
        common = [one for one, other in zip(common, name.split("."), strict=False) if one == other]
    places = [".".join(common[:count]) for count in range(len(common) + 1)]
    parts = dict(module.named_modules())
    found = [getattr(parts[place], "config", None) for place in places if place in parts]
    config: Any = next((c for c in reversed(found) if hasattr(c, "model_type")), None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
