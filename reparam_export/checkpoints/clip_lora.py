"""CLIP-LoRA (MaxZanella/CLIP-LoRA, loralib/utils.py ``save_lora``): LoRA on the attention of OpenAI's CLIP, by number and not by name.

    {"weights": {"layer_0": {"q_proj": {"w_lora_A": (r, width), "w_lora_B": (width, r)}, "k_proj", "v_proj", "proj"}, ...},
     "metadata": {"r", "alpha", "encoder": "text" | "vision" | "both", "params": ["q", "k", "v"], "position": "all" | "half-up" | ...}}

Its layers are the text encoder's blocks, then the image encoder's, those of ``position`` in each (``INDEX_POSITIONS_TEXT`` and
``INDEX_POSITIONS_VISION``, which go by the backbone: the number of layers says which). ``q_proj``, ``k_proj`` and ``v_proj`` are the
thirds of ``attn.in_proj_weight``, ``proj`` is ``attn.out_proj``. The scale is alpha / sqrt(r) (loralib/layers.py ``LoRALayer``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from reparam_export.adapters import lora
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.errors import CheckpointError

LOOKED_FOR = "weights.layer_0.q_proj.w_lora_A and a metadata entry beside (CLIP-LoRA)"
ENCODERS = {"text": ("text",), "vision": ("vision",), "both": ("text", "vision")}
OUTER = {"text": "transformer.resblocks", "vision": "visual.transformer.resblocks"}
PARTS = ("q_proj", "k_proj", "v_proj")
LETTERS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}  # of the metadata's ``params``
TEXT = 12  # blocks of every text encoder that CLIP-LoRA has tables for
FIRST = {"bottom": 0, "mid": 4, "up": 8, "top": 11, "top1": 11, "top2": 10, "top3": 9, "half-bottom": 0, "all": 0}
COUNT = {
    "bottom": 4,
    "mid": 4,
    "up": 4,
    "top": 1,
    "top1": 1,
    "top2": 2,
    "top3": 3,
}  # of the others, half or all of the blocks


def accepts(source: Source) -> bool:
    return any(name.startswith("layer_") and name.endswith(".w_lora_A") for name in source.tensors)


def read(source: Source) -> Parts:
    said: Any = source.content.get("metadata")
    if not isinstance(said, dict) or said.get("encoder") not in ENCODERS or not isinstance(said.get("r"), int):
        raise CheckpointError(
            f"{source.path}: expected a metadata entry with r, alpha, encoder and position; found {str(said)[:80]}"
        )
    source.settings.offer("position", said.get("position"), "the file's metadata")
    position = source.settings.choice(
        "position",
        ("all", *(p for p in (*FIRST, "half-up") if p != "all")),
        why=f"{source.path}: the file does not say which blocks it adapts",
    )
    alpha, rank = float(said["alpha"]), int(said["r"])
    claim = source.claim()
    layers = len({name.partition(".")[0] for name in source.tensors})
    params = _params(source, said.get("params"))
    adapters: list[Adapter] = []
    for number, block in enumerate(_blocks(source, str(said["encoder"]), position, layers)):
        adapters += _adapters(source, claim, f"layer_{number}", f"{block}.attn", alpha / math.sqrt(rank), rank, params)
    claim.finish()
    return Parts(tuple(adapters), covers=partial(_covered, ENCODERS[str(said["encoder"])], position, params))


def _params(source: Source, said: Any) -> tuple[str, ...]:
    """The projections that every layer has, by their names in the file: as the metadata say; where they do not, all that any layer has.

    Raises CheckpointError.
    """
    if said is None:
        return tuple(part for part in LETTERS.values() if any(f".{part}." in name for name in source.tensors))
    if not isinstance(said, list | tuple | str) or not said or not all(letter in LETTERS for letter in said):
        raise CheckpointError(
            f"{source.path}: the metadata say params {str(said)[:80]}; expected some of {', '.join(LETTERS)}"
        )
    return tuple(part for letter, part in LETTERS.items() if letter in said)


def _covered(encoders: Sequence[str], position: str, params: Sequence[str], names: Sequence[str]) -> list[str]:
    """What must have an adapter in a base of these modules: the blocks of ``position``, counted in its own towers."""
    found = []
    for encoder in encoders:
        blocks = re.compile(rf"{re.escape(OUTER[encoder])}\.(\d+)\.attn\.out_proj")
        numbers = {int(match[1]) for name in names if (match := blocks.fullmatch(name))}
        meant = _numbers(position, len(numbers) if encoder == "vision" else TEXT)
        for attention in (f"{OUTER[encoder]}.{number}.attn" for number in sorted(numbers & set(meant))):
            found += [attention] if set(params) & set(PARTS) else []
            found += [f"{attention}.out_proj"] if "proj" in params else []
    return found


def _numbers(position: str, depth: int) -> range:
    """The blocks of a position in an encoder of so many."""
    first = FIRST.get(position, depth // 2)
    return range(first, first + COUNT.get(position, depth if position == "all" else depth // 2))


def _blocks(source: Source, encoder: str, position: str, layers: int) -> list[str]:
    """The adapted blocks in the order of the file. Raises CheckpointError for a number of layers that no backbone has there."""
    found: list[str] = []
    for name in ENCODERS[encoder]:
        depth = TEXT if name == "text" else _depth(position, layers - len(found))
        found += [f"{OUTER[name]}.{block}" for block in _numbers(position, depth)]
    if len(found) != layers:
        raise CheckpointError(
            f"{source.path}: {layers} layers; position {position!r} of the encoder {encoder!r} has {len(found)} in CLIP-LoRA's own tables"
        )
    return found


def _depth(position: str, layers: int) -> int:
    """How many blocks the image encoder has, where that can be said."""
    return layers if position == "all" else 2 * layers if position.startswith("half") else 12


def _adapters(
    source: Source, claim: Claim, layer: str, attention: str, scale: float, rank: int, params: Sequence[str]
) -> list[Adapter]:
    """Those of one layer. Raises CheckpointError for other ones than ``params``, and of another rank than the metadata say."""
    found = []
    has = [part for part in LETTERS.values() if any(n.startswith(f"{layer}.{part}.") for n in claim.names())]
    if has != list(params):
        raise CheckpointError(
            f"{source.path}: {layer} has LoRA on {', '.join(has) or 'nothing'}, and by the metadata (params), or as other layers have it, "
            f"it must be on {', '.join(params)}; the file is incomplete, or its metadata are of another run"
        )
    for part in params:
        a, b = (claim.take(f"{layer}.{part}.w_lora_{letter}") for letter in "AB")
        if len(a.shape) != 2 or int(a.shape[0]) != rank or tuple(b.shape)[1:] != (rank,):
            raise CheckpointError(
                f"{source.path}: {layer}.{part}: A {tuple(a.shape)}, B {tuple(b.shape)}: the metadata say rank {rank}"
            )
        pair, width = lora.Params(Bottleneck(Affine(a), Affine(b)), scale), int(b.shape[0])
        if part == "proj":
            found.append(Adapter(f"{attention}.out_proj", "lora", pair))
        else:
            rows = (PARTS.index(part) * width, (PARTS.index(part) + 1) * width)
            found.append(Adapter(attention, "lora", pair, rows=rows, parameter="in_proj_weight"))
    return found
