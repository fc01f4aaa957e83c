"""Files made to mislead: incomplete, reordered, of the wrong type, or pointing out of their folder."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, own_model
from safetensors.torch import load_file, save_file

import reparam_export as rx
from reparam_export.checkpoints import NATIVE, Recipe, _peft_layers
from reparam_export.errors import CheckpointError, FusionError, ReparamError, TensorMismatchError
from reparam_export.inspection import inspect_checkpoint


def peft_copy(tmp_path: Path, **config: Any) -> Path:
    folder = tmp_path / "peft_lora"
    shutil.copytree(CASES["peft_lora"].folder, folder)
    shutil.copytree(CASES["peft_lora"].folder.parent / "peft_base_llama", tmp_path / "peft_base_llama")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


ODD = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "bool": lambda t: t.bool(),
    "expanded": lambda t: torch.zeros(1).expand(10**6, 10**6),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
def test_inspecting_refuses_tensors_that_are_none(tmp_path: Path, odd: str) -> None:
    tensors = torch.load(CASES["hydra_vtab"].folder / "ckpt.pt", weights_only=True)
    name = "blocks.1.mlp.hydra_mlp_par.down_proj.weight"
    torch.save(tensors | {name: ODD[odd](tensors[name])}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError):
        inspect_checkpoint(Recipe(str(tmp_path / "ckpt.pt")))


@pytest.mark.parametrize("gone", ["layers.1.", "layers.0.self_attn.q_proj"])
def test_a_peft_folder_that_lacks_a_targeted_module_is_refused(tmp_path: Path, gone: str) -> None:
    folder = peft_copy(tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if gone not in k}, file)
    with pytest.raises(TensorMismatchError) as caught:
        rx.fuse(rx.read(folder))
    assert gone.strip(".") in caught.value.module


def test_layers_to_transform_and_exclude_modules_are_targets_as_peft_takes_them(tmp_path: Path) -> None:
    folder = peft_copy(tmp_path, layers_to_transform=[1], exclude_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "layers.1." in k and "q_proj" not in k}
    save_file(kept, file)
    assert len(rx.fuse(rx.read(folder)).changed) == 6
    save_file({k: v for k, v in kept.items() if "k_proj" not in k}, file)
    with pytest.raises(TensorMismatchError):
        rx.fuse(rx.read(folder))


@pytest.mark.parametrize("gone", ["blocks.1.attn.hydra_proj_seq", "blocks.1."])
def test_a_hydra_file_that_lacks_a_branch_or_a_block_is_refused(tmp_path: Path, gone: str) -> None:
    case = CASES["hydra_vtab"]
    tensors = torch.load(case.folder / "ckpt.pt", weights_only=True)
    torch.save({k: v for k, v in tensors.items() if not k.startswith(gone)}, tmp_path / "ckpt.pt")
    with pytest.raises(TensorMismatchError):
        rx.fuse(
            rx.read(
                tmp_path / "ckpt.pt", case.options["base"], base_weights=case.folder / "base.pt", settings={"scale": 3}
            )
        )


def test_a_list_of_paths_is_not_matched_to_layers_in_another_order(tmp_path: Path) -> None:
    """Saved again as safetensors, the names are sorted: attn.proj stands before attn.qkv."""
    case = CASES["glora_vit"]
    path = tmp_path / "digits.safetensors"
    save_file(torch.load(case.folder / "digits.pt", weights_only=True), path)
    given = {"base": case.options["base"], "base_weights": case.folder / "base.pt"}
    with pytest.raises(CheckpointError, match="order"):
        rx.fuse(rx.read(path, config=[case.folder / "checkpoint-3.pth.tar"], **given))
    by_name = rx.fuse(rx.read(path, config=[case.folder / "best_config.json"], **given))
    assert by_name.sha256() == rx.fuse(case.read()).sha256()


@pytest.mark.parametrize("shard", ["/tmp/victim.safetensors", "../victim.safetensors", "victim.txt", 5])
def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path: Path, shard: Any) -> None:
    folder = peft_copy(tmp_path)
    base = tmp_path / "peft_base_llama"
    names = load_file(base / "model.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    checkpoint = rx.read(folder)
    model = rx.verify(checkpoint, rx.fuse(checkpoint))
    rx.export(model, "safetensors", tmp_path / "out")  # the index is not the one that was read, so it is not followed
    assert [p.name for p in (tmp_path / "out" / "hf").glob("*.safetensors")] == ["model.safetensors"]
    (base / "model.safetensors").rename(base / "one.safetensors")
    with pytest.raises(CheckpointError):
        rx.fuse(rx.read(folder))
    assert not (tmp_path / "victim.txt").exists()


def test_code_and_links_of_a_base_folder_are_not_carried_over(tmp_path: Path) -> None:
    folder = peft_copy(tmp_path)
    base = tmp_path / "peft_base_llama"
    (base / "modeling_evil.py").write_text("raise SystemExit")
    (tmp_path / "secret.json").write_text("{}")
    (base / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    checkpoint = rx.read(folder)
    rx.export(rx.verify(checkpoint, rx.fuse(checkpoint)), "safetensors", tmp_path / "out")
    made = {p.name for p in (tmp_path / "out" / "hf").iterdir()}
    assert not made & {"modeling_evil.py", "tokenizer_config.json"}
    assert "auto_map" not in json.loads((tmp_path / "out" / "hf" / "config.json").read_text())


def test_a_config_field_of_the_base_spec_is_in_the_folder_that_is_shipped(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = CASES["peft_lora"].folder.parent / "peft_base_llama"
    checkpoint = rx.read(CASES["peft_lora"].folder, f"hf:{base}?hidden_act=relu")
    model = rx.verify(checkpoint, rx.fuse(checkpoint))
    rx.export(model, "safetensors", tmp_path)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_act"] == "relu"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        answer = stock(**model.reference.inputs).logits
    assert float((answer - model.reference.outputs["logits"]).abs().max()) < 1e-4


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    folder = peft_copy(tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = {k: v.to(torch.complex64) + 1j for k, v in load_file(file).items()}
    file.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="complex64"):
        rx.read(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"(": 5}},
        {"alpha_pattern": ["x"]},
        {"rank_pattern": {"q_proj": "x"}},
        {"r": []},
        {"lora_alpha": {}},
        {"lora_alpha": "x"},
        {"lora_alpha": float("inf")},
        {"trainable_token_indices": 5},
        {"base_model_name_or_path": "../peft_base_llama?hidden_act=relu"},
        {"base_model_name_or_path": 5},
    ],
    ids=str,
)
def test_a_damaged_adapter_config_is_one_error(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = peft_copy(tmp_path, **config)
    with pytest.raises(ReparamError):
        rx.fuse(rx.read(folder))


@pytest.mark.parametrize(
    "config", [{"alpha_pattern": {"(([a-z_.0-9])*)*!": 5}}, {"target_modules": "(((a|_|[.])*)*)*!"}], ids=str
)
def test_a_pattern_that_would_take_for_ever_does_not(tmp_path: Path, config: dict[str, Any]) -> None:
    """Python's own ``re`` does not come back from these; here they match nothing, or run into the time limit."""
    with contextlib.suppress(ReparamError):
        rx.fuse(rx.read(peft_copy(tmp_path, **config)))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "alpha_pattern", "rank_pattern"])
