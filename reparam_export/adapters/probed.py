"""Any affine module f at all: b' = f(0) and W'^T = f(I) - f(0), in float64, after testing that f is affine.

An affine map is known completely by what it does to 0 and to the unit vectors. The test: f(x + y) - f(y) = f(x) - f(0) on random
x, y of several sizes, no dependence on batch or position, the same answer twice. A module that fails it is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from reparam_export.affine import Affine, Tensor, read_out, to_dtype
from reparam_export.calls import evaluated
from reparam_export.errors import NotAffineError
from reparam_export.float64 import pure_float64


@dataclass(frozen=True)
class Params:
    """module: nn.Module that holds its own base layer. takes: "linear": rows (..., in) -> (..., out); "embedding": ids; "conv": images.

    stride and padding of the image are those of ``window``, the plain convolution inside; the kind's rows are its patches.
    """

    module: Any
    name: str = "module"
    takes: str = "linear"
    window: Any = None
    copies: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # the module in other dtypes


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    with exactly(x.dtype):
        return on_rows(p, x.dtype)(x)


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    with exactly(torch.float64):
        call = on_rows(p, torch.float64)
        if p.takes != "embedding":  # a table is linear in one-hot rows whatever is in it
            check_affine(call, base.in_features, p)
        probed = read_out(call, base.in_features, torch.float64)
    bias: Any = probed.bias
    return to_dtype(Affine(probed.weight, bias if bool((bias != 0).any()) else None), base.weight.dtype)


def check_affine(call: Callable[[Tensor], Tensor], in_features: int, p: Params) -> None:
    """Raises NotAffineError that names the module."""
    deviation, allowed = affinity(call, in_features)
    if not deviation <= allowed:
        raise NotAffineError(
            f"{p.name}: {type(p.module).__name__} is not an affine map: f(x + y) - f(y) and f(x) - f(0) differ by "
            f"{deviation:.1e} of the output, at most {allowed:.1e} is rounding; it gates, routes or activates and "
            "cannot be folded",
            modules=(p.name,),
            reason=f"deviation {deviation:.1e} > {allowed:.1e}",
        )


def affinity(call: Callable[[Tensor], Tensor], in_features: int, seed: int = 0) -> tuple[float, float]:
    """How far a float64 function of rows is from affine, and how far rounding may take it; both relative to the output's size.

    The allowance is that of a module which computes in float32 inside: in_features * 2**-24.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    deviation = 0.0
    cases = (*((size, (4, 3)) for size in (1.0, 1e-2, 1e2, 1e5)), (1.0, (1, 1)), (1.0, (150, 1)), (1.0, (2, 70)))
    for size, rows in cases:
        x, y = (size * torch.randn(*rows, in_features, generator=generator, dtype=torch.float64) for _ in range(2))
        zero = call(torch.zeros_like(x))
        parts = call(x + y), call(y), call(x), zero
        scale = max(float(part.abs().max()) for part in parts)
        gaps = (
            parts[0] - parts[1] - (parts[2] - zero),
            call(x[-1:, -1:]) - parts[2][-1:, -1:],  # alone, or in a batch at some position
            zero - zero[:1, :1],
            call(x) - parts[2],
        )
        scaled = float(((call(x / size) - zero) * size - (parts[2] - zero)).abs().max())  # the same at another size
        scaled -= (
            size * float(zero.abs().max()) * 2.0**-22
        )  # what float32 inside may lose of a small answer beside the bias
        worst = max(scaled, *(float(gap.abs().max()) for gap in gaps))
        deviation = max(deviation, worst / scale if scale > 0 else worst)
        if not all(bool(part.isfinite().all()) for part in parts):
            deviation = float("nan")
            break
    return deviation, max(in_features, 16) * 2.0**-24


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {}


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    """Size of what is summed in ``apply``: the module is opaque, so its outputs stand for its inner sums."""
    return apply(x, base, p).abs() + 2 * apply(0 * x, base, p).abs()


def example(seed: int, base: Affine) -> Params:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    inner = nn.Linear(base.in_features, base.out_features).double()
    return Params(nn.Sequential(inner, nn.Linear(base.out_features, base.out_features).double()), "example")


def describe(p: Params) -> dict[str, Any]:
    return {"module": type(p.module).__name__}


def on_rows(p: Params, dtype: Any) -> Callable[[Tensor], Tensor]:
    """The module in that dtype, in eval mode, as a function of rows (..., in) -> (..., out)."""
    import torch

    if dtype not in p.copies:
        p.copies[dtype] = evaluated(copy.deepcopy(p.module).to(dtype))
    module = p.copies[dtype]
    if p.takes == "linear":
        return lambda x: module(x)
    if p.takes == "embedding":
        return lambda x: x @ module(torch.arange(x.shape[-1])).to(dtype)
    return lambda x: _on_patches(module, p.window, x)


def _on_patches(module: Any, window: Any, x: Tensor) -> Tensor:
    """A convolution on patches (..., channels * kernel): each lies alone in an image where one output sees it, and nothing else."""
    kernel, stride, dilation = window.kernel_size, window.stride, window.dilation
    padding = window._reversed_padding_repeated_twice[-2::-2]  # before each axis, the first axis first
    place = [
        -(-pad // step) for pad, step in zip(padding, stride, strict=True)
    ]  # the first output that sees no padding
    start = [at * step - pad for at, step, pad in zip(place, stride, padding, strict=True)]
    extent = [(size - 1) * gap + 1 for size, gap in zip(kernel, dilation, strict=True)]
    images = x.new_zeros(x[..., 0].numel(), window.in_channels, *(s + e for s, e in zip(start, extent, strict=True)))
    spots = tuple(slice(s, s + e, gap) for s, e, gap in zip(start, extent, dilation, strict=True))
    images[(slice(None), slice(None), *spots)] = x.reshape(len(images), window.in_channels, *kernel)
    return module(images)[(slice(None), slice(None), *place)].reshape(*x.shape[:-1], -1)


@contextmanager
def exactly(dtype: Any) -> Iterator[None]:
    """No gradients; float64 stays float64 inside, also in constants that a layer makes in torch's default dtype."""
    import torch

    default = torch.get_default_dtype()
    with torch.no_grad(), torch.sparse.check_sparse_tensor_invariants(enable=False):  # type: ignore[no-untyped-call]  # else torch warns
        if dtype != torch.float64:
            yield
            return
        torch.set_default_dtype(torch.float64)
        try:
            with pure_float64():
                yield
        finally:
            torch.set_default_dtype(default)
