"""Tensors that the user drops by name, adapters that were never trained, and a base that is another than the checkpoint names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming.models import HIDDEN, llama, lora
from test_cli import error_of, run

import reparam_export as rx
from reparam_export.errors import TensorMismatchError, UsageError

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base", dtype=torch.float32)


@pytest.fixture
def with_a_value_head(tmp_path: Path, base: Path) -> Path:
    """An adapter as TRL saves it with the value head of PPO beside it."""
    folder = lora(tmp_path / "adapter", base, modules=MODULES)
    state = load_file(folder / "adapter_model.safetensors")
    head = {"v_head.summary.weight": torch.randn(1, HIDDEN), "v_head.summary.bias": torch.randn(1)}
    save_file(state | head, folder / "adapter_model.safetensors")
    return folder


def test_the_error_for_a_left_over_names_the_option(with_a_value_head: Path) -> None:
    with pytest.raises(TensorMismatchError, match=r"--drop 'v_head\.summary\.\*'"):
        rx.read(with_a_value_head)


@pytest.mark.parametrize("pattern", ["v_head.*", "summary.*", "v_head.summary.?*"])
def test_what_is_dropped_is_said_everywhere_and_the_rest_is_right(
    with_a_value_head: Path, base: Path, tmp_path: Path, pattern: str
) -> None:
    plain = lora(tmp_path / "plain", base, modules=MODULES)
    out = tmp_path / "out"
    words = ("convert", with_a_value_head, "--drop", pattern, "--to", "safetensors")
    result = run(*words, "-o", out)
    assert result.exit_code == 0, result.output
    assert "without 2 tensors of the checkpoint, dropped by name, first v_head.summary." in " ".join(
        result.stdout.split()
    )
    record = json.loads((out / "fused.json").read_text())
    assert record["recipe"]["drop"] == [pattern]
    assert sorted(record["checkpoint"]["dropped"]) == ["v_head.summary.bias", "v_head.summary.weight"]
    assert "dropped by name" in (out / "report.md").read_text()
    expected = rx.fuse(rx.read(plain))
    found = load_file(out / "hf" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.tensors.items())
    assert run(*words[:2], *words[4:], "-o", out, "--resume").exit_code in (2, 3)  # not the same recipe


def test_a_pattern_that_drops_nothing_is_an_error(with_a_value_head: Path) -> None:
    with pytest.raises(UsageError, match="nearest: v_head"):
        rx.read(with_a_value_head, drop=["v_head.*", "value_head.*"])
    assert "holds no tensor of this name" in error_of(run("inspect", with_a_value_head, "--drop", "value_head.*"))


def test_what_an_adapter_needs_is_missed_when_it_is_dropped(with_a_value_head: Path) -> None:
    with pytest.raises(TensorMismatchError, match="missing"):
        rx.read(with_a_value_head, drop=["v_head.*", "*q_proj.lora_B.weight"])


def test_each_of_a_stack_has_its_own(with_a_value_head: Path, base: Path, tmp_path: Path) -> None:
    plain = lora(tmp_path / "plain", base, modules=MODULES[1:])
    words = ("inspect", plain, "--adapter", with_a_value_head, "--json")
    result = run(*words, "--drop", "2:v_head.*")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["dropped"]) == 2
    assert run(*words, "--drop", "v_head.*").exit_code == 2


def test_the_format_is_no_matter(tmp_path: Path) -> None:
    torch.save(
        {"a.adapter_A": torch.ones(2), "fc.bias": torch.randn(4), "ema.decay": torch.ones(())}, tmp_path / "c.pt"
    )
    checkpoint = rx.read(tmp_path / "c.pt", drop=["a.*", "decay"])
    assert list(checkpoint.replaced) == ["fc.bias"]
    assert set(checkpoint.dropped) == {"a.adapter_A", "ema.decay"}


@pytest.mark.parametrize(("factor", "trained"), [("lora_B", False), ("lora_A", False), ("", True)])
def test_inspect_says_of_an_untrained_adapter_what_fuse_says(
    tmp_path: Path, base: Path, factor: str, trained: bool
) -> None:
    folder = lora(tmp_path / "adapter", base, modules=MODULES)
    state = load_file(folder / "adapter_model.safetensors")
    zeroed = {n: torch.zeros_like(t) if factor and factor in n else t for n, t in state.items()}
    save_file(zeroed, folder / "adapter_model.safetensors")
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert found["foldable"] is trained
    assert any("never trained" in reason for reason in found["reasons"]) is not trained
    assert (run("fuse", folder, "-o", tmp_path / "out").exit_code == 0) is trained


@pytest.mark.parametrize(
    ("named", "noted"), [("other/llama-2", True), ("models/base", False), ("{base}", False), ("{base}/", False)]
)
def test_a_base_that_is_not_the_one_named_is_noted(tmp_path: Path, base: Path, named: str, noted: bool) -> None:
    folder = lora(tmp_path / "adapter", base, modules=MODULES, base_model_name_or_path=named.format(base=base))
    checkpoint = rx.read(folder, f"hf:{base}")
    assert any("names the base" in note for note in checkpoint.notes) is noted
    assert not any("names the base" in note for note in rx.read(folder).notes)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"])
def test_a_head_of_its_own_in_the_files_is_one_whatever_the_config_says_of_ties(tmp_path: Path, module: str) -> None:
    """As transformers 5 loads it; the outputs are those of peft on its own base."""
    import peft
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", dtype=torch.float32)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    adapter = lora(tmp_path / "adapter", base, modules=[module])
    result = run("convert", adapter, "--to", "safetensors", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (2, 9)))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        expected = peft.PeftModel.from_pretrained(plain, adapter).eval()(input_ids=ids).logits
        fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").double().eval()
        found = fused(input_ids=ids).logits
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())
