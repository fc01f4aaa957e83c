"""The weights in a folder that somebody gives: in one file or in shards with an index; and the folders below one that holds none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reparam_export.affine import Tensor
from reparam_export.checkpoints._nemo import ENDING
from reparam_export.errors import CheckpointError
from reparam_export.files import PICKLES, flat_tensors, in_parts, indexed, load_pickle, load_safetensors

INDEX = ".index.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS = (
    "model.safetensors", "pytorch_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapters.safetensors",
    "adapter_model.pt",
)  # fmt: skip
DISTRIBUTED = ".distcp"
RANK = re.compile(r"(?<![a-z])rank_(\d+)")
WORLD = re.compile(r"world_size_(\d+)")
NEW_ROWS = ("new_embeddings.safetensors", "new_embeddings.bin")
NUMBERED = re.compile(r"checkpoint-(\d+)")


def weights_file(path: Path) -> Path:
    """The file with the weights, or the index of an adapter's shards. Raises CheckpointError that names what else there is."""
    if path.is_file():
        _check_rank(path)
        if path.name.endswith((*PICKLES, ".safetensors", ENDING)) or path.name in [
            f"{name}{INDEX}" for name in ADAPTERS
        ]:
            return path
        raise CheckpointError(
            f"{path}: expected {', '.join(PICKLES)}, .safetensors, {ENDING} or a PEFT folder, found the ending {path.suffix or '(none)'}"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    for name in (*ADAPTERS, *(f"{name}{INDEX}" for name in ADAPTERS), *OTHERS):
        if (path / name).is_file():
            return path / name
    _check_parts(path)
    raise CheckpointError(f"{path}: the folder holds none of {', '.join((*ADAPTERS, *OTHERS))}{_below(path)}")


def _check_rank(file: Path) -> None:
    """Raises CheckpointError for the file of one of several ranks: as its name says, or others of its name beside it."""
    if file.name.endswith(DISTRIBUTED):
        _check_parts(file.parent)
    ranks = _ranks(file)
    if ranks > 1:
        raise in_parts(file, f"the file of one rank of {ranks}")


def _ranks(file: Path) -> int:
    """How many ranks wrote files like this one: as its name says, or others beside it that are numbered from 0; 1 for any other file."""
    world = WORLD.search(file.name)
    if not RANK.search(file.name) or not file.name.endswith(PICKLES):
        return 1
    if world:
        return int(world[1])
    like = [p.name for p in file.parent.iterdir() if RANK.sub("", p.name) == RANK.sub("", file.name)]
    numbers = sorted(int(match[1]) for name in like if (match := RANK.search(name)))
    return (
        len(like) if numbers == list(range(len(like))) else 1
    )  # lora_rank_8.pt beside lora_rank_16.pt is another matter


def _check_parts(folder: Path) -> None:
    """Raises CheckpointError for a folder, or one with a folder in it, that holds a model in parts by rank and nothing else."""
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        files = sorted(p for p in place.iterdir() if p.is_file())
        if any(p.name.endswith(DISTRIBUTED) for p in files):
            raise CheckpointError(
                f"{place}: a distributed checkpoint of torch ({DISTRIBUTED}: FSDP's SHARDED_STATE_DICT), in parts. Put them together "
                f"first: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {place} model.pt`, and give model.pt"
            )
        ranks = max(map(_ranks, files), default=1)
        if ranks > 1:
            raise in_parts(place, f"it holds the files of {ranks} ranks")


def _below(path: Path) -> str:
    """The folders in this one that hold weights, of numbered checkpoints the newest: named, since which one is meant is not known."""
    names = [*ADAPTERS, *(f"{name}{INDEX}" for name in ADAPTERS), *OTHERS[2:]]
    found = sorted(p.name for p in path.iterdir() if p.is_dir() and any((p / name).is_file() for name in names))
    steps = {int(m[1]): name for name in found if (m := NUMBERED.fullmatch(name))}
    if steps:
        newest = path / steps[max(steps)]
        return f"; it is the parent of {len(steps)} checkpoint(s), the newest of which is {newest}: give the one that is meant"
    if len(found) == 1:
        return f"; it is the parent of an adapter's folder: give {path / found[0]}"
    return f"; folders in it that hold an adapter: {', '.join(found[:9])}; give one of them" if found else ""


def shards(index: Path, *, numpy: bool) -> dict[str, Tensor]:
    """Every tensor of an adapter's shards. Raises CheckpointError unless they hold what the index says, and nothing else."""
    files = indexed(index)
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        safe = file.suffix == ".safetensors"
        tensors = load_safetensors(file, numpy=numpy)[0] if safe else flat_tensors(file, load_pickle(file))
        for name, tensor in tensors.items():
            if files.get(name) != file:
                raise CheckpointError(f"{index}: {name} is in {file.name}, which the index does not say")
            found[name] = tensor
    missing = [name for name in files if name not in found]
    if missing:
        raise CheckpointError(f"{index}: {missing[0]} is not in {files[missing[0]].name}, as the index says")
    return found


def check_beside(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for rows of added tokens in a file of their own, beside an adapter.

    ``input_embeddings`` and ``output_embeddings``, cut out of an adapter's whole tables for vLLM (fms-hf-tuning's
    ``post_process_vLLM_adapters_new_tokens``: the last rows, wherever they stood; vLLM puts them below ``vocab_size`` rows, and only where
    the adapter has LoRA on that table). Which model that is, the folder does not say.
    """
    rows = next((folder / name for name in NEW_ROWS if (folder / name).is_file()), None)
    if config.get("peft_type") and rows is not None:
        raise CheckpointError(
            f"{rows}: holds the rows of added tokens, as an adapter is cut up for vLLM, and not where in the tables they were trained; "
            "they are not read. Give the adapter as it was before that, with its whole embed_tokens and lm_head; or put the rows into "
            "the base's tables (resize_token_embeddings; input_embeddings into the embedding, output_embeddings into lm_head), save that, "
            "give it with --base, and move this file away"
        )


def check_whole(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the adapter of a model that was in parts when it was saved."""
    advice = (
        "DeepSpeed's ZeRO-3 and FSDP write such files where the parts are not gathered; run the zero_to_fp32.py that DeepSpeed puts beside "
        "its checkpoint, or save again with the parts gathered (stage3_gather_16bit_weights_on_model_save, FULL_STATE_DICT)"
    )
    if config.get("peft_type") and not tensors:
        raise CheckpointError(f"{path}: the file holds no tensor at all; {advice}")
    empty = [name for name, tensor in tensors.items() if tuple(getattr(tensor, "shape", ())) == (0,)]
    if empty and (config.get("peft_type") or any(".lora_" in name for name in tensors)):
        raise CheckpointError(
            f"{path}: {len(empty)} of {len(tensors)} tensors are empty (shape [0]), first {empty[0]}; {advice}"
        )
