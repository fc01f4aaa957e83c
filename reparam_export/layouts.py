"""How a torch module stores its matrix, and what rows it multiplies: the bridge between ``nn.Module`` and ``Affine``.

linear       nn.Linear (and subclasses)   weight (out, in)
transposed   transformers' Conv1D         weight (in, out)
embedding    nn.Embedding                 weight (in, out); input rows are one-hot
conv         nn.Conv1d/2d/3d              weight (out, in / groups, *kernel); input rows are patches, of its own channels for each group
norm         nn.LayerNorm, batch norms    weight (out,); each output is a number of its own times its weight, so in is 1

A ``Site`` is one matrix that adapters act on: the weight of such a layer, or a tensor that a module reads directly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from reparam_export.affine import Affine
from reparam_export.checkpoints import Adapter
from reparam_export.errors import FusionError
from reparam_export.rounding import round_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Layout = Literal["linear", "transposed", "embedding", "conv", "norm"]
BIAS_OF = {"weight": "bias", "in_proj_weight": "in_proj_bias"}


@dataclass(frozen=True)
class Site:
    """Where one matrix and its bias are: names in the state dict, how the tensor stores the matrix, which one of a stack."""

    module: str
    tensor: str
    bias: str | None  # None: there is no place for one
    layout: Layout
    expert: int | None = None

    def affine(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Affine:
        """The map that tensors of these names hold, cast to dtype when one is given."""
        whole = tensors[self.tensor].detach()
        weight = matrix(whole if self.expert is None else whole[self.expert], self.layout)
        bias = tensors.get(self.bias) if self.bias else None
        cast = (None if t is None else t.detach() if dtype is None else t.detach().to(dtype) for t in (weight, bias))
        return Affine(*cast)

    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of this site by name, in the module that it was made for."""
        found = {self.tensor: getattr(module, self.tensor.rpartition(".")[2])}
        bias = None if self.bias is None else getattr(module, self.bias.rpartition(".")[2], None)
        return found if bias is None or self.bias is None else found | {self.bias: bias}

    def put(self, new: Affine, old: Tensor, dtype: torch.dtype, *, fresh: bool = False) -> Tensor:
        """The tensor ``old`` with this matrix in it, rounded once to dtype. fresh: ``old`` is a copy that may be changed."""
        old = old.detach()
        if self.expert is None:
            return round_once(stored(new.weight, self.layout, old.shape), dtype)
        whole = old if fresh else old.to(dtype, copy=True)
        whole[self.expert] = round_once(stored(new.weight, self.layout, old[self.expert].shape), dtype)
        return whole


def site_of(module: nn.Module, adapter: Adapter) -> Site:
    """The site of an adapter on this module. Raises FusionError when its tensor is not a plain matrix."""
    name = adapter.module
    if adapter.parameter is None:
        layout = layout_of(name, module)
        return Site(name, f"{name}.weight", f"{name}.bias" if hasattr(module, "bias") else None, layout)
    tensor = module._parameters.get(adapter.parameter)
    wanted = 2 if adapter.expert is None else 3
    if tensor is None or tensor.ndim != wanted or not tensor.is_floating_point():
        raise FusionError(
            f"{adapter.site}: expected a parameter {adapter.parameter} of {wanted} dimensions on a {type(module).__name__}; found "
            f"{'none' if tensor is None else f'{tensor.dtype} {tuple(tensor.shape)}'}"
        )
    if adapter.expert is not None and adapter.expert >= len(tensor):
        raise FusionError(f"{adapter.site}: {name}.{adapter.parameter} is a stack of {len(tensor)} matrices")
    layout = "transposed" if adapter.expert is not None and getattr(module, "is_transposed", False) else "linear"
    bias = BIAS_OF.get(adapter.parameter)
    return Site(
        name,
        f"{name}.{adapter.parameter}",
        f"{name}.{bias}" if bias and hasattr(module, bias) else None,
        layout,
        adapter.expert,
    )


