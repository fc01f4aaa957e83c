"""How a torch module stores its matrix, and what rows it multiplies: the bridge between ``nn.Module`` and ``Affine``.

linear       nn.Linear (and subclasses)   weight (out, in)
transposed   transformers' Conv1D         weight (in, out)
embedding    nn.Embedding                 weight (in, out); input rows are one-hot
conv         nn.Conv1d/2d/3d, groups 1    weight (out, in, *kernel); input rows are patches
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from reparam_export.affine import Affine
from reparam_export.errors import FusionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Layout = Literal["linear", "transposed", "embedding", "conv"]


def layout_of(name: str, module: nn.Module) -> Layout:
    """The layout of a module. Raises FusionError when its weight is not a plain matrix (quantized, grouped, other)."""
    from torch import nn

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = next((k for k in kinds if isinstance(module, k)), None)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = plain is not None and type(module).forward is not plain.forward
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
        if module.groups != 1 or module.padding_mode != "zeros":
            raise FusionError(
                f"{name}: a convolution with groups={module.groups}, padding_mode={module.padding_mode!r} "
                "cannot be folded; only groups=1 and zero padding can"
            )
        return "conv"
    raise FusionError(
        f"{name}: the adapter sits on a {type(module).__name__}, which holds no plain weight matrix; "
        "expected Linear, Conv1D, Conv or Embedding"
    )


def matrix(weight: Tensor, layout: Layout) -> Tensor:
    """The stored weight as a matrix (out, in); a view where the layout allows."""
    if layout == "conv":
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


def outputs_of(y: Tensor, layout: Layout) -> Tensor:
    """Undo ``rows_of`` on the output: conv rows (batch, *positions, out) go back to (batch, out, *positions)."""
    return y.movedim(-1, 1) if layout == "conv" else y
