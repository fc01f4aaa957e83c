"""Hydra elevater (CLIP): the dict of ``get_Hydra_weights()`` (extremebird/Hydra, elevater): every parameter named ``adapter``.

``X.mlp.ad_lin.adapter_{par,seq}`` act on ``X.mlp.c_proj`` of the OpenAI layout, in the visual and the text tower. The scale is a
parameter of each branch when it was learnable, otherwise only the run's configuration holds it. A state dict of the whole model has the
frozen layer as ``X.mlp.ad_lin.linear``.
"""

from __future__ import annotations

import re
from typing import Any

from reparam_export.adapters import hydra
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._carried import parts_with
from reparam_export.checkpoints.hydra_vtab import check_branches, pair
from reparam_export.names.once import renamed_once

LOOKED_FOR = "...mlp.ad_lin.adapter_par.down_proj.weight and the like (Hydra, CLIP)"
BRANCH = re.compile(r"(?P<parent>.+)\.ad_lin\.adapter_(?P<branch>par|seq)\.(?:(?:down|up)_proj\.(?:weight|bias)|scale)")


def accepts(source: Source) -> bool:
    return any(BRANCH.fullmatch(name) for name in source.tensors)


def read(source: Source) -> Parts:
    plain = renamed_once(source.tensors, lambda name: name.replace(".ad_lin.linear.", ".c_proj."), source.path)
    claim = Claim(source.path, plain)
    parents = dict.fromkeys(m["parent"] for name in source.tensors if (m := BRANCH.fullmatch(name)))
    fixed: float | None = None
    adapters = []
    for parent in parents:
        prefix = f"{parent}.ad_lin.adapter"
        branches = {branch: pair(claim, f"{prefix}_{branch}") for branch in ("par", "seq")}
        scales: dict[str, Any] = {branch: claim.take_if(f"{prefix}_{branch}.scale") for branch in branches}
        for branch in branches:
            if scales[branch] is None and branches[branch] is not None:
                if fixed is None:
                    fixed = source.settings.number("scale", found_in="the run's configuration (published runs use 1.0)")
                scales[branch] = fixed
        params = hydra.Params(branches["par"], branches["seq"], scales["par"] or 0.0, scales["seq"] or 0.0)
        adapters.append(Adapter(f"{parent}.c_proj", "hydra", params))
    check_branches(source, adapters)
    return parts_with(source, adapters, claim, lambda name: False)
