"""What the kinds made of low-rank pairs share: their shapes, and random ones without a zero for ``example``."""

from __future__ import annotations

from reparam_export.affine import Affine, Bottleneck, Tensor


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
