"""Tables of words under several names (T5), and those of a language model inside another (LLaVA), with tokens trained or added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_cli import run

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def t5() -> Any:
    """One table under four names."""
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**EYES), image_token_index=49
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


TARGETS = {t5: ["q", "v"], llava: r".*language_model.*\.(q_proj|v_proj)"}


@pytest.mark.parametrize(
    ("make", "rows", "settings"),
    [
        (t5, 60, {"trainable_token_indices": [3, 9]}),
        (t5, 64, {}),
        (t5, 60, {"modules_to_save": ["shared"]}),
        (llava, 60, {"trainable_token_indices": {"embed_tokens": [3, 9]}}),
        (llava, 64, {}),
    ],
    ids=["T5 tokens", "T5 resized", "T5 whole", "LLaVA tokens", "LLaVA resized"],
)
def test_what_is_written_answers_as_peft_does(make: Any, rows: int, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make()
    base.save_pretrained(tmp_path / "base")
    if rows != 60:
        base.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            base.get_input_embeddings().weight[60:].normal_()
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS[make], **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True if rows != 60 else "auto")
    words = ("convert", tmp_path / "adapter", "--base", f"hf:{tmp_path / 'base'}", "--to", "safetensors")
    result = run(*words, "-o", tmp_path / "out", "--witness", "required")
    assert result.exit_code == 0, result.output
    assert "second witness: peft" in result.stdout
    assert rows == 60 or "vocab_size = 64" in result.stdout
    assert "hidden_act" not in result.stdout
    ids = torch.randint(0, 40, (2, 7))
    ids[0, 0], ids[1, 2], ids[1, 3] = 3, 9, rows - 1
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if make is t5 else {})
    fused = type(base).from_pretrained(tmp_path / "out" / "hf")
    with torch.no_grad():
        expected, found = (m.double().eval()(**inputs).logits for m in (model, fused))
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())
