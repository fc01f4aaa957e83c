"""Hydra nlu (RoBERTa): the full ``pytorch_model.bin`` of the authors' transformers fork: base, Hydra and classifier in one file.

Per layer, ``output.hydra_par`` and ``output.hydra_seq`` act on ``output.dense``, without biases; the code has no scale (it is 1).
The file carries its own base: its folder's ``config.json`` builds it, unless another base is given.
"""

from __future__ import annotations

import re

from reparam_export.adapters import hydra
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints.hydra_vtab import check_branches

LOOKED_FOR = "roberta.encoder.layer.N.output.hydra_par.hydra_A.weight and the like (Hydra, nlu)"
BRANCH = re.compile(r"(?P<parent>.+)\.hydra_(?P<branch>par|seq)\.hydra_[AB]\.weight")
CONSTANT = "embeddings.position_ids"  # a buffer of old transformers: 0, 1, 2, ...


def accepts(source: Source) -> bool:
    return any(BRANCH.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    claim = source.claim()
    parents = dict.fromkeys(m["parent"] for name in source.tensors if (m := BRANCH.fullmatch(name)))
    adapters = []
    for parent in parents:
        params = hydra.Params(_pair(claim, f"{parent}.hydra_par"), _pair(claim, f"{parent}.hydra_seq"), 1.0, 1.0)
        adapters.append(Adapter(f"{parent}.dense", "hydra", params))
    check_branches(source, adapters)
    constants = claim.take_all(lambda name: name.endswith(CONSTANT))
    rest = claim.take_all(lambda name: True)
    own_base = not source.base_given and bool(source.config.get("architectures"))
    return Parts(
        tuple(adapters),
        replaced={} if own_base else rest,
        base=f"hf:{source.file.parent}" if own_base else None,
        ignored=frozenset(set(source.tensors) - set(rest)) if own_base else frozenset(constants),
        notes=("the checkpoint carries its own base",) if own_base else (),
    )


def _pair(claim: Claim, prefix: str) -> Bottleneck | None:
    if not any(name.startswith(f"{prefix}.") for name in claim.names()):
        return None
    return Bottleneck(Affine(claim.take(f"{prefix}.hydra_A.weight")), Affine(claim.take(f"{prefix}.hydra_B.weight")))
