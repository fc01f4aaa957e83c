"""Streaming a Hugging Face folder: the bytes of folding in memory, the base's own sharding, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES
from safetensors.torch import load_file, save_file

import reparam_export as rx
from reparam_export.checkpoints import read
from reparam_export.errors import CheckpointError, EquivalenceError, FusionError, TensorMismatchError
from reparam_export.folder import load_fused
from reparam_export.fusion import narrowed
from reparam_export.streaming import NotStreamableError, plan_of, rows, stream
from reparam_export.verification.weights import half_ulp
from streaming.models import HIDDEN, VOCAB, llama, lora, native


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that tiny layers take several."""
    monkeypatch.setattr(rows, "ENTRIES", 1024)


def fused_by_rows(checkpoint: Path, out: Path, dtype: str | None = None, **given: Any) -> dict[str, torch.Tensor]:
    """The tensors that streaming writes, all of them."""
    stream(plan_of(read(checkpoint, numpy=True, **given), dtype), out)
    return tensors_of(out)


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted((out / "hf").glob("*.safetensors")) for n, t in load_file(file).items()}


def same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


LAYERS = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("storage", [None, "bf16", "fp16", "fp32"])
def test_lora_gives_the_bytes_of_folding_in_memory(tmp_path: Path, dtype: torch.dtype, storage: str | None) -> None:
    base = llama(tmp_path / "base", dtype=dtype, shards=2)
    adapter = lora(tmp_path / "adapter", base)
    same_bytes(fused_by_rows(adapter, tmp_path / "out", storage), dict(rx.fuse(read(adapter), storage).tensors))


