"""What a reader must refuse: everything it cannot account for, by name, with what was expected and found."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, Case
from safetensors.torch import load_file, save_file

import reparam_export as rx
from reparam_export.errors import (
    CheckpointError,
    FusionError,
    MissingSettingError,
    TensorMismatchError,
    UnknownFormatError,
    UsageError,
)

PEFT_WARNS = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)  # its own


def state(case: Case) -> dict[str, Any]:
    path = case.folder / case.path
    return dict(torch.load(path, weights_only=True))


def test_every_format_is_recognised_by_its_keys(case: Case) -> None:
    expected = {
        "hydra_vtab": "hydra_vtab",
        "hydra_clip": "hydra_clip",
        "hydra_nlu": "hydra_nlu",
        "glora_vit": "glora_vit",
        "glora_llama": "glora_fork",
        "repadapter_vit": "repadapter",
        "repadapter_linear": "repadapter",
        "ssf_vit": "ssf",
    }
    assert case.read().format == expected.get(case.name, "peft_lora")


@pytest.mark.parametrize("name", ["hydra_vtab", "hydra_clip", "repadapter_vit"])
def test_a_missing_scale_is_refused_and_says_where_it_is(name: str) -> None:
    case = CASES[name]
    path, given = case.arguments()
    given.pop("config", None)
    given.pop("settings", None)
    with pytest.raises(MissingSettingError) as caught:
        rx.read(path, **given)
    assert caught.value.setting == "scale"
    assert caught.value.option == "--set scale=VALUE"


@pytest.mark.parametrize("name", ["glora_vit", "glora_llama"])
def test_a_glora_checkpoint_without_its_paths_is_refused(name: str) -> None:
    path, given = CASES[name].arguments()
    given.pop("config")
    with pytest.raises(MissingSettingError) as caught:
        rx.read(path, **given)
    assert caught.value.setting == "paths"


def test_paths_by_name_by_order_and_from_the_search_agree(glora: Case, tmp_path: Path) -> None:
    best = json.loads((CASES["glora_vit"].folder / "best_config.json").read_text())
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps([{k: v for k, v in layer.items() if k != "layer"} for layer in best]))
    paths = [
        [a.params.path for a in rx.read(glora.folder / "digits.pt", config=[file]).adapters]
        for file in (glora.folder / "checkpoint-3.pth.tar", glora.folder / "best_config.json", plain)
    ]
    assert paths[0] == paths[1] == paths[2]


def test_another_candidate_is_another_model(glora: Case) -> None:
    file = glora.folder / "checkpoint-3.pth.tar"
    best, second = (rx.read(glora.folder / "digits.pt", config=[file], candidate=k) for k in (0, 1))
    assert [a.params.path for a in best.adapters] != [a.params.path for a in second.adapters]
    assert "candidate 1" in second.notes[0]
    with pytest.raises(UsageError):
        rx.read(glora.folder / "digits.pt", config=[file], candidate=4000)


@pytest.mark.parametrize(
    "text", ['[{"A": "none"}]', '{"A": 1}{', "3", '[{"A":"x","B":"none","C":"none","D":"none","E":"none"}]']
)
def test_a_damaged_path_file_is_refused(glora: Case, tmp_path: Path, text: str) -> None:
    file = tmp_path / "paths.json"
    file.write_text(text)
    with pytest.raises(CheckpointError):
        rx.read(glora.folder / "digits.pt", config=[file])


def test_a_path_that_asks_for_more_rank_than_stored_is_refused(glora: Case, tmp_path: Path) -> None:
    best = json.loads((glora.folder / "best_config.json").read_text())
    best[3]["B"] = "LoRA_5"
    file = tmp_path / "paths.json"
    file.write_text(json.dumps(best))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc2.*LoRA_5.*stored rank is 4"):
        rx.read(glora.folder / "digits.pt", config=[file])


def edited(case: Case, tmp_path: Path, **changes: Any) -> Path:
    tensors = state(case)
    for name in changes.get("drop", ()):
        del tensors[name]
    tensors |= changes.get("add", {})
    path = tmp_path / "ckpt.pt"
    torch.save(tensors, path)
    return path


def test_a_left_over_tensor_is_refused(hydra: Case, tmp_path: Path) -> None:
    path = edited(hydra, tmp_path, add={"blocks.0.attn.extra.weight": torch.ones(2)})
    with pytest.raises(TensorMismatchError) as caught:
        rx.read(path, settings={"scale": 3})
    assert (caught.value.module, caught.value.tensor) == ("blocks.0.attn.extra", "weight")


def test_a_missing_tensor_is_refused(hydra: Case, tmp_path: Path) -> None:
    gone = "blocks.1.mlp.hydra_mlp_seq.up_proj.weight"
    path = edited(hydra, tmp_path, drop=[gone])
    with pytest.raises(TensorMismatchError) as caught:
        rx.read(path, settings={"scale": 3})
    assert caught.value.expected == gone


def test_a_mis_shaped_tensor_names_module_expected_and_found(hydra: Case, tmp_path: Path) -> None:
    name = "blocks.1.mlp.hydra_mlp_par.down_proj.weight"
    path = edited(hydra, tmp_path, add={name: torch.ones(4, 96)})
    checkpoint = rx.read(path, hydra.options["base"], base_weights=hydra.folder / "base.pt", settings={"scale": 3})
    with pytest.raises(TensorMismatchError) as caught:
        rx.fuse(checkpoint)
    assert (caught.value.module, caught.value.expected, caught.value.found) == ("blocks.1.mlp.fc2", (4, 384), (4, 96))


def test_a_bias_of_the_wrong_size_does_not_broadcast(hydra: Case, tmp_path: Path) -> None:
    path = edited(hydra, tmp_path, add={"blocks.1.mlp.hydra_mlp_par.up_proj.bias": torch.ones(1)})
    checkpoint = rx.read(path, hydra.options["base"], base_weights=hydra.folder / "base.pt", settings={"scale": 3})
    with pytest.raises(TensorMismatchError):
        rx.fuse(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_checkpoint_is_refused(hydra: Case, tmp_path: Path, value: float) -> None:
    name = "blocks.1.mlp.hydra_mlp_par.down_proj.bias"
    path = edited(hydra, tmp_path, add={name: torch.full((4,), value)})
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        rx.read(path, settings={"scale": 3})


def test_an_adapter_that_changes_nothing_is_refused(hydra: Case, tmp_path: Path) -> None:
    zero = {k: torch.zeros_like(v) for k, v in state(hydra).items() if "up_proj" in k}
    path = edited(hydra, tmp_path, add=zero)
    checkpoint = rx.read(path, hydra.options["base"], base_weights=hydra.folder / "base.pt", settings={"scale": 3})
    with pytest.raises(FusionError, match="changes nothing"):
        rx.fuse(checkpoint)


def test_the_wrong_base_is_refused(hydra: Case) -> None:
    other = hydra.options["base"].replace("depth=3", "depth=2")
    with pytest.raises(TensorMismatchError):
        rx.fuse(rx.read(hydra.folder / "ckpt.pt", other, base_weights=hydra.folder / "base.pt", settings={"scale": 3}))


def test_no_base_is_refused(hydra: Case) -> None:
    with pytest.raises(MissingSettingError) as caught:
        rx.fuse(rx.read(hydra.folder / "ckpt.pt", settings={"scale": 3}))
    assert caught.value.setting == "base"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("owned",))


def test_a_malicious_pickle_is_refused_by_the_name_it_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"blocks.0.attn.hydra_proj_par.down_proj.weight": Evil()}, path)
    with pytest.raises(CheckpointError, match="print"):
        rx.read(path, settings={"scale": 1})
    assert "owned" not in capsys.readouterr().out
    bare = tmp_path / "bare.bin"
    bare.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        rx.read(bare)


@pytest.mark.parametrize("keep", [0, 10, 1000, 60_000])
def test_a_truncated_file_is_refused(hydra: Case, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes((hydra.folder / "ckpt.pt").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        rx.read(path, settings={"scale": 3})


@pytest.mark.parametrize("keep", [0, 4, 500, 20_000])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, keep: int) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(CASES["peft_lora"].folder, folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for inspecting in (True, False):
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            rx.read(folder, inspecting=inspecting)


def test_an_unknown_checkpoint_lists_what_every_reader_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"conv.weight": torch.ones(3)}, path)
    with pytest.raises(UnknownFormatError) as caught:
        rx.read(path)
    assert {"hydra_vtab", "glora_vit", "peft_lora", "native"} <= set(caught.value.looked_for)


@pytest.mark.parametrize("path", ["nowhere.pt", "notes.txt", "."])
def test_what_is_no_checkpoint_at_all_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError):
        rx.read(tmp_path / path)


def test_a_misspelt_setting_is_refused(hydra: Case) -> None:
    with pytest.raises(UsageError, match="scal"):
        rx.read(hydra.folder / "ckpt.pt", settings={"scale": 3, "scal": 2})


@pytest.mark.parametrize("value", ["big", float("nan"), 0, True, None])
def test_a_scale_that_is_no_number_is_refused(hydra: Case, value: Any) -> None:
    with pytest.raises(UsageError):
        rx.read(hydra.folder / "ckpt.pt", settings={"scale": value})


# --- PEFT folders ---------------------------------------------------------------------------------------------------


def peft_folder(tmp_path: Path, name: str = "peft_lora", **config: Any) -> Path:
    """A copy of a recorded folder, beside its base, with changed settings."""
    shutil.copytree(CASES[name].folder, tmp_path / name)
    file = tmp_path / name / "adapter_config.json"
    content = json.loads(file.read_text())
    base = Path(str(content["base_model_name_or_path"])).name
    shutil.copytree(CASES[name].folder.parent / base, tmp_path / base)
    file.write_text(json.dumps(content | config))
    return tmp_path / name


@pytest.mark.parametrize(
    "setting",
    [
        {"init_lora_weights": "corda"},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"layer_replication": [[0, 1]]},
        {"a_setting_of_the_future": 3},
    ],
    ids=lambda s: next(iter(s)),
)
def test_a_setting_that_changes_the_forward_is_refused_by_name(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(FusionError, match=next(iter(setting))):
        rx.read(peft_folder(tmp_path, **setting))


@PEFT_WARNS
def test_patterns_and_rslora_scale_as_peft_does(tmp_path: Path) -> None:
    """The scales that peft itself computes for the same configuration are the expected ones."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={r"layers\.1\..*q_proj": 2},
        alpha_pattern={"v_proj": 9, "layers.0.mlp.down_proj": 5},
        init_lora_weights=False,
    )
    base = CASES["peft_lora"].folder.parent / "peft_base_llama"
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path)
    expected = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    found = {a.module: a.params.scale for a in rx.read(tmp_path, f"hf:{base}").adapters}
    assert found == pytest.approx(expected)
    assert len(set(found.values())) >= 4


