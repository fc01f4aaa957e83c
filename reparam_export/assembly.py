"""A checkpoint or its fused weights put into a live base module; the only place, with ``training/``, that touches one.

adapted()   the unfused model: every touched module runs its kind's ``apply`` on the activations
fused()     the plain model with the fused tensors in it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import Step, inserted, kind, unfused
from reparam_export.affine import Affine, to_dtype
from reparam_export.calls import evaluated
from reparam_export.checkpoints import Adapter, Checkpoint, by_site, check_disjoint, components
from reparam_export.errors import FusionError, ReparamError, TensorMismatchError
from reparam_export.fit import check_kind, check_takes_bias, check_trained_on
from reparam_export.layouts import (
    affine_of,
    channel_groups,
    grouped,
    layout_of,
    outputs_of,
    readers_of_weights,
    rows_of,
    site_of,
)
from reparam_export.models import Base, Signature, parse_input
from reparam_export.names import Own
from reparam_export.naming import named
from reparam_export.ties import apart_of, check_known, copies_apart, groups_of, second_names, untie

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def base_of(checkpoint: Checkpoint) -> Base:
    """The base that the checkpoint names. Raises MissingSettingError when it names none and none was given."""
    from reparam_export.errors import MissingSettingError

    if checkpoint.base is None:
        raise MissingSettingError(
            f"{checkpoint.path}: a {checkpoint.format} checkpoint holds the adapter only and does not name its base; "
            "pass it with --base timm:NAME, hf:FOLDER, open_clip:NAME or py:FILE.py:FUNCTION (and --base-weights FILE)",
            setting="base",
            found_in="the training script",
            option="--base SPEC",
        )
    return Base(
        spec=checkpoint.base,
        weights=checkpoint.base_weights,
        state=checkpoint.base_state or None,
        replaced={name: tuple(tensor.shape) for name, tensor in checkpoint.replaced.items()},
        ignored=checkpoint.ignored,
        inputs=tuple(parse_input(text) for text in checkpoint.inputs),
        entry=checkpoint.settings.get("base_weights"),
    )


def opened(checkpoint: Checkpoint) -> tuple[nn.Module, Signature, Checkpoint]:
    """The base with the checkpoint's whole tensors in place, its signature, and the checkpoint with its adapters on this very base."""
    checkpoint = settled(checkpoint)
    module, signature = base_of(checkpoint).build()
    checkpoint = settled(checkpoint, module)
    _check_folder(checkpoint, module)
    check_trained_on(checkpoint, dict(module.named_parameters(remove_duplicate=False)).get)
    module, untied = whole(module, checkpoint)
    on_base = bound(checkpoint, module)
    for member in on_base.members or (on_base,):
        _check_groups(member, module)
    return module, signature, replace(on_base, untied=untied)


