"""Every recorded case, against the outputs of its authors' own unfused forward."""

from __future__ import annotations

import pytest
import torch
from conftest import CASES, MORE_CASES, Case

import reparam_export as rx
from reparam_export.assembly import base_of, fused
from reparam_export.verification.outputs import run

FLOAT32_INSIDE = 5e-6  # the recorded float64 of these holds transformers' casts to float32
CASTS = dict.fromkeys(
    (
        "glora_llama", "peft_c3a", "peft_deft", "peft_fourierft", "peft_lora", "peft_lora_embed_head", "peft_lora_trainable_tokens",
        "peft_oft_share_coft", "peft_road", "peft_unilora", "peft_vera_noproj",
    ),
    FLOAT32_INSIDE,
) | {"peft_waveft": 2e-5}  # its float32 answer is 1.5e-5 off; without the casts peft's float64 is 5e-14 from ours  # fmt: skip
EVERY = {**CASES, **MORE_CASES}


@pytest.fixture(params=sorted(EVERY))
def case(request: pytest.FixtureRequest) -> Case:
    """Each recorded case in turn, those of peft's types too."""
    return EVERY[request.param]


def test_the_fused_model_answers_as_the_authors_unfused_one(case: Case) -> None:
    checkpoint = case.read()
    weights = rx.fuse(checkpoint)
    model, signature = base_of(checkpoint).build()
    module = fused(model, weights.tensors).double()
    answer = run(module, signature, case.inputs(), torch.float64)[0]
    # fused weights are rounded to float32 once: the recorded outputs of order 10 may move by their float32 floor
    expected = case.expected()
    assert float((answer - expected).abs().max()) < 2e-5
    assert float(expected.abs().max()) > 1


def test_the_reference_is_the_authors_own_forward(case: Case) -> None:
    checkpoint = case.read()
    model = rx.verify(checkpoint, rx.fuse(checkpoint), case.inputs())
    reference = next(iter(model.reference.outputs.values()))
    worst = float((reference - case.expected()).abs().max())
    assert worst < CASTS.get(case.name, 1e-13)
    assert model.certificate.verdict == "exact"
    assert all(layer.method == "exhaustive" for layer in model.certificate.layers)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["hydra_vtab", "glora_vit", "repadapter_linear", "peft_lora_bert_lorabias"])
def test_sixteen_bit_storage_is_proven_too(name: str, dtype: str) -> None:
    checkpoint = CASES[name].read()
    model = rx.verify(checkpoint, rx.fuse(checkpoint, dtype), CASES[name].inputs())
    assert model.certificate.verdict == "exact"
    assert set(model.certificate.storage) == {"float16" if dtype == "fp16" else "bfloat16"}
