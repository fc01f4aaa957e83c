"""Hydra vtab1k: the ``.pt`` of ``utils.save`` (extremebird/Hydra, vtab1k): every parameter named ``hydra`` or ``head``.

``blocks.N.attn.hydra_proj_{par,seq}`` act on ``attn.proj``, ``blocks.N.mlp.hydra_mlp_{par,seq}`` on ``mlp.fc2``. One scale for all,
which only the YAML of the run holds. A state dict of the whole model has the same names beside those of the base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reparam_export.adapters import hydra
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Adapter, Claim, Parts, Source, unnumbered
from reparam_export.checkpoints._carried import parts_with
from reparam_export.errors import TensorMismatchError

LOOKED_FOR = "blocks.N.attn.hydra_proj_par.down_proj.weight and the like (Hydra, vtab1k)"
BRANCH = re.compile(r"(?P<parent>.+)\.hydra_(?P<layer>proj|mlp)_(?P<branch>par|seq)\.(?:down|up)_proj\.(?:weight|bias)")
ADAPTED = {"proj": "proj", "mlp": "fc2"}


def accepts(source: Source) -> bool:
    return any(BRANCH.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    claim = source.claim()
    scale = source.settings.number(
        "scale", found_in="configs/<method>/<dataset>.yaml of the run, unless --scale overrode it"
    )
    sites = dict.fromkeys((m["parent"], m["layer"]) for name in source.tensors if (m := BRANCH.fullmatch(name)))
    adapters = []
    for parent, layer in sites:
        prefix = f"{parent}.hydra_{layer}"
        params = hydra.Params(pair(claim, f"{prefix}_par"), pair(claim, f"{prefix}_seq"), scale, scale)
        adapters.append(Adapter(f"{parent}.{ADAPTED[layer]}", "hydra", params))
    check_branches(source, adapters)
    return parts_with(source, adapters, claim)


def check_branches(source: Source, adapters: Sequence[Adapter]) -> None:
    """Raises TensorMismatchError when one layer lacks a branch that its like have: the authors' code builds them all alike."""
    by_site: dict[str, dict[str, tuple[bool, bool]]] = {}
    for adapter in adapters:
        branches = (adapter.params.parallel is not None, adapter.params.sequential is not None)
        by_site.setdefault(unnumbered(adapter.module), {})[adapter.module] = branches
    for found in by_site.values():
        full = tuple(any(column) for column in zip(*found.values(), strict=True))
        for module, branches in found.items():
            if branches != full:
                lacking = "parallel" if full[0] and not branches[0] else "sequential"
                raise TensorMismatchError(
                    f"{source.path}: {module} has no {lacking} branch, other layers of its kind have; the file is incomplete",
                    module=module,
                    tensor=lacking,
                    expected="a branch",
                    found=None,
                )


def pair(claim: Claim, prefix: str) -> Bottleneck | None:
    """The bottleneck under ``prefix``, or None when the branch is absent altogether."""
    if not any(name.startswith(f"{prefix}.") for name in claim.names()):
        return None
    down, up = (
        Affine(claim.take(f"{prefix}.{part}.weight"), claim.take_if(f"{prefix}.{part}.bias"))
        for part in ("down_proj", "up_proj")
    )
    return Bottleneck(down, up)