def _check_folder(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Raises TensorMismatchError where a file carries its base, and the folder that is given for it has other numbers below the adapters.

    One of the two is the wrong one; a state dict that was saved while its adapters were merged is told so.
    """
    from reparam_export.hf_folder import folder_of
    from reparam_export.names.conversions import places_in_files
    from reparam_export.state import stored_in

    folder = folder_of(checkpoint.base) if checkpoint.base_state and checkpoint.base_weights is None else None
    if folder is None or (not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin"))):
        return  # it gives the configuration alone
    places = places_in_files(module) or {}
    files = {place.tensor: name for name, place in places.items() if place is not None and place.whole}
    given = stored_in(folder, [files.get(name, name) for name in checkpoint.base_digests])
    check_trained_on(checkpoint, lambda name: given.get(files.get(name, name)))


def _check_groups(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Raises FusionError for an adapter on a convolution in groups, but for those whose code folds it into the weight before it convolves
    (LyCORIS), and for LoRA whose reader has told the groups apart."""
    for adapter in checkpoint.adapters:
        layer = dict(module.named_modules()).get(adapter.module)
        groups = 1 if layer is None or adapter.parameter else channel_groups(layer)
        own = checkpoint.format == "lycoris" or (checkpoint.format == "peft_lora" and adapter.kind == "lora")
        if groups != 1 and not own:
            raise FusionError(
                f"{adapter.module}: a convolution in {groups} groups, of which each output reads the channels of its group only, under a "
                f"{adapter.kind} of a {checkpoint.format} checkpoint; this is folded for LyCORIS' adapters and peft's LoRA alone"
            )


def whole(module: nn.Module, checkpoint: Checkpoint) -> tuple[nn.Module, tuple[str, ...]]:
    """The base with the checkpoint's whole tensors in place and what it unties untied, and the names with a tensor of their own now."""
    check_known(module, checkpoint)
    apart = apart_of(checkpoint)
    copies = untie(module, lambda names: apart(names) if copies_apart(checkpoint, names) else [])
    module = with_replaced(module, checkpoint)
    return module, (*copies, *untie(module, apart))


def settled(checkpoint: Checkpoint, module: nn.Module | None = None) -> Checkpoint:
    """The checkpoint under the base's own names, as far as they can be had: from its skeleton, or from the module when it is built.

    To build the base, only the names of whole tensors matter: where there are none, no skeleton is made for the rest.
    Raises TensorMismatchError for names that are not the base's.
    """
    from reparam_export.names.conversions import own_of

    if checkpoint.named or (module is None and not checkpoint.replaced and not checkpoint.base_state):
        return checkpoint
    skeleton = base_of(checkpoint).skeleton() if module is None else module
    return checkpoint if skeleton is None else named_each(checkpoint, own_of(skeleton))


def named_each(checkpoint: Checkpoint, own: Own) -> Checkpoint:
    """The checkpoint, or each member of a stack, under the base's own names."""
    if not checkpoint.members:
        return named(checkpoint, own)
    from reparam_export.checkpoints._stack import stacked

    members = [named(member, own) for member in checkpoint.members]
    whole = stacked(members, [m.recipe.weight for m in members])
    return replace(whole, recipe=checkpoint.recipe, base=checkpoint.base, named=True)


def bound(checkpoint: Checkpoint, module: nn.Module) -> Checkpoint:
    """The checkpoint with the adapters that are made from their base: from its names, its sizes, its numbers.

    module: the base, with whole tensors in place; it is left as it is. The same base gives the same adapters.
    Raises FusionError for what cannot be folded into it, TensorMismatchError for what does not fit.
    """
    import torch

    if checkpoint.members:
        from reparam_export.checkpoints._stack import stacked

        members = [bound(member, module) for member in checkpoint.members]
        whole = stacked(members, [m.recipe.weight for m in members])
        _check_probed(whole)
        return replace(whole, recipe=checkpoint.recipe)
    if checkpoint.bind is None:
        return checkpoint
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapters = tuple(checkpoint.bind(module, checkpoint.adapters))
    except ReparamError:
        raise
    except Exception as error:  # of another library's code on a damaged adapter: many types, one meaning
        raise FusionError(
            f"{checkpoint.path}: the adapters cannot be put on this base: {type(error).__name__}: {error}; "
            "is this the base that it was trained on?"
        ) from error
    check_disjoint(checkpoint.path, adapters)
    return replace(checkpoint, adapters=adapters, bind=None)


def _check_probed(checkpoint: Checkpoint) -> None:
    """Raises FusionError for a probed layer that is not the first on its module: it was made around the base's own weight."""
    for site, group in by_site(checkpoint.adapters).items():
        if any(adapter.kind == "probed" for adapter in group[1:]):
            raise FusionError(
                f"{checkpoint.path}: {site}: an adapter that is probed in a layer of another library is made around the base's own weight; "
                "put its checkpoint first in the stack"
            )


def place(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors under their state-dict names into the module; each takes the dtype it has. Returns the module.

    A bias that the module lacks, and has a place for, is created. A tensor that has several names there takes the value given for
    one of them; where several are given, each name gets its own and they are one no longer.
    Raises TensorMismatchError for a name or shape the module lacks, and for a bias that it would not read.
    """
    from torch import nn as torch_nn

    tied = tied_names(module)
    for name, tensor in tensors.items():
        owner, attribute = _owner(module, name)
        current = getattr(owner, attribute, None)
        created = current is None and (
            attribute in owner._parameters or (attribute == "bias" and hasattr(owner, "weight"))
        )
        if created and attribute == "bias":
            check_takes_bias(name, owner)
        if not created and (current is None or tuple(current.shape) != tuple(tensor.shape)):
            raise TensorMismatchError(
                f"{name}: the base has {None if current is None else tuple(current.shape)}, the checkpoint brings {tuple(tensor.shape)}",
                module=name.rpartition(".")[0],
                tensor=attribute,
                expected=None if current is None else tuple(current.shape),
                found=tuple(tensor.shape),
            )
        if attribute in owner._buffers:
            owner._buffers[attribute] = tensor
        else:
            parameter = torch_nn.Parameter(tensor, requires_grad=False)
            for other in tied.get(name, (name,)):
                if other == name or other not in tensors:
                    setattr(*_owner(module, other), parameter)
    return module


def tied_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each name of a parameter that has several (tied embeddings): all of its names."""
    return {name: tuple(group) for group in groups_of(module) for name in group}


def with_replaced(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The base with the tensors that the checkpoint brings whole, in the base's own dtype."""
    state = module.state_dict()
    for name, tensor in checkpoint.replaced.items():
        if name in state:
            check_kind(name, state[name].dtype, tensor.dtype)
    cast = {
        name: tensor.to(state[name].dtype) if name in state and state[name].is_floating_point() else tensor
        for name, tensor in checkpoint.replaced.items()
    }
    again = second_names(module, cast)
    return place(module, {name: tensor for name, tensor in cast.items() if name not in again})


def fused(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The plain base module with all of the fused tensors in it (its own dtype each)."""
    return place(module, tensors)


def adapted(module: nn.Module, adapters: Sequence[Adapter], dtype: torch.dtype) -> nn.Module:
    """The unfused model in one dtype: every touched module is replaced by one that runs its kind's ``apply``.

    module: a fresh base (``with_replaced``), which is changed and returned. The adapters' tensors are cast to dtype. A norm, and a tensor
    that a module reads without calling a layer, take the matrix that the unfused forward is, read out in float64.
    """
    groups = by_site(adapters)
    direct = {site for site, group in groups.items() if _is_direct(module, group[0])}
    spelled: dict[str, Tensor] = {}
    for site in direct:
        spelled |= _spelled(module, groups[site], spelled)
    place(module.to(dtype), {name: t.to(dtype) for name, t in spelled.items()})
    for name, of_module in groups.items():
        if name in direct:
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        setattr(parent, attribute, adapted_module(name, getattr(parent, attribute), of_module, dtype))
    return evaluated(module)


def steps_of(adapters: Sequence[Adapter], dtype: torch.dtype, start: int = 0) -> list[Step]:
    """The adapters of one stack on the outputs from ``start`` on, in order, their tensors in that dtype."""
    return [
        Step(
            kind(a.kind),
            to_dtype(a.params, dtype),
            None if a.rows is None else (a.rows[0] - start, a.rows[1] - start),
            a.weight,
        )
        for a in adapters
    ]


def reach(adapters: Sequence[Adapter]) -> tuple[int, int] | None:
    """The outputs that a stack acts on, None for all of them."""
    rows = [a.rows for a in adapters]
    return None if None in rows else (min(r[0] for r in rows if r), max(r[1] for r in rows if r))


def stacks(adapters: Sequence[Adapter], dtype: torch.dtype) -> list[tuple[tuple[int, int] | None, list[Step]]]:
    """The adapters of one matrix as stacks on disjoint outputs: (outputs, steps); steps that act on all of them have no rows."""
    found = []
    for group in components(adapters):
        rows = reach(group)
        steps = steps_of(group, dtype, rows[0] if rows else 0)
        found.append((rows, [replace(s, rows=None) if rows and s.rows == (0, rows[1] - rows[0]) else s for s in steps]))
    return found


def adapted_module(name: str, module: nn.Module, adapters: Sequence[Adapter], dtype: torch.dtype) -> nn.Module:
    """One touched module with its adapters unfused: same inputs and outputs as the module itself."""
    from torch import nn as torch_nn

    layout = layout_of(name, module)
    whole, groups = affine_of(module, layout, dtype), channel_groups(module) if layout == "conv" else 1
    parts = [(rows, unfused(whole.rows(*rows) if rows else whole, steps)) for rows, steps in stacks(adapters, dtype)]
    settings = {key: value for key, value in vars(module).items() if not key.startswith("_")}  # no tensor and no module

    class Adapted(torch_nn.Module):
        """y = apply(x, base, p) on the adapter's rows, the base's own output on all others."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = whole.in_features, whole.out_features
            self.weight = module.weight
            self.bias = getattr(module, "bias", None)
            self.calls = 0  # a module that is never called has its weight read directly, or no part in the outputs

        def __getattr__(self, key: str) -> Any:
            """A model may ask its layer how it is made: MobileNet pads by the stride of its convolutions."""
            return settings[key] if key in settings else super().__getattr__(key)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            inputs = rows_of(x, module, layout, dtype)
            return outputs_of(grouped(self.on_rows, inputs, groups), module, layout)

        def on_rows(self, inputs: Tensor) -> Tensor:
            import torch

            y: Tensor | None = None
            for rows, part in parts:
                if rows is None:
                    y = part(inputs)
                    continue  # it is the only one
                y = whole(inputs) if y is None else y
                y = torch.cat([y[..., : rows[0]], part(inputs), y[..., rows[1] :]], dim=-1)
            assert y is not None
            return y

    return Adapted()


def _is_direct(module: nn.Module, adapter: Adapter) -> bool:
    """Does the adapter act on a tensor, and not on what a layer is called with?"""
    if adapter.parameter or reads_weights(module, adapter.module):
        return True
    return layout_of(adapter.module, module.get_submodule(adapter.module)) == "norm"


def reads_weights(module: nn.Module, name: str) -> bool:
    """May the parent of this module read its weight without calling it?"""
    parent = module.get_submodule(name.rpartition(".")[0]) if "." in name else module
    return isinstance(parent, readers_of_weights())


def _spelled(module: nn.Module, adapters: Sequence[Adapter], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one site as the unfused forward makes them, in float64. made: those of other matrices of the same stack."""
    import torch

    target = module.get_submodule(adapters[0].module)
    site = site_of(target, adapters[0])
    own = site.of(target)
    whole = base = site.affine(own, torch.float64)
    for rows, steps in stacks(adapters, torch.float64):
        part = unfused(base.rows(*rows) if rows else base, steps)
        whole = inserted(whole, Affine(part.weight, part.bias), rows)
    old = made.get(site.tensor, own[site.tensor])
    new = {site.tensor: site.put(whole, old, torch.float64, fresh=site.tensor in made)}
    return new | {site.bias: whole.bias} if whole.bias is not None and site.bias else new


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    parent, _, attribute = name.rpartition(".")
    try:
        return module.get_submodule(parent), attribute
    except AttributeError as error:
        raise TensorMismatchError(
            f"{name}: the base has no module {parent!r}; is this the base that the checkpoint was trained on?",
            module=parent,
            tensor=attribute,
            expected=None,
            found=name,
        ) from error
