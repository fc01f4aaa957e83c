"""Exports as a whole: every recorded case, run by onnxruntime itself, against its authors' recorded float64 outputs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CASES, Case, own_model
from safetensors.torch import save_file

import reparam_export as rx
from reparam_export import exporters
from reparam_export.assembly import base_of
from reparam_export.errors import EquivalenceError, ExportError, UsageError
from reparam_export.files import exported_sha256
from reparam_export.verification import VerifiedModel


def verified(case: Case, dtype: str | None = None) -> VerifiedModel:
    checkpoint = case.read()
    return rx.verify(checkpoint, rx.fuse(checkpoint, dtype), case.inputs())


@pytest.fixture(scope="module")
def hydra_model() -> VerifiedModel:
    return verified(CASES["hydra_vtab"])


def test_onnxruntime_answers_as_the_authors_recorded(case: Case, tmp_path: Path) -> None:
    artifact = rx.export(verified(case), "onnx", tmp_path, batch=(1, 2, 5))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    expected = case.expected().numpy()
    inputs = {name: tensor.numpy() for name, tensor in case.inputs().items() if name in names}
    found = session.run(None, inputs)[0]
    bound = artifact.outputs[0].bound
    assert np.abs(found - expected).max() <= bound < 1e-4
    assert [o.batch for o in artifact.outputs[:: len(session.get_outputs())]] == [1, 2, 5]
    assert artifact.ran


@pytest.mark.parametrize(
    ("name", "precision"), [("hydra_vtab", "fp16"), ("hydra_vtab", "bf16"), ("glora_llama", "bf16")]
)
def test_lower_precision_stays_within_its_own_floor(name: str, precision: str, tmp_path: Path) -> None:
    case = CASES[name]
    artifact = rx.export(verified(case), "onnx", tmp_path, precision=precision, batch=(1, 2, 4))
    worst = max(artifact.outputs, key=lambda o: o.error)
    assert worst.error <= worst.bound
    assert worst.bound < 0.5 * worst.magnitude
    assert worst.floor > 1e-4  # it really is lower precision
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    layer = next(a.module for a in case.read().adapters)
    assert kinds[f"{layer}.weight"] == (onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16)


@pytest.mark.parametrize("name", ["hydra_vtab", "glora_vit"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_is_built_and_audited_here(name: str, precision: str, tmp_path: Path) -> None:
    artifact = rx.export(verified(CASES[name]), "trt", tmp_path, precision=precision, batch=(1, 2, 4))
    assert artifact.audit is not None
    assert artifact.audit.relaid == ()
    assert len(artifact.audit.bitwise) + len(artifact.audit.merged) == artifact.audit.fused_tensors >= 12
    assert artifact.audit.adapter_tensors_found == ()
    assert artifact.details["gpus"] == ["sm80", "sm86", "sm89", "sm120"]
    assert artifact.details["products"].keys() == {"float32" if precision == "fp32" else "float16"}
    if not torch.cuda.is_available():
        assert artifact.ran is False
        assert "not run: no GPU" in artifact.note
    written = json.loads((tmp_path / "artifact.json").read_text())["artifacts"]
    assert [a["target"] for a in written] == ["onnx", "trt"]


def test_an_unfused_engine_does_not_pass_the_audit(
    hydra_model: VerifiedModel, tmp_path: Path, monkeypatch: Any
) -> None:
    """If the unfused model were what is exported, its adapters would stand in the plan."""
    unfused = hydra_model.unfused(torch.float32)
    monkeypatch.setattr(VerifiedModel, "module", lambda self: unfused)
    monkeypatch.setattr(exporters, "graph_differences", lambda *args: [])
    with pytest.raises(EquivalenceError, match="holds adapter tensors"):
        rx.export(hydra_model, "trt", tmp_path, batch=(1, 2, 4))
    assert not (tmp_path / "model.engine").exists()


def test_an_unfused_onnx_file_does_not_pass_the_graph_proof(
    hydra_model: VerifiedModel, tmp_path: Path, monkeypatch: Any
) -> None:
    unfused = hydra_model.unfused(torch.float32)
    monkeypatch.setattr(VerifiedModel, "module", lambda self: unfused)
    with pytest.raises(EquivalenceError, match="graph differs from the base's"):
        rx.export(hydra_model, "onnx", tmp_path, batch=(1, 2, 4))
    assert not list(tmp_path.glob("model*"))


def test_a_file_that_answers_wrongly_is_not_kept(hydra_model: VerifiedModel, tmp_path: Path, monkeypatch: Any) -> None:
    module = copy.deepcopy(hydra_model.module())
    with torch.no_grad():
        module.get_parameter("blocks.2.mlp.fc2.bias")[3] += 1e-2
    monkeypatch.setattr(VerifiedModel, "module", lambda self: module)
    with pytest.raises(EquivalenceError, match="was not kept"):
        rx.export(hydra_model, "onnx", tmp_path, batch=(1, 2, 4))
    assert not list(tmp_path.glob("model*"))


def test_every_output_of_a_model_is_compared(tmp_path: Path) -> None:
    """A model with two outputs, the second of which alone is wrong."""
    base = own_model(tmp_path, "self.a, self.b = Linear(6, 4), Linear(6, 4)", "self.a(x), self.b(x)")
    torch.save(
        {"b.adapter.conv_A.weight": torch.ones(2, 6, 1), "b.adapter.conv_B.weight": torch.ones(6, 1, 1)},
        tmp_path / "c.pt",
    )
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,6:float32"])
    weights = rx.fuse(checkpoint)
    model = rx.verify(checkpoint, weights)
    assert {o.output for o in model.certificate.outputs} == set(model.signature.outputs)
    assert len(model.signature.outputs) == 2
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    tensors["b.bias"] += 0.1
    with pytest.raises(EquivalenceError) as caught:
        rx.verify(checkpoint, replace(weights, tensors=tensors))
    assert [o.passed for o in caught.value.evidence.outputs[:2]] == [True, False]
    rx.export(model, "onnx", tmp_path / "out", batch=(1, 2, 3))


def test_metadata_says_where_the_file_comes_from(hydra_model: VerifiedModel, tmp_path: Path) -> None:
    rx.export(hydra_model, "onnx", tmp_path, batch=(1, 2, 4))
    content = onnx.load(tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in content.metadata_props}
    assert metadata["checkpoint_sha256"] == hydra_model.checkpoint.sha256
    assert metadata["weights_sha256"] == hydra_model.weights.sha256()
    assert json.loads(metadata["kinds"]) == {"hydra": 6}
    assert set(hydra_model.weights.tensors) <= {i.name for i in content.graph.initializer}


def test_external_data_is_used_when_asked(hydra_model: VerifiedModel, tmp_path: Path) -> None:
    options = exporters.Options(batch=(1, 2, 4), external=1000)
    artifact = exporters.to_onnx(hydra_model, tmp_path, options)
    assert (tmp_path / "model.onnx.data").stat().st_size > 500_000
    assert artifact.size == sum(f.stat().st_size for f in tmp_path.glob("model.onnx*"))
    assert exported_sha256(tmp_path / "model.onnx") == artifact.sha256
    with (tmp_path / "model.onnx.data").open("r+b") as file:
        file.write(bytes(16))
    assert exported_sha256(tmp_path / "model.onnx") != artifact.sha256  # so a report no longer vouches for it
    again = exporters.to_onnx(hydra_model, tmp_path, exporters.Options(batch=(1, 2, 4)))
    assert not (tmp_path / "model.onnx.data").exists()
    assert again.ran


@pytest.mark.parametrize(("target", "options"), [("tflite", {}), ("onnx", {"precision": "int8"})])
def test_unknown_options_are_refused(
    hydra_model: VerifiedModel, tmp_path: Path, target: str, options: dict[str, str]
) -> None:
    with pytest.raises(UsageError):
        rx.export(hydra_model, target, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# --- safetensors ----------------------------------------------------------------------------------------------------


def test_created_biases_get_a_place_that_stock_transformers_takes(tmp_path: Path) -> None:
    """GLoRA on a bias-free LLaMA: the fused folder, loaded by transformers alone, gives the recorded outputs."""
    from transformers import AutoModelForCausalLM

    case = CASES["glora_llama"]
    artifact = rx.export(verified(case), "safetensors", tmp_path)
    assert artifact.details["config_changed"] == {"attention_bias": True, "mlp_bias": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    with torch.no_grad():
        logits = model.eval()(case.inputs()["input_ids"]).logits
    expected = torch.from_numpy(np.load(case.folder / "expected64.npy"))
    assert float((logits - expected).abs().max()) < 2e-5


def test_a_model_type_without_bias_switches_is_refused(tmp_path: Path) -> None:
    from reparam_export.hf_folder import bias_switches

    config = json.loads((CASES["peft_lora_gpt2"].folder.parent / "peft_base_gpt2" / "config.json").read_text())
    with pytest.raises(ExportError, match="stock loaders would drop"):
        bias_switches(config, {"lm_head.weight"}, ("lm_head.bias",))


def test_shards_and_tokenizer_are_carried_over(tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(CASES["peft_lora"].folder.parent / "peft_base_llama", base)
    state = load_file(base / "model.safetensors")
    names = sorted(state)
    shards = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(shards.values()):
        save_file({n: state[n] for n in names if shards[n] == shard}, base / shard, {"format": "pt"})
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (base / "tokenizer_config.json").write_text("{}")
    checkpoint = rx.read(CASES["peft_lora"].folder, f"hf:{base}")
    rx.export(rx.verify(checkpoint, rx.fuse(checkpoint)), "safetensors", tmp_path / "out")
    made = tmp_path / "out" / "hf"
    assert (made / "tokenizer_config.json").read_text() == "{}"
    for shard in set(shards.values()):
        assert sorted(load_file(made / shard)) == sorted(n for n in names if shards[n] == shard)


def test_the_safetensors_file_loads_into_a_plain_timm_model(
    hydra: Case, hydra_model: VerifiedModel, tmp_path: Path
) -> None:
    import timm
    from safetensors.torch import load_file

    rx.export(hydra_model, "safetensors", tmp_path)
    kwargs = json.loads((hydra.folder / "meta.json").read_text())["model"]["kwargs"]
    model = timm.create_model("vit_tiny_patch16_224", **kwargs).double().eval()
    model.load_state_dict({k: v.double() for k, v in load_file(tmp_path / "model.safetensors").items()}, strict=True)
    with torch.no_grad():
        answer = model(hydra.inputs()["image"].double())
    assert float((answer - hydra.expected()).abs().max()) < 2e-5


def test_a_fused_weight_beyond_fp16_is_kept_in_fp32_and_named(tmp_path: Path) -> None:
    base = own_model(tmp_path, "self.a, self.b = Linear(6, 4), Linear(4, 3)", "self.b(torch.tanh(self.a(x)))")
    pair = {"a.adapter.conv_A.weight": torch.ones(2, 6, 1), "a.adapter.conv_B.weight": 1e7 * torch.ones(6, 1, 1)}
    torch.save(pair, tmp_path / "c.pt")
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,6:float32"])
    artifact = rx.export(
        rx.verify(checkpoint, rx.fuse(checkpoint)), "onnx", tmp_path / "out", precision="fp16", batch=(1, 2, 3)
    )
    assert any(name == "a.weight" and reason.startswith("holds ") for name, reason in artifact.kept_fp32)
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert kinds["a.weight"] == onnx.TensorProto.FLOAT
    assert kinds["b.weight"] == onnx.TensorProto.FLOAT16


def test_an_output_that_is_called_as_an_input_gets_a_name_of_its_own(tmp_path: Path) -> None:
    base = own_model(tmp_path, "self.fc = Linear(6, 4)", "{'x': self.fc(x), 'out_x': self.fc(x) ** 2}")
    torch.manual_seed(1)
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    lora = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    save_file({f"lora_unet_fc.{name}": tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    checkpoint = rx.read(tmp_path / "lora.safetensors", base, inputs=["x=batch,6:float32"])
    artifact = rx.export(rx.verify(checkpoint, rx.fuse(checkpoint)), "onnx", tmp_path / "out", batch=(1, 2, 3))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x"]
    x = torch.randn(5, 6)
    found = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"x": x.numpy()}), strict=True))
    plain = base_of(checkpoint).build()[0].double().fc
    expected = plain(x.double()) + 1.5 * x.double() @ down.double().T @ up.double().T
    assert set(found) == {"out_out_x", "out_x"}
    assert np.abs(found["out_out_x"] - expected.numpy()).max() < 1e-5
    assert np.abs(found["out_x"] - expected.numpy() ** 2).max() < 1e-4
    assert artifact.details["renamed_outputs"] == {"out_out_x": "x"}
    assert "output x is called out_out_x" in artifact.note


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_what_untying_adds_is_listed_and_is_no_difference(tmp_path: Path, target: str) -> None:
    """GPT-2, whose ONNX graph has a node more once head and embeddings are two tensors; against peft's own forward in float64."""
    import peft
    import transformers
    from test_cli import run

    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    )
    base.save_pretrained(tmp_path / "base")
    given = peft.LoraConfig(r=4, lora_alpha=10, target_modules=[target, "c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, given)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    words = (
        "convert",
        tmp_path / "adapter",
        "--base",
        f"hf:{tmp_path / 'base'}",
        "--to",
        "onnx",
        "--batch",
        "1:1:2",
        "-o",
        out,
    )
    result = run(*words)
    assert result.exit_code == 0, result.output
    graph = json.loads((out / "verification.json").read_text())["graph"]
    assert graph["added"] == ["lm_head.weight (60, 32): one tensor with transformer.wte.weight in the base"]
    assert graph["bytes_fused"] - graph["bytes_base"] == 60 * 32 * 4
    assert graph["parameters_fused"] - graph["parameters_base"] == 60 * 32
    (artifact,) = json.loads((out / "artifact.json").read_text())["artifacts"]
    assert artifact["details"]["graph"] == "identical to the base's, but for 1 added tensors that the report lists"
    assert "graph identical to the base but for 1 addition" in (out / "report.md").read_text()
    ids = torch.randint(60, (3, 11))
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones((3, 11), np.int64)})[0]
    with torch.no_grad():
        expected = model.double().eval()(input_ids=ids).logits.numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
