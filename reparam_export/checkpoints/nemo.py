"""NeMo's and Megatron's LoRA (a ``.nemo`` archive of one rank, or ``model_weights.ckpt`` out of it), on models of Hugging Face like LLaMA.

    [model.]decoder.layers.N.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight (r, in), linear_out.weight (out, r)
    ...lora_dense_attention_adapter, mlp.adapter_layer.lora_hto4h_adapter, lora_4htoh_adapter
    [module.]decoder.layers.N.self_attention.linear_qkv.adapter.linear_in.weight, linear_proj; mlp.linear_fc1, mlp.linear_fc2

The packed q, k, v are by groups, ``[groups, (heads / groups + 2), head_dim]``: the heads of one group, its k, its v (NVIDIA/NeMo,
``MCoreSelfAttentionMixin.get_query_key_value_tensors``; its own ``convert_nemo_to_canonical.py`` cuts them as if q, k and v stood one after
the other, which is another model). ``linear_fc1`` is the gate, then up. Scale ``alpha`` / r.
The weights say none of the three numbers; the archive's ``model_config.yaml`` mostly does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from reparam_export.adapters import lora
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Parts, Source
from reparam_export.checkpoints._nemo import settings_in
from reparam_export.checkpoints._stated import checked, head_size
from reparam_export.errors import CheckpointError, TensorMismatchError

LOOKED_FOR = (
    "decoder.layers.N.self_attention.linear_qkv.adapter.linear_in.weight, or ...lora_kqv_adapter (NeMo, Megatron)"
)
FACTOR = re.compile(
    r"(?P<stem>(?:.+\.)?decoder\.layers\.(?P<number>\d+)\.(?:self_attention|mlp)\.(?:adapter_layer\.)?(?P<layer>\w+)(?:\.adapter)?)"
    r"\.linear_in\.weight"
)
LAYERS = {
    "lora_kqv_adapter": "qkv", "linear_qkv": "qkv", "lora_dense_attention_adapter": "o_proj", "linear_proj": "o_proj",
    "lora_hto4h_adapter": "gate_up", "linear_fc1": "gate_up", "lora_4htoh_adapter": "down_proj", "linear_fc2": "down_proj",
}  # fmt: skip
WHERE = "model_config.yaml of the .nemo archive: "


def accepts(source: Source) -> bool:
    return any(FACTOR.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    claim = source.claim()
    for name, value in settings_in(source.config.get("nemo", {})).items():
        source.settings.offer(name, value, "model_config.yaml")
    alpha = source.settings.number("lora_alpha", found_in=f"{WHERE}peft.lora_tuning.alpha")
    adapters: list[Adapter] = []
    found = [match for name in source.tensors if (match := FACTOR.fullmatch(name))]
    packed = _packed(source) if any(LAYERS.get(match["layer"]) == "qkv" for match in found) else (1, 1)
    for match in found:
        stem, block = match["stem"], f"model.layers.{match['number']}"
        a, b = claim.take(f"{stem}.linear_in.weight"), claim.take(f"{stem}.linear_out.weight")
        layer = LAYERS.get(match["layer"])
        if layer is None:
            raise CheckpointError(f"{source.path}: {stem}: expected one of {', '.join(LAYERS)}")
        if len(a.shape) != 2 or tuple(b.shape)[1:] != (a.shape[0],):
            raise TensorMismatchError(
                f"{source.path}: {stem}: linear_in {tuple(a.shape)} and linear_out {tuple(b.shape)} are not (r, in) and (out, r)",
                module=stem,
                tensor="linear_out",
                expected=("out", int(a.shape[0])),
                found=tuple(b.shape),
            )
        for module, rows in _parts(source, layer, int(b.shape[0]), *packed):
            adapters.append(Adapter(f"{block}.{module}", "lora", _params(a, b if rows is None else b[rows], alpha)))
    claim.finish()
    return Parts(tuple(adapters), bind=checked(source.path, source.settings.used, _of_config), by_shapes=True)


def _of_config(config: Any) -> dict[str, Any]:
    """What the base's configuration says of the numbers that are asked for."""
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return {"num_query_groups": groups, "head_dim": head_size(config)}


def _params(a: Tensor, b: Tensor, alpha: float) -> lora.Params:
    return lora.Params(Bottleneck(Affine(a), Affine(b)), alpha / int(a.shape[0]))


def _packed(source: Source) -> tuple[int, int]:
    """How many groups there are, and how many rows a head has. Raises MissingSettingError."""
    groups = _whole(
        source, "num_query_groups", f"{WHERE}num_query_groups, or num_attention_heads where that is not set"
    )
    return groups, _whole(source, "head_dim", f"{WHERE}kv_channels, or hidden_size / num_attention_heads")


def _parts(source: Source, layer: str, rows: int, groups: int, size: int) -> list[tuple[str, Sequence[int] | None]]:
    """Hugging Face's layers of one of NeMo's, each with its rows in it; None: all of them. Raises CheckpointError."""
    if layer == "gate_up":
        half = list(range(rows // 2))
        return [("mlp.gate_proj", half), ("mlp.up_proj", [row + rows // 2 for row in half])]
    if layer != "qkv":
        return [(f"{'self_attn' if layer == 'o_proj' else 'mlp'}.{layer}", None)]
    heads = rows // size - 2 * groups
    if rows % size or heads <= 0 or heads % groups:
        raise CheckpointError(f"{source.path}: {rows} outputs of q, k and v are no {groups} groups of heads of {size}")
    each = heads // groups
    starts = [group * (each + 2) * size for group in range(groups)]
    cuts = (("q_proj", 0, each), ("k_proj", each, each + 1), ("v_proj", each + 1, each + 2))
    return [
        (f"self_attn.{name}", [s + row for s in starts for row in range(a * size, b * size)]) for name, a, b in cuts
    ]


def _whole(source: Source, name: str, found_in: str) -> int:
    number = source.settings.number(name, found_in=found_in)
    if number != number:
        return 1  # while inspecting
    if number != int(number) or number < 1:
        raise CheckpointError(f"{source.path}: {name} {number:g}: expected a whole number")
    return int(number)
