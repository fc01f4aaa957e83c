"""PEFT GLORA folders: ``glora_A.Xd`` and ``.Xu``, ``.X``, or ``.zeros`` for a path that is off, of A to E of each module.

Not the GLoRA fork of peft (``glora_fork``), which stores ``glora_Ad`` and leaves the paths out.
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import glora_peft
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, read_folder

LOOKED_FOR = looked_for("GLORA")
READ = ("config_A_B", "config_C", "config_D_E", "r")


def accepts(source: Source) -> bool:
    return source.config.get("peft_type") == "GLORA" and any(".glora_A." in name for name in source.tensors)


def read(source: Source) -> Parts:
    return read_folder(source, ("glora_A.Xd", "glora_A.X", "glora_A.zeros"), _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    return "glora_peft", glora_peft.Params(*(_path(layer, f"glora_{name}") for name in "ABCDE"))


def _path(layer: Layer, name: str) -> glora_peft.Path | None:
    off, vector = layer.take_if(f"{name}.zeros"), layer.take_if(f"{name}.X")
    if vector is not None:
        return glora_peft.Path(vector)
    if off is None:
        return glora_peft.Path(layer.take(f"{name}.Xd"), layer.take(f"{name}.Xu"))
    return None if not bool((off != 0).any()) else glora_peft.Path(off)
