"""The unfused model as its user would ship it: the one that fusing is compared with when time is taken.

The proof's reference (``assembly.adapted``) spells every formula out, layer by layer, as the paper has it. Its speed is
nobody's. Here a frozen layer runs the torch function it always ran, low-rank pairs are linear layers, every tensor of an
adapter is a parameter, and what the base gives is computed once. Kinds with ``RECOMPUTES`` (GLoRA, trained tokens) make
their whole weight anew at every call, as their authors' code does, and multiply once. In a stack, each adapter runs on what
the ones before it give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from reparam_export.adapters import Kind, kind
from reparam_export.affine import Affine, Computed, map_tensors, tensors_of
from reparam_export.assembly import reach
from reparam_export.checkpoints import Adapter, components
from reparam_export.errors import FusionError
from reparam_export.layouts import Layout, channel_groups, layout_of, matrix, outputs_of

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


class Native(Affine):
    """A map that is computed by the torch function of its layer, on a ``LayerInput`` or on plain rows (..., in)."""

    def __call__(self, x: Any) -> Any:
        from torch.nn import functional as F

        return x.through(self) if isinstance(x, LayerInput) else F.linear(x, self.weight, self.bias)


class LayerInput:
    """The input of a convolution, an embedding or a norm; a map is put on it by that layer's own function, features last."""

    def __init__(self, x: Tensor, layer: Any) -> None:
        self.x, self.layer = x, layer

    def through(self, affine: Affine) -> Tensor:
        """x through a matrix (out, in) of the layer's layout -> (..., out)."""
        from torch import nn
        from torch.nn import functional as F

        if isinstance(self.layer, nn.Embedding):
            y = F.embedding(self.x, affine.weight.T)
            return y if affine.bias is None else y + affine.bias
        if isinstance(self.layer, nn.LayerNorm):
            shape = self.layer.normalized_shape
            return F.layer_norm(self.x, shape, affine.weight.reshape(shape), affine.bias, self.layer.eps)
        kernel = affine.weight.reshape(affine.weight.shape[0], *self.layer.weight.shape[1:])
        convolved: Tensor = self.layer._conv_forward(self.x, kernel, affine.bias)
        return convolved.movedim(1, -1)


def unfused(module: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    """The base with every touched layer replaced; ``module`` is changed and returned, the tensors take its layers' dtypes.

    Raises FusionError for an adapter that has no form here which a user would ship.
    """
    groups: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        groups.setdefault(adapter.module, []).append(adapter)
    for name, group in groups.items():
        parent, _, attribute = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, attribute, _layer(name, getattr(owner, attribute), group))
    return module.eval()


