"""minLoRA (cccntu/minLoRA, minlora/model.py): LoRA as a parametrization of torch, on the weights of a model.

    X.parametrizations.weight.0.lora_A (r, in), lora_B (out, r)          W + lora_alpha / r B A; of a convolution (out, in k k)
    X.parametrizations.weight.0.lora_A (rows, r), lora_B (r, columns)    of an embedding: W + lora_alpha / r A B
    X.parametrizations.weight.original                                   W, in the state dict of a whole model

``get_lora_state_dict(model)`` has the first two only. ``lora_alpha`` is in the script (1 where it is not given there). The buffers
``lora_dropout_mask`` are ones.
"""

from __future__ import annotations

import re

from reparam_export.adapters import lora
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._carried import parts_with
from reparam_export.errors import TensorMismatchError
from reparam_export.names.once import renamed_once

LOOKED_FOR = "X.parametrizations.weight.0.lora_A and lora_B (minLoRA)"
FACTOR = re.compile(r"(?P<stem>(?P<module>.+)\.parametrizations\.(?P<tensor>[^.]+)\.\d+)\.lora_[AB]")
ORIGINAL = re.compile(r"(?P<module>.+)\.parametrizations\.(?P<tensor>[^.]+)\.original")


def accepts(source: Source) -> bool:
    return any(FACTOR.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    tensors = renamed_once(source.tensors, lambda name: ORIGINAL.sub(r"\g<module>.\g<tensor>", name), source.path)
    claim = Claim(source.path, tensors)
    alpha = source.settings.number("lora_alpha", found_in="the training script (minLoRA's own default is 1)")
    claim.take_all(lambda name: name.endswith(".lora_dropout_mask"))
    sites = dict.fromkeys((m["stem"], m["module"], m["tensor"]) for name in tensors if (m := FACTOR.fullmatch(name)))
    adapters = [_adapter(source, claim, *site, alpha) for site in sites]
    return parts_with(source, adapters, claim, lambda name: True)


def _adapter(source: Source, claim: Claim, stem: str, module: str, tensor: str, alpha: float) -> Adapter:
    a, b = claim.take(f"{stem}.lora_A"), claim.take(f"{stem}.lora_B")
    fits = len(a.shape) == len(b.shape) == 2
    if fits and a.shape[1] == b.shape[0] and (a.shape[0] != b.shape[1] or a.shape[0] > a.shape[1]):
        a, b = a.T, b.T  # of an embedding
    if not fits or a.shape[0] != b.shape[1]:
        raise TensorMismatchError(
            f"{source.path}: {stem}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} have no rank in common",
            module=module,
            tensor="lora_B",
            expected=("out", int(a.shape[0])),
            found=tuple(b.shape),
        )
    params = lora.Params(Bottleneck(Affine(a), Affine(b)), alpha / int(a.shape[0]))
    return Adapter(module, "lora", params, parameter=None if tensor == "weight" else tensor)
