"""RepAdapter (luogen1996/RepAdapter): 1x1 convolutions conv_A and conv_B, saved by ``utils.save`` or ``save_repadapter``.

``blocks.N.adapter_attn`` acts on the input of ``attn.qkv``, ``blocks.N.adapter_mlp`` on that of ``mlp.fc1``; the scale is in the run's YAML
only. The generic API of its README puts ``X.adapter`` in front of every Linear X, with scale 1 and without the head.
A state dict of the whole model has the same names beside those of the base.
"""

from __future__ import annotations

import re

from reparam_export.adapters import repadapter
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._carried import parts_with
from reparam_export.errors import TensorMismatchError

LOOKED_FOR = "blocks.N.adapter_attn.conv_A.weight, or X.adapter.conv_A.weight (RepAdapter)"
SITE = re.compile(r"(?P<parent>.+)\.(?P<site>adapter_attn|adapter_mlp|adapter)\.conv_[AB]\.(?:weight|bias)")
ADAPTED = {"adapter_attn": ".attn.qkv", "adapter_mlp": ".mlp.fc1", "adapter": ""}


def accepts(source: Source) -> bool:
    return any(SITE.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    claim = source.claim()
    sites = dict.fromkeys((m["parent"], m["site"]) for name in source.tensors if (m := SITE.fullmatch(name)))
    generic = all(site == "adapter" for _, site in sites)
    if generic and "scale" not in source.settings.values:
        scale = 1.0  # set_repadapter of the README never takes another
    else:
        scale = source.settings.number("scale", found_in="configs/<method>/<dataset>.yaml of the run")
    adapters = []
    for parent, site in sites:
        pair = _pair(source, claim, f"{parent}.{site}")
        adapters.append(Adapter(parent + ADAPTED[site], "repadapter", repadapter.Params(pair, scale)))
    return parts_with(source, adapters, claim)


def _pair(source: Source, claim: Claim, prefix: str) -> Bottleneck:
    a, b = claim.take(f"{prefix}.conv_A.weight"), claim.take(f"{prefix}.conv_B.weight")
    rank, per_group = int(a.shape[0]), int(b.shape[1])
    for name, weight in (("conv_A", a), ("conv_B", b)):
        if len(weight.shape) != 3 or weight.shape[2] != 1 or rank % per_group or b.shape[0] % (rank // per_group):
            raise TensorMismatchError(
                f"{source.path}: {prefix}: conv_A {tuple(a.shape)} and conv_B {tuple(b.shape)} are not 1x1 convolutions in -> r -> in",
                module=prefix,
                tensor=name,
                expected=("out", "in / groups", 1),
                found=tuple(weight.shape),
            )
    down = Affine(a[:, :, 0], claim.take_if(f"{prefix}.conv_A.bias"))
    up = Affine(block_diagonal(b[:, :, 0], rank // per_group), claim.take_if(f"{prefix}.conv_B.bias"))
    return Bottleneck(down, up)


def block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """The dense (out, r) matrix of a grouped 1x1 convolution (out, r / groups): group g reads inputs g r / groups on."""
    if groups == 1:
        return weight
    out, per_group = weight.shape
    dense = weight.repeat(1, groups) if hasattr(weight, "detach") else __import__("numpy").tile(weight, (1, groups))
    for g in range(groups):
        rows = slice(g * out // groups, (g + 1) * out // groups)
        dense[rows, : g * per_group] = 0
        dense[rows, (g + 1) * per_group :] = 0
    return dense
