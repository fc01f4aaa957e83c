"""Whole tensors out of a checkpoint among those of the base's files: tied ones, and tables for another number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reparam_export.checkpoints import Checkpoint
from reparam_export.errors import SharedWeightError
from reparam_export.hf_folder import EMBEDDING, HEAD, Structure, of_vocabulary
from reparam_export.streaming.shards import Stored
from reparam_export.streaming.source import NotStreamableError


def with_ties(
    replaced: Mapping[str, Stored],
    stored: Mapping[str, Stored],
    checkpoint: Checkpoint,
    structure: Structure,
    apart: Mapping[str, str],
) -> dict[str, Stored]:
    """The whole tensors under the names that will be written.

    apart: the names that get tensors of their own -> the name that held both. One that is no copy is the base's own, so it is for both;
    where names stay one tensor, it is written under the name that holds it.
    """
    own = {
        name: replace(replaced[holder], name=name)
        for name, holder in apart.items()
        if name not in replaced and holder in replaced and holder not in checkpoint.copies
    }
    held = {structure.ties.get(name, name): tensor for name, tensor in replaced.items()}
    second = {name: tensor for name, tensor in replaced.items() if name in structure.ties and name in stored}
    return {name: replace(tensor, name=name) for name, tensor in (held | second | own).items()}


def vocabulary(
    stored: Mapping[str, Stored], replaced: Mapping[str, Stored], structure: Structure, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The config entry for the rows of the embedding, where a checkpoint brings it with others than the base has.

    Raises NotStreamableError for any other shape than the model's, SharedWeightError for an output layer of other rows.
    """
    final = {name: tensor.shape for name, tensor in ({**stored, **replaced}).items()}
    other = [name for name in replaced if name in stored and stored[name].shape != final[name]]
    if structure.shapes is not None:
        odd = [name for name in replaced if structure.shapes.get(name, final[name]) != final[name]]
    else:
        odd = [name for name in other if name not in (EMBEDDING, HEAD) or stored[name].shape[1:] != final[name][1:]]
    if odd:
        raise NotStreamableError(f"the checkpoint brings {odd[0]} in another shape than the base's")
    tables = [f"{name}.weight" for name in structure.embeddings if f"{name}.weight" in other]
    if not tables and HEAD not in other:
        return {}
    rows = final[tables[0] if tables else EMBEDDING][0]
    if HEAD in final and final[HEAD][0] != rows:
        raise SharedWeightError(
            f"with the checkpoint's whole tables, {EMBEDDING} has {rows} rows and {HEAD} {final[HEAD][0]}: a model has one "
            "vocabulary. Give the base as it was resized for training with --base",
            tensor=HEAD,
            owners=(EMBEDDING, HEAD),
        )
    return of_vocabulary(config, rows)