@PEFT_WARNS
def test_trained_biases_and_saved_modules_replace_the_bases(tmp_path: Path) -> None:
    """bias="all" and modules_to_save, as peft writes them, against peft's own unmerged forward."""
    import peft
    from transformers import AutoModelForSequenceClassification

    base = CASES["peft_lora"].folder.parent / "peft_base_bert"
    config = peft.LoraConfig(
        r=3, lora_alpha=5, bias="all", task_type="SEQ_CLS", target_modules=["query", "dense"], init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    checkpoint = rx.read(tmp_path, f"hf:{base}")
    proven = rx.verify(checkpoint, rx.fuse(checkpoint))
    inputs = dict(proven.reference.inputs)
    with torch.no_grad():
        expected = model.eval().double()(**inputs).logits
    assert float((next(iter(proven.reference.outputs.values())) - expected).abs().max()) < 1e-12


@PEFT_WARNS
def test_folding_into_a_tied_embedding_unties_it(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = CASES["peft_lora"].folder.parent / "peft_base_gpt2"
    config = peft.LoraConfig(r=2, target_modules=["wte", "c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path)
    checkpoint = rx.read(tmp_path, f"hf:{base}")
    proven = rx.verify(checkpoint, rx.fuse(checkpoint), count=2)
    assert proven.weights.untied == ("transformer.wte.weight",)
    with torch.no_grad():
        expected = adapted.eval().double()(**proven.reference.inputs).logits
    assert float((proven.reference.outputs["logits"] - expected).abs().max()) < 1e-12


def test_a_rank_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError):
        rx.read(peft_folder(tmp_path, r=8))


def test_left_over_peft_keys_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.layers.0.mlp.down_proj.lora_C.weight": torch.ones(2)}, file)
    with pytest.raises(TensorMismatchError):
        rx.read(folder)


@PEFT_WARNS
def test_a_classifier_adapter_on_a_language_model_base(tmp_path: Path) -> None:
    """The usual case: the base folder is a masked language model, the adapter was trained for SEQ_CLS."""
    import peft
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    checkpoint = rx.read(tmp_path / "adapter")
    assert checkpoint.base == f"hf:{tmp_path / 'base'}?task=SEQ_CLS"
    proven = rx.verify(checkpoint, rx.fuse(checkpoint))
    with torch.no_grad():
        expected = adapted.eval().double()(**proven.reference.inputs).logits
    assert expected.shape == (8, 5)
    assert float((proven.reference.outputs["logits"] - expected).abs().max()) < 1e-12
    rx.export(proven, "safetensors", tmp_path / "out")
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / "hf", dtype=torch.float64
    )
    with torch.no_grad():
        answer = stock.eval()(**proven.reference.inputs).logits
    assert float((answer - expected).abs().max()) < 1e-5
