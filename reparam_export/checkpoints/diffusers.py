"""Diffusers' own LoRA files: ``save_lora_weights`` of a pipeline, ``save_lora_adapter`` of a model, and what older versions wrote.

    unet.X.lora_A.weight, text_encoder.X.lora_B.weight         a pipeline's: the name of the model, the module, peft's keys
    X.lora_A.weight                                            a model's own
    ...X.lora.down.weight, ...X.lora.up.weight                 older; text encoders: X.lora_linear_layer.down.weight
    ...attn1.processor.to_q_lora.down.weight                   oldest: attention processors; to_out_lora is to_out.0
    X.alpha                                                    alpha of one module, in files converted from others

The safetensors header may hold peft's configuration, ``lora_adapter_metadata``: JSON, its keys with the name of the model in front
(diffusers, loaders/lora_base.py, utils/state_dict_utils.py). Without it alpha is in no file; diffusers then loads the file as if alpha were
the rank, so ``--set lora_alpha=rank`` is what its own pipelines run, and another number what was trained with another.
Of several models in one file ``--set part=NAME`` takes one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from reparam_export.affine import Tensor
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import LORA_LAYER
from reparam_export.checkpoints._peft_names import PREFIX, of_pattern
from reparam_export.checkpoints.peft_state import lora_settings, reader_of
from reparam_export.errors import CheckpointError
from reparam_export.files import unlike_pairs
from reparam_export.names.once import renamed_once

LOOKED_FOR = "unet.X.lora_A.weight, transformer. or text_encoder., or a lora_adapter_metadata in the header (diffusers)"
METADATA = "lora_adapter_metadata"
PART = re.compile(
    r"(?P<part>unet|transformer(?:_\d)?|text_encoder(?:_\d)?|controlnet|image_encoder|prior)\.(?P<rest>.+)"
)
OLD = re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.(?:down|up)\.weight")
WHERE = (
    "what the training script set (save_lora_weights keeps it only with its ..._lora_adapter_metadata); diffusers itself loads such a file "
    "with alpha = rank, which is --set lora_alpha=rank"
)
ORIGINAL = (
    "diffusion_model."  # the models of Stability and Black Forest Labs under their own names, as ComfyUI has them
)
IN_UNET = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
IN_TEXT = {"to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj"}


def accepts(source: Source) -> bool:
    names = list(source.tensors)
    if "peft_type" in source.config or any(".base_layer." in n or n.startswith("base_model.") for n in names):
        return False
    lora = any(LORA_LAYER.search(n) or OLD.search(n) for n in names)
    in_parts = all(PART.fullmatch(n) or n.startswith(ORIGINAL) for n in names)
    return (METADATA in source.metadata or in_parts or any(OLD.search(n) for n in names)) and lora


def read(source: Source) -> Parts:
    if any(name.startswith(ORIGINAL) for name in source.tensors):
        raise CheckpointError(
            f"{source.path}: its names ({ORIGINAL}...) are those of the original model, as ComfyUI has them, and no base here has them; "
            "load it with diffusers' load_lora_weights and save it with the model's save_lora_adapter"
        )
    part, tensors, notes = _part(source)
    tensors = renamed_once(tensors, partial(_today, text=part.startswith("text_encoder")), source.path)
    own = {name.removesuffix(".alpha"): t for name, t in tensors.items() if name.endswith(".alpha")}
    tensors = {PREFIX + name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    config = _configuration(source, part)
    if config is None:
        config = _alphas(source, tensors, {name: float(t) for name, t in own.items()})
    else:
        _check_alphas(source, tensors, config, own)
    inner = replace(source, tensors=tensors, config={"peft_type": "LORA"} | config)
    parts = reader_of(inner).read(inner)
    return replace(parts, notes=(*notes, *parts.notes))


def _part(source: Source) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """The name of the model that is read, its tensors, a note on the others. Raises MissingSettingError where there are several."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.tensors.items():
        match = PART.fullmatch(name)
        part, rest = (match["part"], match["rest"]) if match else ("", name)
        found.setdefault(part, {})[rest] = tensor
    if "" in found and len(found) > 1:
        return "", dict(source.tensors), ()  # a model with a part of that name
    if len(found) == 1 and "part" not in source.settings.values:
        return next((part, tensors, ()) for part, tensors in found.items())
    why = f"{source.path}: the file has LoRA for {' and '.join(found)}, and a base is one model"
    part = source.settings.choice("part", list(found), why=why)
    left = [f"{name} ({len(tensors)} tensors)" for name, tensors in found.items() if name != part]
    return part, found[part], (f"left out: {', '.join(left)}",) if left else ()


def _today(name: str, *, text: bool) -> str:
    """The key as peft has it."""
    name = name.replace(".processor.", ".")
    for old, new in (IN_TEXT if text else IN_UNET).items():
        name = name.replace(f".{old}.", f".{new}.lora.")
    name = re.sub(r"\.(?:lora|lora_linear_layer)\.down\.weight\Z", ".lora_A.weight", name)
    return re.sub(r"\.(?:lora|lora_linear_layer)\.up\.weight\Z", ".lora_B.weight", name)


def _configuration(source: Source, part: str) -> dict[str, Any] | None:
    """peft's configuration of this model in the header, if there is one. Raises CheckpointError for what is no JSON object."""
    text = source.metadata.get(METADATA)
    if text is None:
        return None
    try:
        content = json.loads(text, object_pairs_hook=unlike_pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.path}: {METADATA} in the header cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source.path}: {METADATA} in the header: expected a JSON object")
    own = {
        name.removeprefix(f"{part}."): value
        for name, value in content.items()
        if not part or name.startswith(f"{part}.")
    }
    return own or None


def _check_alphas(
    source: Source, tensors: Mapping[str, Tensor], config: Mapping[str, Any], alphas: Mapping[str, Tensor]
) -> None:
    """Raises CheckpointError where the alpha of a module in the file is not that of the configuration in the header.

    diffusers refuses a file that has both; where they agree it does not matter which of them is read.
    """
    for module, alpha in alphas.items():
        patterns: Any = config.get("alpha_pattern") or {}
        said = next((own for key, own in patterns.items() if of_pattern(key, module)), config.get("lora_alpha"))
        if f"{PREFIX}{module}.lora_A.weight" not in tensors:
            raise CheckpointError(f"{source.path}: {module}.alpha is alpha of a module without LoRA in the file")
        if said is None or float(alpha * 0 + float(said)) != float(alpha):  # rounded as the file's is
            raise CheckpointError(
                f"{source.path}: {module}.alpha is {float(alpha):g}, and {METADATA} in the header says {str(said)[:80]} for it: one of "
                "them is not what was trained; take it out of the file"
            )


def _alphas(source: Source, tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """What stands for the configuration: alpha of each module from the file, or one for all from the user."""
    ranks = {
        n.removeprefix(PREFIX).removesuffix(".lora_A.weight"): int(t.shape[0])
        for n, t in tensors.items()
        if n.endswith(".lora_A.weight")
    }
    given = source.settings
    if not alphas and given.values.get("lora_alpha") == "rank":
        given.used["lora_alpha"] = "rank"
        given.notes.append("alpha is the rank of each module, as diffusers takes it where the file has none: scale 1")
        alphas = ranks
    if alphas and set(alphas) != set(ranks):
        odd = sorted(set(alphas) ^ set(ranks))[0]
        raise CheckpointError(f"{source.path}: {odd} has LoRA without alpha, or alpha without LoRA")
    return lora_settings(source, list(tensors), WHERE, alphas)
