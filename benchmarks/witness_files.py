"""Misreadings of LyCORIS' files and of diffusers', for ``witness_mutations.py``: each file is written by its own library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import reparam_export as rx
from benchmarks.witness_nets import Pixels, unet
from benchmarks.witness_readings import Config, Mutation, by_params, dropped, each, moved, on_adapters, setting, turned
from reparam_export.checkpoints import Adapter, Checkpoint, diffusers

ROOT = Path(__file__).parents[1]
PIXELS = ["x=batch,4,6,6:float32"]
LATENTS = ["sample=batch,4,8,8:float32", "timestep=batch:int64:1000", "encoder_hidden_states=batch,5,16:float32"]
EXCHANGED = {"to_q": "to_v", "to_v": "to_q"}


def of_files() -> list[Mutation]:
    """Of both."""
    return [*of_lycoris(), *of_diffusers()]


def of_lycoris() -> list[Mutation]:
    """One row for each thing that its files say, or leave to the reader."""
    lora = {"algo": "lora", "linear_dim": 3, "linear_alpha": 7, "conv_dim": 2, "conv_alpha": 5}
    core = {**lora, "algo": "locon", "use_tucker": True}
    loha = {"algo": "loha", "linear_dim": 3, "linear_alpha": 2}
    lokr = {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "factor": 3}
    by_output = {**lora, "algo": "locon", "dora_wd": True}
    by_input = {**by_output, "wd_on_output": False}
    glora = {"algo": "glora", "linear_dim": 3, "linear_alpha": 7}

    def one(what: str, options: dict[str, Any], plant: Any) -> Mutation:
        return Mutation("LyCORIS", what, (), plant=plant, reads=_lycoris(options))

    return [
        one("alpha not seen", lora, each("scale", lambda p: 1.0)),
        one("alpha not divided by the rank", lora, each("scale", lambda p: 3 * p.scale)),
        one("sign of the change", lora, each("scale", lambda p: -p.scale)),
        one("B A as A^T B^T on a square layer", lora, _on(("to_q", "to_v"), turned)),
        one("q and v exchanged", lora, moved(EXCHANGED)),
        one("a module left out", lora, dropped("to_q")),
        one("axes of a core exchanged", core, by_params("locon", lambda p: _with_core(p, p.core))),
        one("kernel of a core turned round", core, by_params("locon", lambda p: replace(p, core=_flipped(p.core)))),
        one("LoHa: alpha not seen", loha, each("scale", lambda p: 1.0)),
        one("LoHa: scale taken twice, as its own merge", loha, each("scale", lambda p: p.scale**2)),
        one("LoHa: factors exchanged", loha, _on(("to_q", "to_v"), by_params("loha", lambda p: replace(p, a1=p.a2, a2=p.a1)))),
        one("LoKr: alpha not seen", lokr, each("scale", lambda p: 1.0)),
        one("LoKr: first factor transposed", lokr, _on(("to_q", "to_v"), by_params("lokr", lambda p: replace(p, w1=p.w1.T)))),
        one("decomposed: by input, not by output", by_output, _on(("to_q",), by_params("decomposed", lambda p: replace(p, side="in")))),
        one("decomposed: by output, not by input", by_input, _on(("to_q",), by_params("decomposed", lambda p: replace(p, side="out")))),
        one("decomposed: magnitudes not seen", by_output, on_adapters(lambda adapters: [_undecomposed(a) for a in adapters])),
        one("GLoRA: scale not seen", glora, each("scale", lambda p: 1.0)),
        one("GLoRA: B1 and B2 for A1 and A2", glora, _on(("to_q", "to_v"), by_params("glora_lycoris", _exchanged))),
        one("norms left out", {**lora, "train_norm": True}, dropped("norm")),
        one("whole differences: bias left out", {"algo": "full"}, by_params("full", lambda p: replace(p, bias=None))),
        one("whole differences: halved", {"algo": "full"}, each("weight", lambda p: p.weight / 2)),
    ]  # fmt: skip


def of_diffusers() -> list[Mutation]:
    """Its headers, its alphas, the names of its older files."""

    def one(
        what: str, plant: Any = None, sees: Config | None = None, alpha: Any = None, old: bool = False, **config: Any
    ) -> Mutation:
        return Mutation("diffusers", what, (), plant=plant, reads=_diffusers(config, sees, alpha, old))

    ranks = {"to_k": 2}
    return [
        one("header: alpha not seen", sees=lambda c: c | {"lora_alpha": c["r"]}),
        one("header: alpha_pattern not seen", sees=setting(alpha_pattern={}), alpha_pattern={"to_q": 3}),
        one("header: scale by the rank of the others", each("scale", lambda p: 10 / 4), rank_pattern=ranks),
        one("header: rsLoRA not seen", sees=setting(use_rslora=False), use_rslora=True),
        one("header: DoRA not seen", on_adapters(lambda adapters: [_as_lora(a) for a in adapters]), use_dora=True),
        one("sign of the change", each("scale", lambda p: -p.scale)),
        one("B A as A^T B^T on a square layer", _on(("attn1.to_q", "attn1.to_v"), turned)),
        one("q and v exchanged", moved(EXCHANGED), target_modules=["attn1.to_q", "attn1.to_v"]),
        one("a module left out", dropped("to_out.0")),
        one("alpha of a file without one taken for 1", each("scale", lambda p: p.scale / 10), alpha=10),
        one("alpha = rank taken for alpha = 1", each("scale", lambda p: p.scale / 4), alpha="rank"),
        one("older file: q and k exchanged", moved({"to_q": "to_k", "to_k": "to_q"}), alpha=10, old=True,
            target_modules=["attn1.to_q", "attn1.to_k"]),
        one("older file: to_out left out", dropped("to_out.0"), alpha=10, old=True),
    ]  # fmt: skip


def _base(folder: Path, build: Callable[[], nn.Module]) -> str:
    file = folder / "net.py"
    file.write_text(
        f"import sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks.witness_nets import {build.__name__}\n"
        f"def build():\n    torch.manual_seed(0)\n    return {build.__name__}()\n"
    )
    torch.manual_seed(0)
    return f"py:{file}:build"


def _drawn(model: Any, keep: Callable[[str], bool]) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if keep(name):
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)


def _lycoris(options: dict[str, Any]) -> Callable[[Path], Checkpoint]:
    """LyCORIS' own file of a trained network."""

    def reads(folder: Path) -> Checkpoint:
        import lycoris

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        base = _base(folder, Pixels)
        network: Any = lycoris.create_lycoris(Pixels(), 1.0, warn_on_unmatched=False, **options)
        network.apply_to()
        _drawn(network, lambda name: ".org_" not in name)
        network.save_weights(str(folder / "lycoris.safetensors"), torch.float32, None)
        return rx.read(folder / "lycoris.safetensors", base, inputs=PIXELS)

    return reads


