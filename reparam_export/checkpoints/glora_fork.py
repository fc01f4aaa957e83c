"""GLoRA fork of peft (Arnav0400/peft): ``adapter_model.bin`` with ``base_model.model.X.glora_Ad`` and so on, ``peft_type`` GLORA.

The path of each layer (``eval_config``) is a Python attribute that the fork never saves: it has to be given, by layer name or in order.
Not today's peft GLORA, which stores ``glora_A.Xd`` and one path for all layers.
"""

from __future__ import annotations

from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import base_spec
from reparam_export.checkpoints._peft_names import PREFIX
from reparam_export.checkpoints.glora_vit import supports

LOOKED_FOR = "base_model.model.X.glora_Ad and the like (GLoRA fork of peft)"


def accepts(source: Source) -> bool:
    return any(name.endswith(".glora_Ad") for name in source.tensors)


def read(source: Source) -> Parts:
    claim = source.claim()
    adapters = supports(source, claim, mark=".glora_", prefix=PREFIX)
    claim.finish()
    return Parts(adapters, base=base_spec(source))
