"""Trainable tokens of a PEFT folder: new vectors of some rows of an embedding, and of the layers that share its weight."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import tokens
from reparam_export.checkpoints import Adapter, Claim, Source, alike
from reparam_export.checkpoints._peft_names import PREFIX, ends_with
from reparam_export.errors import CheckpointError, FusionError

if TYPE_CHECKING:
    from torch import nn


def trained_tokens(source: Source, claim: Claim) -> list[Adapter]:
    """Trainable tokens: ``X.token_adapter.trainable_tokens_delta`` holds the new vectors of the configured indices."""
    end = re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta\Z")
    indices = source.config.get("trainable_token_indices") or source.config.get("token_indices") or {}
    found: list[Adapter] = []
    used: dict[str, Any] = {}
    if indices and not any(end.search(n) for n in claim.names()):
        raise CheckpointError(f"{source.path}: trainable tokens are configured, but the file holds none")
    given = claim.take_all(end.search)
    for name, vectors in given.items():
        module = end.sub("", name.removeprefix(PREFIX))
        mine = ends_with(module, [] if isinstance(indices, list) else list(indices))
        chosen = indices if isinstance(indices, list) else None if mine is None else indices[mine]
        if chosen is None and any(other != name and alike(vectors, t) for other, t in given.items()):
            continue  # of a layer that shares its weight with the one that is listed
        if chosen is None:
            raise CheckpointError(
                f"{source.path}: {module} has trained tokens, but trainable_token_indices does not list it"
            )
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in chosen)
        if not whole or len(set(chosen)) != len(chosen) or len(chosen) != len(vectors):
            raise CheckpointError(
                f"{source.path}: {module}: {len(vectors)} trained tokens do not fit the indices {str(chosen)[:80]}"
            )
        used[str(mine)] = chosen
        found.append(Adapter(module, "tokens", tokens.Params(tuple(chosen), vectors)))
    for key, chosen in {} if isinstance(indices, list) else indices.items():
        if (
            key not in used and chosen not in used.values()
        ):  # peft leaves out a layer that is tied to one with the same indices
            raise CheckpointError(
                f"{source.path}: trainable_token_indices of adapter_config.json names {key!r}, and the file has no trained tokens of it"
            )
    return found


def on_every_tie(module: nn.Module, adapter: Adapter) -> list[Adapter]:
    """Trained tokens on their embedding and, as peft has it, on the layers that share its weight: other tables (T5), the head's outputs.

    peft looks for those where a model's config says ``tie_word_embeddings`` only; in any other model the head keeps the base's weight.
    """
    from torch import nn as torch_nn

    tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
    shared = module.get_submodule(adapter.module).get_parameter("weight")
    owners = [name for name, part in module.named_modules() if part._parameters.get("weight") is shared]
    owners = owners if tied else [adapter.module]
    found = []
    for name in owners:
        layer = module.get_submodule(name)
        side = "output" if isinstance(layer, torch_nn.Linear) else "input"
        if side == "output" and layer.bias is not None:
            raise FusionError(
                f"{name}: peft's forward of trained tokens on a linear layer leaves its bias out; no such layer can be kept"
            )
        found.append(replace(adapter, module=name, params=replace(adapter.params, side=side)))
    return found
