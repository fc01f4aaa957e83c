"""PEFT AdaLoRA folders: ``lora_A``, ``lora_B`` and ``lora_E`` of each module, cut to the ranks that were left, which may be 0.

The scale is lora_alpha / (init_r + 1e-5): peft divides by the rank at the start, also where less of it is left.
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import adalora
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("ADALORA")
READ = ("init_r", "lora_alpha", "r", "rank_pattern")
TRAINING = (
    "beta1", "beta2", "deltaT", "init_lora_weights", "megatron_core", "orth_reg_weight", "qalora_group_size", "target_r",
    "tfinal", "tinit", "total_step",
)  # fmt: skip

accepts = of_type("ADALORA")


def read(source: Source) -> Parts:
    return read_folder(source, "lora_E", _params, (*READ, *TRAINING))


def _params(layer: Layer) -> tuple[str, Any]:
    alpha, rank = float(layer.setting("lora_alpha")), float(layer.setting("init_r", 12))
    scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    e = layer.take("lora_E")
    return "adalora", adalora.Params(layer.take("lora_B"), e.reshape(e.shape[0]), layer.take("lora_A"), scale)
