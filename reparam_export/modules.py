"""One module of a user's own, whatever is in it, as the plain layer that it is: ``fuse_module``.

The module is probed in float64: its answers to 0 and to the unit vectors are the layer's bias and columns. For a convolution each unit
lies alone in an image where one output sees all of its window. What is found has to answer as the module does, on rows of several sizes,
or on images of several shapes, borders included, in its own dtype too; a module that is not affine, or not translation-equivariant, is
refused by name. No finite number of answers is complete: what is affine on rows of sizes 0.01 to 100,000 in batches of up to 150 passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from reparam_export.adapters.probed import Params, check_affine, exactly, on_rows
from reparam_export.affine import Affine, read_out
from reparam_export.calls import evaluated
from reparam_export.errors import FusionError, NotAffineError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def fuse_module(module: nn.Module, like: Layer | None = None, name: str = "module") -> Layer:
    """The one ``nn.Linear`` or ``nn.Conv1d/2d/3d`` that an affine module is, in eval mode; the module itself stays as it is.

    like: a layer of the wanted sizes, kernel, stride, padding and dilation, where the module's own parts do not tell (its numbers are not
    looked at). The result has the dtype and device of the layer inside the module that has its shape, or of its first parameter, and a
    bias where that one has, or where one is needed; each number is rounded once. name: for the errors.
    Raises NotAffineError, FusionError (not finite in its dtype), UsageError (nothing tells what the module takes).
    """
    import torch
    from torch import nn as torch_nn

    if not isinstance(module, torch_nn.Module):
        raise UsageError(f"{name}: expected an nn.Module, found {type(module).__name__}")
    wide = _in_float64(module, name)
    refusals: list[NotAffineError] = []
    for window in [like] if like is not None else _windows(module):
        with exactly(torch.float64):
            try:
                found = (
                    _linear(wide, window, name) if isinstance(window, torch_nn.Linear) else _conv(wide, window, name)
                )
            except NotAffineError as error:
                refusals.append(error)
                continue
        if found is not None:
            layer = _as_stored(found, window, module, name)
            _compare_stored(layer, module, window, name)
            return layer
    if refusals:
        raise refusals[0]
    raise UsageError(
        f"{name}: nothing in this {type(module).__name__} tells what it takes{'' if like is None else ', and not what like says'}; pass "
        "like=nn.Linear(in, out) or a convolution of its sizes, kernel, stride, padding and dilation"
    )


def _in_float64(module: nn.Module, name: str) -> nn.Module:
    try:
        return evaluated(copy.deepcopy(module).to("cpu").double())
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise FusionError(
            f"{name}: this {type(module).__name__} cannot be copied to float64: {type(error).__name__}: {error}"
        ) from error


def _windows(module: nn.Module) -> Iterator[Layer]:
    """Layers that the module may be like: those in it, and linear ones of every size that a matrix in it has; each once."""
    import torch
    from torch import nn as torch_nn

    seen = set()
    layers = [
        m
        for m in module.modules()
        if isinstance(m, torch_nn.Linear | torch_nn.Conv1d | torch_nn.Conv2d | torch_nn.Conv3d)
    ]
    sizes = [getattr(module, "in_features", None), *(n for p in module.parameters() if p.ndim == 2 for n in p.shape)]
    with torch.device("meta"):
        layers += [torch_nn.Linear(n, 1) for n in sizes if isinstance(n, int)]
    for layer in sorted(layers, key=lambda layer: not isinstance(layer, torch_nn.Linear)):
        key = (
            (layer.in_features,)
            if isinstance(layer, torch_nn.Linear)
            else (type(layer), layer.in_channels, *_geometry(layer))
        )
        if key not in seen:
            seen.add(key)
            yield layer


def _geometry(layer: Any) -> tuple[Any, ...]:
    return tuple(getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode"))


def _linear(module: nn.Module, window: nn.Linear, name: str) -> Affine | None:
    """The module as a map of rows of this size; None when it does not take them. Raises NotAffineError."""
    import torch

    params = Params(module, name)
    call = on_rows(params, torch.float64)
    if not _takes(call, (2, 3, window.in_features), ndim=3):
        if not _takes(call, (2, window.in_features), ndim=2):
            return None
        call = _of_rows(call)
    check_affine(call, window.in_features, params)
    return read_out(call, window.in_features, torch.float64)


def _of_rows(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A module that takes a list of rows only, such as one with a BatchNorm1d in it, on rows (..., in)."""
    return lambda x: call(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _conv(module: nn.Module, window: Any, name: str) -> Affine | None:
    """The module as a map of this convolution's patches; None when it does not take its images. Raises NotAffineError."""
    import torch

    extent = [(k - 1) * d + 1 for k, d in zip(window.kernel_size, window.dilation, strict=True)]
    images = [
        (
            batch,
            window.in_channels,
            *(e + more * s + axis for axis, (e, s) in enumerate(zip(extent, window.stride, strict=True))),
        )
        for batch, more in ((1, 0), (2, 1), (3, 3))
    ]
    if not _takes(module, images[2], ndim=len(images[2])):
        return None
    if not all(_takes(module, shape, ndim=len(shape)) for shape in images[:2]):
        raise _no_convolution(
            module, window, name, f"takes images {images[2]}, and not all of {images[:2]}: another convolution"
        )
    patch = window.in_channels * torch.Size(window.kernel_size).numel()
    found = read_out(on_rows(Params(module, name, "conv", window), torch.float64), patch, torch.float64)
    layer = _plain(found, window, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for shape in images:
        for size in (1.0, 1e-2, 1e2):
            image = size * torch.randn(shape, generator=generator, dtype=torch.float64)
            _compare(layer(image), (module(image), module(image)), patch, (module, window, name, shape))
    return found


def _compare(
    expected: Tensor, answers: tuple[Tensor, ...], terms: int, what: tuple[nn.Module, Any, str, tuple[int, ...]]
) -> None:
    """Raises NotAffineError where an answer of the module differs from the convolution's by more than float32 rounding inside may."""
    module, window, name, shape = what
    allowed = max(terms, 16) * 2.0**-24 * max(float(expected.abs().max()), *(float(a.abs().max()) for a in answers))
    for answer in answers:
        same = answer.shape == expected.shape
        worst = float((answer - expected).abs().max()) if same and bool(answer.isfinite().all()) else float("inf")
        if not worst <= allowed:
            gap = answer - expected if same else expected
            for axis in range(2, gap.ndim):
                gap = gap.narrow(axis, 1, max(gap.shape[axis] - 2, 0))
            borders = same and gap.numel() > 0 and bool((gap.abs() <= allowed).all())
            why = (
                "no convolution at the borders, as where a bias is padded with zeros"
                if borders
                else "not affine, not the same at every position, or another convolution"
            )
            said = f"answers images {shape} with shape {tuple(answer.shape)} and differs by {worst:.1e}, at most {allowed:.1e} is "
            raise _no_convolution(module, window, name, f"{said}rounding: {why}")


def _no_convolution(module: nn.Module, window: Any, name: str, why: str) -> NotAffineError:
    return NotAffineError(
        f"{name}: {type(module).__name__} is not a convolution with kernel {window.kernel_size}, stride {window.stride}, padding "
        f"{window.padding} and dilation {window.dilation} and cannot be folded; it {why}",
        modules=(name,),
        reason=why,
    )


def _takes(call: Callable[[Tensor], Any], shape: tuple[int, ...], ndim: int) -> bool:
    """Does the module take such a tensor of zeros, and answer with one tensor of that many dimensions?"""
    import torch

    try:
        answer = call(torch.zeros(shape, dtype=torch.float64))
    except Exception:  # whatever a module raises about a tensor that it is not made for
        return False
    return (
        isinstance(answer, torch.Tensor) and answer.ndim == ndim and answer.is_floating_point() and answer.numel() > 0
    )


def _plain(found: Affine, window: Any, dtype: torch.dtype) -> Layer:
    """The plain layer with this matrix, on the CPU; groups as the window has them where the matrix is zero elsewhere."""
    import torch
    from torch import nn as torch_nn

    out, bias = found.out_features, found.bias is not None
    with torch.device("meta"):
        if isinstance(window, torch_nn.Linear):
            layer: Any = torch_nn.Linear(found.in_features, out, bias=bias)
        else:
            kind: Any = next(k for k in (torch_nn.Conv1d, torch_nn.Conv2d, torch_nn.Conv3d) if isinstance(window, k))
            groups = _groups(found, window)
            layer = kind(window.in_channels, out, *_geometry(window)[:4], groups, bias, window.padding_mode)
    weight = found.weight
    if not isinstance(window, torch_nn.Linear):
        weight = weight.reshape(out, window.in_channels, *window.kernel_size)
        rows, columns = out // layer.groups, window.in_channels // layer.groups
        parts = [weight[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(layer.groups)]
        weight = torch.cat(parts)
    layer.weight = torch_nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if found.bias is not None:
        layer.bias = torch_nn.Parameter(found.bias.to(dtype), requires_grad=False)
    return layer  # type: ignore[no-any-return]


def _groups(found: Affine, window: Any) -> int:
    """The window's groups, where the matrix keeps to them, else 1."""
    groups, out = window.groups, found.out_features
    if out % groups:
        return 1
    blocks = found.weight.reshape(groups, out // groups, groups, -1)
    across = [blocks[g, :, h] for g in range(groups) for h in range(groups) if g != h]
    return 1 if any(bool((part != 0).any()) for part in across) else int(groups)


def _as_stored(found: Affine, window: Layer, module: nn.Module, name: str) -> Layer:
    """The plain layer in the module's own dtype, on its device. Raises FusionError when a number does not fit the dtype."""
    import torch

    kept = next((m for m in module.modules() if _same_shape(m, found, window)), module)
    tensors = [t for m in (kept, module) for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
    dtype, device = (
        (tensors[0].dtype, tensors[0].device) if tensors else (torch.get_default_dtype(), torch.device("cpu"))
    )
    needed = found.bias is not None and bool((found.bias != 0).any())
    if not needed and getattr(kept, "bias", None) is None:
        found = Affine(found.weight)
    layer = _plain(found, window, dtype).to(device)
    if not all(bool(p.isfinite().all()) for p in layer.parameters()):
        raise FusionError(f"{name}: not finite after rounding to {dtype}; the values exceed the format")
    return layer.train(module.training).requires_grad_(any(p.requires_grad for p in module.parameters()))


def _compare_stored(layer: Any, module: nn.Module, window: Any, name: str) -> None:
    """Raises NotAffineError when the module answers otherwise in its own dtype than in float64, by more than rounding may."""
    import torch
    from torch import nn as torch_nn

    own = evaluated(copy.deepcopy(module).to("cpu"))
    layer = copy.deepcopy(layer).to("cpu")
    dtype = layer.weight.dtype
    shape: tuple[int, ...] = (2, 3, window.in_features) if isinstance(window, torch_nn.Linear) else ()
    if not shape:
        extent = ((k - 1) * d + 1 for k, d in zip(window.kernel_size, window.dilation, strict=True))
        shape = (2, window.in_channels, *(e + s for e, s in zip(extent, window.stride, strict=True)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        answer = _answer(own, x)
        if answer is None:  # its parts are of several dtypes, or the CPU has no such arithmetic
            return
    terms = layer.weight[0].numel()
    size = max(float(expected.abs().max()), float(layer.weight.detach().abs().flatten(1).sum(1).max() * x.abs().max()))
    worst, allowed = float((answer - expected).abs().max()), 4 * (terms + 16) * torch.finfo(dtype).eps * size
    if not worst <= allowed:
        raise NotAffineError(
            f"{name}: {type(module).__name__} answers otherwise in {dtype} than in float64: by {worst:.1e}, at most {allowed:.1e} is "
            "rounding",
            modules=(name,),
            reason="depends on the dtype",
        )


def _answer(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the module answers, given x or its rows as a list; None when it takes neither."""
    for given in (x, x.flatten(0, -2)):
        try:
            answer: Tensor = module(given)
        except (IndexError, RuntimeError, ValueError, NotImplementedError):
            continue
        return answer if given is x else answer.reshape(*x.shape[:-1], -1)
    return None


def _same_shape(part: Any, found: Affine, window: Any) -> bool:
    """Is this the layer that the module wraps: of its kind, with its inputs and outputs?"""
    names = (
        ("in_features", "out_features")
        if hasattr(window, "in_features")
        else ("in_channels", "out_channels", "kernel_size")
    )
    own = tuple(getattr(part, n, None) for n in names)
    return hasattr(part, "weight") and own == (
        getattr(window, names[0]),
        found.out_features,
        *(getattr(window, n) for n in names[2:]),
    )
