"""One adapter kind, one file. A kind is a module with the names of ``Kind``; its docstring is its formula.

``apply`` is the specification: the unfused forward, transcribed from the paper. ``fuse`` is the claim: the closed form.
Both see ``Affine`` maps and the kind's own ``Params`` only, never a model or a tensor name of a file.

``low_rank`` is optional: the closed form by its factors, by which a layer larger than memory is folded a few rows at a time. There
``base.weight`` may be a matrix on disk that only knows ``@``, from either side, and its ``shape``.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from reparam_export import plugins
from reparam_export.affine import Affine, LowRank, Tensor

Shapes = dict[str, tuple[int, ...]]


class Kind(Protocol):
    """What ``plugins.load("adapters", name)`` returns. Tensors are torch tensors of one float dtype."""

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


def low_rank(name: str, base: Affine, p: Any) -> LowRank | None:
    """The factors of a fused layer; None for a kind that has none, or none for these Params."""
    found = getattr(kind(name), "low_rank", None)
    return None if found is None else cast("LowRank | None", found(base, p))


def kind(name: str) -> Kind:
    """The kind of that name. Raises UsageError that lists what there is."""
    return cast(Kind, plugins.load("adapters", name))
