"""PEFT folders that train parts of the base itself: LN tuning (``X.ln_tuning_layers.weight``), tokens (``X.trainable_tokens_delta``)."""

from __future__ import annotations

from dataclasses import replace

from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import looked_for, of_type, other_settings, parts_of, targets
from reparam_export.errors import FusionError

LOOKED_FOR = looked_for("LN_TUNING") + " or TRAINABLE_TOKENS"

accepts = of_type("LN_TUNING", "TRAINABLE_TOKENS")


def read(source: Source) -> Parts:
    unknown = other_settings(source.config, ("token_indices",))
    if unknown:
        raise FusionError(
            f"{source.path}: adapter_config.json sets {unknown[0]}={source.config[unknown[0]]!r}, which is not known"
        )
    parts = parts_of(source, source.claim(), ())
    trained = {name.rpartition(".")[0] for name in parts.replaced}
    meant = targets(source.config) or (lambda names: [])
    return replace(parts, covers=lambda names: [name for name in meant(names) if name not in trained])
