"""PEFT RandLoRA folders: ``randlora_lambda``, ``randlora_gamma`` of each module, and the bases ``randlora_A``, ``randlora_B`` of all.

The file repeats the shared bases beside every module. With ``save_projection`` off they are not in it, and how peft draws them again
depends on the machine; such a folder goes through peft's own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reparam_export.adapters import randlora
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder
from reparam_export.checkpoints._peft_layers import read_layers
from reparam_export.errors import TensorMismatchError

LOOKED_FOR = looked_for("RANDLORA")
READ = ("projection_prng_key", "r", "randlora_alpha", "save_projection", "sparse", "very_sparse")
SHARED = ("randlora_A", "randlora_B")

accepts = of_type("RANDLORA")


def read(source: Source) -> Parts:
    if not source.config.get("save_projection", True):
        return read_layers(source)
    return read_folder(
        source, "randlora_lambda", _params(source), READ, shared=[f"base_model.{name}" for name in SHARED]
    )


def _params(source: Source) -> Callable[[Layer], tuple[str, Any]]:
    def params(layer: Layer) -> tuple[str, Any]:
        l, g = layer.take("randlora_lambda"), layer.take("randlora_gamma")  # noqa: E741
        bases = []
        for name in SHARED:
            own, shared = layer.take_if(name), source.tensors.get(f"base_model.{name}")
            if own is not None and shared is not None and not bool((own == shared).all()):
                raise TensorMismatchError(
                    f"{source.path}: {layer.module}: its {name} is not the one that all modules share",
                    module=layer.module,
                    tensor=name,
                    expected=f"base_model.{name}",
                    found=f"{layer.full}.{name}",
                )
            found = own if shared is None else shared
            bases.append(layer.claim.take(f"base_model.{name}") if found is None else found)
        scale = float(layer.setting("randlora_alpha", 640)) / int(layer.setting("r"))
        return "randlora", randlora.Params(bases[0], bases[1], l, g, scale)

    return params