def _layer(name: str, module: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    """One touched layer with its adapters. Raises FusionError."""
    for adapter in adapters:
        if adapter.parameter or adapter.kind == "probed":
            raise FusionError(f"{adapter.site}: there is no {adapter.kind} on it to be shipped unfused")
    layout = layout_of(name, module)
    if layout == "conv" and channel_groups(module) != 1:
        raise FusionError(f"{name}: there is no adapter on a convolution in groups to be shipped unfused")
    wrapped = layout in ("embedding", "conv", "norm")
    for adapter in adapters:
        if wrapped and not _on_outputs(adapter.kind, layout, module):
            raise FusionError(f"{name}: there is no {adapter.kind} on a {type(module).__name__} to be shipped unfused")
    return _module(module, adapters, layout, wrapped=wrapped)


def _on_outputs(name: str, layout: Layout, module: nn.Module) -> bool:
    """Does the kind's formula run on an input that is not rows: on the layer's outputs, or as another such layer beside it?"""
    from torch import nn

    if layout == "norm":
        return name == "ssf" and isinstance(module, nn.LayerNorm)
    return name in ("lora", "ssf") or recomputes(kind(name))


def _module(module: nn.Module, adapters: Sequence[Adapter], layout: Layout, *, wrapped: bool) -> nn.Module:
    from torch import nn as torch_nn

    weight: Any = module.get_parameter("weight")
    kinds = [kind(a.kind) for a in adapters]
    tensors = [
        map_tensors(a.params, lambda t: t.detach().clone().to(weight.dtype) if t.is_floating_point() else t)
        for a in adapters
    ]

    place = {id(adapter): number for number, adapter in enumerate(adapters)}
    stacks = [(reach(stack), [place[id(adapter)] for adapter in stack]) for stack in components(adapters)]

    class Unfused(torch_nn.Module):
        """y = apply(x, base, p) on each adapter's outputs, the layer's own output on all others."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = weight, getattr(module, "bias", None)
            self.out_features, self.in_features = matrix(weight, layout).shape
            self._fields = [map_tensors(params, lambda t: t.to("meta")) for params in tensors]
            self._names = [[_key(number, n) for n in tensors_of(params)] for number, params in enumerate(tensors)]
            for names, params in zip(self._names, tensors, strict=True):
                for key, tensor in zip(names, tensors_of(params).values(), strict=True):
                    if tensor.is_floating_point():
                        self.register_parameter(key, torch_nn.Parameter(tensor, requires_grad=False))
                    else:
                        self.register_buffer(key, tensor)

        def params(self, number: int) -> Any:
            held = (getattr(self, key) for key in self._names[number])
            return _native(map_tensors(self._fields[number], lambda _: next(held)))

        def forward(self, x: Tensor) -> Tensor:
            import torch

            given: Any = LayerInput(x, module) if wrapped else x
            base = Native(matrix(self.weight, layout), self.bias)
            whole = _once(base)
            y: Any = None
            for rows, numbers in stacks:
                if rows is None:
                    y = self.stack(base, numbers, 0)(given)
                    break
                y = whole(given) if y is None else y
                part = self.stack(whole.rows(*rows), numbers, rows[0])(given)
                y = torch.cat([y[..., : rows[0]], part, y[..., rows[1] :]], dim=-1)
            found: Tensor = outputs_of(y, module, layout)
            return found

        def stack(self, base: Affine, numbers: Sequence[int], start: int) -> Affine:
            """The map that these adapters make of the outputs from ``start`` on."""
            for number in numbers:
                rows = adapters[number].rows
                inner = None if rows is None else (rows[0] - start, rows[1] - start)
                base = _step(kinds[number], base, self.params(number), inner, adapters[number].weight)
            return base

    return Unfused()


def recomputes(of_kind: Kind) -> bool:
    """Does the authors' code make the whole weight anew at every call?"""
    return bool(getattr(of_kind, "RECOMPUTES", False))


def _step(of_kind: Kind, base: Affine, params: Any, rows: tuple[int, int] | None, weight: float) -> Affine:
    """The map after one adapter on some or all of the outputs; what was there before it is computed once for an input."""
    import torch

    alone = weight == 1 and rows in (None, (0, base.out_features))
    before = base if alone else _once(base)
    start, stop = rows or (0, base.out_features)
    part = before if rows is None or alone else before.rows(start, stop)

    def call(x: Any) -> Any:
        if recomputes(of_kind):
            made = of_kind.fuse(part, params)
            y: Any = Native(made.weight, made.bias)(x)
        else:
            y = of_kind.apply(x, part, params)
        if weight != 1:
            y = part(x) + weight * (y - part(x))
        return y if alone or rows is None else torch.cat([before(x)[..., :start], y, before(x)[..., stop:]], dim=-1)

    return Computed(call, base, _unknown)


def _once(inner: Affine) -> Affine:
    """The same map, computed once for an input."""
    last: list[Any] = [None, None]

    def call(x: Any) -> Any:
        if last[0] is not x:
            last[:] = x, inner(x)
        return last[1]

    return Computed(call, inner, lambda: Affine(inner.weight, inner.bias))


def _unknown() -> Affine:
    raise FusionError("an adapter that reads the weight that another one made has no form that is shipped unfused")


def _native(value: T) -> T:
    """The same Params with every map in them one that torch computes as a linear layer."""
    if isinstance(value, Affine):
        return Native(value.weight, value.bias)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _native(getattr(value, f.name)) for f in fields(value)})
    return value


def _key(number: int, name: str) -> str:
    return f"adapter_{number}_{name.replace('.', '_')}"
