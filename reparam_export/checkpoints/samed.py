"""SAMed, Sam_LoRA and LoRA-ViT: LoRA on q and v of packed qkv layers, by number and not by name.

    w_a_000 (r, width), w_b_000 (width, r)      q of the first adapted block: the first ``width`` outputs of its ``attn.qkv``
    w_a_001, w_b_001                            v of it: the last ``width`` outputs; and so on
    prompt_encoder.*, mask_decoder.*            SAMed: the rest of SAM, trained whole
    fc_{in}in_{out}out                          LoRA-ViT: the weight of the head; its bias is in no file

hitachinsk/SAMed, sam_lora_image_encoder.py; JamesQFreeman/LoRA-ViT, lora.py (``LoRA_ViT_timm``). SAMed has no scale (it is 1), LoRA-ViT's
is ``alpha // r``, rounded down; the file holds neither, so it is asked for. The blocks are all of the model's, in order, or those of
``lora_layer``. The names are timm's and SAM's own; for others (``vision_encoder.layers``) there is ``--rename``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reparam_export.adapters import lora
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._carried import parts_with
from reparam_export.errors import CheckpointError, TensorMismatchError, UsageError
from reparam_export.names.once import renamed_once

LOOKED_FOR = "w_a_000 and w_b_000 (SAMed, Sam_LoRA, LoRA-ViT)"
FACTOR = re.compile(r"w_a_(\d{3,})")
HEAD = re.compile(r"\Afc_\d+in_\d+out\Z")
SAM = ("prompt_encoder.", "mask_decoder.")


def accepts(source: Source) -> bool:
    return any(FACTOR.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    tensors = renamed_once(source.tensors, lambda name: HEAD.sub("head.weight", name), source.path)
    claim = Claim(source.path, tensors)
    numbers = sorted(int(m[1]) for name in tensors if (m := FACTOR.fullmatch(name)))
    if numbers != list(range(len(numbers))) or len(numbers) % 2:
        raise CheckpointError(
            f"{source.path}: w_a_000 and on come in pairs, one for q and one for v; found the numbers {numbers[:9]} ..."
        )
    scale = source.settings.number(
        "scale", found_in="the training code: 1 for SAMed and Sam_LoRA, alpha // r (rounded down) for LoRA-ViT"
    )
    blocks = _blocks(source, len(numbers) // 2)
    outer = "image_encoder." if any(name.startswith(SAM) for name in tensors) else ""
    adapters = [
        _adapter(source, claim, 2 * i + part, f"{outer}blocks.{block}.attn.qkv", part, scale)
        for i, block in enumerate(blocks)
        for part in (0, 1)
    ]
    parts = parts_with(source, adapters, claim, lambda name: name.startswith(SAM) or name == "head.weight")
    notes = ("the bias of the head is in no such file: it is the base's",) if "head.weight" in parts.replaced else ()
    some = "lora_layer" in source.settings.used
    return replace(parts, notes=(*parts.notes, *notes), covers=(lambda names: []) if some else None)


def _blocks(source: Source, count: int) -> Sequence[int]:
    """The numbers of the adapted blocks: those that the user gave, or the first ones. Raises UsageError for others than there are pairs."""
    given: Any = source.settings.values.get("lora_layer")
    if given is None:
        return range(count)
    found = [given] if isinstance(given, int) else given
    whole = isinstance(found, list | tuple) and all(type(n) is int and n >= 0 for n in found)
    if not whole or len(set(found)) != count:
        raise UsageError(
            f"setting lora_layer: expected the numbers of {count} blocks, such as [4,5,6,7]; found {given!r:.80}"
        )
    source.settings.used["lora_layer"] = sorted(found)
    return sorted(found)  # the code goes through the blocks in their order


def _adapter(source: Source, claim: Claim, number: int, module: str, part: int, scale: float) -> Adapter:
    a, b = claim.take(f"w_a_{number:03d}"), claim.take(f"w_b_{number:03d}")
    if len(a.shape) != 2 or tuple(b.shape) != (a.shape[1], a.shape[0]):
        raise TensorMismatchError(
            f"{source.path}: w_a_{number:03d} {tuple(a.shape)} and w_b_{number:03d} {tuple(b.shape)} are not (r, width) and (width, r)",
            module=module,
            tensor=f"w_b_{number:03d}",
            expected=tuple(a.shape)[::-1],
            found=tuple(b.shape),
        )
    width = int(b.shape[0])
    rows = (2 * part * width, (2 * part + 1) * width)  # q is the first third, v the last
    return Adapter(module, "lora", lora.Params(Bottleneck(Affine(a), Affine(b)), scale), rows=rows)
