"""The second witness of a streamed fusion: on the skeleton, layer by layer, before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from reparam_export.checkpoints import Checkpoint, read
from reparam_export.errors import EquivalenceError
from reparam_export.report import write_report
from reparam_export.streaming import plan_of, stream
from reparam_export.streaming.witness import heard_of, subject_of
from reparam_export.verification.witness import hear

CASES: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "lora_bias": True},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Adapter folders that peft wrote on a tiny LLaMA in bfloat16, by their case."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attention_bias=True, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "base")

    def make(case: str) -> Path:
        if not (root / case).exists():
            base = transformers.LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
            settings: dict[str, Any] = {
                "r": 4,
                "lora_alpha": 9,
                "target_modules": "all-linear",
                "task_type": "CAUSAL_LM",
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.get_peft_model(base, peft.LoraConfig(**settings | CASES[case]))
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter += 0.1 * torch.randn_like(parameter)
                model.save_pretrained(root / case)
        return root / case

    return make


def wrongly(checkpoint: Checkpoint, module: str, scale: float) -> Checkpoint:
    def of(adapter: Any) -> Any:
        return replace(adapter, params=replace(adapter.params, scale=scale)) if adapter.module == module else adapter

    return replace(checkpoint, adapters=tuple(map(of, checkpoint.adapters)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("numpy", [False, True])
def test_every_layer_of_a_streamed_fusion_is_witnessed(
    case: str, numpy: bool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    record = stream(plan_of(read(made(case), numpy=numpy)), tmp_path / "out")
    (said,) = record["witness"]
    assert (said["who"], said["settings"], said["layers"], said["of_layers"]) == ("peft", 14, 14, 14)
    assert said["error"] < 1e-12
    assert "second witness: peft " in write_report(tmp_path / "out").headline


@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_misread_scale_is_found_out_before_anything_is_written(
    limit: int, made: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = read(made("lora"))
    module = "model.layers.1.mlp.up_proj"
    plan = plan_of(wrongly(checkpoint, module, 2.25))
    (said,) = hear(subject_of(plan, limit=limit))
    assert said.layers == (1 if limit == 1 else 14)
    assert len(said.differences) == 2  # its settings, and its numbers, with the base layer inside or without
    assert said.differences[0].startswith(f"{module}: scale: ours 2.25, peft ")
    assert said.differences[1].startswith(f"{module}: the answers of peft ")
    with pytest.raises(EquivalenceError, match="nothing was written") as caught:
        stream(plan, tmp_path / "out")
    assert caught.value.layer == module
    assert not (tmp_path / "out").exists()


def test_layers_beyond_the_limit_are_said_and_plain_lora_is_compared_without_them(made: Callable[[str], Path]) -> None:
    (lora,), (dora,) = (hear(subject_of(plan_of(read(made(case))), limit=1)) for case in ("lora", "dora"))
    assert (lora.layers, lora.of_layers, dora.layers, dora.of_layers) == (1, 14, 1, 14)
    assert lora.notes == (
        "of 13 more layers the numbers were compared without the base layer, which a LoRA does not depend on",
    )
    assert dora.notes == ()


def test_swapped_tensors_of_two_layers_are_found_out_though_all_settings_agree(made: Callable[[str], Path]) -> None:
    checkpoint = read(made("lora"))
    one, two = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    swapped = {one: two, two: one}
    plan = plan_of(
        replace(checkpoint, adapters=tuple(replace(a, module=swapped.get(a.module, a.module)) for a in checkpoint.adapters))
    )  # fmt: skip
    (said,) = hear(subject_of(plan, limit=1))
    assert {text.partition(":")[0] for text in said.differences} == {one, two}


def test_a_process_without_torch_lets_another_one_hear_the_witness(made: Callable[[str], Path]) -> None:
    code = (
        "import json, sys\n"
        "from reparam_export.checkpoints import read\n"
        "from reparam_export.streaming import plan_of\n"
        "from reparam_export.streaming.witness import heard_of\n"
        f"(said,) = heard_of(plan_of(read({str(made('lora'))!r}, numpy=True)), 'required')\n"
        "print(json.dumps([said.who, said.layers, 'torch' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["peft", 14, False]


def test_none_and_required_hold_for_streaming_too(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(read(made("lora")))
    assert heard_of(plan, "none")[0].absent == "none was wanted (--witness none)"
    assert "verify" in heard_of(plan, "later")[0].absent
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'reparam-export[peft]'" in heard_of(plan, "auto")[0].absent
    with pytest.raises(EquivalenceError, match="one is required"):
        heard_of(plan, "required")
