"""``target_parameters`` of peft's LoRA: adapters on tensors that a module reads itself, such as the stacked matrices of experts.

peft (0.21, ``BaseTuner._inject_parameters`` and ``lora.ParamWrapper``) wraps a module once for each of its targeted parameters, in the
module's own order; the innermost wrapper, whose name in the file has the most ``base_layer``, holds the first of them. ``rank_pattern`` and
``alpha_pattern`` are matched against ``module.parameter``. Of a stack of matrices, A has rows (matrix, rank), B columns (rank, matrix).
Which parameters a module has, and how a stack lies in memory, only the base knows; its shapes are enough, the numbers are not looked at.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reparam_export.adapters import lora
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Claim, Parts, Source, Unbound
from reparam_export.checkpoints._peft import Check, Layer, on_base, parts_of, scale_of
from reparam_export.checkpoints._peft_names import PREFIX, check_matched, named, targets
from reparam_export.errors import CheckpointError, FusionError, TensorMismatchError

if TYPE_CHECKING:
    from torch import nn

OF_A_LAYER = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
)  # fmt: skip
MakeAdapter = Callable[[Layer], Adapter]  # of a layer that target_modules names


@dataclass(frozen=True)
class Wrapper:
    """One wrapped module of the file by its name there, and all of its tensors."""

    source: Source
    full: str
    tensors: Mapping[str, Tensor]
    module: str = ""  # the base's

    @property
    def owner(self) -> str:
        """The module by its name in the file."""
        return re.sub(r"(?:\.base_layer)+\Z", "", self.full).removeprefix(PREFIX)

    def layer(self, full: str | None = None) -> tuple[Layer, Claim]:
        """Its tensors to be taken, each of them. full: the name that patterns are matched against."""
        claim = Claim(self.source.path, {f"{self.full}.{name}": t for name, t in self.tensors.items()})
        return Layer(self.source, claim, self.full if full is None else full), claim


def read_parameters(
    source: Source, claim: Claim, modules: Sequence[str], make: MakeAdapter, check: Check | None
) -> Parts:
    """The folder's parts. modules: every module with tensors of its own, by its name in the file; make: for those of ``target_modules``.

    Raises TensorMismatchError for tensors and parameters that do not fit each other, CheckpointError for a target that is not there.
    """
    wrappers = [Wrapper(source, full, _own(claim, full)) for full in modules]
    waiting = [Adapter(w.owner, "lora", Unbound(dict(w.tensors), {}), parameter=w.full) for w in wrappers]
    parts = parts_of(source, claim, waiting, names=[])
    tokens = [a for a in parts.adapters if a.kind == "tokens"]

    def bind(module: nn.Module, placed: Sequence[Adapter]) -> list[Adapter]:
        modules = {a.parameter: a.module for a in placed if a.kind != "tokens"}
        adapters = _on_model(source, module, [replace(w, module=modules[w.full]) for w in wrappers], make)
        names = [f"{a.module}.{a.parameter}" if a.parameter else a.module for a in adapters]
        check_matched(source.path, source.config, list(dict.fromkeys(names)), list(parts.replaced))
        return on_base(check, module, [*adapters, *(a for a in placed if a.kind == "tokens")])

    covers = targets(source.config)
    return replace(parts, bind=bind, by_shapes=not tokens, covers=covers or (lambda names: []), only=covers is not None)


def _own(claim: Claim, full: str) -> dict[str, Tensor]:
    found = {name: claim.take_if(f"{full}.{name}") for name in OF_A_LAYER}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _on_model(source: Source, module: nn.Module, wrappers: Sequence[Wrapper], make: MakeAdapter) -> list[Adapter]:
    wanted = [str(name) for name in source.config["target_parameters"]]
    parameters: dict[str, list[str]] = {}
    unused = dict.fromkeys(wanted)
    for name, part in module.named_modules():
        for own, _ in part.named_parameters(recurse=False):
            hits = [target for target in wanted if named(f"{name}.{own}", [target])]
            if hits:
                parameters.setdefault(name, []).append(own)
            for target in hits:
                unused.pop(target, None)
    if unused:
        raise CheckpointError(
            f"{source.path}: target_parameters of adapter_config.json names {next(iter(unused))!r}, and no parameter of this base is "
            "called so; is this the base that it was trained on?"
        )
    groups: dict[str, list[Wrapper]] = {}
    for wrapper in wrappers:
        groups.setdefault(wrapper.module, []).append(wrapper)
    missing = [name for name in parameters if name not in groups]
    if missing:
        raise _mismatch(source, missing[0], f"adapters on its {', '.join(parameters[missing[0]])}", "none in the file")
    found: list[Adapter] = []
    for name, group in groups.items():
        _check_there(source, module, name)
        if name not in parameters:
            found += [_plain(wrapper, make) for wrapper in group]
            continue
        group = sorted(group, key=lambda w: -w.full.count(".base_layer"))
        if len(parameters[name]) != len(group):
            raise _mismatch(
                source, name, f"adapters on its {', '.join(parameters[name])}", f"{len(group)} of them in the file"
            )
        for own, wrapper in zip(parameters[name], group, strict=True):
            found += _on_parameter(wrapper, own, module.get_submodule(name))
    return found


def _plain(wrapper: Wrapper, make: MakeAdapter) -> Adapter:
    """A layer that ``target_modules`` names, beside the targeted parameters: with all that LoRA on a layer can have."""
    layer, claim = wrapper.layer()
    adapter = replace(make(layer), module=wrapper.module)
    claim.finish()
    return adapter


def _on_parameter(wrapper: Wrapper, parameter: str, target: nn.Module) -> list[Adapter]:
    """One adapter for a matrix, one for each matrix of a stack."""
    name, tensor = wrapper.module, target.get_parameter(parameter)
    layer, claim = wrapper.layer()
    a, b = layer.take("lora_A.weight"), layer.take("lora_B.weight")
    claim.finish()
    experts = 1 if tensor.ndim == 2 else int(tensor.shape[0])
    rank, left = divmod(int(a.shape[0]), experts)
    if tensor.ndim not in (2, 3) or left or a.ndim != 2 or b.ndim != 2 or int(b.shape[1]) != int(a.shape[0]):
        raise FusionError(
            f"{name}.{parameter}: a parameter of shape {tuple(tensor.shape)}, lora_A of {tuple(a.shape)} and lora_B of {tuple(b.shape)} do "
            "not fit; expected 2 or 3 dimensions, and a rank for each matrix of a stack"
        )
    of = replace(layer, full=f"{PREFIX}{wrapper.owner}.{parameter}")
    of.check_rank(rank)
    scale = scale_of(of, rank)
    downs, ups = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts)
    return [
        Adapter(
            name,
            "lora",
            lora.Params(Bottleneck(Affine(downs[e]), Affine(ups[..., e])), scale),
            parameter=parameter,
            expert=None if tensor.ndim == 2 else e,
        )
        for e in range(experts)
    ]


def _check_there(source: Source, module: nn.Module, name: str) -> None:
    names = dict(module.named_modules())
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise _mismatch(
            source, name, f"a module of this name (nearest: {', '.join(near) or 'none'})", "none in this base"
        )


def _mismatch(source: Source, module: str, expected: str, found: str) -> TensorMismatchError:
    return TensorMismatchError(
        f"{source.path}: {module}: expected {expected}, found {found}; the file is incomplete, or belongs to another base",
        module=module,
        tensor="lora_A",
        expected=expected,
        found=found,
    )