def test_nor_does_one_that_peft_itself_would_match(tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What peft's own layers are made by gets patterns only once they have been tried in a process that can be ended."""
    monkeypatch.setattr(_peft_layers, "MATCH_SECONDS", 1)
    endless = "(([a-z_.0-9])+.?)+[!]"
    value: Any = {endless: 5} if field.endswith("pattern") else endless
    with pytest.raises(CheckpointError, match="takes more than 1 s"):
        rx.fuse(rx.read(peft_copy(tmp_path, init_lora_weights="pissa", **{field: value})))


ADAPTER = {
    "module": "fc",
    "kind": "lora",
    "rows": None,
    "params": {
        "pair": {
            "down": {"weight": torch.ones(1, 4), "bias": None},
            "up": {"weight": torch.ones(4, 1), "bias": None},
        },
        "scale": 1.0,
    },
}


@pytest.mark.parametrize(
    "change",
    [
        {"base": "py:evil.py:build"},
        {"base": 5},
        {"notes": 5},
        {"adapters": 5},
        {"adapters": [5]},
        {"adapters": []},
        {"adapters": [ADAPTER | {"kind": "probed", "params": {"module": "x", "name": "y"}}]},
        {"adapters": [ADAPTER | {"kind": "../evil"}]},
        {"adapters": [ADAPTER | {"rows": [0, float("inf")]}]},
        {"adapters": [ADAPTER | {"rows": [-4, 0]}]},
        {"adapters": [ADAPTER | {"rows": [3, 2]}]},
        {"adapters": [ADAPTER | {"params": {"pair": None, "scale": 1.0}}]},
        {"adapters": [ADAPTER | {"params": ADAPTER["params"] | {"scale": "x"}}]},
        {"adapters": [ADAPTER | {"params": ADAPTER["params"] | {"scale": 10**400}}]},
        {"adapters": [ADAPTER | {"params": ADAPTER["params"] | {"scale": float("nan")}}]},
        {"adapters": [ADAPTER | {"params": ADAPTER["params"] | {"scale": torch.tensor(1j)}}]},
        {"adapters": [ADAPTER, ADAPTER]},
        {"replaced": {"a": 5}},
        {"a_new_entry": 1},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_damaged_file_of_our_own_is_one_error(tmp_path: Path, change: dict[str, Any]) -> None:
    base = own_model(tmp_path, "self.fc = Linear(4, 4)", "self.fc(x)")
    content = {"format": NATIVE, "base": None, "base_state": None, "adapters": [ADAPTER], "replaced": {}, "notes": []}
    torch.save(content, tmp_path / "good.pt")
    inputs = ["x=batch,4:float32"]
    rx.fuse(rx.read(tmp_path / "good.pt", base, inputs=inputs))
    torch.save(content | change, tmp_path / "ckpt.pt")
    with pytest.raises(ReparamError):
        rx.fuse(rx.read(tmp_path / "ckpt.pt", base, inputs=inputs))


def test_bytes_flipped_anywhere_are_an_error_of_ours_or_other_numbers(tmp_path: Path) -> None:
    """No damaged file makes the reader raise anything else."""
    import random

    generator = random.Random(0)
    for source in (CASES["hydra_vtab"].folder / "ckpt.pt", CASES["peft_lora"].folder / "adapter_model.safetensors"):
        content = source.read_bytes()
        folder = tmp_path / source.stem
        shutil.copytree(source.parent, folder)
        for _ in range(60):
            broken = bytearray(content)
            for _ in range(3):
                broken[generator.randrange(min(len(broken), 4000))] = generator.randrange(256)
            (folder / source.name).write_bytes(broken)
            path = folder if source.suffix == ".safetensors" else folder / source.name
            try:
                rx.read(path, settings={"scale": 3} if source.suffix == ".pt" else None)
            except ReparamError:
                continue


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
        {"modules_to_save": ["v_proj"]},
        {"target_modules": "nothing.*"},
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_adapter_that_the_configuration_leaves_out_is_refused(
    tmp_path: Path, config: dict[str, Any], streamed: bool
) -> None:
    """peft loads such a folder without it, so folding it would make another model."""
    adapter = peft_copy(tmp_path, **config)
    with pytest.raises(CheckpointError):
        rx.plan_of(rx.read(adapter)) if streamed else rx.fuse(rx.read(adapter))


@pytest.mark.parametrize("odd", ["expanded", "huge", "csr"])
def test_a_tensor_that_is_not_all_there_is_refused(tmp_path: Path, odd: str) -> None:
    made = {
        "expanded": lambda: torch.zeros(1).expand(1, 4),
        "huge": lambda: torch.zeros(1).expand(10**6, 10**6),
        "csr": lambda: torch.eye(4).to_sparse_csr(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about its sparse tensors
        entry = copy.deepcopy(ADAPTER)
        entry["params"]["pair"]["down"]["weight"] = made[odd]()
        torch.save({"format": NATIVE, "base": None, "adapters": [entry], "replaced": {}}, tmp_path / "ckpt.pt")
        with pytest.raises(CheckpointError):
            rx.read(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("dtype", ["bf16", None])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_adapter_of_which_the_storage_keeps_nothing_is_refused(
    tmp_path: Path, streamed: bool, dtype: str | None
) -> None:
    folder = peft_copy(tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({k: v * 1e-7 if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    if dtype is None:  # the base's own storage
        for shard in (tmp_path / "peft_base_llama").glob("*.safetensors"):
            save_file({k: v.bfloat16() for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    checkpoint = rx.read(folder)
    with pytest.raises(FusionError, match=r"keeps .* % of the adapter's change"):
        rx.stream(rx.plan_of(checkpoint, dtype), tmp_path / "out") if streamed else rx.fuse(checkpoint, dtype)
    assert not (tmp_path / "out").exists()
