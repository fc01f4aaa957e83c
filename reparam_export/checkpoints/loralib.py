"""loralib (microsoft/LoRA, loralib/layers.py): ``X.lora_A`` and ``X.lora_B`` of ``lora_state_dict(model)``, or in a model's own state dict.

    Linear          A (r, in), B (out, r)
    Embedding       A (r, rows), B (columns, r): the table gains (B A)^T
    MergedLinear    A (r n, in), B (out n / len(enable_lora), r), n the number of slices that are adapted: B is the kernel of a convolution
                    in n groups, and its jth part adds to the jth slice of the outputs that ``enable_lora`` has True for
    Conv2d          A (r k, in k), B (out k, r k), k the size of the kernel: the numbers of B A are read row by row as (out, in, k, k);
                    the base's own tensors are ``X.conv.weight`` and ``X.conv.bias``

The scale is ``lora_alpha`` / r, which only the script has, and so has ``enable_lora``. ``fan_in_fan_out`` turns how the base's weight is
stored, not what is added to the output. In eval mode loralib adds the change to the weights that it keeps (``merge_weights``): of a
whole state dict it is asked in which mode it was saved, unless the base is given apart and shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import lora
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._carried import parts_with
from reparam_export.errors import FusionError, TensorMismatchError, UsageError
from reparam_export.names.once import renamed_once

if TYPE_CHECKING:
    from torch import nn

LOOKED_FOR = "X.lora_A and X.lora_B without a .weight behind (loralib)"


def accepts(source: Source) -> bool:
    return "peft_type" not in source.config and any(_is_factor(name) for name in source.tensors)


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B")) and ".parametrizations." not in name


def read(source: Source) -> Parts:
    owners = dict.fromkeys(name.rpartition(".")[0] for name in source.tensors if _is_factor(name))
    tensors = renamed_once(source.tensors, lambda name: _plain(name, owners), source.path)
    claim = Claim(source.path, tensors)
    if any(f"{owner}.weight" in tensors for owner in owners) and not source.weights_given:
        _check_mode(source)
    alpha = source.settings.number("lora_alpha", found_in="the training script, where the layers of loralib are made")
    enabled = _enabled(source)
    adapters: list[Adapter] = []
    for owner in owners:
        adapters += _adapters(
            source, owner, claim.take(f"{owner}.lora_A"), claim.take(f"{owner}.lora_B"), alpha, enabled
        )
    parts = parts_with(source, adapters, claim, lambda name: True)
    return replace(parts, bind=partial(_on_base, enabled), by_shapes=True)


def _plain(name: str, owners: dict[str, None]) -> str:
    """``X.conv.weight`` of a convolution is the weight of X."""
    owner, _, leaf = name.rpartition(".")
    outer = owner.removesuffix(".conv")
    return f"{outer}.{leaf}" if outer != owner and outer in owners else name


def _check_mode(source: Source) -> None:
    mode = source.settings.choice(
        "saved_in",
        ("train", "eval"),
        why=f"{source.path}: the file has the weights too, and in eval mode loralib has added the change to them already (not with "
        "merge_weights=False: that is as train); the mode in which the model was saved decides what they are",
    )
    if mode == "eval":
        raise FusionError(
            f"{source.path}: saved in eval mode, its weights hold the change of the adapters already: without lora_A and lora_B it is "
            "the folded model, and there is nothing to fold"
        )


def _enabled(source: Source) -> tuple[bool, ...]:
    """``enable_lora`` as it was given; empty where it was not. Raises UsageError for what is no list of booleans."""
    given: Any = source.settings.values.get("enable_lora", ())
    if isinstance(given, str):
        given = given.strip("[]() ").split(",")
    words = {"true": True, "t": True, "false": False, "f": False}
    found = [words.get(str(word).strip().lower()) for word in given] if isinstance(given, list | tuple) else [None]
    if any(word is None for word in found) or (found and not any(found)):
        raise UsageError(
            f"setting enable_lora: expected true or false for each slice, such as true,false,true; found {given!r:.80}"
        )
    if found:
        source.settings.used["enable_lora"] = [bool(word) for word in found]
    return tuple(bool(word) for word in found)


def _adapters(source: Source, owner: str, a: Tensor, b: Tensor, alpha: float, enabled: Sequence[bool]) -> list[Adapter]:
    """One adapter on a whole layer, or one on each slice of it that is adapted."""
    rank = int(b.shape[1]) if len(b.shape) == 2 else 0
    slices = int(a.shape[0]) // rank if rank else 0
    if len(a.shape) != 2 or not slices or slices * rank != int(a.shape[0]) or int(b.shape[0]) % slices:
        raise TensorMismatchError(
            f"{source.path}: {owner}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not (r n, in) and (.., r)",
            module=owner,
            tensor="lora_B",
            expected=("out", int(a.shape[0])),
            found=tuple(b.shape),
        )
    if slices > 1 and sum(enabled) != slices:
        source.settings.miss(
            f"{source.path}: {owner} is a MergedLinear with {slices} adapted slices, and the file does not say which they are; say it as "
            "the script does, with --set enable_lora=true,false,true (q and v of a packed qkv)",
            setting="enable_lora",
            found_in="the training script",
            option="--set enable_lora=true,false,true",
        )
        enabled = [True] * slices  # while inspecting
    if slices == 1:
        return [Adapter(owner, "lora", _params(a, b, alpha / rank))]
    width = int(b.shape[0]) // slices
    return [
        Adapter(
            owner,
            "lora",
            _params(a[rank * i : rank * (i + 1)], b[width * i : width * (i + 1)], alpha / rank),
            rows=(width * slot, width * (slot + 1)),
        )
        for i, slot in enumerate(slot for slot, on in enumerate(enabled) if on)
    ]


def _params(a: Tensor, b: Tensor, scale: float) -> lora.Params:
    return lora.Params(Bottleneck(Affine(a), Affine(b)), scale)


def _on_base(enabled: Sequence[bool], module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters on these layers: on the only slice of a packed one, and on the kernels of convolutions. Raises TensorMismatchError."""
    return [_on_layer(enabled, module.get_submodule(adapter.module), adapter) for adapter in adapters]