def readers_of_weights() -> tuple[type[nn.Module], ...]:
    """Modules that may read a child's weight without calling the child."""
    from torch import nn

    return (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def touched(adapter: Adapter) -> tuple[str, ...]:
    """Names of the tensors that an adapter may change or create."""
    tensor = adapter.parameter or "weight"
    return tuple(f"{adapter.module}.{part}" for part in (tensor, BIAS_OF.get(tensor)) if part)


def layout_of(name: str, module: nn.Module) -> Layout:
    """The layout of a module. Raises FusionError when its weight is not a plain matrix (quantized, grouped, other)."""
    from torch import nn

    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, *norms)
    plain = next((k for k in kinds if isinstance(module, k)), None)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = plain is not None and type(module).forward is not plain.forward
    if plain is nn.LayerNorm and own:  # timm's has a forward of its own
        own = not _scales_and_shifts(module)
    elif plain is not None and plain not in norms and own:  # Falcon's linear layers
        own = not _is_plain(module, plain)
    own = own or "forward" in vars(module)
    if "weight" not in module._parameters or hooks or own or getattr(module, "max_norm", None) is not None:
        raise FusionError(
            f"{name}: a {type(module).__name__} whose forward is not the plain map of its weight "
            f"({'hooks' if hooks else 'a forward of its own' if own else 'its weight is computed, quantized or renormalised'}) "
            "cannot be folded"
        )
    if plain is nn.Linear:
        return "linear"
    if plain is nn.Embedding:
        return "embedding"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "transposed"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        padded = module.padding == "same" or any(width for width in module.padding if not isinstance(width, str))
        if module.padding_mode != "zeros" and padded:
            raise FusionError(
                f"{name}: a convolution with padding_mode={module.padding_mode!r}: adapters on convolutions pad their input with zeros, so "
                "no weight of this one gives what was trained"
            )
        return "conv"
    if plain in norms and module._parameters["weight"] is not None:
        return "norm"
    raise FusionError(
        f"{name}: the adapter sits on a {type(module).__name__}, which holds no plain weight matrix; "
        "expected Linear, Conv1D, Conv or Embedding"
    )


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Does this subclass of nn.Linear, nn.Embedding or a convolution compute what these do, on inputs of several sizes, in float64?

    Tried on a small layer of the same class and settings, so that neither a layer's size nor the meta device matters. One that has
    other parameters or layers in it is not plain.
    """
    import torch

    from reparam_export.float64 import pure_float64

    forwards: list[Any] = [type(module).forward, kind.forward]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), pure_float64():
            small = _shrunk(module, generator)
            for x in _probes(small, generator):
                found, expected = (forward(small, x) for forward in forwards)
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


def _scales_and_shifts(norm: nn.Module) -> bool:
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


def matrix(weight: Tensor, layout: Layout) -> Tensor:
    """The stored weight as a matrix (out, in); a view where the layout allows."""
    if layout in ("conv", "norm"):
        return weight.reshape(weight.shape[0], -1)
    return weight.T if layout in ("transposed", "embedding") else weight


def stored(matrix: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """The matrix (out, in) in the shape and memory order that the module stores."""
    if layout in ("transposed", "embedding"):
        matrix = matrix.T
    return matrix.reshape(shape).contiguous()


def affine_of(module: nn.Module, layout: Layout, dtype: torch.dtype) -> Affine:
    """The module's own map, its tensors cast to dtype."""
    weight = matrix(module.get_parameter("weight").detach(), layout).to(dtype)
    bias = getattr(module, "bias", None)
    return Affine(weight, None if bias is None else bias.detach().to(dtype))


def rows_of(x: Tensor, module: nn.Module, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The input of the module as rows (..., in) that its matrix multiplies: one-hot ids, patches, or x itself."""
    import torch
    from torch.nn import functional as F

    if layout == "embedding":
        return F.one_hot(x, module.num_embeddings).to(dtype)  # type: ignore[arg-type]
    if layout != "conv":
        return x
    kernel, stride, dilation = (tuple(getattr(module, k)) for k in ("kernel_size", "stride", "dilation"))
    x = F.pad(x, list(module._reversed_padding_repeated_twice))  # type: ignore[arg-type]
    spatial = len(kernel)
    for axis in range(spatial):
        size, step, gap = kernel[axis], stride[axis], dilation[axis]
        x = x.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap] if gap > 1 else x.unfold(2 + axis, size, step)
    # (batch, in, *positions, *kernel) -> (batch, *positions, in * kernel)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    return torch.flatten(x.permute(order), start_dim=1 + spatial)


def grouped(run: Callable[[Tensor], Tensor], rows: Tensor, groups: int) -> Tensor:
    """A map (..., in / groups) -> (..., out) on rows (..., in), of which each group of its outputs sees its own inputs only."""
    import torch

    if groups == 1:
        return run(rows)
    parts = [run(own) for own in rows.chunk(groups, dim=-1)]
    return torch.cat([part.chunk(groups, dim=-1)[number] for number, part in enumerate(parts)], dim=-1)


def channel_groups(module: nn.Module) -> int:
    """In how many groups of channels a convolution maps its inputs; 1 of any other layer."""
    from torch import nn

    return module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1


def outputs_of(y: Tensor, layout: Layout) -> Tensor:
    """Undo ``rows_of`` on the output: conv rows (batch, *positions, out) go back to (batch, out, *positions)."""
    return y.movedim(-1, 1) if layout == "conv" else y
