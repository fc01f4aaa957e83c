"""PEFT folders on transformers' models as people have them, against peft's own unfused forward in float64."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_types import quiet, shake
from safetensors.torch import load_file, save_file
from torch import nn

import reparam_export as rx
from reparam_export.checkpoints import Recipe
from reparam_export.errors import CheckpointError, MissingSettingError, ReparamError, TensorMismatchError
from reparam_export.folder import load_fused
from reparam_export.streaming import stream

IDS = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(5))


def qwen3_moe() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def made(model: transformers.PreTrainedModel, config: Any, folder: Path) -> tuple[Path, nn.Module]:
    """The base and the adapter, away from where training begins, as peft saves them; and peft's own model."""
    with quiet():
        model.save_pretrained(folder / "base")
        adapted = peft.get_peft_model(model, config)
        shake(adapted)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / "adapter")
    return folder / "adapter", adapted


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """In float64, which the model is from then on; experts one by one."""
    model = model.double().eval()
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(own, "set_experts_implementation"):
        own.set_experts_implementation("eager")
    with torch.no_grad(), quiet():
        return model(input_ids=ids).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_patterns_that_peft_writes_for_experts_are_matched_with_the_parameter(tmp_path: Path) -> None:
    model = qwen3_moe()
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapter, adapted = made(model, config, tmp_path)
    assert re.search(r"gate_up_proj.*: 6", (adapter / "adapter_config.json").read_text())
    fused = rx.fuse(rx.read(adapter))
    plain = qwen3_moe().double()
    plain.load_state_dict({name: t.double() for name, t in fused.tensors.items()}, strict=False)
    expected = logits(adapted)
    assert distance(logits(plain), expected) < 1e-6 < 1e-2 < distance(logits(qwen3_moe()), expected)


ROWS = 100
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = ["q_proj", "down_proj"]


def llama(*, tied: bool = True, rows: int = ROWS) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **more)


def folded(adapter: Path, out: Path, *, streamed: bool) -> Path:
    """The Hugging Face folder of the fused model, proven."""
    out.mkdir()
    checkpoint = rx.read(adapter)
    if streamed:
        stream(rx.plan_of(checkpoint), out)
    else:
        rx.export(rx.verify(checkpoint, rx.fuse(checkpoint), count=2), "safetensors", out)
    return out / "hf"


BOTH = ["embed_tokens", "lm_head"]
TIES = {  # config -> are the tables of the result one?
    "saved, ensured": (lora(target_modules=TARGETS, modules_to_save=["lm_head"], ensure_weight_tying=True), True),
    "saved, one": (lora(target_modules=TARGETS, modules_to_save=["embed_tokens"]), False),
    "saved, head": (lora(target_modules=TARGETS, modules_to_save=["lm_head"]), False),
    "saved, both": (lora(target_modules=TARGETS, modules_to_save=BOTH), False),
    "adapted, ensured": (
        lora(
            target_modules=[*TARGETS, "embed_tokens"], ensure_weight_tying=True, use_rslora=True,
            rank_pattern={"embed_tokens": 2}, alpha_pattern={"embed_tokens": 5, "lm_head": 4},
        ),
        False,
    ),
    "adapted, ensured by a pattern": (
        lora(target_modules=r".*(q_proj|embed_tokens)", ensure_weight_tying=True, use_dora=True), False,
    ),
    "adapted, head": (lora(target_modules=[*TARGETS, "lm_head"]), False),
    "adapted, both": (lora(target_modules=[*TARGETS, *BOTH]), False),
    "tokens": (lora(target_modules=TARGETS, trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [2, 7]}), True),
    "tokens apart": (lora(target_modules=TARGETS, trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [3]}), False),
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", TIES)
def test_tied_tables_stay_tied_or_not_as_peft_has_them(name: str, streamed: bool, tmp_path: Path) -> None:
    config, one = TIES[name]
    if streamed and "tokens" in name:
        pytest.skip("trained tokens are placed by the model")
    adapter, adapted = made(llama(), copy.deepcopy(config), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folded(adapter, tmp_path / "out", streamed=streamed))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == one == model.config.tie_word_embeddings
    expected = logits(adapted)
    assert distance(logits(model), expected) < 1e-6 < 1e-2 < distance(logits(llama()), expected)