def _on_layer(enabled: Sequence[bool], layer: Any, adapter: Adapter) -> Adapter:
    up = adapter.params.pair.up.weight
    kernel = getattr(layer, "kernel_size", (1,))
    if max(kernel) > 1:
        return _on_kernel(layer, adapter, int(kernel[0]))
    outputs = int(layer.weight.shape[0 if not hasattr(layer, "nf") else 1]) if hasattr(layer, "weight") else 0
    packed = outputs if outputs % len(enabled or (1,)) == 0 else 0
    width = packed // len(enabled or (1,))
    if adapter.rows is None and sum(enabled) == 1 and int(up.shape[0]) == width != outputs:
        slot = list(enabled).index(True)
        return replace(adapter, rows=(width * slot, width * (slot + 1)))
    if adapter.rows is not None and int(up.shape[0]) != width:
        raise TensorMismatchError(
            f"{adapter.module}: {outputs} outputs in {len(enabled)} slices (enable_lora) are not {int(up.shape[0])} each, as in the file",
            module=adapter.module,
            tensor="lora_B",
            expected=width,
            found=int(up.shape[0]),
        )
    return adapter


def _on_kernel(layer: Any, adapter: Adapter, size: int) -> Adapter:
    """The factors of a convolution's change as those of its matrix (out, in k k): B A has k rows for each output, one after the other."""
    import torch

    a, b = adapter.params.pair.down.weight, adapter.params.pair.up.weight
    square = tuple(layer.kernel_size) == (size, size)
    shapes = (tuple(a.shape)[1:], tuple(b.shape)[:1])
    if not square or layer.groups != 1 or shapes != ((layer.in_channels * size,), (layer.out_channels * size,)):
        raise FusionError(
            f"{adapter.module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of loralib on a convolution with kernel "
            f"{layer.kernel_size} and {layer.groups} group(s) from {layer.in_channels} to {layer.out_channels} channels; read are "
            "convolutions over squares in one group"
        )
    rank, scale = int(a.shape[0]) // size, adapter.params.scale * int(a.shape[0])  # alpha
    down: Tensor = torch.block_diag(*[a] * size)  # type: ignore[no-untyped-call]
    up = b.reshape(layer.out_channels, -1)
    return replace(adapter, params=_params(down, up, scale / rank))
