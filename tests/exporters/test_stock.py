"""A fused Hugging Face folder as a stock user loads it: ``AutoModel...from_pretrained(folder)`` and nothing else, tensors bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming.models import llama, lora

import reparam_export as rx
from reparam_export.errors import ExportError
from reparam_export.hf_folder import retyped
from reparam_export.streaming import plan_of, stream

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def edited(folder: Path, **entries: Any) -> Path:
    """The folder with other entries in its config; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def loaded_by_a_stock_user(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def holds_what_is_stored(folder: Path) -> str:
    """Every number of the files, in the dtype that config.json says, which is returned."""
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    loaded = loaded_by_a_stock_user(folder)
    for name, tensor in stored.items():
        assert torch.equal(loaded[name].double(), tensor.double()), name
    config = json.loads((folder / "config.json").read_text())
    said = str(config.get("dtype", config.get("torch_dtype")))
    assert {str(t.dtype) for t in loaded.values()} == {f"torch.{said}"}
    return said


def converted(checkpoint: rx.Checkpoint, dtype: str | None, out: Path, *, streamed: bool) -> rx.Artifact:
    if streamed:
        from reparam_export.folder import load_fused, save_proof

        stream(plan_of(checkpoint, dtype), out)
        model = rx.verify(*load_fused(out), count=2)
        save_proof(out, model.certificate, model)
        return rx.export(model, "safetensors", out)
    return rx.export(rx.verify(checkpoint, rx.fuse(checkpoint, dtype), count=2), "safetensors", out)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "in memory"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_the_config_says_the_dtype_of_what_is_stored(
    tmp_path: Path, stored: torch.dtype, dtype: str | None, streamed: bool
) -> None:
    base = llama(tmp_path / "base", dtype=stored)
    checkpoint = rx.read(lora(tmp_path / "adapter", base))
    converted(checkpoint, dtype, tmp_path / "out", streamed=streamed)
    assert holds_what_is_stored(tmp_path / "out" / "hf") == (SHORT[dtype] if dtype else str(stored)[6:])


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "in memory"])
def test_a_config_that_says_another_dtype_than_the_base_s_files(tmp_path: Path, streamed: bool) -> None:
    base = edited(llama(tmp_path / "base", dtype=torch.float32), dtype=None, torch_dtype="bfloat16")
    checkpoint = rx.read(lora(tmp_path / "adapter", base))
    artifact = converted(checkpoint, None, tmp_path / "out", streamed=streamed)
    assert artifact.details["config_changed"] == {"torch_dtype": "float32"}
    config = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    assert (config["torch_dtype"], config.get("dtype")) == ("float32", None)  # under the base's own key
    assert holds_what_is_stored(tmp_path / "out" / "hf") == "float32"


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "in memory"])
@pytest.mark.parametrize("said", ["bfloat16", None])
def test_of_mixed_files_the_config_says_what_loses_nothing(tmp_path: Path, said: str | None, streamed: bool) -> None:
    base = edited(llama(tmp_path / "base", dtype=torch.bfloat16), dtype=said)
    state = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    fine = {n: torch.randn(t.shape, generator=generator) for n, t in state.items() if "norm" in n}
    save_file(state | fine, base / "model.safetensors", {"format": "pt"})
    checkpoint = rx.read(lora(tmp_path / "adapter", base))
    converted(checkpoint, None, tmp_path / "out", streamed=streamed)
    assert holds_what_is_stored(tmp_path / "out" / "hf") == "float32"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trained_tokens_in_a_wider_dtype(tmp_path: Path) -> None:
    """Folded in memory by its kind: a tied bfloat16 base with trained tokens, stored in float32; judged by peft's own forward."""
    import peft
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", tied=True)
    given = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], trainable_token_indices=[3, 9, 40])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), given)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    checkpoint = rx.read(tmp_path / "adapter", f"hf:{base}")
    rx.export(rx.verify(checkpoint, rx.fuse(checkpoint, "fp32"), count=2), "safetensors", tmp_path / "out")
    assert holds_what_is_stored(tmp_path / "out" / "hf") == "float32"
    ids = torch.randint(60, (3, 11), generator=generator)
    with torch.no_grad():
        expected = model.double().eval()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").double().eval()(input_ids=ids).logits
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())


def test_a_folder_that_stock_loaders_cast_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam_export.exporters import safetensors

    monkeypatch.setattr(safetensors, "retyped", lambda config, *_: (dict(config), {}))
    base = llama(tmp_path / "base")
    checkpoint = rx.read(lora(tmp_path / "adapter", base))
    model = rx.verify(checkpoint, rx.fuse(checkpoint, "fp32"), count=2)
    with pytest.raises(ExportError, match=r"written as torch\.float32 and is loaded as torch\.bfloat16"):
        rx.export(model, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out" / "hf").exists()


def test_what_transformers_holds_in_float32_itself_does_not_widen_the_rest(tmp_path: Path) -> None:
    """Routers of Ernie: float32 in files that are bfloat16 otherwise, and so loaded; seen by the loader itself."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "ernie4_5_moe", vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, moe_num_experts=4, moe_k=2, moe_layer_start_index=0, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    stored = {n: str(t.dtype)[6:] for n, t in load_file(tmp_path / "model.safetensors").items()}
    from reparam_export.hf_folder import held_wide

    said = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "float32"}
    made, changed = retyped(said, stored, held_wide(model))
    assert (made["dtype"], changed) == ("bfloat16", {"dtype": "bfloat16"})
    edited(tmp_path, dtype=made["dtype"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    routers = {n: p for n, p in model.named_parameters() if n.endswith("gate.weight")}
    assert routers
    assert all(torch.equal(again.get_parameter(n), p) for n, p in routers.items())


def test_parts_of_a_config_say_the_same() -> None:
    config = {
        "torch_dtype": "float16",
        "text_config": {"torch_dtype": "float16", "size": 3},
        "vision_config": {"dtype": "bfloat16"},
        "dtype_of_other_things": "float16",
    }
    made, changed = retyped(config, {"a": "bfloat16", "b": "float16", "ids": "int64"}, {})
    assert changed == {
        "torch_dtype": "float32",
        "text_config.torch_dtype": "float32",
        "vision_config.dtype": "float32",
    }
    assert made["text_config"] == {"torch_dtype": "float32", "size": 3}
    assert made["dtype_of_other_things"] == "float16"


def test_a_streamed_folder_that_transformers_loads_as_something_else_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam_export.bases import hf

    true = hf.stock

    def other(folder: Path) -> torch.nn.Module:
        model = true(folder)
        model.get_parameter("model.norm.weight").data[3] *= 1.01
        return model

    base = llama(tmp_path / "base")
    monkeypatch.setattr(hf, "stock", other)
    with pytest.raises(ExportError, match=r"model\.norm\.weight.*set aside: hf\.refuted"):
        converted(rx.read(lora(tmp_path / "adapter", base)), None, tmp_path / "out", streamed=True)
    assert not (tmp_path / "out" / "hf").exists()
