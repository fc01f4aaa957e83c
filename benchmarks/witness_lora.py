"""Misreadings of LoRA folders, of ``target_parameters`` and of stacks, for ``witness_mutations.py``."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.witness_nets import Mixture, Tied
from benchmarks.witness_readings import (
    Mutation,
    Plant,
    as_lora,
    by_params,
    dropped,
    each,
    experts_misread,
    later,
    lora,
    moved,
    on_modules,
    others_slices,
    packed_slice_lost,
    replaced_by,
    replaced_moved,
    setting,
    tokens,
    turned,
)

PATTERNS = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.up": 5}}
EXPERTS = {
    "target_modules": [],
    "target_parameters": ["experts.up", "experts.down"],
    "rank_pattern": {"experts.up": 2},
    "alpha_pattern": {"experts.down": 5},
}


def plain() -> list[Mutation]:
    """LoRA: scales, names, places, biases."""
    one = lambda family, what, config, **how: Mutation(family, what, (config,), **how)  # noqa: E731
    return [
        one("alpha", "taken for the rank", lora(), sees=setting(lora_alpha=3)),
        one("alpha", "not divided by the rank", lora(), plant=each("scale", lambda p: 7.0)),
        one("alpha", "taken for 1", lora(), sees=setting(lora_alpha=1)),
        one("alpha_pattern", "not seen", lora(**PATTERNS), sees=setting(alpha_pattern={})),
        one("alpha_pattern", "its value for all modules", lora(**PATTERNS), sees=setting(lora_alpha=5)),
        one("alpha_pattern", "matched by the last name only", lora(**PATTERNS), sees=setting(alpha_pattern={"up": 5})),
        one(
            "alpha_pattern",
            "the later of two that match",
            lora(alpha_pattern={"layers.1.up": 5, "up": 11}),
            sees=setting(alpha_pattern={"up": 11, "layers.1.up": 5}),
        ),
        one(
            "rank_pattern",
            "scale by the rank of the others",
            lora(**PATTERNS),
            plant=on_modules("k_proj", each("scale", lambda p: 7 / 3)),
        ),
        one("rank", "scale by twice the rank", lora(), plant=each("scale", lambda p: p.scale / 2)),
        one("rsLoRA", "not seen", lora(use_rslora=True), sees=setting(use_rslora=False)),
        one("rsLoRA", "assumed", lora(), sees=setting(use_rslora=True)),
        one(
            "rsLoRA",
            "root of the rank of the others",
            lora(use_rslora=True, **PATTERNS),
            plant=on_modules("k_proj", each("scale", lambda p: 7 / 3**0.5)),
        ),
        one("sign", "of the change", lora(), plant=each("scale", lambda p: -p.scale)),
        one("transposition", "B A as A^T B^T on a square layer", lora(target_modules=["q_proj"]), plant=turned),
        one(
            "fan_in_fan_out",
            "a Conv1D taken for a linear layer",
            lora(target_modules=["mix"], fan_in_fan_out=True),
            plant=turned,
        ),
        one("names", "q and v exchanged", lora(), plant=moved({"q_proj": "v_proj", "v_proj": "q_proj"})),
        one(
            "layers_to_transform",
            "counted from 1",
            lora(layers_to_transform=[0, 2], layers_pattern="layers"),
            plant=moved({"layers.0": "layers.1"}),
        ),
        one(
            "layers_to_transform",
            "the last one left out",
            lora(layers_to_transform=[0, 2], layers_pattern="layers"),
            plant=dropped("layers.2."),
        ),
        one("target_modules", "a module left out", lora(), plant=dropped("layers.1.down")),
        one("slices", "k of a packed q k v lost", lora(target_modules=["qkv"]), plant=packed_slice_lost),
        one("slices", "q, k, v taken for v, q, k", lora(target_modules=["qkv"]), plant=others_slices),
        one(
            "lora_bias",
            "dropped",
            lora(lora_bias=True),
            plant=each("pair", lambda p: replace(p.pair, up=replace(p.pair.up, bias=None))),
        ),
        one(
            "lora_bias",
            "not scaled",
            lora(lora_bias=True),
            plant=each("pair", lambda p: replace(p.pair, up=replace(p.pair.up, bias=p.pair.up.bias / p.scale))),
        ),
        one("bias", "trained biases dropped", lora(bias="all"), plant=replaced_by("bias", None)),
        one(
            "bias",
            "of one block put on another",
            lora(bias="lora_only"),
            plant=replaced_moved({"layers.0.up.bias": "layers.1.up.bias"}),
        ),
        one("modules_to_save", "dropped", lora(modules_to_save=["classifier"]), plant=replaced_by("classifier", None)),
        one("modules_to_save", "halved", lora(modules_to_save=["classifier"]), plant=replaced_by("classifier", 0.5)),
        one(
            "embedding",
            "scale not seen",
            lora(target_modules=["embed"]),
            plant=each("scale", lambda p: 1.0),
            net=Mixture,
        ),
        one("tokens", "counted from 1", tokens(), plant=by_params("tokens", later), net=Mixture),
        one(
            "tying",
            "a table saved whole put on the tied head too",
            lora(modules_to_save=["embed_tokens"], target_modules=["q_proj"]),
            plant=replaced_moved({"model.embed_tokens.weight": "lm_head.weight"}),
            net=Tied,
        ),
        one("DoRA", "magnitude not seen", lora(use_dora=True), plant=as_lora),
        one(
            "DoRA",
            "magnitudes in another order",
            lora(use_dora=True),
            plant=each("magnitude", lambda p: p.magnitude.flip(0)),
        ),
        one("DoRA", "alpha not seen", lora(use_dora=True), sees=setting(lora_alpha=3)),
    ]


def of_parameters() -> list[Mutation]:
    """``target_parameters``, and several adapters on one base."""
    experts, stack = (lora(**EXPERTS),), (lora(), lora(use_dora=True, r=2))
    return [
        Mutation(
            "target_parameters",
            "alpha_pattern not matched with the parameter",
            experts,
            sees=setting(alpha_pattern={}),
            net=Mixture,
        ),
        Mutation(
            "target_parameters",
            "scale by the rank of the other parameter",
            experts,
            plant=on_modules("up", each("scale", lambda p: 7 / 3)),
            net=Mixture,
        ),
        Mutation("target_parameters", "experts in another order", experts, plant=experts_misread("order"), net=Mixture),
        Mutation("target_parameters", "A as (rank, expert)", experts, plant=experts_misread("A"), net=Mixture),
        Mutation("target_parameters", "B as (expert, rank)", experts, plant=experts_misread("B"), net=Mixture),
        Mutation(
            "target_parameters",
            "the two parameters exchanged",
            experts,
            plant=experts_misread("parameters"),
            net=Mixture,
        ),
        Mutation(
            "stack", "in another order", stack, plant=lambda c: replace(c, members=c.members[::-1]), weights=(0.6, 0.6)
        ),
        Mutation("stack", "weights not seen", stack, plant=weighted(1.0, 1.0), weights=(0.6, 0.8)),
        Mutation("stack", "weights exchanged", stack, plant=weighted(0.8, 0.6), weights=(0.6, 0.8)),
        Mutation("stack", "the second left out", stack, plant=weighted(0.6, 1e-9), weights=(0.6, 0.8)),
    ]


def weighted(*weights: float) -> Plant:
    """The members of a stack with other weights than the user gave."""
    return lambda c: replace(
        c,
        members=tuple(replace(m, recipe=replace(m.recipe, weight=w)) for m, w in zip(c.members, weights, strict=True)),
    )
