"""Which axes of an output belong to the samples: usually the first; both of images x texts; none of a constant.

``Axes`` names each such axis and how many entries a sample has on it: ``((0, 1),)`` is one row a sample,
``((0, 1), (1, 1))`` each with each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Axes = tuple[tuple[int, int], ...]
ROWS: Axes = ((0, 1),)


def is_plain(shape: Sequence[int]) -> bool:
    """Does the shape of an answer to one sample leave no doubt that its one axis of samples is the first?"""
    return [axis for axis, size in enumerate(shape) if size == 1] == [0]


def axes_of(one: Sequence[int], two: Sequence[int]) -> Axes | None:
    """From the shapes of the answers to one sample and to two; None when they are not made of samples."""
    if len(one) != len(two) or any(size not in (own, 2 * own) for own, size in zip(one, two, strict=True)):
        return None
    return tuple((axis, own) for axis, (own, size) in enumerate(zip(one, two, strict=True)) if size != own)


def chosen(tensor: Tensor, axes: Axes, index: Tensor) -> Tensor:
    """The answer to the samples of ``index`` in one batch, out of the answer to all of them in one."""
    import torch

    for axis, count in axes:
        entries = (index[:, None] * count + torch.arange(count)).flatten()
        tensor = tensor.index_select(axis, entries)
    return tensor


def fits(tensor: Tensor, axes: Axes, samples: int) -> bool:
    """Has an answer the shape that so many samples have?"""
    return all(axis < tensor.ndim and tensor.shape[axis] == count * samples for axis, count in axes)
