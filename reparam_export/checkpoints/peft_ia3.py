"""PEFT IA3 folders: ``ia3_l`` of each module, (out, 1) on outputs or (1, in) on the inputs of feed-forward modules.

That of a convolution is (1, channels, 1, 1) on either side: ``feedforward_modules`` says on which.
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import ia3
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder
from reparam_export.checkpoints._peft_names import matches

LOOKED_FOR = looked_for("IA3")
READ = ("feedforward_modules", "init_ia3_weights")

accepts = of_type("IA3")


def read(source: Source) -> Parts:
    return read_folder(source, "ia3_l", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    l = layer.take("ia3_l")  # noqa: E741
    modules = layer.setting("feedforward_modules", [])
    if isinstance(modules, str):
        inputs = matches(rf"(?:{modules})\Z", layer.module)
    else:
        inputs = any(layer.module.endswith(name) for name in modules)
    side = ("channels" if len(l.shape) > 2 else "input") if inputs else "output"
    return "ia3", ia3.Params(l.reshape(-1), side)
