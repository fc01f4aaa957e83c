"""PEFT VB-LoRA folders: ``vblora_logits_A``, ``vblora_logits_B`` of each module, and ``vblora_vector_bank`` that all share.

With ``save_only_topk_weights``, the chosen vectors (``..._topk_indices``) and all but the last of their weights (``..._topk_weights``).
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import vblora
from reparam_export.affine import Tensor
from reparam_export.checkpoints import Parts, Source, as_integers
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder
from reparam_export.errors import CheckpointError

LOOKED_FOR = looked_for("VBLORA")
READ = (
    "init_logits_std", "init_vector_bank_bound", "num_vectors", "r", "save_only_topk_weights", "topk", "vector_length",
)  # fmt: skip
BANK = "base_model.vblora_vector_bank"

accepts = of_type("VBLORA")


def read(source: Source) -> Parts:
    return read_folder(source, ("vblora_logits_A", "vblora_logits_A_topk_indices"), _params, READ, shared=[BANK])


def _params(layer: Layer) -> tuple[str, Any]:
    bank = layer.source.tensors.get(BANK)
    bank = layer.claim.take(BANK) if bank is None else bank
    return "vblora", vblora.Params(_choice(layer, "A"), _choice(layer, "B"), bank, int(layer.setting("topk", 2)))


def _choice(layer: Layer, side: str) -> vblora.Choice:
    name = f"vblora_logits_{side}"
    if layer.source.config.get("save_only_topk_weights"):
        indices, weights = layer.take(f"{name}_topk_indices"), layer.take(f"{name}_topk_weights")
        return vblora.Choice(_logits(layer, weights), as_integers(indices))
    return vblora.Choice(layer.take(name))


def _logits(layer: Layer, weights: Tensor) -> Tensor:
    """The logarithms of all weights, as peft restores them: by torch, in the dtype of the file, the last being what is left of 1.

    numpy's differ from torch's in the last bit, which is more than folding may be off by: they are for looking at, and nothing else.
    """
    if hasattr(weights, "softmax"):
        import torch

        return torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1).log()
    if not layer.source.settings.lenient:
        raise CheckpointError(f"{layer.source.path}: {layer.module}: the logits are restored by torch")
    import numpy as np

    return np.log(np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], axis=-1))
