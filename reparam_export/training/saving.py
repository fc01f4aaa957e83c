"""Our own checkpoint format (``checkpoints/native.py``) of a model with attached adapters: written, and given back."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reparam_export.affine import Affine, map_tensors, tensors_of
from reparam_export.assembly import opened, place
from reparam_export.checkpoints import NATIVE, Checkpoint, placed, read
from reparam_export.checkpoints.native import BASES, to_plain
from reparam_export.errors import CheckpointError, MissingSettingError, UsageError
from reparam_export.files import PICKLES, replace_file
from reparam_export.fit import check_shapes, touched_module
from reparam_export.models import Input, Signature, named_outputs, outputs_of_call, samples, split_argument
from reparam_export.training.attach import Attached, attached_layer, attached_of, plain_map, put
from reparam_export.training.frozen import told_apart

ROUNDINGS = 256  # in which two computations of the same model may differ
T = TypeVar("T")


def save(
    model: nn.Module,
    path: str | Path,
    *,
    base: str | None,
    base_state: bool | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the trained model to ``path`` (.pt), as our own format; the file appears whole or not at all.

    base: spec of the plain base, "timm:...", "hf:..." or "open_clip:..."; None: to be given when it is read. A relative folder of the
    working folder is kept as seen from the file, so that the two can be read from anywhere, and moved together.
    base_state: put the frozen base's tensors into the file, under the plain base's names; default: for a timm base
    without pretrained=true, which exists nowhere else. Without them, their digests: another base is refused when the file is read.
    ``replaced`` are running statistics and all else that was trained, frozen by now or not. Wrappers (torch.compile, DataParallel)
    are taken off.
    inputs: a few, by the names that the forward has, for the second witness: they are saved with what the model answers in eval mode, and
    ``verify`` holds the fused model's reference against that; default: 2 random images for a timm base without pretrained=true.
    Of a supernet without a fixed candidate, all paths are saved; ``--config checkpoint-N.pth.tar`` then chooses.
    Raises UsageError for a model without adapters, a base or an ending that cannot be read back, and for a timm base that is
    another model than this one (the file is written then, too).
    """
    path, model = Path(path), unwrapped(model)
    _check_saveable(path, model, base)
    with_base = _exists_nowhere_else(base) if base_state is None else base_state
    content = _content(model, None if base is None else placed(base, partial(_from, path.parent)), with_base=with_base)
    if inputs is not None:
        content["expected"] = answers_of(model, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda unfinished: torch.save(content, unfinished))
    if with_base and base is not None and base.startswith("timm:"):
        recorded = check_saved(path, getattr(model, "_orig_mod", model))
        if recorded is not None and inputs is None:
            content["expected"] = recorded
            replace_file(path, lambda unfinished: torch.save(content, unfinished))


def _check_saveable(path: Path, model: nn.Module, base: str | None) -> None:
    """Raises UsageError, as ``save`` says."""
    if not attached_of(model):
        raise UsageError(f"{path}: the model has no adapter to save; expected one that attach() was called on")
    if not path.name.endswith(PICKLES):
        raise UsageError(f"{path}: expected a name that ends in {', '.join(PICKLES)}; found {path.name!r}")
    if base is not None and not base.startswith(BASES):
        raise UsageError(f"base {base!r}: expected {', '.join(BASES)} or None; give any other when reading, as --base")
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise UsageError(f"{path}: {empty[0]} is on the device meta and has no numbers; load the weights before saving")


def _content(model: nn.Module, base: str | None, *, with_base: bool) -> dict[str, Any]:
    """What the file holds, as ``checkpoints/native.py`` describes it."""
    attached = attached_of(model)
    own = {f"{name}.adapter.{tensor}" for name, module in attached for tensor in module.adapter}
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items() if name not in own}
    trained, digests = told_apart(model)
    replaced = {name: state[name] for name in trained if name in state}
    return {
        "format": NATIVE,
        "base": base,
        "base_state": _plain({n: t for n, t in state.items() if n not in replaced}) if with_base else None,
        "base_digests": {} if with_base else _plain({n: digest for n, digest in digests.items() if n in state}),
        "adapters": [
            {
                "module": _plain_name(name),
                "kind": module.kind,
                "rows": None,
                "params": to_plain(map_tensors(module.params(), Tensor.cpu)),
            }
            for name, module in attached
        ],
        "replaced": _plain(replaced),
        "notes": [],
    }


@torch.no_grad()
def check_saved(path: Path, model: nn.Module) -> dict[str, Any] | None:
    """Does what was saved on a timm base answer as the model in hand? A spec can leave out what no tensor tells, as the heads.

    Gives the images and the answers of the model in hand, as ``answers_of`` does; None where they are no numbers.

    A supernet without a path has no answers, and one that diverged none that could be compared; reading the file says so.
    Raises UsageError; the file stays, since another base can be given with it.
    """
    try:
        checkpoint = read(path)
    except (MissingSettingError, CheckpointError):
        return None
    modes = {module: module.training for module in model.modules()}
    like = next(p for p in model.parameters() if p.is_floating_point())
    again, signature = with_signature(checkpoint)
    again.to(like.device, like.dtype)
    images = tuple(t.to(like.device, like.dtype) for t in samples(signature, 2, seed=0).values())
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled need not be compiled again for this
            found, expected = (outputs_of_call(m, signature, images) for m in (again, model.eval()))
    finally:
        for module, training in modes.items():
            module.training = training
    for one, other in zip(found, expected, strict=True):
        gap, size = float((one - other).abs().max()), float(other.abs().max())
        if gap > ROUNDINGS * torch.finfo(other.dtype).eps * size:
            raise UsageError(
                f"{path}: written, but its base {checkpoint.base!r} with these adapters is not the model in hand: on the same images "
                f"their outputs differ by {gap:.2g} of {size:.2g}; name in the spec what the model was made with, and save it again"
            )

    return _recorded(
        dict(zip((i.name for i in signature.inputs), images, strict=True)),
        dict(zip(signature.outputs, expected, strict=True)),
    )


