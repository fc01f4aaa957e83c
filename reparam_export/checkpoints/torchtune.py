"""torchtune's own LoRA files (``adapter_0.pt``, ``adapter_model.pt``), under its own names of layers.

    layers.N.attn.q_proj.lora_a.weight (r, in), lora_b.weight (out, r), magnitude (out)      y + alpha / r B A x; DoRA with magnitude

They are those of Hugging Face under other names (pytorch/torchtune, torchtune/models/convert_weights.py), but for the rows of q and k of
Llama, Mistral and Gemma: torchtune turns pairs of neighbours by the position, Hugging Face's models the halves of each head, so row 2 i + j
of a head is row j half + i there. Qwen's are as they are. ``adapter_model.safetensors`` beside it is a file of peft's.
alpha is in ``adapter_config.json``, or asked for; so are the kind of model and the size of a head, which are in neither.
"""

from __future__ import annotations

import re
from typing import Any

from reparam_export.adapters import dora, lora
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._peft import is_torchtune
from reparam_export.checkpoints._stated import checked, head_size
from reparam_export.errors import CheckpointError, TensorMismatchError

LOOKED_FOR = "layers.N.attn.q_proj.lora_a.weight (torchtune)"
LAYER = re.compile(r"layers\.(\d+)\.(attn\.(?:q_proj|k_proj|v_proj|output_proj)|mlp\.w[123])")
NAMES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
TURNED = ("attn.q_proj", "attn.k_proj")
END = ".lora_a.weight"
KINDS = {"llama": ("llama", "mistral", "gemma"), "qwen": ("qwen",)}  # how model_type of a configuration begins

accepts = is_torchtune


def read(source: Source) -> Parts:
    claim = source.claim()
    owners = [name.removesuffix(END) for name in source.tensors if name.endswith(END)]
    source.settings.offer("lora_alpha", source.config.get("lora_alpha"), "adapter_config.json")
    alpha = source.settings.number(
        "lora_alpha", found_in="torchtune's adapter_config.json, or lora_alpha of the recipe's configuration"
    )
    head = _head_size(source) if any(owner.endswith(TURNED) for owner in owners) else 0
    adapters = tuple(_adapter(source, claim, owner, alpha, head) for owner in owners)
    claim.finish()
    return Parts(adapters, bind=checked(source.path, source.settings.used, _of_config), by_shapes=True)


def _of_config(config: Any) -> dict[str, Any]:
    """What the base's configuration says of what is asked for; of models that are neither kind, what the user says holds."""
    kinds = (kind for kind, names in KINDS.items() if config.model_type.startswith(names))
    return {"model_type": next(kinds, None), "head_dim": head_size(config)}


def _head_size(source: Source) -> int:
    """How many rows one head of q and k has, where their order is another; 0 where it is not. Raises MissingSettingError."""
    kind = source.settings.choice(
        "model_type",
        tuple(KINDS),
        why=f"{source.path}: torchtune keeps the rows of q and k of Llama, Mistral and Gemma (llama) in another order than Hugging Face, "
        "those of Qwen (qwen) in the same, and the file does not say which model it is of",
    )
    if kind == "qwen":
        return 0
    size = source.settings.number(
        "head_dim", found_in="the model's config.json: head_dim, or hidden_size / num_attention_heads"
    )
    if size != size:  # while inspecting
        return 0
    if size != int(size) or int(size) % 2 or size < 2:
        raise CheckpointError(f"{source.path}: head_dim {size:g}: expected an even number")
    return int(size)


def _adapter(source: Source, claim: Claim, owner: str, alpha: float, head: int) -> Adapter:
    a, b = claim.take(f"{owner}{END}"), claim.take(f"{owner}.lora_b.weight")
    magnitude = claim.take_if(f"{owner}.magnitude")
    match = LAYER.fullmatch(owner)
    if match is None and owner != "output":
        raise CheckpointError(
            f"{source.path}: {owner}: no layer that torchtune converts to Hugging Face's names for these models"
        )
    if len(a.shape) != 2 or tuple(b.shape)[1:] != (a.shape[0],):
        raise TensorMismatchError(
            f"{source.path}: {owner}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} are not (r, in) and (out, r)",
            module=owner,
            tensor="lora_b",
            expected=("out", int(a.shape[0])),
            found=tuple(b.shape),
        )
    module = "lm_head" if match is None else f"model.layers.{match[1]}.{NAMES[match[2]]}"
    if head and owner.endswith(TURNED):
        b = _turned(source, owner, b, head)
        magnitude = None if magnitude is None else _turned(source, owner, magnitude, head)
    pair, scale = Bottleneck(Affine(a), Affine(b)), alpha / int(a.shape[0])
    if magnitude is not None:
        return Adapter(module, "dora", dora.Params(pair, magnitude, scale))
    return Adapter(module, "lora", lora.Params(pair, scale))


def _turned(source: Source, owner: str, tensor: Tensor, head: int) -> Tensor:
    """The rows in Hugging Face's order: of each head those of even numbers, then those of odd ones."""
    rows = int(tensor.shape[0])
    if rows % head:
        raise CheckpointError(f"{source.path}: {owner}: {rows} rows are no heads of {head} (head_dim)")
    order = [first + n for first in range(0, rows, head) for start in (0, 1) for n in range(start, head, 2)]
    return tensor[order]
