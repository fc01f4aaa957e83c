"""How a torch module stores its matrix, and what rows it multiplies: the bridge between ``nn.Module`` and ``Affine``.

linear       nn.Linear (and subclasses)   weight (out, in)
transposed   transformers' Conv1D         weight (in, out)
embedding    nn.Embedding                 weight (in, out); input rows are one-hot; the outputs may all be multiplied by one number
conv         nn.Conv1d/2d/3d              weight (out, in / groups, *kernel); input rows are patches, of its own channels for each group
norm         nn.LayerNorm, batch norms    weight (out,); each output is a number of its own times its weight, so in is 1

A ``Site`` is one matrix that adapters act on: the weight of such a layer, or a tensor that a module reads directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from reparam_export.affine import Affine
from reparam_export.checkpoints import Adapter
from reparam_export.errors import FusionError
from reparam_export.rounding import round_once
from reparam_export.subclasses import is_plain, scale_of, scales_and_shifts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Layout = Literal["linear", "transposed", "embedding", "conv", "norm"]
OF_TABLES = ("lora", "dora", "tokens")  # that peft multiplies by the scale of the embeddings which they are on
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
        check_scaled(name, adapter.kind, scaled=layout == "embedding" and scale_of(module) is not None)
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
        own = not scales_and_shifts(module)
    elif plain is not None and plain not in norms and own:  # Falcon's linear layers, Gemma's embeddings
        own = not is_plain(module, plain)
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


def check_scaled(name: str, kind: str, *, scaled: bool) -> None:
    """Raises FusionError for an adapter on scaled embeddings whose own library adds it to the outputs without their scale."""
    if scaled and kind not in OF_TABLES:
        raise FusionError(
            f"{name}: {kind} on embeddings that are multiplied by a number (embed_scale): the library that writes such adapters adds its "
            f"part beside that number, or puts another layer in its place; on these, {', '.join(OF_TABLES)} can be folded"
        )


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


def outputs_of(y: Tensor, module: nn.Module, layout: Layout) -> Tensor:
    """Undo ``rows_of`` on the output: conv rows (batch, *positions, out) go back to (batch, out, *positions); a table's are scaled."""
    if layout == "embedding":
        scale = scale_of(module)
        return y if scale is None else y * (scale if isinstance(scale, float) else scale.to(y.dtype))
    return y.movedim(-1, 1) if layout == "conv" else y
