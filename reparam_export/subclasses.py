"""Subclasses of torch's layers with a forward of their own: those that compute what their class does are known by trying them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCALE = "embed_scale"  # of BART's, Gemma's and other models' word embeddings; peft looks for this very name


def scale_of(module: nn.Module) -> Tensor | float | None:
    """The one number that a subclass of nn.Embedding multiplies its vectors by, as it has it; None where there is none."""
    import torch
    from torch import nn

    scale = getattr(module, SCALE, None)
    if type(module).forward is nn.Embedding.forward or isinstance(scale, bool) or scale is None:
        return None
    if isinstance(scale, torch.Tensor):
        return scale.detach().reshape(()) if scale.numel() == 1 else None
    return float(scale) if isinstance(scale, int | float) else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Does this subclass of nn.Linear, nn.Embedding or a convolution compute what these do, on inputs of several sizes, in float64?

    Embeddings may be multiplied by ``scale_of`` them, whatever number it is. Tried on a small layer of the same class and settings, so that
    neither a layer's size nor the meta device matters. One that has other parameters or layers in it is not plain.
    """
    import torch
    from torch import nn

    from reparam_export.float64 import pure_float64

    forwards: list[Any] = [type(module).forward, kind.forward]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), pure_float64():
            small = _shrunk(module, generator)
            scale = scale_of(small) if kind is nn.Embedding else None
            for x in _probes(small, generator):
                found, expected = (forward(small, x) for forward in forwards)
                expected = expected if scale is None else expected * scale
                if found.shape != expected.shape or found.dtype != expected.dtype:
                    return False
                if not torch.allclose(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max())):
                    return False
    except Exception:  # a forward of somebody else's, on what it is not made for
        return False
    return True


def _shrunk(module: nn.Module, generator: torch.Generator) -> Any:
    """A layer of the same class and settings with few random numbers in float64. Raises ValueError for one that holds anything else."""
    import torch
    from torch import nn

    small: Any = copy.copy(module)
    shape: tuple[int, ...]
    if module._modules or module._parameters.keys() - {"weight", "bias"}:
        raise ValueError("it holds more than a weight and a bias")
    if isinstance(module, nn.Embedding):
        shape = (11, 6)
        small.num_embeddings, small.embedding_dim = shape
        small.padding_idx = None if module.padding_idx is None else module.padding_idx % 11
        if scale_of(module) is not None:
            _put_scale(small, 1.7)  # on the meta device it has no number; and any number must be taken as it is
    elif isinstance(module, nn.Linear):
        shape = (7, 5)
        small.out_features, small.in_features = shape
    else:
        groups, kernel = (getattr(module, name) for name in ("groups", "kernel_size"))
        shape = (2 * groups, 3, *kernel)
        small.out_channels, small.in_channels = 2 * groups, 3 * groups
    shapes: dict[str, tuple[int, ...]] = {"weight": shape, "bias": shape[:1]}
    small.__dict__["_parameters"] = {
        name: None if old is None else nn.Parameter(torch.randn(shapes[name], generator=generator, dtype=torch.float64))
        for name, old in module._parameters.items()
    }
    return small


def _put_scale(small: Any, scale: float) -> None:
    import torch

    if SCALE in small._buffers:
        small.__dict__["_buffers"] = small._buffers | {SCALE: torch.tensor(scale, dtype=torch.float64)}
    else:
        setattr(small, SCALE, scale)


def _probes(small: Any, generator: torch.Generator) -> Iterator[Tensor]:
    """Seeded inputs of several shapes, and for the numbers of several sizes, those of attention masks and far outliers among them."""
    import torch
    from torch import nn

    if isinstance(small, nn.Embedding):
        for size in ((3,), (1, 1), (2, 9)):
            yield torch.randint(small.num_embeddings, size, generator=generator)
        return
    if isinstance(small, nn.Linear):
        shapes: list[tuple[int, ...]] = [(1, 5), (4, 5), (2, 3, 5), (1, 150, 5)]
    else:
        spatial = [(width - 1) * gap + 1 for width, gap in zip(small.kernel_size, small.dilation, strict=True)]
        shapes = [(2, small.in_channels, *(width + more for width in spatial)) for more in (0, 4, 9)]
    for shape in shapes:
        for scale in (0.01, 1.0, 100.0, 1e5):
            yield scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def scales_and_shifts(norm: nn.Module) -> bool:
    """Is the forward of this kind of nn.LayerNorm x^ * weight + bias, with x^ independent of both, on the last axis or on the first?"""
    import torch

    generator = torch.Generator().manual_seed(0)
    sizes = norm.get_parameter("weight").shape
    shapes = ((2, *sizes), (2, *sizes, 3, 5))  # the second: images, channels first
    for shape in shapes if len(sizes) == 1 else shapes[:1]:
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        try:
            return _is_scaled(_real(norm), x)
        except Exception:  # a forward of somebody else's, on a shape that it may not be made for
            continue
    return False


def _real(norm: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, with random numbers in it: with a weight of ones and a bias of zeros every norm would be plain."""
    import torch

    copied = copy.deepcopy(norm)
    copied = (copied.to_empty(device="cpu") if norm.get_parameter("weight").is_meta else copied).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return copied


def _is_scaled(norm: nn.Module, x: Tensor) -> bool:
    import torch

    weight, bias = norm.get_parameter("weight"), norm._parameters.get("bias")
    axes = weight.shape if x.ndim < 4 else (*weight.shape, 1, 1)
    with torch.no_grad():
        found = norm(x)
        norm.weight = torch.nn.Parameter(torch.ones_like(weight))
        if bias is not None:
            norm.bias = torch.nn.Parameter(torch.zeros_like(bias))
        expected = norm(x) * weight.reshape(axes) + (0 if bias is None else bias.reshape(axes))
    return bool(torch.allclose(found, expected, rtol=1e-12, atol=1e-12))