VOCABULARIES = {  # rows, were the base's tables tied, config, are those of the result
    "saved, tied": (105, True, lora(target_modules=TARGETS, modules_to_save=BOTH), False),
    "saved, ensured": (
        105,
        True,
        lora(target_modules=TARGETS, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
    ),
    "saved, one of the tied": (105, True, lora(target_modules=TARGETS, modules_to_save=["embed_tokens"]), False),
    "saved, apart": (105, False, lora(target_modules=TARGETS, modules_to_save=BOTH), False),
    "not trained, tied": (105, True, lora(target_modules=TARGETS), True),
    "not trained, apart": (105, False, lora(target_modules=TARGETS), False),
    "adapted, one of the tied": (105, True, lora(target_modules=[*TARGETS, "embed_tokens"]), False),
    "adapted, apart": (105, False, lora(target_modules=[*TARGETS, *BOTH]), False),
    "tokens, tied": (
        105,
        True,
        lora(target_modules=TARGETS, trainable_token_indices={"embed_tokens": [100, 104]}),
        True,
    ),
    "tokens, apart": (
        105,
        False,
        lora(target_modules=TARGETS, trainable_token_indices={"embed_tokens": [2, 104]}),
        False,
    ),
    "padded to a multiple": (128, True, lora(target_modules=TARGETS, modules_to_save=BOTH), False),
    "made smaller": (96, False, lora(target_modules=TARGETS, modules_to_save=BOTH), False),
}


def with_vocabulary(name: str, folder: Path) -> tuple[Path, nn.Module, int]:
    """A base, and an adapter that was trained on it with another number of tokens."""
    rows, tied, config, _ = VOCABULARIES[name]
    model, config = llama(tied=tied), copy.deepcopy(config)
    with quiet():
        model.save_pretrained(folder / "base")
        model.resize_token_embeddings(rows)
        config.base_model_name_or_path = model.name_or_path = str(folder / "base")
        adapted = peft.get_peft_model(model, config)
        shake(adapted)
        adapted.save_pretrained(folder / "adapter")
    return folder / "adapter", adapted, rows


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_vocabulary_has_as_many_tokens_as_the_table_that_was_saved(
    name: str, streamed: bool, tmp_path: Path
) -> None:
    if streamed and "tokens" in name:
        pytest.skip("trained tokens are placed by the model")
    adapter, adapted, rows = with_vocabulary(name, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folded(adapter, tmp_path / "out", streamed=streamed))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == VOCABULARIES[name][3]
    assert model.config.vocab_size == rows == len(model.model.embed_tokens.weight)
    ids = torch.randint(3, rows, (3, 9), generator=torch.Generator().manual_seed(2))
    assert distance(logits(model, ids), logits(adapted, ids)) < 1e-6


@pytest.mark.parametrize("streamed", [False, True])
def test_a_table_of_integers_is_refused(streamed: bool, tmp_path: Path) -> None:
    adapter, _, _ = with_vocabulary("saved, tied", tmp_path)
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    save_file({n: (t * 99).to(torch.int8) if "embed_tokens" in n else t for n, t in state.items()}, file)
    with pytest.raises(TensorMismatchError, match=r"embed_tokens.weight: the base has .*float32, .* brings .*int8"):
        rx.plan_of(rx.read(adapter, numpy=True)) if streamed else rx.fuse(rx.read(adapter))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("left", ["embed_tokens", "lm_head"])
def test_a_table_of_other_rows_whose_partner_is_missing_is_refused(left: str, streamed: bool, tmp_path: Path) -> None:
    adapter, _, _ = with_vocabulary("saved, tied", tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if left not in name}, file)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["modules_to_save"] = [name for name in BOTH if name != left]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ReparamError, match=r"rows|not of the base's size") as caught:
        rx.plan_of(rx.read(adapter)) if streamed else rx.fuse(rx.read(adapter))
    assert caught.value.exit_code in (3, 4)


