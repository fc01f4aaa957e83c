"""How good a candidate of a supernet is: fold its paths into the weights and measure the plain model.

The plain model is built once; for each candidate only its weights are written anew. ``python -m benchmarks.search`` measures how much
faster that is than running the supernet on the candidate's paths.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reparam_export.adapters import glora
from reparam_export.affine import Affine
from reparam_export.errors import UsageError
from reparam_export.layouts import matrix, stored
from reparam_export.state import content_digest, digest_of
from reparam_export.training.space import Candidate
from reparam_export.training.supernet import Sampled, Supernet

Measure = Callable[[nn.Module], float]  # a model in eval mode -> how good it is, more is better
PLAIN = (int, float, complex, str, bytes, type(None))  # values that their ``repr`` tells apart


def accuracy(batches: Iterable[tuple[Any, Tensor]]) -> Measure:
    """The share of right answers, 0 to 1, as a measure. batches: (inputs, classes (batch,)), read once and kept."""
    return _Accuracy(list(batches))


class _Accuracy:
    def __init__(self, batches: list[tuple[Any, Tensor]]) -> None:
        self.batches = batches

    @property
    def identity(self) -> str:
        """Of the data, however the inputs hold it. Raises UsageError for data whose content is not known."""
        return _identity({f"{n}.{k}": part for n, batch in enumerate(self.batches) for k, part in enumerate(batch)})

    def __call__(self, model: nn.Module) -> float:
        right = total = 0
        with torch.inference_mode():
            for inputs, classes in self.batches:
                right += int((model(inputs).argmax(-1) == classes).sum())
                total += classes.numel()
        return right / total


class Unfused:
    """Evaluates a candidate on the supernet itself, with its paths fixed; the supernet is left as it was."""

    def __init__(self, net: Supernet, measure: Measure) -> None:
        self.net, self.measure = net, measure

    def __call__(self, candidate: Candidate) -> float:
        net, before, training = self.net, self.net.fixed, self.net.model.training
        try:
            return self.measure(net.fix(candidate).model.eval())
        finally:
            net.model.train(training)
            net.free() if before is None else net.fix(before)


class Fused:
    """Evaluates a candidate as the plain model with its paths folded in: the same function without GLoRA's work.

    The supernet is copied; training it further does not change what is evaluated. Folding is done in the layers' own dtype.
    """

    def __init__(self, net: Supernet, measure: Measure) -> None:
        self.measure, self.space = measure, net.space
        self.model = copy.deepcopy(net.model).eval().requires_grad_(False)
        _stop_drawing(self.model)
        self.sources = [_Source(self.model.get_submodule(name)) for name in net.space.layers]
        self.layers = []
        for name, source in zip(net.space.layers, self.sources, strict=True):
            parent, _, attribute = name.rpartition(".")
            plain = source.plain()
            setattr(self.model.get_submodule(parent), attribute, plain)
            self.layers.append(plain)

    @property
    def identity(self) -> str:
        """Of the weights and the data: a search folder of another supernet is not taken for this one's.

        Raises UsageError for data, or a state of a module, whose content is not known.
        """
        folded = tuple(f"{name}." for name in self.space.layers)  # with the dot: ``fc_head.weight`` is not of ``fc``
        held = {name: t for name, t in self.model.state_dict().items() if not name.startswith(folded)}
        for name, source in zip(self.space.layers, self.sources, strict=True):
            held |= {f"{name}.{key}": tensor for key, tensor in source.layer.state_dict().items()}
        return _identity(held) + str(getattr(self.measure, "identity", ""))

    def __call__(self, candidate: Candidate) -> float:
        self.space.check(candidate)
        with torch.no_grad():
            for layer, source, path in zip(self.layers, self.sources, candidate, strict=True):
                source.fold(path, layer)
        return self.measure(self.model)


class _Source:
    """The tensors of one supernet layer, and how they are folded into a plain one."""

    def __init__(self, layer: Any) -> None:
        self.layer: Sampled = layer
        self.base = Affine(matrix(layer.weight, layer.layout), layer.bias)
        self.params: glora.Params = layer.params()

    def plain(self) -> nn.Module:
        """A layer of the base's own kind, with a bias: a path may create one."""
        weight: Any = self.layer.weight
        plain = self.layer.plain(bias=True)
        plain.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
        plain.bias = nn.Parameter(weight.new_zeros(self.layer.out_features), requires_grad=False)
        return plain

    def fold(self, path: glora.Path, plain: Any) -> None:
        fused = glora.fuse(self.base, replace(self.params, path=path))
        plain.weight.copy_(stored(fused.weight, self.layer.layout, plain.weight.shape))  # type: ignore[arg-type]
        plain.bias.zero_() if fused.bias is None else plain.bias.copy_(fused.bias)


def _stop_drawing(model: nn.Module) -> None:
    """Take the supernet's own hook off a copy of its model; the other hooks are part of the function and stay."""
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "__func__", None) is Supernet._before]:
        del hooks[key]


def _identity(held: Mapping[str, Any]) -> str:
    """sha256 over all that is held, by name. Raises UsageError."""
    return digest_of(leaf for name, value in held.items() for leaf in _leaves(name, value))


def _leaves(name: str, held: Any) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Tensors and plain values, as ``digest_of`` takes them, and the containers: an empty one counts too. Raises UsageError."""
    kind = type(held).__name__
    if isinstance(held, Tensor):
        yield name, str(held.dtype), tuple(held.shape), content_digest(held)
    elif isinstance(held, PLAIN):
        yield name, kind, (), hashlib.sha256(repr(held).encode()).digest()
    elif isinstance(held, Mapping | list | tuple):
        yield name, kind, (len(held),), b""
        for key, value in held.items() if isinstance(held, Mapping) else enumerate(held):
            yield from _leaves(f"{name}[{key!r}]", value)
    else:
        raise UsageError(
            f"{name} (batch.part of the data, or a state of the model) is a {kind}, so a search folder cannot tell whether it is "
            "the same when it goes on; expected tensors, numbers and strings, also in lists, tuples and mappings; "
            "convert it, or search without a folder"
        )
