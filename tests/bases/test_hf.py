"""``hf:`` bases equal what transformers itself loads, in the dtypes on disk, and nothing is skipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reparam_export.errors import (
    CheckpointError,
    MissingBackendError,
    MissingSettingError,
    TensorMismatchError,
    UsageError,
)
from reparam_export.models import Base, outputs_of_call, parse_input, pure_float64, samples

pytest.importorskip("transformers")
import transformers

DATA = Path(__file__).parents[1] / "data"
BERT, GPT2, LLAMA, NLU = (
    DATA / name for name in ("peft_base_bert", "peft_base_gpt2", "glora_llama/base", "hydra_nlu/ckpt")
)
ADAPTER = frozenset(n for n in torch.load(NLU / "pytorch_model.bin", weights_only=True) if "hydra" in n)


def copied(folder: Path, to: Path, **config: object) -> Path:
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return to


@pytest.mark.parametrize(
    ("folder", "name"),
    [(BERT, "BertForSequenceClassification"), (GPT2, "GPT2LMHeadModel"), (LLAMA, "LlamaForCausalLM")],
)
def test_equals_a_direct_load_by_transformers(folder: Path, name: str) -> None:
    module, signature = Base(f"hf:{folder}").build()
    direct = getattr(transformers, name).from_pretrained(folder).eval()
    inputs = samples(signature, 4, seed=0)
    (logits,) = outputs_of_call(module, signature, tuple(inputs.values()))
    assert type(module) is type(direct)
    assert torch.equal(logits, direct(**inputs).logits)
    assert (list(inputs), signature.outputs) == (["input_ids", "attention_mask"], ("logits",))
    assert signature.inputs[0].high == direct.config.vocab_size
    assert not any(p.requires_grad for p in module.parameters())


def test_tied_weights_stay_tied() -> None:
    module, _ = Base(f"hf:{GPT2}").build()
    assert module.lm_head.weight is module.transformer.wte.weight


def test_a_folder_with_an_adapter_and_fork_only_settings_in_it_is_read_without_the_adapter() -> None:
    module, signature = Base(f"hf:{NLU}", ignored=ADAPTER).build()
    stored = torch.load(NLU / "pytorch_model.bin", weights_only=True)
    state = module.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())
    assert set(stored) - set(state) == ADAPTER | {"roberta.embeddings.position_ids"}
    assert signature.outputs == ("logits",)


def test_left_over_tensors_are_refused_by_name() -> None:
    with pytest.raises(TensorMismatchError) as caught:
        Base(f"hf:{NLU}").build()
    assert caught.value.tensor in ADAPTER
    assert caught.value.expected is None


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [(None, "a tensor in the weights", None), (torch.ones(63), (64,), (63,)), (torch.ones(64, 2), (64,), (64, 2))],
)
def test_missing_and_misshaped_tensors_are_refused(
    tmp_path: Path, change: torch.Tensor | None, expected: object, found: object
) -> None:
    folder, name = copied(BERT, tmp_path / "base"), "bert.encoder.layer.1.output.LayerNorm.bias"
    state = load_file(BERT / "model.safetensors") | {name: change}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TensorMismatchError) as caught:
        Base(f"hf:{folder}").build()
    assert (caught.value.tensor, caught.value.expected, caught.value.found) == (name, expected, found)
    assert caught.value.module == "bert.encoder.layer.1.output.LayerNorm"


def test_the_checkpoints_classifier_decides_the_number_of_labels() -> None:
    replaced = {"classifier.weight": (5, 64), "classifier.bias": (5,)}
    module, _ = Base(f"hf:{BERT}", replaced=replaced).build()
    assert tuple(module.classifier.weight.shape) == (5, 64)
    assert not module.classifier.weight.any()


def test_weights_may_come_from_another_file(tmp_path: Path) -> None:
    state = {k: v + 1 for k, v in load_file(BERT / "model.safetensors").items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "base.pth.tar")
    module, _ = Base(f"hf:{BERT}", tmp_path / "base.pth.tar").build()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_keeps_the_stored_dtypes_whatever_the_config_says(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path / "base", dtype="float16")
    state = {k: v if "norm" in k else v.bfloat16() for k, v in load_file(LLAMA / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    module, _ = Base(f"hf:{folder}").build()
    stored = module.state_dict()
    assert all(
        stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor) for name, tensor in state.items()
    )


@pytest.mark.parametrize("shard", ["model", "pytorch_model"])
def test_reads_shards_and_refuses_one_that_is_gone(tmp_path: Path, shard: str) -> None:
    state, kind = load_file(LLAMA / "model.safetensors"), ".safetensors" if shard == "model" else ".bin"
    folder = copied(LLAMA, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    where = {name: f"{shard}-0000{1 + i % 2}-of-00002{kind}" for i, name in enumerate(state)}
    for file in set(where.values()):
        part = {n: t.contiguous() for n, t in state.items() if where[n] == file}
        save_file(part, folder / file) if shard == "model" else torch.save(part, folder / file)
    (folder / f"{shard}{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    module, _ = Base(f"hf:{folder}").build()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    first, last = sorted(set(where.values()))
    name = next(n for n, file in where.items() if file == first)
    part = {n: t.contiguous() for n, t in state.items() if where[n] == last or n == name}
    save_file(part, folder / last) if shard == "model" else torch.save(part, folder / last)  # and in the other, too
    with pytest.raises(CheckpointError, match=rf"{name} in {first} and {name} in {last} are both"):
        Base(f"hf:{folder}").build()
    (folder / f"{shard}-00002-of-00002{kind}").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        Base(f"hf:{folder}").build()


def test_a_truncated_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    folder = copied(BERT, tmp_path / "base")
    (folder / "model.safetensors").write_bytes((BERT / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="5000 bytes"):
        Base(f"hf:{folder}").build()


def test_a_vision_model_takes_pixel_values(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    torch.manual_seed(3)
    transformers.ViTModel(config).eval().save_pretrained(tmp_path)
    module, signature = Base(f"hf:{tmp_path}").build()
    images = samples(signature, 2, seed=0)
    outputs = outputs_of_call(module, signature, tuple(images.values()))
    direct = transformers.ViTModel.from_pretrained(tmp_path).eval()(**images)
    assert images["pixel_values"].shape == (2, 3, 16, 16)
    assert signature.outputs == ("last_hidden_state", "pooler_output")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, direct.values(), strict=True))


def test_the_user_may_state_the_inputs() -> None:
    _, signature = Base(f"hf:{BERT}", inputs=(parse_input("input_ids=batch,8:int64:96"),)).build()
    assert [i.name for i in signature.inputs] == ["input_ids"]


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (f"hf:{BERT}?no_such_field=1", UsageError),
        (f"hf:{BERT}?architecture=NoSuchModel", CheckpointError),
        (f"hf:{BERT}?architecture=AutoModel", CheckpointError),
        (f"hf:{BERT}?task=NO_TASK", UsageError),
        (f"hf:{BERT}?architecture=LlamaForCausalLM", CheckpointError),
        (f"hf:{DATA / 'hydra_vtab'}", CheckpointError),
        (f"hf:{DATA / 'no_such_folder'}", CheckpointError),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(spec: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Base(spec).build()
    assert type(caught.value) is error


def test_an_id_that_cannot_be_had_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        Base("hf:nobody/no-such-model").build()


def test_a_config_that_wants_code_or_names_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingSettingError) as caught:
        Base(f"hf:{copied(BERT, tmp_path / 'a', architectures=None)}").build()
    assert caught.value.setting == "architectures"
    remote = {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}
    with pytest.raises(CheckpointError):
        Base(f"hf:{copied(BERT, tmp_path / 'b', **remote)}").build()
    with pytest.raises(CheckpointError, match="quantized"):
        Base(f"hf:{copied(BERT, tmp_path / 'c', quantization_config={'quant_method': 'awq'})}").build()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers.utils.logging", None)
    with pytest.raises(MissingBackendError) as caught:
        Base(f"hf:{BERT}").build()
    assert caught.value.extra == "hf"


def glora_folded() -> tuple[torch.nn.Module, object]:
    """The recorded LLaMA with its GLoRA adapter folded by W' = W + W*A + B, b' = E + W C, in float64."""
    module, signature = Base(f"hf:{LLAMA}").build()
    module.double()
    stored = torch.load(DATA / "glora_llama/adapter/adapter_model.bin", weights_only=True)

    def support(option: str, down: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        if option.startswith("LoRA"):
            rank = int(option.split("_")[1])
            return down[:, :rank] @ up[:rank]
        if option == "vector":
            return down[:, :1] if down.ndim == 2 else down
        return down.flatten()[0] if option == "constant" else torch.zeros(1, dtype=torch.float64)

    for path, options in json.loads((DATA / "glora_llama/eval_config.json").read_text()).items():
        p = {n: stored[f"{path}.glora_{n}"].double() for n in ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "E")}
        linear = module.get_submodule(path.removeprefix("base_model.model."))
        weight = linear.weight
        c = support(options["C"], p["Cd"], p["Cu"]).expand(weight.shape[1], 1)
        bias = support(options["E"], p["E"]) + (weight @ c).squeeze(1)
        a, b = support(options["A"], p["Ad"], p["Au"]), support(options["B"], p["Bd"], p["Bu"])
        linear.weight = torch.nn.Parameter(weight + weight * a + b, requires_grad=False)
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return module, signature


def test_float64_is_pure_to_the_last_bit_of_the_recorded_llama() -> None:
    module, signature = glora_folded()
    ids = torch.from_numpy(np.load(DATA / "glora_llama/inputs.npy"))
    inputs = (ids, torch.ones_like(ids))
    pure = np.load(DATA / "glora_llama/expected64_pure.npy")
    casting = outputs_of_call(module, signature, inputs)[0].numpy()
    assert np.abs(casting - np.load(DATA / "glora_llama/expected64.npy")).max() < 1e-13
    assert np.abs(casting - pure).max() > 1e-7
    # The recording also has the rotary frequencies in float64; the model's own are numbers rounded to float32.
    exponents = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    module.model.rotary_emb.inv_freq = 1.0 / 10000.0**exponents
    with pure_float64():
        ours = outputs_of_call(module, signature, inputs)[0].numpy()
    assert np.abs(ours - pure).max() < 1e-13