def test_vectors_of_a_bank_are_weighed_alike_however_they_are_read(tmp_path: Path) -> None:
    """peft restores the logits in float32; another library's logarithms are off by a last bit."""
    config = peft.VBLoRAConfig(
        target_modules=LAYERS,
        r=4,
        num_vectors=16,
        vector_length=8,
        topk=3,
        save_only_topk_weights=True,
        task_type="CAUSAL_LM",
    )
    adapter, adapted = made(llama(), config, tmp_path)
    lightly = Recipe(str(adapter)).read_lightly()
    (tmp_path / "out").mkdir()
    stream(rx.plan_of(lightly), tmp_path / "out")
    folder, weights = load_fused(tmp_path / "out")
    assert rx.verify(folder, weights, count=2).certificate.verdict == "exact"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert distance(logits(model), logits(adapted)) < 1e-6


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as peft writes it."""
    return made(llama(), lora(target_modules=TARGETS, modules_to_save=["norm"]), tmp_path_factory.mktemp("saved"))[0]


def rewritten(adapter: Path, folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_an_adapter_in_shards_is_the_adapter(saved: Path, end: str, tmp_path: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    folder = rewritten(saved, tmp_path / "adapter", {})
    (folder / "adapter_model.safetensors").unlink()
    names = list(tensors)
    where = {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = f"adapter_model-{number:05}-of-00002.{end}"
        own = {name: tensors[name] for name in part}
        save_file(own, folder / file) if end == "safetensors" else torch.save(own, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / f"adapter_model.{end}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert rx.fuse(rx.read(folder)).sha256() == rx.fuse(rx.read(saved)).sha256() == rx.fuse(rx.read(index)).sha256()
    for odd in (where | {"another": where[names[0]]}, {n: f for n, f in where.items() if n != names[0]}):
        index.write_text(json.dumps({"weight_map": odd}))
        with pytest.raises(CheckpointError, match="index"):
            rx.read(folder)


def test_of_numbered_checkpoints_the_newest_is_named_and_none_is_taken(saved: Path, tmp_path: Path) -> None:
    for number in (9, 10, 100):
        shutil.copytree(saved, tmp_path / "out" / f"checkpoint-{number}")
    with pytest.raises(CheckpointError, match=r"3 checkpoint\(s\), the newest of which is .*checkpoint-100:"):
        rx.read(tmp_path / "out")
    assert rx.read(tmp_path / "out" / "checkpoint-9").adapters


def test_the_only_adapter_below_a_folder_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model" / "default")
    with pytest.raises(CheckpointError, match=r"parent of an adapter's folder: give .*default"):
        rx.read(tmp_path / "model")
    shutil.copytree(saved, tmp_path / "model" / "other")
    with pytest.raises(CheckpointError, match="default, other; give one of them"):
        rx.read(tmp_path / "model")


@pytest.mark.parametrize("kept", [("lora_",), ("norm",), ()])
def test_tensors_that_were_not_gathered_are_named_and_what_to_run(
    saved: Path, kept: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    empty = {name: t if any(part in name for part in kept) else torch.zeros(0) for name, t in tensors.items()}
    with pytest.raises(CheckpointError, match=r"empty \(shape \[0\]\).*zero_to_fp32"):
        rx.read(rewritten(saved, tmp_path / "adapter", empty))
    with pytest.raises(CheckpointError, match=r"no tensor at all.*zero_to_fp32"):
        rx.read(rewritten(saved, tmp_path / "none", {}))


def test_an_alpha_of_zero_is_said_to_be_that(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lora_alpha 0"):
        rx.read(rewritten(saved, tmp_path / "adapter", tensors, lora_alpha=0))
    assert rx.read(rewritten(saved, tmp_path / "some", tensors, lora_alpha=0, alpha_pattern={"q_proj": 3})).adapters


@pytest.mark.parametrize("none", [True, False])
def test_an_alpha_that_is_not_there_is_asked_for_with_the_line_to_add(saved: Path, none: bool, tmp_path: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    folder = rewritten(saved, tmp_path / "adapter", tensors, lora_alpha=None)
    config = json.loads((folder / "adapter_config.json").read_text())
    if not none:
        del config["lora_alpha"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MissingSettingError, match=r'add "lora_alpha": VALUE to it') as caught:
        rx.read(folder)
    assert caught.value.setting == "lora_alpha"
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    assert rx.read(folder).adapters


@pytest.mark.parametrize("name", ["new_embeddings.safetensors", "new_embeddings.bin"])
def test_rows_of_added_tokens_in_a_file_of_their_own_are_not_passed_over(
    name: str, saved: Path, tmp_path: Path
) -> None:
    folder = rewritten(saved, tmp_path / "adapter", load_file(saved / "adapter_model.safetensors"))
    assert rx.read(folder).adapters
    rows = {"input_embeddings": torch.ones(3, 32)}
    save_file(rows, folder / name) if name.endswith("s") else torch.save(rows, folder / name)
    with pytest.raises(CheckpointError, match=r"rows of added tokens.*whole embed_tokens and lm_head.*--base"):
        rx.read(folder)


def tokenizer(*added: str, template: str | None = None) -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(90)}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    found.add_tokens(list(added))
    found.chat_template = template
    return found


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["whole", "template", "none"])
def test_the_adapters_own_tokenizer_goes_with_the_model_and_that_is_said(
    kind: str, streamed: bool, tmp_path: Path
) -> None:
    adapter, _ = made(llama(), lora(target_modules=TARGETS), tmp_path)
    tokenizer(template="{{ messages }}").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    if kind == "whole":
        tokenizer("<|im_start|>", template="{{ messages }}!").save_pretrained(adapter)
    if kind == "template":
        (adapter / "chat_template.jinja").write_text("{{ messages }}!")
    found = transformers.AutoTokenizer.from_pretrained(folder := folded(adapter, tmp_path / "out", streamed=streamed))
    assert len(found) == 90 + (kind == "whole")
    assert found.chat_template == "{{ messages }}" + "!" * (kind != "none")
    assert (folder / "added_tokens.json").is_file() == (kind != "whole")
    if streamed:
        checkpoint, weights = load_fused(tmp_path / "out")
        artifact = rx.export(rx.verify(checkpoint, weights, count=2), "safetensors", tmp_path / "out")
        assert ("tokenizer of the adapter's folder" in artifact.note) == (kind != "none")
        assert ("chat_template.jinja" in artifact.details.get("tokenizer", ())) == (kind != "none")


class TiedBySelf(torch.nn.Module):
    """A head that shares the embedding's weight, in a model without a config: peft does not look for it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False)
        self.middle = torch.nn.Linear(8, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(ids)))  # type: ignore[no-any-return]


def tied_by_self() -> TiedBySelf:
    torch.manual_seed(3)
    return TiedBySelf()


@pytest.mark.filterwarnings("ignore")
def test_trained_tokens_leave_a_head_alone_that_peft_leaves_alone(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        tied_by_self(), peft.LoraConfig(target_modules=["middle"], trainable_token_indices={"embed": [2, 5]})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name or "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    base = f"py:{__file__}:tied_by_self"
    checkpoint = rx.read(tmp_path, base, inputs=["ids=batch,4:int64:20"])
    with pytest.raises(rx.errors.SharedWeightError, match=r"embed\.weight"):
        rx.fuse(checkpoint)
