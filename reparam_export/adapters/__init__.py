"""One adapter kind, one file. A kind is a module with the names of ``Kind``; its docstring is its formula.

``apply`` is the specification: the unfused forward, transcribed from the paper. ``fuse`` is the claim: the closed form.
Both see ``Affine`` maps and the kind's own ``Params`` only, never a model or a tensor name of a file.

Several adapters on one layer are a stack of ``Step``s: each, in order, acts on the map that the ones before it made.

A kind may also have

    initial(base, **settings)   the Params that training starts from: the paper's, with which it changes nothing
    DROPOUT                     where its low-rank pairs drop out in training: "before" or "after" the way down
    count(p)                    trainable parameters as its paper counts them, where that is not the size of all tensors
    branches(base, p)           the parts of the change of W that its paper tells apart, by name
    magnitude(x, base, p)       the size of what ``apply`` sums, where its formula on absolute values does not tell it
    low_rank(base, p)           the closed form by its factors, by which a layer larger than memory is folded a few rows at a time; there
                                ``base.weight`` may be a matrix on disk that only knows ``@``, from either side, and its ``shape``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from reparam_export import plugins
from reparam_export.affine import Affine, Computed, LowRank, Tensor, map_tensors, read_out, to_dtype, units

Shapes = dict[str, tuple[int, ...]]


class Kind(Protocol):
    """What ``plugins.load("adapters", name)`` returns. Tensors are torch tensors of one float dtype.

    A kind whose ``apply`` on absolute values does not bound the sizes of the terms it sums (it has norms, inverses, signs of its
    own) also has ``magnitude(x, base, p)``, which does: x (..., in) -> (..., out), all entries at least 0.
    """

    @property
    def Params(self) -> type[Any]:  # noqa: N802
        """Frozen dataclass of tensors and numbers, under local names only."""

    def apply(self, x: Tensor, base: Affine, p: Any) -> Tensor:
        """The unfused forward: x (..., in) -> (..., out)."""

    def fuse(self, base: Affine, p: Any) -> Affine:
        """The one affine map that ``apply`` is."""

    def shapes(self, out_features: int, in_features: int, p: Any) -> Shapes:
        """The shape that every tensor of ``p`` must have on a base of this size, by dotted field name."""

    def example(self, seed: int, base: Affine) -> Any:
        """Random Params for this base with no zero in them, float64."""

    def describe(self, p: Any) -> dict[str, Any]:
        """The settings a reader wants to see: rank, scale, path, branches."""


@dataclass(frozen=True)
class Step:
    """One adapter of a stack: it makes b, the map it finds, into b + weight (apply(b) - b), on its ``rows`` of the outputs."""

    kind: Kind
    params: Any
    rows: tuple[int, int] | None = None
    weight: float = 1.0

    def apply(self, x: Tensor, base: Affine) -> Tensor:
        """The unfused forward of this step on what the steps before it made. x (..., in) -> (..., out)."""
        part = base if self.rows is None else base.rows(*self.rows)
        y = self.kind.apply(x, part, self.params)
        if self.weight != 1:
            h = part(x)
            y = h + self.weight * (y - h)
        return y if self.rows is None else _with_rows(base(x), y, self.rows)

    def fuse(self, base: Affine) -> Affine:
        """The closed form of the same."""
        part = base if self.rows is None else base.rows(*self.rows)
        folded = self.kind.fuse(part, self.params)
        if self.weight != 1:
            folded = part.plus(folded.plus(part.times(-1)).times(self.weight))
        return folded if self.rows is None else inserted(base, folded, self.rows)

    def size(self, x: Tensor, base: Affine) -> Tensor:
        """Bounds the sum of the sizes of all terms of ``apply``, entry by entry; float64's rounding is proportional to it."""
        part = base if self.rows is None else base.rows(*self.rows)
        magnitude = getattr(self.kind, "magnitude", None)
        if magnitude is not None:
            y = magnitude(x, part, self.params)
        else:
            y = self.kind.apply(abs(x), part.size, map_tensors(self.params, abs, abs))
        if self.weight != 1:
            y = abs(self.weight) * y + (1 + abs(self.weight)) * part.size(abs(x))
        return y if self.rows is None else _with_rows(base.size(abs(x)), y, self.rows)


def unfused(base: Affine, steps: Sequence[Step]) -> Affine:
    """The map that the base and all steps make, computed by their own forwards one inside the other, in the base's dtype."""
    for step in steps:
        base = _stacked(base, step)
    return base


def fused(base: Affine, steps: Sequence[Step]) -> Affine:
    """The same as one matrix, by the closed forms."""
    for step in steps:
        base = step.fuse(base)
    return base


def inserted(whole: Affine, part: Affine, rows: tuple[int, int] | None) -> Affine:
    """``whole`` with ``part`` in place of some of its outputs; a bias that one of them lacks is 0."""
    if rows is None:
        return part
    import torch

    start, stop = rows
    weight = torch.cat([whole.weight[:start], part.weight, whole.weight[stop:]])
    if whole.bias is None and part.bias is None:
        return Affine(weight)
    old = whole.bias if whole.bias is not None else torch.zeros(len(weight), dtype=weight.dtype)
    new = part.bias if part.bias is not None else torch.zeros(stop - start, dtype=weight.dtype)
    return Affine(weight, torch.cat([old[:start], new, old[stop:]]))


def low_rank(name: str, base: Affine, p: Any) -> LowRank | None:
    """The factors of a fused layer; None for a kind that has none, or none for these Params."""
    found = getattr(kind(name), "low_rank", None)
    return None if found is None else cast("LowRank | None", found(base, p))


def kind(name: str) -> Kind:
    """The kind of that name. Raises UsageError that lists what there is."""
    return cast(Kind, plugins.load("adapters", name))


def _stacked(base: Affine, step: Step) -> Affine:
    def matrix() -> Affine:
        """In float64, whatever the dtype: a later step that reads the matrix must not see the rounding of the read-out."""
        import torch

        wide = to_dtype(Affine(base.weight, base.bias), torch.float64)
        exact = replace(step, params=to_dtype(step.params, torch.float64))
        whole = read_out(lambda x: exact.apply(x, wide), base.in_features, torch.float64)
        # copied: where float64 is to stay float64 (pure_float64), a cast would leave it so in a float32 model too
        return map_tensors(whole, lambda t: torch.empty(t.shape, dtype=base.weight.dtype).copy_(t))

    def sizes() -> Affine:
        import torch

        dtype = base.weight.dtype
        zero = step.size(torch.zeros(1, base.in_features, dtype=dtype), base)[0]
        columns = [step.size(units(j, j + 1, base.in_features, dtype), base)[0] for j in range(base.in_features)]
        return Affine(torch.stack(columns).T, zero)

    return Computed(lambda x: step.apply(x, base), base, matrix, sizes)


def _with_rows(whole: Tensor, part: Tensor, rows: tuple[int, int]) -> Tensor:
    import torch

    return torch.cat([whole[..., : rows[0]], part, whole[..., rows[1] :]], dim=-1)