@torch.no_grad()
def answers_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the model answers to these, in eval mode, on its own device and in its own dtype: ``expected`` of the format.

    Raises UsageError for a model that answers with no tensor of numbers.
    """
    model = getattr(model, "_orig_mod", model)
    like = next(p for p in model.parameters() if p.is_floating_point())
    given = {
        n: t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device) for n, t in inputs.items()
    }
    by_name = set(given) <= set(inspect.signature(model.forward).parameters)
    signature = Signature(tuple(Input(n, tuple(t.shape)) for n, t in given.items()), (), {"by_name": by_name})
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.compiler.set_stance("force_eager"):
            found = named_outputs(model.eval(), signature, tuple(given.values()))
    finally:
        for module, training in modes.items():
            module.training = training
    recorded = _recorded(given, {n: t for n, t in found.items() if t.is_floating_point()})
    if recorded is None:
        raise UsageError("inputs: the model answers them with no finite numbers, so there is nothing to record")
    return recorded


def _recorded(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
    if not outputs or not all(bool(t.isfinite().all()) for t in outputs.values()):
        return None
    dtype = next(iter(outputs.values())).dtype
    kept = {n: (t.float() if t.is_floating_point() else t).cpu().contiguous() for n, t in inputs.items()}
    return {
        "inputs": kept,
        "outputs": {n: t.detach().cpu().contiguous() for n, t in outputs.items()},
        "dtype": str(dtype).removeprefix("torch."),
    }


def load(
    path: str | Path, base: str | None = None, *, base_weights: str | Path | None = None, **options: Any
) -> nn.Module:
    """The model that ``save`` wrote, or that any other readable checkpoint adapts, with its adapters attached: to train on.

    base, base_weights, options: as of ``reparam_export.read``. In eval mode; adapters, and the tensors that the checkpoint
    brought whole, are trainable, all else is frozen.
    Raises CheckpointError and its kin, UsageError for an adapter that cannot be attached (on part of a packed layer, or in a stack).
    """
    return attached_model(read(path, base, base_weights=base_weights, **options))


def attached_model(checkpoint: Checkpoint, made: type[Attached] = Attached) -> nn.Module:
    """A checkpoint as a model with live adapters, all in the widest dtype that is there.

    Raises UsageError for an adapter on part of a layer, or in a stack.
    """
    return with_signature(checkpoint, made)[0]


def with_signature(checkpoint: Checkpoint, made: type[Attached] = Attached) -> tuple[nn.Module, Signature]:
    """The same, and how it is called."""
    model, signature, checkpoint = opened(checkpoint)
    place(model, checkpoint.replaced)
    tensors = [*model.parameters(), *(t for a in checkpoint.adapters for t in tensors_of(a.params).values())]
    widest = reduce(torch.promote_types, {t.dtype for t in tensors if t.is_floating_point()})
    model.to(widest)
    layers: dict[str, Attached] = {}
    for adapter in checkpoint.adapters:
        whole = adapter.rows is None and adapter.parameter is None and adapter.weight == 1
        if not whole or adapter.module in layers:
            raise UsageError(
                f"{adapter.site}: an adapter on part of a layer, or on top of another one, cannot be attached; fuse it first"
            )
        check_shapes(adapter.site, plain_map(touched_module(model, adapter.module), adapter.module), adapter)
        params = map_tensors(adapter.params, lambda t: t.clone().to(widest) if t.is_floating_point() else t.clone())
        layers[adapter.module] = attached_layer(model, adapter.module, adapter.kind, partial(_same, params), made=made)
    put(model, layers, brought=checkpoint.replaced)
    _thaw(model, checkpoint.replaced)
    return model.eval(), signature


def _same(params: Any, base: Affine) -> Any:
    return params


def _thaw(model: nn.Module, names: Iterable[str]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a data-parallel wrapper."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _plain(named: Mapping[str, T]) -> dict[str, T]:
    return {_plain_name(name): value for name, value in named.items()}


def _plain_name(name: str) -> str:
    """The name without the wrappers of ``torch.compile``."""
    return name.replace("_orig_mod.", "")


def _from(folder: Path, place: str) -> str:
    """A relative folder as seen from another one; a hub id as it is."""
    own = not Path(place).is_absolute() and Path(place).is_dir()
    return os.path.relpath(place, folder) if own else place


def _exists_nowhere_else(base: str | None) -> bool:
    scheme, _, argument = (base or "").partition(":")
    return scheme == "timm" and not split_argument(argument)[1].get("pretrained", False)
