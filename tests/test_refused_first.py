"""What is known to be refused at the start is refused before the work, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from test_cli import error_of, run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def written(folder: Path, **others: Any) -> list[Any]:
    """A LoRA on a small Phi-3, whose config has no switch for biases; the options that read it."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    base = transformers.Phi3ForCausalLM(config)
    base.save_pretrained(folder / "base")
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["qkv_proj", "down_proj"], **others)
    model = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    return [folder / "adapter", "--base", f"hf:{folder / 'base'}", "-o", folder / "out"]


def nothing_was_done(result: Any, folder: Path, said: str, code: int) -> None:
    assert result.exit_code == code, result.output
    assert said in error_of(result)
    assert "fuse" not in result.stdout
    assert not list((folder / "out").glob("*")), list((folder / "out").glob("*"))


def test_a_new_bias_that_the_folder_has_no_place_for(tmp_path: Path) -> None:
    options = written(tmp_path, lora_bias=True)
    result = run("convert", *options, "--to", "safetensors")
    nothing_was_done(result, tmp_path, "no switch of its config (it has none) gives them a place", 5)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"logits": (3, 5, 59)}, "logits has shape (3, 5, 59); expected (3, 5, 60)"),
        ({"logits": (2, 5, 60)}, "logits has shape (2, 5, 60); expected (3, 5, 60)"),
        ({"scores": (3, 5, 60)}, "expected floating point arrays of one or more of the outputs logits"),
        ({"logits": (3, 5, 60), "other": (3,)}, "other is neither an input nor an output of the base"),
    ],
)
def test_answers_of_another_model(arrays: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    options = written(tmp_path)
    ids = np.ones((3, 5), np.int64)
    answers = {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
    np.savez(tmp_path / "expected.npz", input_ids=ids, attention_mask=ids, **answers)
    result = run("convert", *options, "--to", "safetensors", "--expected", tmp_path / "expected.npz")
    nothing_was_done(result, tmp_path, said, 2)


def test_samples_of_another_model(tmp_path: Path) -> None:
    options = written(tmp_path)
    np.savez(tmp_path / "samples.npz", pixel_values=np.ones((3, 5), np.float32))
    result = run("convert", *options, "--to", "safetensors", "--inputs", tmp_path / "samples.npz")
    nothing_was_done(result, tmp_path, "expected the arrays input_ids, attention_mask; found pixel_values", 2)
