"""SSF (dongzelian/SSF): ``X.ssf_scale_N`` and ``X.ssf_shift_N`` in the model's own blocks, saved by timm's ``CheckpointSaver`` or alone.

Which layer X's Nth pair follows: attn qkv, proj; mlp fc1, fc2; a block norm1, norm2; patch_embed proj, norm; a swin's downsample norm
(for which the authors' code never switches SSF on); the model itself its last norm. The saver keeps the whole model, base included, and
with ``--model-ema`` its moving average, which is the one that the script evaluates. Swin layers are named as today's timm names them.
"""

from __future__ import annotations

import re
from typing import Any

from reparam_export.adapters import ssf
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._carried import parts_with
from reparam_export.errors import FusionError, TensorMismatchError
from reparam_export.names.once import renamed_once

LOOKED_FOR = "blocks.N.attn.ssf_scale_1, ssf_shift_1 and the like (SSF)"
PAIR = re.compile(r"(?P<owner>(?:.+\.)?)ssf_(?P<part>scale|shift)_(?P<number>\d+)")
FOLLOWS = (
    (re.compile(r"(?:.+\.)?attn\."), ("qkv", "proj")),
    (re.compile(r"(?:.+\.)?mlp\."), ("fc1", "fc2")),
    (re.compile(r"(?:.+\.)?patch_embed\."), ("proj", "norm")),
    (re.compile(r"(?:.+\.)?blocks\.\d+\."), ("norm1", "norm2")),
    (re.compile(r"(?:.+\.)?downsample\."), ("norm",)),
    (re.compile(r""), ("norm",)),
)
REFUSED = (
    (re.compile(r"(?:stem|stages)\."), "ConvNeXt: its last scale and shift act on a sum, which no layer makes"),
    (
        re.compile(r"(?:.+\.)?axial_shift\."),
        "AS-MLP: its scale acts on the channels or on the width, as the image has it",
    ),
)
OLD_SWIN = "layers.0.downsample.reduction.weight"


def accepts(source: Source) -> bool:
    return any(PAIR.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    tensors = dict(source.tensors)
    if OLD_SWIN in tensors or "layers.0.downsample.ssf_scale_1" in tensors:
        tensors = renamed_once({n: t for n, t in tensors.items() if not _is_buffer(n)}, _swin, source.path)
    claim = Claim(source.path, tensors)
    pairs = dict.fromkeys((m["owner"], int(m["number"])) for name in tensors if (m := PAIR.fullmatch(name)))
    adapters = tuple(_adapter(source, claim, owner, number) for owner, number in pairs)
    return parts_with(source, adapters, claim, lambda name: True, base=_base(source))


def _adapter(source: Source, claim: Claim, owner: str, number: int) -> Adapter:
    for pattern, reason in REFUSED:
        if pattern.match(owner):
            raise FusionError(f"{source.path}: {owner}ssf_scale_{number}: SSF on {reason}")
    layers = next(layers for pattern, layers in FOLLOWS if pattern.fullmatch(owner))
    if not 1 <= number <= len(layers):
        raise TensorMismatchError(
            f"{source.path}: {owner}ssf_scale_{number}: SSF has {len(layers)} scales there",
            module=owner.rstrip("."),
            tensor=f"ssf_scale_{number}",
            expected=len(layers),
            found=number,
        )
    scale, shift = (claim.take(f"{owner}ssf_{part}_{number}") for part in ("scale", "shift"))
    return Adapter(f"{owner}{layers[number - 1]}", "ssf", ssf.Params(scale, shift))


def _base(source: Source) -> str | None:
    """The model that the script was told to make, and the image size where that was told."""
    name, options = source.content.get("arch"), getattr(source.content.get("args"), "__dict__", {})
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
        return None
    size: Any = options.get("img_size")
    return f"timm:{name}" + (f"?img_size={size}" if isinstance(size, int) else "")


def _swin(name: str) -> str:
    """The name in today's timm: a stage begins with its downsampling, the head holds ``fc``."""
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def _is_buffer(name: str) -> bool:
    return name.endswith((".relative_position_index", ".attn_mask"))