@pytest.mark.parametrize("name", ["hydra", "glora", "repadapter"])
@pytest.mark.parametrize("storage", [None, "fp32"])
def test_every_kind_with_factors_gives_the_bytes_of_folding_in_memory(
    tmp_path: Path, name: str, storage: str | None
) -> None:
    base = llama(tmp_path / "base", shards=3)
    modules = [
        f"model.layers.{i}.{end}" for i in range(2) for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    file = native(tmp_path / "ckpt.pt", base, name, modules)
    expected = rx.fuse(read(file), storage)
    found = fused_by_rows(file, tmp_path / "out", storage)
    record = json.loads((tmp_path / "out" / "fused.json").read_text())
    assert record["created"] == list(expected.created)
    assert record["changed"].keys() == set(expected.changed)
    same_bytes({n: t for n, t in found.items() if n not in record["apart"]}, dict(expected.tensors))
    assert all(not found[n].any() for n in record["apart"])


@pytest.mark.parametrize("name", ["peft_lora", "peft_lora_gpt2", "peft_lora_embed_head", "glora_llama"])
def test_recorded_cases_give_the_bytes_of_folding_in_memory(tmp_path: Path, name: str) -> None:
    """Conv1D, embeddings, trained heads, created biases."""
    path, given = CASES[name].arguments()
    expected = rx.fuse(read(path, **given))
    fused_by_rows(path, tmp_path / "out", **given)
    checkpoint, weights = load_fused(tmp_path / "out")
    same_bytes(dict(weights.tensors), dict(expected.tensors))
    assert (
        weights.sha256()
        == expected.sha256()
        == json.loads((tmp_path / "out" / "fused.json").read_text())["weights_sha256"]
    )
    assert (weights.changed, weights.created, weights.replaced, dict(weights.aliases)) == (
        expected.changed,
        expected.created,
        expected.replaced,
        dict(expected.aliases),
    )
    assert rx.verify(checkpoint, weights, CASES[name].inputs()).certificate.verdict == "exact"


def test_what_is_made_from_the_model_itself_is_refused_here() -> None:
    """Trained tokens go onto every layer that shares the embedding, and only the model says which those are."""
    path, given = CASES["peft_lora_trainable_tokens"].arguments()
    with pytest.raises(NotStreamableError, match="from the model itself"):
        plan_of(read(path, **given))


@pytest.mark.parametrize(
    "options", [{"pickled": True}, {"pickled": True, "shards": 2}, {"shards": 1}, {"shards": 4}], ids=str
)
def test_the_bases_own_sharding_is_kept(tmp_path: Path, options: dict[str, Any]) -> None:
    base = llama(tmp_path / "base", **options)
    adapter = lora(tmp_path / "adapter", base, modules=LAYERS)
    same_bytes(fused_by_rows(adapter, tmp_path / "out"), dict(rx.fuse(read(adapter)).tensors))
    made = tmp_path / "out" / "hf"
    ending = "bin" if options.get("pickled") else "safetensors"
    shards = sorted(p.name for p in base.glob(f"*.{ending}"))
    assert sorted(p.name for p in made.glob("*.safetensors")) == [
        s.replace("pytorch_model", "model").replace(".bin", ".safetensors") for s in shards
    ]
    assert (made / "tokenizer_config.json").read_text() == (base / "tokenizer_config.json").read_text()
    assert not list(made.glob("*.py"))
    index = made / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if index.exists():
        where = json.loads(index.read_text())["weight_map"]
        assert where == {n: f.name for f in made.glob("*.safetensors") for n in load_file(f)}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_bytes_are_within_one_unit_of_pefts_own_merge(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", shards=2)
    adapter = lora(tmp_path / "adapter", base)
    found = fused_by_rows(adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, tensor in found.items():
        gap = (merged[name].double() - tensor.double()).abs()
        assert bool((gap <= 2 * half_ulp(tensor.double(), torch.bfloat16)).all()), name
    assert any(not torch.equal(merged[n], load_file(next(base.glob("*1-of*"))).get(n, merged[n])) for n in found)


def test_stock_transformers_loads_it_without_a_warning_and_answers_as_the_unfused_model(tmp_path: Path) -> None:
    """GLoRA on bias-free LLaMA: the biases have a place, and the logits are the authors' recorded ones."""
    import logging
    import warnings

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    case = CASES["glora_llama"]
    path, given = case.arguments()
    fused_by_rows(path, tmp_path / "out", "fp32", **given)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    hf_logging.get_logger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", output_loading_info=True)
    finally:
        hf_logging.get_logger("transformers").removeHandler(handler)
    assert said == []
    assert not any(info.values()), info
    assert model.config.attention_bias
    with torch.no_grad():
        logits = model.double().eval()(case.inputs()["input_ids"]).logits
    assert float((logits - torch.from_numpy(np.load(case.folder / "expected64.npy"))).abs().max()) < 2e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_tied_embeddings_are_untied_where_the_adapter_tells_them_apart(tmp_path: Path, module: str) -> None:
    """peft's unfused forward in float64 is what the untied folder has to answer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", tied=True, dtype=torch.float32, shards=2)
    adapter = lora(tmp_path / "adapter", base, modules=[module, "model.layers.0.mlp.up_proj"])
    found = fused_by_rows(adapter, tmp_path / "out")
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    unfused = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).double().eval()
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").double().eval()
    with torch.no_grad():
        expected, answer = unfused(ids).logits, fused(ids).logits
    assert float((expected - answer).abs().max()) < 1e-5 * float(expected.abs().max())
    checkpoint, weights = load_fused(tmp_path / "out")
    assert rx.verify(checkpoint, weights).certificate.verdict == "exact"


def test_tied_embeddings_stay_tied_otherwise(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=True)
    adapter = lora(tmp_path / "adapter", base, modules=LAYERS)
    assert "lm_head.weight" not in fused_by_rows(adapter, tmp_path / "out")
    checkpoint, weights = load_fused(tmp_path / "out")
    assert weights.sha256() == rx.fuse(checkpoint).sha256()


def test_no_torch_is_imported_for_kinds_with_factors(tmp_path: Path) -> None:
    import subprocess
    import sys

    base = llama(tmp_path / "base", shards=2)
    adapter = lora(tmp_path / "adapter", base)
    code = (
        "import sys\nfrom reparam_export import cli\n"
        f"cli.cli.main(['fuse', {str(adapter)!r}, '-o', {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_wrong_scale_in_the_factors_is_caught_by_the_kinds_own_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam_export.adapters import lora as of_lora
    from reparam_export.affine import Affine, LowRank

    base = llama(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", base)
    monkeypatch.setattr(of_lora, "low_rank", lambda base, p: LowRank.of(base, (p.pair, p.scale * (1 + 1e-9))))
    with pytest.raises(EquivalenceError) as caught:
        fused_by_rows(adapter, tmp_path / "out")
    assert caught.value.layer is not None
    assert caught.value.evidence.verdict == "wrong"
    assert not (tmp_path / "out").exists()
    assert Affine is not None


@pytest.mark.parametrize("name", ["hydra", "glora", "repadapter"])
def test_a_wrong_factor_of_any_kind_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from dataclasses import replace

    from reparam_export import adapters

    base = llama(tmp_path / "base")
    file = native(tmp_path / "ckpt.pt", base, name, LAYERS)
    honest = adapters.kind(name).low_rank  # type: ignore[attr-defined]

    def faulty(base: Any, p: Any) -> Any:
        form = honest(base, p)
        bent = tuple((left, right * (1 + 1e-9)) for left, right in form.added)
        gates = tuple((left * (1 + 1e-9), right) for left, right in form.gates)
        return replace(form, added=bent, gates=gates, bias=None if form.bias is None else form.bias * (1 + 1e-9))

    monkeypatch.setattr(adapters.kind(name), "low_rank", faulty)
    with pytest.raises(EquivalenceError, match="is not the trained layer"):
        fused_by_rows(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fault_in_one_stored_entry_is_named_and_nothing_is_kept(
    tmp_path: Path, compiled_with: Callable[[str, str], None]
) -> None:
    base = llama(tmp_path / "base", shards=2)
    adapter = lora(tmp_path / "adapter", base)
    compiled_with(
        "store i16 %stored, ptr %out.i, align 2",
        """
  %here = icmp eq i64 %i, 3
  %wrong = select i1 %here, i16 512, i16 0
  %odd = xor i16 %stored, %wrong
  store i16 %odd, ptr %out.i, align 2""",
    )
    with pytest.raises(EquivalenceError) as caught:
        fused_by_rows(adapter, tmp_path / "out")
    assert caught.value.layer in {a.module for a in read(adapter).adapters}
    assert caught.value.evidence.worst["index"][1] == 3
    assert not (tmp_path / "out").exists()


def test_a_shard_that_was_changed_afterwards_is_caught_and_the_entry_named(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", shards=2)
    adapter = lora(tmp_path / "adapter", base)
    fused_by_rows(adapter, tmp_path / "out")
    shard = next((tmp_path / "out" / "hf").glob("*2-of*"))
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("up_proj.weight"))
    tensors[name].view(torch.int16)[5, 7] ^= 1  # one unit in the last place
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(EquivalenceError, match=r"\[5, 7\] is") as caught:
        load_fused(tmp_path / "out")
    assert f"{caught.value.layer}.weight" == name


def test_a_carried_tensor_that_was_changed_or_lost_afterwards_is_caught(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", base, modules=LAYERS)
    fused_by_rows(adapter, tmp_path / "out")
    shard = tmp_path / "out" / "hf" / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(EquivalenceError, match=r"model\.norm\.weight .* \[3\] is"):
        load_fused(tmp_path / "out")
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, shard, {"format": "pt"})
    with pytest.raises(EquivalenceError, match=r"model\.norm\.weight is missing"):
        load_fused(tmp_path / "out")


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(checkpoint: Path, error: type[Exception], match: str, **given: Any) -> None:
    with pytest.raises(error, match=match):
        plan_of(read(checkpoint, numpy=True, **given), None)


def test_damaged_bases_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", shards=3)
    adapter = lora(tmp_path / "adapter", base)
    index = base / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    second = base / "model-00002-of-00003.safetensors"
    for name in ("../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "x.py", 7):
        changed = {**whole, "weight_map": {**whole["weight_map"], "model.norm.weight": name}}
        index.write_text(json.dumps(changed))
        refused(adapter, CheckpointError, "names the shard")
    for text in ("[]", "{}", '{"weight_map": []}', "{"):
        index.write_text(text)
        refused(adapter, CheckpointError, "index.json")
    index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], "extra.weight": second.name}}))
    refused(adapter, TensorMismatchError, r"extra\.weight")
    index.write_text(
        json.dumps({**whole, "weight_map": {k: v for k, v in whole["weight_map"].items() if k != "lm_head.weight"}})
    )
    refused(adapter, TensorMismatchError, r"lm_head\.weight")
    index.write_text(json.dumps(whole))
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    refused(adapter, CheckpointError, "truncated or damaged")
    second.write_bytes(b"\xff" * 8 + content[8:])
    refused(adapter, CheckpointError, "truncated or damaged")
    second.unlink()
    refused(adapter, CheckpointError, "1 shard")


def test_a_base_with_a_layer_missing_or_of_another_size_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", layers=3)
    adapter = lora(tmp_path / "adapter", base, modules=LAYERS)
    state = load_file(base / "model.safetensors")
    save_file({n: t for n, t in state.items() if n != "model.layers.2.mlp.up_proj.weight"}, base / "model.safetensors")
    refused(adapter, TensorMismatchError, r"model\.layers\.2\.mlp\.up_proj\.weight")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(4, HIDDEN, dtype=torch.bfloat16)
    save_file(state, base / "model.safetensors")
    refused(adapter, TensorMismatchError, r"model\.layers\.1\.mlp\.up_proj")


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    deep = llama(tmp_path / "deep", layers=3)
    refused(
        lora(tmp_path / "adapter", deep), TensorMismatchError, r"model\.layers\.2", base=f"hf:{base}?task=CAUSAL_LM"
    )
    part = lora(tmp_path / "part", base, modules=LAYERS)
    config = json.loads((part / "adapter_config.json").read_text())
    (part / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["k_proj", "down_proj"]}))
    refused(part, TensorMismatchError, "does not adapt it")


def test_tensors_brought_whole_are_a_change_and_the_bases_own_are_none(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    norm = {"model.norm.weight": torch.full((HIDDEN,), 1.5)}
    torch.save(norm, tmp_path / "norm.pt")
    found = fused_by_rows(tmp_path / "norm.pt", tmp_path / "out", "fp32", base=f"hf:{base}")
    assert torch.equal(found["model.norm.weight"], norm["model.norm.weight"])
    same_bytes(found, dict(rx.fuse(read(tmp_path / "norm.pt", f"hf:{base}"), "fp32").tensors))
    own = {n: t.float() for n, t in load_file(base / "model.safetensors").items() if n in norm}
    torch.save(own, tmp_path / "own.pt")
    with pytest.raises(FusionError, match="changes nothing"):
        fused_by_rows(tmp_path / "own.pt", tmp_path / "none", base=f"hf:{base}")


def test_whole_tensors_are_rounded_once_to_the_storage_that_was_asked_for(tmp_path: Path) -> None:
    base, fine = llama(tmp_path / "base"), torch.full((HIDDEN,), 1 + 2.0**-20)
    path = native(tmp_path / "ckpt.pt", base, "lora", LAYERS, **{"model.norm.weight": fine})
    assert torch.equal(fused_by_rows(path, tmp_path / "wide", "fp32")["model.norm.weight"], fine)
    plan = plan_of(read(path, numpy=True))
    assert narrowed(plan.checkpoint, plan.itemsize) == ["model.norm.weight"]
    assert torch.equal(fused_by_rows(path, tmp_path / "narrow")["model.norm.weight"], fine.bfloat16())
    recorded = [json.loads((tmp_path / kept / "fused.json").read_text())["narrowed"] for kept in ("wide", "narrow")]
    assert recorded == [[], ["model.norm.weight"]]


def test_biases_of_zeros_are_a_change_of_nothing(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    path = native(tmp_path / "ckpt.pt", base, "hydra", LAYERS, scale=0.0)
    for refused in (lambda: fused_by_rows(path, tmp_path / "out"), lambda: rx.fuse(read(path))):
        with pytest.raises(FusionError, match="changes nothing"):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"], ids=["copied", "folded"])
def test_another_base_than_the_one_it_was_trained_on_is_refused(
    tmp_path: Path, trained: torch.dtype, name: str
) -> None:
    from transformers import LlamaForCausalLM

    from reparam_export.training import attach, save

    base = llama(tmp_path / "base", shards=2)
    model = attach(LlamaForCausalLM.from_pretrained(base, dtype=trained), "lora", "*.mlp.up_proj", rank=2)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.1)
    save(model, tmp_path / "ckpt.pt", base=f"hf:{base}")
    fused_by_rows(tmp_path / "ckpt.pt", tmp_path / "out")
    for file in base.glob("*.safetensors"):
        state = load_file(file)
        if name in state:
            state[name].view(-1)[5] += 1
            save_file(state, file, {"format": "pt"})
    with pytest.raises(TensorMismatchError, match="other numbers") as caught:
        fused_by_rows(tmp_path / "ckpt.pt", tmp_path / "other")
    assert caught.value.tensor == name
    assert not (tmp_path / "other").exists()


def test_a_change_of_nothing_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", base)
    state = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in state.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(FusionError, match="changes nothing"):
        fused_by_rows(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized_bases_are_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    refused(lora(tmp_path / "adapter", base), CheckpointError, "quantized")


def test_what_only_folding_in_memory_can_do_says_why(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", base)
    refused(adapter, NotStreamableError, "no Hugging Face folder", base="timm:vit_tiny_patch16_224")
    refused(adapter, NotStreamableError, "do not come from its own folder", base_weights=base / "model.safetensors")
    refused(adapter, NotStreamableError, "for SEQ_CLS", base=f"hf:{base}?task=SEQ_CLS")
    refused(adapter, NotStreamableError, "config is changed", base=f"hf:{base}?rms_norm_eps=1e-3")
    mistral = tmp_path / "mistral"
    shutil.copytree(base, mistral)
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (mistral / "config.json").write_text(json.dumps(config))
    refused(native(tmp_path / "ckpt.pt", mistral, "glora", LAYERS), NotStreamableError, "no switch of its config")


def test_a_folder_that_was_changed_around_its_shards_is_caught(tmp_path: Path) -> None:
    """Whatever ``from_pretrained`` would read: the config, the index, a second file with a tensor of the same name."""
    adapter = lora(tmp_path / "adapter", llama(tmp_path / "base", shards=2))
    out = tmp_path / "out"
    fused_by_rows(adapter, out)
    folder = out / "hf"
    for name, change in (
        ("config.json", lambda text: text.replace('"hidden_size": 48', '"hidden_size": 49')),
        ("model.safetensors.index.json", lambda text: text.replace("00001-of", "00002-of", 1)),
    ):
        whole = (folder / name).read_text()
        assert change(whole) != whole
        (folder / name).write_text(change(whole))
        with pytest.raises(EquivalenceError, match=f"{name} is not the file"):
            load_fused(out)
        assert rx.write_report(out).verdict == "unproven"
        (folder / name).write_text(whole)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "zzz.safetensors")
    with pytest.raises(EquivalenceError, match=r"zzz\.safetensors is new"):
        load_fused(out)
    (folder / "zzz.safetensors").unlink()
    load_fused(out)


def test_a_head_that_is_neither_there_nor_tied_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", base)
    state = load_file(base / "model.safetensors")
    save_file({n: t for n, t in state.items() if n != "lm_head.weight"}, base / "model.safetensors", {"format": "pt"})
    refused(adapter, TensorMismatchError, "not tied to the embedding")


def test_shira_and_its_indices_are_streamed(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.ShiraConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft itself uses
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / "adapter")
    found = fused_by_rows(tmp_path / "adapter", tmp_path / "out")
    merged = model.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], merged[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(found[name], load_file(base / "model.safetensors")[name])