def _diffusers(config: dict[str, Any], sees: Config | None, alpha: Any, old: bool) -> Callable[[Path], Checkpoint]:
    """A pipeline's file, with the configuration in its header, or without it where alpha is given."""

    def reads(folder: Path) -> Checkpoint:
        import peft
        from diffusers import StableDiffusionPipeline
        from peft.utils import get_peft_model_state_dict

        base = _base(folder, unet)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        given = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": targets, **config})
        model: Any = unet()
        model.add_adapter(given)
        _drawn(model, lambda name: "lora_" in name)
        header = {} if alpha else {"unet_lora_adapter_metadata": given.to_dict()}
        layers = get_peft_model_state_dict(model)
        if old:
            layers = {
                n.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): t for n, t in layers.items()
            }
        StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers, **header)
        seen = diffusers._configuration
        changed = lambda *a: sees(dict(seen(*a) or {})) if sees else seen(*a)  # noqa: E731
        with mock.patch.object(diffusers, "_configuration", changed):
            return rx.read(folder / "lora", base, inputs=LATENTS, settings={"lora_alpha": alpha} if alpha else {})

    return reads


def _on(ends: tuple[str, ...], plant: Any) -> Any:
    """The same on modules whose names end so."""

    def how(checkpoint: Checkpoint) -> Checkpoint:
        wrong = [
            plant(replace(checkpoint, adapters=(a,))).adapters[0] if a.module.endswith(ends) else a
            for a in checkpoint.adapters
        ]
        return replace(checkpoint, adapters=tuple(wrong), covers=lambda names: [], only=False)

    return how


def _with_core(params: Any, core: Any) -> Any:
    return params if core is None else replace(params, core=core.transpose(0, 1).contiguous())


def _flipped(core: Any) -> Any:
    return None if core is None else core.flip(-1)


def _undecomposed(adapter: Adapter) -> Adapter:
    """The low-rank change without its magnitudes."""
    return replace(adapter, kind="locon", params=adapter.params.locon) if adapter.kind == "decomposed" else adapter


def _exchanged(params: Any) -> Any:
    return replace(params, a1=params.b1, a2=params.b2, b1=params.a1, b2=params.a2)


def _as_lora(adapter: Adapter) -> Adapter:
    from reparam_export.adapters import lora

    return replace(adapter, kind="lora", params=lora.Params(adapter.params.pair, adapter.params.scale))
