"""The base's own folder: is it one that can be folded shard by shard, is it whole, and which of its ties would the adapter break?"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reparam_export.checkpoints import Checkpoint, unnumbered
from reparam_export.errors import CheckpointError, ReparamError, SharedWeightError, TensorMismatchError
from reparam_export.files import read_json, weight_files
from reparam_export.hf_folder import EMBEDDING, Structure, folder_of, is_known, keywords_of, structure_of
from reparam_export.models import Base
from reparam_export.streaming.shards import Stored, open_shard
from reparam_export.ties import apart_of

TASKS = {  # peft's task_type -> how a class for it is called
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
}
UNTIED = "tie_word_embeddings"


class NotStreamableError(ReparamError):
    """The checkpoint can be folded in memory only; the message says why."""


def source_of(checkpoint: Checkpoint, base: Base) -> tuple[Path, dict[str, Any]]:
    """The base's folder and config. Raises NotStreamableError, CheckpointError."""
    source = folder_of(base.spec)
    if not hasattr(os, "pwrite"):
        raise NotStreamableError("this system cannot write into the middle of a file")
    if source is None:
        raise NotStreamableError(f"the base {base.spec} is no Hugging Face folder")
    if base.weights is not None or base.state is not None or base.ignored:
        raise NotStreamableError("the base's weights do not come from its own folder")
    config = read_json(source / "config.json")
    quantized = next((name for name in ("quantization_config", "quantization") if config.get(name)), None)
    if quantized:
        by = " by mlx" if isinstance(config.get("quantization"), dict) else ""
        raise CheckpointError(
            f"base {base.spec!r}: expected plain weights; config.json says they are quantized{by} ({quantized}); give the base before "
            "quantization"
        )
    keywords = keywords_of(base.spec)
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    task = keywords.pop("task", None)
    if keywords.pop("architecture", architecture) != architecture or not architecture:
        raise NotStreamableError("the model is of another class than the base's folder")
    plain = task is None or architecture.endswith(TASKS.get(str(task), ("\0",)))
    if (
        not plain and type(base.skeleton()).__name__ != architecture
    ):  # transformers may have no other class for the task
        raise NotStreamableError(f"the checkpoint is for {task}, the base's folder holds a {architecture}")
    if keywords:
        raise NotStreamableError(f"the base's config is changed ({', '.join(keywords)})")
    probed = [a.module for a in checkpoint.adapters if a.kind == "probed"]
    if probed:
        raise NotStreamableError(f"{len(probed)} module(s) have an adapter without a closed form, first {probed[0]}")
    return source, config


def files_of(source: Path) -> dict[Path, dict[str, Stored]]:
    """Each weight file and its tensors. Raises TensorMismatchError where index and files differ."""
    index = weight_files(source)
    opened = {path: open_shard(path) for path in dict.fromkeys(index.values())}
    if "" in index:
        return opened
    for name, path in index.items():
        if name not in opened[path]:
            raise mismatch(name, f"in {path.name}, as the index says", "not in it")
    for path, tensors in opened.items():
        for name in tensors:
            if index.get(name) != path:
                raise mismatch(name, "in the index" if name not in index else f"in {index[name]}", f"in {path.name}")
    return opened


def mismatch(name: str, expected: object, found: object) -> TensorMismatchError:
    """The error for a tensor of the base that is not as it should be."""
    return TensorMismatchError(
        f"base: tensor {name}: expected {expected}; found {found}; the base's folder is incomplete or mixed up, fetch it again",
        module=name.rpartition(".")[0],
        tensor=name,
        expected=expected,
        found=found,
    )


def check_names(
    structure: Structure, stored: Mapping[str, Stored], config: Mapping[str, Any], replaced: Collection[str]
) -> None:
    """The files hold the model's tensors. replaced: by the checkpoint, in whatever size. Raises TensorMismatchError, NotStreamableError."""
    from reparam_export.state import CONSTANTS

    if structure.shapes is not None:
        wanted = {n: s for n, s in structure.shapes.items() if n not in structure.ties}
        ends = tuple(end for end, _ in CONSTANTS)
        found = {
            n: t.shape for n, t in stored.items() if n in wanted or (n not in structure.ties and not n.endswith(ends))
        }
        if found != wanted:
            odd = sorted({n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)} - set(replaced))
            if not odd:
                return
            raise NotStreamableError(
                f"{odd[0]} is {found.get(odd[0])} in the base's files and {wanted.get(odd[0])} in its model"
            )
        return
    layers = config.get("num_hidden_layers")
    kinds = {unnumbered(name) for name in stored}
    numbered = [kind for kind in kinds if "#" in kind.split(".")]
    alike = {kind.replace("#", str(i), 1) for kind in numbered for i in range(int(layers or 0))}
    missing = sorted(alike - stored.keys())
    if missing or EMBEDDING not in stored:
        raise mismatch(missing[0] if missing else EMBEDDING, f"one for each of {layers} layers", None)


def untied(
    structure: Structure, checkpoint: Checkpoint, config: Mapping[str, Any], base: Base
) -> tuple[Structure, dict[str, str]]:
    """Ties that the checkpoint breaks, broken: structure without them, and new tensor -> the one with its numbers.

    Raises SharedWeightError.
    """
    groups: dict[str, list[str]] = {}
    for alias, holder in structure.ties.items():
        groups.setdefault(holder, [holder]).append(alias)
    broken = {holder for holder, names in groups.items() if apart_of(checkpoint)(names)}
    hit = {alias: holder for alias, holder in structure.ties.items() if holder in broken}
    if not hit:
        return structure, {}
    apart = structure.ties.keys() <= hit.keys()
    if not is_known(config):
        keyword = f"{base.spec}{'&' if '?' in base.spec else '?'}{UNTIED}=False"
        apart = (
            apart and UNTIED in config and not structure_of(config, {}, replace(base, spec=keyword), exact=True).ties
        )
    if not apart:
        alias, holder = next(iter(hit.items()))
        raise SharedWeightError(
            f"{holder} is one tensor with {alias}: changing it would change both. Untie them in the base first",
            tensor=holder,
            owners=(holder, alias),
        )
    return replace(structure, ties={}), hit
