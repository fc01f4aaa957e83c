"""Trainable adapters on the linear layers of a frozen model.

attach()      each targeted layer now runs its kind's ``apply``: what is trained is what is folded and proven later
trainable()   how many numbers an optimizer would change;  adapter_parameters()   as the papers count
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam_export import adapters, plugins
from reparam_export.affine import Affine, Bottleneck, map_tensors, tensors_of
from reparam_export.errors import UsageError
from reparam_export.layouts import channel_groups, layout_of, matrix, stored
from reparam_export.training.frozen import remember
from reparam_export.training.targets import Targets, targeted, trained_modules


class Frozen(Affine):
    """The base layer's own map, computed by the same torch function as in the layer, so that its bits are the same."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Dropped(Bottleneck):
    """A low-rank pair in training: numbers of its input ("before") or of its narrow middle ("after") are dropped."""

    place: str = "after"
    rate: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        narrow = self.down(F.dropout(x, self.rate)) if self.place == "before" else F.dropout(self.down(x), self.rate)
        y: Tensor = self.up(narrow)
        return y


class Attached(nn.Module):
    """A frozen linear layer with a trainable adapter: x (..., in) -> (..., out) is ``kind.apply(x, base, params)``.

    ``weight`` and ``bias`` are the layer's own, under their own names; the adapter's tensors are in ``adapter``.
    """

    def __init__(self, layer: nn.Module, layout: str, kind_name: str, params: Any, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix(layer.weight, layout).shape[::-1]  # type: ignore[arg-type]
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)
        self.layout, self.kind, self.dropout = layout, kind_name, dropout
        self.adapter = nn.ParameterDict({_key(name): tensor for name, tensor in tensors_of(params).items()})
        self._fields = map_tensors(params, lambda t: t.to("meta"))  # how the tensors of ``adapter`` make up Params

    def params(self) -> Any:
        """The kind's Params as they are now; gradients flow through them."""
        tensors = iter([self.adapter[_key(name)] for name in tensors_of(self._fields)])
        return map_tensors(self._fields, lambda _: next(tensors))

    def frozen(self) -> Affine:
        """The base layer's own map."""
        return Frozen(matrix(self.weight, self.layout), self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        kind, params = adapters.kind(self.kind), self.params()
        if self.training and self.dropout:
            pairs = {f.name: p for f in fields(params) if isinstance(p := getattr(params, f.name), Bottleneck)}
            place = kind.DROPOUT  # type: ignore[attr-defined]
            params = replace(params, **{n: Dropped(p.down, p.up, place, self.dropout) for n, p in pairs.items()})
        y: Tensor = kind.apply(x, self.frozen(), params)
        if y.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            y = y.to(
                torch.get_autocast_dtype(x.device.type)
            )  # as the layer itself: what is added to its products is not cast
        return y

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The plain layer with the adapter in its weight, computed in float64 and rounded once to the layer's dtype.

        ``timm.utils.reparameterize_model`` calls it, so it folds attached adapters too.
        """
        weight, bias = self.weight, self.bias
        base = Affine(matrix(weight.double(), self.layout), None if bias is None else bias.double())  # type: ignore[arg-type]
        fused = adapters.kind(self.kind).fuse(base, map_tensors(self.params(), torch.Tensor.double))
        plain = self.plain(bias=fused.bias is not None)
        plain.weight = nn.Parameter(stored(fused.weight, self.layout, weight.shape).to(weight.dtype))  # type: ignore[arg-type]
        if fused.bias is not None:
            plain.bias = nn.Parameter(fused.bias.to(weight.dtype if bias is None else bias.dtype))
        return plain.train(self.training)

    def plain(self, *, bias: bool) -> nn.Module:
        """A plain layer of this one's kind and size, without numbers yet."""
        if self.layout == "linear":
            return nn.Linear(self.in_features, self.out_features, bias=bias, device="meta")
        from transformers.pytorch_utils import Conv1D

        return Conv1D(self.out_features, self.in_features)  # type: ignore[no-untyped-call]


def attach(
    model: nn.Module,
    kind: str,
    targets: Targets,
    *,
    train: str | Sequence[str] = (),
    dropout: float = 0.0,
    **settings: Any,
) -> nn.Module:
    """Put a trainable adapter on every linear layer that a target names; changes ``model`` and returns it.

    kind, settings: any kind with ``initial()`` and its arguments: "hydra" (rank, scale, learnable_scale, branches,
    sequential_rank, bias, init), "lora" (rank, scale, init), "repadapter" (rank, scale, bias, init), "glora" (rank, path,
    init), ... targets: see ``targets.py``. train: modules to train whole (a new head), by glob. dropout: of the low-rank
    pairs, where the kind's paper has it. All else is frozen, but for what an attach before
    this one trains. Before training the model gives the base's outputs bit for bit.
    Adapters are drawn from torch's global generator, in the layer's dtype and on its device.
    Raises UsageError (unknown kind or setting, a name that matches nothing, a layer that cannot be adapted),
    SharedWeightError (a tied weight).
    """
    initial = initial_of(kind, settings)
    trained = trained_modules(model, train)
    attached = {n: attached_layer(model, n, kind, initial, dropout=dropout) for n in targeted(model, targets)}
    put(model, attached)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    return model


def put(model: nn.Module, attached: Mapping[str, Attached], brought: Collection[str] = ()) -> None:
    """Replace the modules of these names; everything but the adapters in them, and what an attach before trains, is frozen.

    brought: tensors that a checkpoint has put in place of the base's.
    """
    remember(model, but=brought)
    if not attached_of(model):
        model.requires_grad_(False)
    for name, module in attached.items():
        module.weight.requires_grad_(False)
        if module.bias is not None:
            module.bias.requires_grad_(False)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def trainable(model: nn.Module) -> int:
    """The number of trainable parameters, adapters and modules trained whole; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_parameters(model: nn.Module) -> int:
    """The parameters of all adapters as their papers count them: without heads, and of GLoRA only those of the path."""
    total = 0
    for _, module in attached_of(model):
        params = module.params()
        count: Callable[[Any], int] | None = getattr(adapters.kind(module.kind), "count", None)
        total += sum(t.numel() for t in tensors_of(params).values()) if count is None else count(params)
    return total


def attached_of(model: nn.Module) -> list[tuple[str, Attached]]:
    """Every attached layer by name, in the order of the model's modules."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Attached)]


def trainable_kinds() -> list[str]:
    """The kinds that can be attached."""
    return [name for name in plugins.names("adapters") if hasattr(adapters.kind(name), "initial")]


def initial_of(kind: str, settings: Mapping[str, Any]) -> Callable[[Affine], Any]:
    """The kind's first Params as a function of the base layer. Raises UsageError for the kind or its settings."""
    make = getattr(adapters.kind(kind), "initial", None) if kind in plugins.names("adapters") else None
    if make is None:
        raise UsageError(f"kind {kind!r} cannot be trained here; there are: {', '.join(trainable_kinds())}")
    try:
        inspect.signature(make).bind(None, **settings)
    except TypeError as error:
        known = list(inspect.signature(make).parameters)[1:]
        raise UsageError(
            f"kind {kind!r}: {error}; its settings are {', '.join(known)}; of every kind: dropout, train"
        ) from error
    for name in (n for n in settings if n == "rank" or n.endswith("_rank")):
        if type(settings[name]) is not int or settings[name] < 1:
            raise UsageError(f"{name} {settings[name]!r}: expected a whole number of at least 1")
    for name, value in settings.items():
        if name == "scale" and not (isinstance(value, int | float) and math.isfinite(value)):
            raise UsageError(f"scale {value!r}: expected a finite number")
    return lambda base: make(base, **settings)


def attached_layer(
    model: nn.Module,
    name: str,
    kind: str,
    initial: Callable[[Affine], Any],
    *,
    dropout: float = 0.0,
    made: type[Attached] = Attached,
) -> Attached:
    """The trainable layer that is to stand in this one's place. Raises UsageError for a dropout without a place."""
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout {dropout!r}: expected a share of at least 0 and below 1")
    if dropout and not hasattr(adapters.kind(kind), "DROPOUT"):
        raise UsageError(f"kind {kind!r} has no dropout in its paper; leave it out")
    layer = model.get_submodule(name)
    if channel_groups(layer) != 1:
        raise UsageError(
            f"{name}: a convolution in {channel_groups(layer)} groups, which no adapter is trained on here"
        )
    attached = made(layer, layout_of(name, layer), kind, initial(plain_map(layer, name)), dropout)
    if made is Attached:
        _freeze_unread(attached)
    return attached


def _freeze_unread(layer: Attached) -> None:
    """What the formula does not read, as a GLoRA path does of the others' tensors, is not trained."""
    with torch.enable_grad():
        base = layer.frozen()
        y = adapters.kind(layer.kind).apply(base.weight.new_zeros(1, layer.in_features), base, layer.params())
        tensors = [p for p in layer.adapter.values() if p.requires_grad]
        read = torch.autograd.grad(y.sum(), tensors, allow_unused=True) if y.requires_grad else [None] * len(tensors)
    for parameter, gradient in zip(tensors, read, strict=True):
        parameter.requires_grad_(gradient is not None)


def plain_map(layer: Any, name: str) -> Affine:
    """What a linear layer computes, without gradients."""
    bias = getattr(layer, "bias", None)
    return Affine(matrix(layer.weight.detach(), layout_of(name, layer)), None if bias is None else bias.detach())


def _key(name: str) -> str:
    return name.replace(".", "_")  # the name of a parameter holds no dot
