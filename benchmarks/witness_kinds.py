"""Misreadings of the other families of peft, for ``witness_mutations.py``."""

from __future__ import annotations

from dataclasses import replace

import peft
import torch

from benchmarks.witness_readings import RANDOM, Mutation, as_lora, by_params, each, of, replaced_by, setting


def of_other_kinds() -> list[Mutation]:
    """The other families of peft: block sizes, signs, seeds, scales."""
    one = lambda family, what, config, **how: Mutation(family, what, (config,), **how)  # noqa: E731
    two = {"r": 3, "alpha": 7, **RANDOM}
    return [
        one("LoHa", "alpha not seen", of(peft.LoHaConfig, **two), sees=setting(alpha=3)),
        one(
            "LoHa",
            "factors exchanged",
            of(peft.LoHaConfig, **two),
            plant=by_params("loha", lambda p: replace(p, a1=p.a2, a2=p.a1)),
        ),
        one("LoKr", "alpha not seen", of(peft.LoKrConfig, r=2, alpha=7, **RANDOM), sees=setting(alpha=2)),
        one(
            "LoKr",
            "first factor transposed",
            of(peft.LoKrConfig, r=2, alpha=7, **RANDOM),
            plant=by_params("lokr", lambda p: replace(p, w1=p.w1.T)),
        ),
        one(
            "(IA)^3",
            "feedforward_modules not seen",
            of(peft.IA3Config, feedforward_modules=["k_proj"], init_ia3_weights=False),
            sees=setting(feedforward_modules=[]),
        ),
        one(
            "(IA)^3",
            "added, not multiplied",
            of(peft.IA3Config, feedforward_modules=[], init_ia3_weights=False),
            plant=by_params("ia3", lambda p: replace(p, l=p.l + 1)),
        ),
        one(
            "OFT",
            "sign of the rotation",
            of(peft.OFTConfig, r=0, oft_block_size=4, **RANDOM),
            plant=each("entries", lambda p: -p.entries),
        ),
        one(
            "OFT",
            "blocks in another order",
            of(peft.OFTConfig, r=0, oft_block_size=4, **RANDOM),
            plant=each("entries", lambda p: p.entries.flip(0)),
        ),
        one(
            "OFT",
            "Cayley's transform for its series",
            of(peft.OFTConfig, r=0, oft_block_size=4, use_cayley_neumann=True, **RANDOM),
            sees=setting(use_cayley_neumann=False),
        ),
        one(
            "OFT",
            "radius of COFT not seen",
            of(peft.OFTConfig, r=0, oft_block_size=4, coft=True, eps=1e-3, **RANDOM),
            sees=setting(coft=False),
        ),
        one(
            "BOFT",
            "sign of the rotations",
            of(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=1, **RANDOM),
            plant=each("A", lambda p: p.A.transpose(-1, -2)),
        ),
        one(
            "BOFT",
            "blocks in another order",
            of(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=1, **RANDOM),
            plant=each("A", lambda p: p.A.flip(1)),
        ),
        one(
            "BOFT",
            "scale not seen",
            of(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=1, **RANDOM),
            plant=each("s", lambda p: torch.ones_like(p.s)),
        ),
        one(
            "HRA",
            "reflections in another order",
            of(peft.HRAConfig, r=4, **RANDOM),
            plant=each("u", lambda p: p.u.flip(1)),
        ),
        one(
            "HRA",
            "Gram-Schmidt not seen",
            of(peft.HRAConfig, r=4, apply_GS=True, **RANDOM),
            sees=setting(apply_GS=False),
        ),
        one(
            "VeRA",
            "d and b exchanged",
            of(peft.VeraConfig, r=12, **RANDOM),
            plant=by_params("vera", lambda p: replace(p, l_d=p.l_b, l_b=p.l_d)),
        ),
        one(
            "VeRA",
            "seed of the projections",
            of(peft.VeraConfig, r=4, save_projection=False, projection_prng_key=5, **RANDOM),
            sees=setting(projection_prng_key=0),
        ),
        one(
            "RandLoRA",
            "scale of the rank",
            of(peft.RandLoraConfig, r=3, randlora_alpha=5, **RANDOM),
            plant=each("scale", lambda p: 3 * p.scale),
        ),
        one(
            "AdaLoRA",
            "alpha divided by the rank",
            of(peft.AdaLoraConfig, init_r=4, lora_alpha=7, total_step=10),
            plant=each("scale", lambda p: p.scale / 4),
        ),
        one(
            "AdaLoRA",
            "singular values not seen",
            of(peft.AdaLoraConfig, init_r=4, lora_alpha=7, total_step=10),
            plant=each("e", lambda p: torch.ones_like(p.e)),
        ),
        one(
            "MiSS",
            "blocks in another order",
            of(peft.MissConfig, r=3, **RANDOM),
            plant=each("D", lambda p: p.D.flip(0)),
        ),
        one(
            "RoAd",
            "sign of the angle",
            of(peft.RoadConfig, group_size=4, **RANDOM),
            plant=each("theta", lambda p: -p.theta),
        ),
        one(
            "C3A",
            "circulant turned round",
            of(peft.C3AConfig, block_size=4, init_weights="gaussian"),
            plant=each("w", lambda p: p.w.flip(-1).roll(1, -1)),
        ),
        one(
            "FourierFT",
            "seed of the places",
            of(peft.FourierFTConfig, n_frequency=20, random_loc_seed=5, **RANDOM),
            sees=setting(random_loc_seed=777),
        ),
        one(
            "FourierFT",
            "scaling not seen",
            of(peft.FourierFTConfig, n_frequency=20, scaling=9.0, **RANDOM),
            sees=setting(scaling=150.0),
        ),
        one(
            "GraLoRA",
            "blocks in another order",
            of(peft.GraloraConfig, r=4, alpha=6, gralora_k=2, **RANDOM),
            plant=each("A", lambda p: p.A.flip(0)),
        ),
        one("HiRA", "added, not multiplied", of(peft.HiraConfig, r=3, **RANDOM), plant=as_lora),
        one(
            "DeLoRA",
            "strength not seen",
            of(peft.DeloraConfig, r=3, **RANDOM),
            plant=each("strength", lambda p: torch.ones_like(p.strength)),
        ),
        one(
            "norm tuning",
            "not scaled but halved",
            of(peft.LNTuningConfig, target_modules=["norm"]),
            plant=replaced_by("norm", 0.5),
        ),
    ]
