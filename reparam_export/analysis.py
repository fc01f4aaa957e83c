"""What each branch of an adapter does to the pre-trained weight: its share, size, rank, directions, and what it amplifies.

For Hydra the branches are the parallel one, s P, and the sequential one, t S W (Kim et al., "Hydra", 2023, whose study compares them); for
GLoRA the supports A and B of the weight; every other kind has one, its whole change. The Hydra paper gives no formulas for its study, so
the quantities are the standard ones, of Hu et al., "LoRA", 2021, section 7, and Roy and Vetterli, 2007. All are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reparam_export.adapters import Step
from reparam_export.affine import Affine
from reparam_export.assembly import opened, stacks
from reparam_export.checkpoints import Adapter, Checkpoint, by_site, components
from reparam_export.fit import touched_module
from reparam_export.fusion import Advance
from reparam_export.layouts import site_of

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor, nn

DIRECTIONS = 16  # singular directions that are compared, where a branch has more


@dataclass(frozen=True)
class BranchAnalysis:
    """One branch of one adapted layer. W: the pre-trained weight (out, in), D: the branch's change of it, r: ``directions``.

    share             <D, sum of all branches> / |sum of all branches|^2; the shares of a layer add up to 1
    norm              |D|, Frobenius
    relative_norm     |D| / |W|
    rank              singular values of D above the largest times max(out, in) times float64's epsilon, squared as they are computed
    effective_rank    exp(entropy of the singular values of D divided by their sum); Roy and Vetterli, "The effective rank", 2007
    similarity_out    |U_W^T U_D|^2 / r of the r largest left singular vectors: 1, D writes into the directions W writes most to;
    similarity_in     the same of the right ones, the directions read; Hu et al., 2021, section 7.2, equation 4, with i = j = r
    chance_out        what random directions give: r / out;  chance_in: r / in
    amplification     |D| / |U_D^T W V_D|, how much larger D is than what W itself does in D's directions; Hu et al., section 7.3
    """

    module: str
    kind: str
    branch: str
    share: float
    norm: float
    relative_norm: float
    rank: int
    effective_rank: float
    directions: int
    similarity_out: float
    similarity_in: float
    chance_out: float
    chance_in: float
    amplification: float


def analyse(checkpoint: Checkpoint, advance: Advance | None = None) -> tuple[BranchAnalysis, ...]:
    """Every branch of every adapted layer, in the order of the checkpoint. advance: called with (layers done, in all).

    Raises what building the base raises, and TensorMismatchError for an adapter on a module that it does not have.
    """
    import torch

    module, _, checkpoint = opened(checkpoint)
    sites = by_site(checkpoint.adapters)
    found: list[BranchAnalysis] = []
    with torch.no_grad():
        for done, adapters in enumerate(sites.values(), 1):
            for stack in components(adapters):
                found += analyse_stack(module, stack)
            if advance is not None:
                advance(done, len(sites))
    return tuple(found)


def analyse_stack(module: nn.Module, stack: Sequence[Adapter]) -> list[BranchAnalysis]:
    """The branches of one adapter on a base model; of several on the same outputs, what each of them adds."""
    import torch

    target = touched_module(module, stack[0].module)
    site = site_of(target, stack[0])
    base = site.affine(site.of(target), torch.float64)
    ((rows, steps),) = stacks(stack, torch.float64)
    base = base.rows(*rows) if rows else base
    changes = branches_of(base, steps, [a.kind for a in stack])
    total = torch.stack([*changes.values()]).sum(0)
    own = Directions.of(base.weight)
    name = stack[0].site if rows is None else f"{stack[0].site}[{rows[0]}:{rows[1]}]"
    kinds = " + ".join(a.kind for a in stack)
    return [
        BranchAnalysis(module=name, kind=kinds, branch=branch, **compare(change, total, base.weight, own))
        for branch, change in changes.items()
    ]


def branches_of(base: Affine, steps: Sequence[Step], kinds: Sequence[str]) -> dict[str, Tensor]:
    """The parts of the change of the weight (out, in) by name; one called "change" where the kind tells none apart."""
    branches = getattr(steps[0].kind, "branches", None)
    if len(steps) == 1 and steps[0].weight == 1 and branches is not None:
        found: dict[str, Tensor] = branches(base, steps[0].params)
        return found
    found = {}
    for number, step in enumerate(steps, 1):
        after = step.fuse(base)
        found["change" if len(steps) == 1 else f"{number}. {kinds[number - 1]}"] = after.weight - base.weight
        base = after
    return found


@dataclass(frozen=True)
class Directions:
    """Singular values (k,), largest first, and their left (out, k) and right (in, k) vectors, of a float64 matrix."""

    values: Tensor
    left: Tensor
    right: Tensor
    rank: int

    @staticmethod
    def of(matrix: Tensor) -> Directions:
        """Through the eigenvectors of the smaller of M M^T and M^T M: several times faster than an SVD, and exact to 1e-8."""
        import torch

        wide = matrix.shape[0] <= matrix.shape[1]
        gram = matrix @ matrix.T if wide else matrix.T @ matrix
        squares, vectors = torch.linalg.eigh(gram)
        squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
        noise = max(matrix.shape) * torch.finfo(torch.float64).eps * float(squares[0])
        rank = int((squares > noise).sum())
        values, vectors = squares[:rank].sqrt(), vectors[:, :rank]
        others = (matrix.T if wide else matrix) @ vectors / values
        left, right = (vectors, others) if wide else (others, vectors)
        return Directions(values, left, right, rank)


def compare(change: Tensor, total: Tensor, weight: Tensor, own: Directions) -> dict[str, Any]:
    """The numbers of one branch; ``own`` are the directions of the pre-trained weight."""
    import torch

    norm, size = float(change.norm()), float(total.square().sum())
    theirs = Directions.of(change)
    r = min(theirs.rank, own.rank, DIRECTIONS)
    odds = theirs.values / theirs.values.sum() if theirs.rank else torch.ones(1)
    entropy = float(-(odds * odds.log()).sum())
    left, right = theirs.left[:, :r], theirs.right[:, :r]
    through = float((left.T @ weight @ right).norm())
    return {
        "share": float((change * total).sum()) / size if size else 0.0,
        "norm": norm,
        "relative_norm": norm / float(weight.norm()) if bool(weight.any()) else float("inf"),
        "rank": theirs.rank,
        "effective_rank": math.exp(entropy) if theirs.rank else 0.0,
        "directions": r,
        "similarity_out": float((own.left[:, :r].T @ left).square().sum()) / r if r else 0.0,
        "similarity_in": float((own.right[:, :r].T @ right).square().sum()) / r if r else 0.0,
        "chance_out": r / weight.shape[0],
        "chance_in": r / weight.shape[1],
        "amplification": norm / through if through else float("inf") if norm else 0.0,
    }
