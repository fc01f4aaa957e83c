"""LyCORIS and kohya files: ``PREFIX_NAME.KEY``, the dots of a module's name as underscores in NAME, PREFIX ``lycoris``, ``lora_unet``, ...

    lora_up.weight lora_down.weight [lora_mid.weight]         LoCon, LoRA; with a core for the kernel of a convolution
    hada_w1_a hada_w1_b hada_w2_a hada_w2_b [hada_t1 hada_t2] LoHa
    lokr_w1 | lokr_w1_a lokr_w1_b, lokr_w2 | ... [lokr_t2]    LoKr
    a1.weight a2.weight b1.weight b2.weight                   GLoRA as LyCORIS has it
    diff [diff_b], w_norm [b_norm]                            whole differences of layers and of norms
    alpha, dora_scale                                         scale alpha / rank, 1 without it; decomposition by output or by input

A kohya file may hold several models, ``lora_unet_``, ``lora_te_``, ``lora_te1_``, ``lora_te2_``: ``--set part=unet`` reads one of them.
What LyCORIS' forward does with these is what is read; its own merge of LoHa and LoKr (4.1.3) takes the scale twice. The names are
found in the base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from reparam_export.adapters import decomposed, full, glora_lycoris, locon, loha, lokr, lora
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Claim, Parts, Source, as_core, as_matrix
from reparam_export.errors import FusionError
from reparam_export.names.underscored import MODEL

FIRST = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "a1.weight", "diff", "w_norm")
LOOKED_FOR = f"tensors NAME.KEY, no dot in NAME, with a KEY of {', '.join(FIRST)} (LyCORIS, kohya)"
REFUSED = {
    "oft_blocks": "OFT and BOFT",
    "oft_diag": "OFT",
    "on_input": "(IA)^3",
    "lambda_layer": "T-LoRA",
    "bm.weight": "GLoRA with a core for the kernel",
}


def accepts(source: Source) -> bool:
    split = [name.partition(".") for name in source.tensors]
    keys = (*FIRST, *REFUSED)
    return "peft_type" not in source.config and any(stem and key in keys for stem, _, key in split)


def read(source: Source) -> Parts:
    source, notes = of_part(source)
    split = [name.partition(".") for name in source.tensors]
    for key, name in REFUSED.items():
        modules = [stem for stem, _, found in split if found == key]
        if modules:
            raise FusionError(
                f"{source.path}: {name} of LyCORIS on {len(modules)} modules, first {modules[0]}, is not read; merge it with LyCORIS' own "
                "merge_to first"
            )
    claim = source.claim()
    stems = dict.fromkeys(stem for stem, _, key in split if key in FIRST)
    adapters = tuple(Adapter(stem, *_params(_Named(claim, stem))) for stem in stems)
    claim.finish()

    return Parts(adapters, covers=lambda names: [], underscored=True, notes=notes)


def of_part(source: Source) -> tuple[Source, tuple[str, ...]]:
    """The tensors of the one model that the user chose of those in a kohya file, with a note on the others; without a choice all of them.

    A base may hold several of the models. Raises UsageError for a part that the file has not.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.tensors.items():
        match = MODEL.match(name)
        found.setdefault(match[0].removeprefix("lora_") if match else "", {})[name] = tensor
    if "part" not in source.settings.values:
        return source, (f"the file has the parts {', '.join(found)}: --set part=NAME reads one of them",) if len(
            found
        ) > 1 else ()
    part = source.settings.choice("part", [name for name in found if name], why="the file has several parts")
    left = [f"{name} ({len(tensors)} tensors)" for name, tensors in found.items() if name != part]
    return replace(source, tensors=found[part]), (f"left out: {', '.join(left)}",) if left else ()


@dataclass(frozen=True)
class _Named:
    """The tensors of one module, to be taken by their keys."""

    claim: Claim
    stem: str

    def take(self, key: str) -> Tensor:
        return self.claim.take(f"{self.stem}.{key}")

    def take_if(self, key: str) -> Tensor | None:
        return self.claim.take_if(f"{self.stem}.{key}")

    def scale(self, rank: int) -> float:
        """alpha / rank, 1 where alpha is not there or 0."""
        alpha = self.take_if("alpha")
        return (float(alpha) / rank if alpha is not None else 0.0) or 1.0


def _params(of: _Named) -> tuple[str, Any]:
    """The kind of one module's adapter, and its Params."""
    for key, make in (("diff", "diff_b"), ("w_norm", "b_norm")):
        weight = of.take_if(key)
        if weight is not None:
            return "full", full.Params(as_matrix(weight), of.take_if(make))
    a1 = of.take_if("a1.weight")
    if a1 is not None:
        a2, b1, b2 = (as_matrix(of.take(f"{name}.weight")) for name in ("a2", "b1", "b2"))
        return "glora_lycoris", glora_lycoris.Params(as_matrix(a1), a2, b1, b2, of.scale(int(a2.shape[0])))
    m = of.take_if("dora_scale")
    name, change, outputs = _change(of)
    if m is not None:
        whole = (m.shape[0] > 1) if max(m.shape) > 1 else outputs == 1
        return "decomposed", decomposed.Params(m.reshape(-1), "out" if whole else "in", **{name: change})
    if name == "locon" and change.core is None:
        return "lora", lora.Params(Bottleneck(Affine(change.down), Affine(change.up)), change.scale)
    return name, change


def _change(of: _Named) -> tuple[str, Any, int]:
    """What is added to the weight: its kind, its Params, and how many outputs it has."""
    a1 = of.take_if("hada_w1_a")
    if a1 is not None:
        b1, a2, b2 = (of.take(f"hada_{name}") for name in ("w1_b", "w2_a", "w2_b"))
        t1, t2 = (as_core(of.take_if(f"hada_{name}")) for name in ("t1", "t2"))
        a1, a2 = (a1, a2) if t1 is None else (a1.T, a2.T)
        scale = of.scale(int(b1.shape[0]))
        return "loha", loha.Params(a1, as_matrix(b1), a2, as_matrix(b2), scale, t1, t2), int(a1.shape[0])
    up = of.take_if("lora_up.weight")
    if up is not None:
        down, core = as_matrix(of.take("lora_down.weight")), as_core(of.take_if("lora_mid.weight"))
        return "locon", locon.Params(as_matrix(up), down, of.scale(int(down.shape[0])), core), int(up.shape[0])
    return "lokr", *_kronecker(of)


def _kronecker(of: _Named) -> tuple[lokr.Params, int]:
    """LoKr: its rank is that of the factored half, its scale 1 where both halves are whole."""
    w1, w2, t2 = of.take_if("lokr_w1"), of.take_if("lokr_w2"), as_core(of.take_if("lokr_t2"))
    w1_a, w1_b = (None, None) if w1 is not None else (of.take("lokr_w1_a"), of.take("lokr_w1_b"))
    w2_a, w2_b = (None, None) if w2 is not None else (of.take("lokr_w2_a"), as_matrix(of.take("lokr_w2_b")))
    left, right = (a if whole is None else whole for whole, a in ((w1, w1_a), (w2, w2_a)))
    outputs = int(left.shape[0]) * int(right.shape[0 if t2 is None else 1])  # type: ignore[union-attr]
    factored = w1_b if w2_b is None else w2_b
    scale = of.scale(1 if factored is None else int(factored.shape[0]))
    w2 = None if w2 is None else as_matrix(w2)
    return lokr.Params(1.0 if factored is None else scale, w1, w1_a, w1_b, w2, w2_a, w2_b, t2), outputs
