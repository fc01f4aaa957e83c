"""One adapter kind, one file. A kind is a module with the names of ``Kind``; its docstring is its formula.

``apply`` is the specification: the unfused forward, transcribed from the paper. ``fuse`` is the claim: the closed form.
Both see ``Affine`` maps and the kind's own ``Params`` only, never a model or a tensor name of a file.

A kind may also have

    initial(base, **settings)   the Params that training starts from: the paper's, with which it changes nothing
    DROPOUT                     where its low-rank pairs drop out in training: "before" or "after" the way down
    count(p)                    trainable parameters as its paper counts them, where that is not the size of all tensors
    branches(base, p)           the parts of the change of W that its paper tells apart, by name
    magnitude(x, base, p)       the size of what ``apply`` sums, where its formula on absolute values does not tell it
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from reparam_export import plugins
from reparam_export.affine import Affine, Tensor

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


def kind(name: str) -> Kind:
    """The kind of that name. Raises UsageError that lists what there is."""
    return cast(Kind, plugins.load("adapters", name))
