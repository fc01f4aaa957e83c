"""What the kinds made of low-rank pairs share: shapes, what they are trained from, random ones without a zero for ``example``."""

from __future__ import annotations

from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.errors import UsageError

INITS = ("xavier", "kaiming", "normal")


class Draw:
    """Draws float64 tensors from one seeded generator; entries are between 0.1 and 1 in size, either sign."""

    def __init__(self, seed: int) -> None:
        import torch

        self._torch = torch
        self._generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        torch = self._torch
        size = torch.rand(shape, generator=self._generator, dtype=torch.float64) * 0.9 + 0.1
        return size * torch.where(torch.rand(shape, generator=self._generator) < 0.5, -1.0, 1.0)

    def integer(self, low: int, high: int) -> int:
        return int(self._torch.randint(low, high, (), generator=self._generator))

    def choice(self, options: tuple[str, ...]) -> str:
        return options[self.integer(0, len(options))]

    def bottleneck(self, rank: int, in_features: int, out_features: int, *, bias: bool) -> Bottleneck:
        """A low-rank pair scaled so that its output is about as large as its input."""
        down = Affine(self.tensor(rank, in_features) / in_features**0.5, self.tensor(rank) if bias else None)
        up = Affine(self.tensor(out_features, rank) / rank**0.5, self.tensor(out_features) if bias else None)
        return Bottleneck(down, up)


def bottleneck_shapes(name: str, pair: Bottleneck, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a low-rank pair's tensors by dotted name; the rank is that of ``down``."""
    rank = pair.rank
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.down.weight": (rank, in_features),
        f"{name}.up.weight": (out_features, rank),
    }
    if pair.down.bias is not None:
        shapes[f"{name}.down.bias"] = (rank,)
    if pair.up.bias is not None:
        shapes[f"{name}.up.bias"] = (out_features,)
    return shapes


def initial_pair(
    like: Tensor, rank: int, in_features: int, out_features: int, *, init: str, bias: bool = False
) -> Bottleneck:
    """A pair that changes nothing yet: a random way down, a zero way up, zero biases; dtype and device of ``like``.

    init: "xavier" (uniform), "kaiming" (uniform with a = sqrt(5), as loralib) or "normal" (deviation 0.02).
    """
    down = drawn(like.new_empty(rank, in_features), init)
    up = like.new_zeros(out_features, rank)
    return Bottleneck(
        Affine(down, like.new_zeros(rank) if bias else None), Affine(up, like.new_zeros(out_features) if bias else None)
    )


def drawn(tensor: Tensor, init: str) -> Tensor:
    """The tensor, filled from torch's global generator. Raises UsageError for an unknown ``init``."""
    from torch import nn

    if init == "xavier":
        return nn.init.xavier_uniform_(tensor)
    if init == "kaiming":
        return nn.init.kaiming_uniform_(tensor, a=5**0.5)
    if init == "normal":
        return nn.init.normal_(tensor, std=0.02)
    raise UsageError(f"init {init!r}: expected one of {', '.join(INITS)}")


def parts(what: str, size: int, count: int) -> int:
    """The size of each of ``count`` equal parts. Raises UsageError when there are none."""
    if count < 1 or size % count:
        raise UsageError(f"{what} {count}: expected a whole number that divides {size}, the size of the layer")
    return size // count
