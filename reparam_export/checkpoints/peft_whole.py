"""PEFT folders that train parts of the base itself: LN tuning (``X.ln_tuning_layers.weight``), tokens (``X.trainable_tokens_delta``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reparam_export.checkpoints import Adapter, Parts, Source
from reparam_export.checkpoints._peft import looked_for, of_type, other_settings, parts_of
from reparam_export.checkpoints._peft_names import PREFIX, targets
from reparam_export.errors import FusionError, TensorMismatchError

if TYPE_CHECKING:
    from torch import nn

LOOKED_FOR = looked_for("LN_TUNING") + " or TRAINABLE_TOKENS"

accepts = of_type("LN_TUNING", "TRAINABLE_TOKENS")


def read(source: Source) -> Parts:
    unknown = other_settings(source.config, ("token_indices",))
    if unknown:
        raise FusionError(
            f"{source.path}: adapter_config.json sets {unknown[0]}={source.config[unknown[0]]!r}, which is not known"
        )

    def complete(module: nn.Module, adapters: Sequence[Adapter]) -> None:
        """A norm is saved with its weight and its bias. Raises TensorMismatchError."""
        for name in sorted(trained):
            for own, _ in module.get_submodule(name).named_parameters(recurse=False):
                if f"{name}.{own}" not in parts.replaced:
                    raise TensorMismatchError(
                        f"{source.path}: {name}: its {own} is missing; LN tuning saves all of a norm",
                        module=name,
                        tensor=own,
                        expected=f"{name}.{own}",
                        found=None,
                    )

    parts = parts_of(source, source.claim(), (), complete if source.config["peft_type"] == "LN_TUNING" else None)
    trained = {
        n.removeprefix(PREFIX).partition(".ln_tuning_layers.")[0] for n in source.tensors if ".ln_tuning_layers." in n
    }
    meant = targets(source.config) or (lambda names: [])
    return replace(parts, covers=lambda names: [name for name in meant(names) if name not in trained], only=False)
