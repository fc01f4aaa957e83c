"""Does a checkpoint belong to this base: are its modules there, all of them and of its sizes, and are the numbers those it was trained on?

Our own checkpoints carry digests of their base's parameters, each in the dtype that it was trained in: a base that was cast for
training is the same base.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from reparam_export.adapters import kind
from reparam_export.affine import Affine, tensors_of
from reparam_export.checkpoints import Adapter, Checkpoint
from reparam_export.errors import CheckpointError, TensorMismatchError
from reparam_export.state import content_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

Digest = tuple[str, str]  # dtype, as torch names it without "torch."; blake3 of the bytes


def touched_module(module: nn.Module, name: str) -> nn.Module:
    """The base's module of that name. Raises TensorMismatchError that names the nearest ones."""
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5)
    raise TensorMismatchError(
        f"the checkpoint adapts {name}, which the base does not have (nearest: {', '.join(near) or 'none'}); "
        "is this the base that it was trained on?",
        module=name,
        tensor="weight",
        expected=name,
        found=near,
    )


def check_shapes(name: str, base: Affine, adapter: Adapter) -> None:
    """Every tensor of the adapter against the base's size. Raises TensorMismatchError with the first that does not fit."""
    expected = kind(adapter.kind).shapes(base.out_features, base.in_features, adapter.params)
    for tensor, value in tensors_of(adapter.params).items():
        if tuple(value.shape) != expected.get(tensor):
            raise TensorMismatchError(
                f"{name}: the {adapter.kind} tensor {tensor} is {tuple(value.shape)}, expected {expected.get(tensor)} on a base "
                f"weight of {base.out_features} x {base.in_features}; is this the base that it was trained on?",
                module=name,
                tensor=tensor,
                expected=expected.get(tensor),
                found=tuple(value.shape),
            )


def check_replaced(module: nn.Module, replaced: Mapping[str, tuple[int, ...]]) -> None:
    """Raise TensorMismatchError unless the module has every tensor of ``replaced``, in that shape.

    A bias may be new where the module has a place for one: the checkpoint then adds it.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    for name, shape in replaced.items():
        owner, _, leaf = name.rpartition(".")
        new_bias = leaf == "bias" and name not in shapes and f"{owner}.weight" in shapes
        if new_bias:
            check_takes_bias(name, module.get_submodule(owner))
        if not new_bias and shapes.get(name) != tuple(shape):
            raise TensorMismatchError(
                f"{name}: the checkpoint replaces it with shape {tuple(shape)}; the base model has "
                f"{shapes.get(name, 'no such tensor')}; choose a base of the checkpoint's size and number of classes",
                module=owner,
                tensor=name,
                expected=tuple(shape),
                found=shapes.get(name),
            )


def check_takes_bias(name: str, owner: nn.Module) -> None:
    """Raises TensorMismatchError for a bias on a module that has no place for one (an RMSNorm, an embedding): nothing would read it."""
    if getattr(owner, "bias", owner) is not None:  # what is registered without a bias has None there
        raise TensorMismatchError(
            f"{name}: the checkpoint brings a bias, and the base's {type(owner).__name__} has none and reads none, so that it would change "
            "nothing; is this the base that it was trained on?",
            module=name.rpartition(".")[0],
            tensor=name,
            expected=None,
            found="a bias",
        )


def check_kind(name: str, base: object, found: object) -> None:
    """Raises TensorMismatchError for integers where the base has floating point numbers, or the other way round. Dtypes or their names."""
    if ("float" in str(base)) != ("float" in str(found)):
        raise TensorMismatchError(
            f"{name}: the base has {base}, and the checkpoint brings {found}: numbers of another kind, such as indices or codes of a "
            "quantized table; save it in floating point numbers",
            module=name.rpartition(".")[0],
            tensor=name,
            expected=base,
            found=found,
        )


def check_covered(names: list[str], checkpoint: Checkpoint) -> None:
    """Every module that the training code adapts has its adapter, and a list of paths met the layers in their order.

    names: of the base's modules with a weight, in the model's order. Raises TensorMismatchError, CheckpointError.
    """
    adapted = {a.module for a in checkpoint.adapters}
    wanted = checkpoint.covers(names)
    if checkpoint.only:
        _check_only(checkpoint, set(checkpoint.covers([*names, *adapted])))
    missing = [name for name in wanted if name not in adapted]
    if missing:
        raise TensorMismatchError(
            f"{checkpoint.path}: {len(missing)} module(s) that a {checkpoint.format} checkpoint adapts have no adapter in it, "
            f"first {missing[0]}; the file is incomplete, or belongs to another base",
            module=missing[0],
            tensor="weight",
            expected="an adapter",
            found=None,
        )
    order = {name: number for number, name in enumerate(names)}
    places = [order[a.module] for a in checkpoint.adapters if a.module in order]
    if checkpoint.positional and places != sorted(places):
        raise CheckpointError(
            f"{checkpoint.path}: its layers do not stand in the model's order, so a list of paths cannot be matched to them "
            "(a file that was saved again may be sorted by name); give the paths by layer name"
        )


def _check_only(checkpoint: Checkpoint, wanted: set[str]) -> None:
    """Raises TensorMismatchError for an adapter on a module that its configuration leaves out: whoever loads it, leaves it out."""
    for adapter in checkpoint.adapters:
        own = adapter.module in wanted or adapter.module.rpartition(".")[0] in wanted  # a part of an attention module
        if not own and adapter.parameter is None and adapter.kind != "tokens":
            raise TensorMismatchError(
                f"{checkpoint.path}: {adapter.module} has an adapter in the file, and the configuration does not adapt it (target_modules, "
                "exclude_modules, layers_to_transform, modules_to_save); file and configuration do not belong together",
                module=adapter.module,
                tensor="weight",
                expected=None,
                found="an adapter",
            )


def check_trained_on(checkpoint: Checkpoint, parameter: Callable[[str], Tensor | None]) -> None:
    """Raises TensorMismatchError unless the base's parameters are those that the checkpoint was trained on, as far as it says.

    parameter: a parameter of the base by its name, None where there is none. Of a stack, the later ones may have been trained on what
    those before them made.
    """
    made: set[str] = set()  # by those before
    for member in checkpoint.members or (checkpoint,):
        known = {name: digest for name, digest in member.base_digests.items() if name not in made}
        odd = [name for name, digest in known.items() if _differs(parameter(name), digest)]
        if odd:
            raise TensorMismatchError(
                f"{member.path}: it was trained on a base with other numbers than {checkpoint.base} has: {len(odd)} of {len(known)} "
                f"parameters differ, first {odd[0]}; give the base that it was trained on, or save() it with base_state=True. A file "
                "that holds its base and was saved while its adapters were merged has such numbers, too: unmerge them before saving",
                module=odd[0].rpartition(".")[0],
                tensor=odd[0],
                expected=known[odd[0]][1],
                found=None,
            )
        made |= set(member.replaced) | {f"{a.module}.{a.parameter or 'weight'}" for a in member.adapters}
        made |= {f"{a.module}.bias" for a in member.adapters}


def digest_of(tensor: Tensor, dtype: str | None = None) -> Digest:
    """The digest of a tensor as one of that dtype; None: of its own."""
    import torch

    cast = tensor if dtype is None else tensor.to(getattr(torch, dtype))
    return str(cast.dtype).removeprefix("torch."), content_digest(cast).hex()


def _differs(tensor: Tensor | None, expected: Digest) -> bool:
    return tensor is not None and digest_of(tensor, expected[0]) != expected
