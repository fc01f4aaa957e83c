"""PEFT VeRA and PVeRA folders: ``vera_lambda_b``, ``vera_lambda_d`` of each module, and ``vera_A``, ``vera_B`` that all share.

With ``save_projection`` off the shared matrices are not in the file. They are drawn again as peft draws them: Kaiming uniform, from
``projection_prng_key``, as large as the largest adapted layer of the base. PVeRA draws its values from a distribution while it trains; the
mean, the first half of its rows, is what it gives in use, unless it is told to sample then, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import vera
from reparam_export.affine import Tensor
from reparam_export.checkpoints import Adapter, Bind, Parts, Source, Unbound
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, other_settings, read_folder
from reparam_export.checkpoints._peft_layers import read_layers
from reparam_export.errors import NotAffineError

if TYPE_CHECKING:
    from torch import nn

LOOKED_FOR = looked_for("VERA") + " or PVERA"
READ = ("d_initial", "generator_seed", "projection_prng_key", "r", "save_projection", "sample_at_inference")

accepts = of_type("VERA", "PVERA")


def read(source: Source) -> Parts:
    name = str(source.config["peft_type"]).lower()
    shared = [f"base_model.{name}_{side}" for side in "AB"]
    if source.config.get("sample_at_inference"):
        modules = tuple(dict.fromkeys(n.partition(f".{name}_lambda")[0] for n in source.tensors if "_lambda" in n))
        raise NotAffineError(
            f"{source.path}: sample_at_inference: PVeRA draws random numbers in every forward, which no weight does "
            f"({len(modules)} modules, first {modules[0]})",
            modules=modules,
            reason="random numbers in the forward",
        )
    if other_settings(source.config, READ):
        return read_layers(source)
    saved = bool(source.config.get("save_projection", True))
    projections = [source.tensors.get(key) for key in shared] if saved else [None, None]
    parts = read_folder(source, f"{name}_lambda_b", _params(name, *projections), READ, shared=shared)
    return parts if saved else replace(parts, bind=_drawn(source, name))


def _params(name: str, A: Tensor | None, B: Tensor | None) -> Callable[[Layer], tuple[str, Any]]:  # noqa: N803
    def params(layer: Layer) -> tuple[str, Any]:
        l_d, l_b = layer.take(f"{name}_lambda_d"), layer.take(f"{name}_lambda_b")
        rank = int(l_d.shape[0]) // (2 if name == "pvera" else 1)
        if layer.source.config.get("save_projection", True):
            shared = (
                (A, B)
                if A is not None and B is not None
                else (layer.claim.take(f"base_model.{name}_{s}") for s in "AB")
            )
            first, second = shared
            return "vera", vera.Params(first[:rank], second, l_d[:rank], l_b)
        return "vera", Unbound({"l_d": l_d[:rank], "l_b": l_b}, {"rank": rank})

    return params


def _drawn(source: Source, name: str) -> Bind:
    """The adapters with the shared matrices drawn again, for the largest layer among theirs."""

    def bind(module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
        import torch

        layers = [module.get_submodule(a.module) for a in adapters if a.kind == "vera"]
        sizes = [
            w.shape if isinstance(m, torch.nn.Linear) else w.T.shape
            for m in layers
            if (w := m.get_parameter("weight")) is not None
        ]
        out, inn = (max(int(size[axis]) for size in sizes) for axis in (0, 1))
        rank = int(source.config["r"])
        generator = torch.Generator().manual_seed(int(source.config.get("projection_prng_key") or 0))
        A = _kaiming(rank * (2 if name == "pvera" else 1), inn, generator)[:rank]  # noqa: N806
        B = _kaiming(out, rank, generator)  # noqa: N806
        return [
            replace(a, params=vera.Params(A, B, a.params.tensors["l_d"], a.params.tensors["l_b"]))
            if a.kind == "vera"
            else a
            for a in adapters
        ]

    return bind


def _kaiming(rows: int, columns: int, generator: Any) -> Tensor:
    """Uniform within the square root of 6 / columns, in float32."""
    import torch

    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
