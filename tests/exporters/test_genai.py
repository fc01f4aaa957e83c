"""onnxruntime-genai: a tiny LLaMA with a tokenizer, built by its own builder, generating with its cache, compared token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming.models import VOCAB, llama, lora, native

import reparam_export as rx
from reparam_export.errors import EquivalenceError, ExportError, UsageError
from reparam_export.exporters import genai
from reparam_export.verification import VerifiedModel

LAYERS = [
    f"model.layers.{i}.{end}" for i in range(2) for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tokenizer(folder: Path) -> None:
    """A word tokenizer over the words of the prompts, as a fast tokenizer's files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for prompt in genai.PROMPTS for letter in prompt.replace(" ", "Ġ")})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *letters])}
    assert len(vocabulary) <= VOCAB
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def verified(tmp_path: Path, name: str, dtype: torch.dtype) -> VerifiedModel:
    base = llama(tmp_path / "base", dtype=dtype)
    tokenizer(base)
    path = lora(tmp_path / "adapter", base) if name == "lora" else native(tmp_path / "ckpt.pt", base, name, LAYERS)
    checkpoint = rx.read(path)
    return rx.verify(checkpoint, rx.fuse(checkpoint))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[VerifiedModel, Path, Any]:
    """A GLoRA model, verified and exported once."""
    root = tmp_path_factory.mktemp("genai")
    model = verified(root, "glora", torch.float32)
    return model, root / "out", rx.export(model, "genai", root / "out")


def check_artifact(artifact: Any, comparisons: int) -> None:
    assert artifact.ran
    assert {(o.model.split(" against")[0], o.batch) for o in artifact.outputs} == {("genai fp32", 1), ("genai fp32", 2)}
    assert all(o.passed for o in artifact.outputs)
    assert len(artifact.outputs) == comparisons
    assert artifact.details["prompts"] == 20
    assert artifact.details["prompts tokenized alike"] == "20 of 20"


def test_it_generates_the_unfused_models_tokens(built: tuple[VerifiedModel, Path, Any]) -> None:
    _, out, artifact = built
    check_artifact(artifact, 2)
    assert artifact.details["same tokens"] == "20 of 20", artifact.details["divergences"]
    assert artifact.details["tokens compared"] > 20
    written = json.loads((out / "artifact.json").read_text())["artifacts"]
    assert [a["path"] for a in written] == ["genai"]
    assert (out / "genai" / "genai_config.json").is_file()
    text = rx.write_report(out).html.read_text()
    assert "same tokens" in text
    assert "onnxruntime-genai on the CPU" in text


def test_weights_of_16_bits_are_held_to_fp32_as_well(tmp_path: Path) -> None:
    check_artifact(rx.export(verified(tmp_path, "lora", torch.bfloat16), "genai", tmp_path / "out"), 4)


@pytest.fixture
def rebuilt(built: tuple[VerifiedModel, Path, Any], monkeypatch: pytest.MonkeyPatch) -> VerifiedModel:
    """The model, with a builder that takes what it built before."""
    model, out, _ = built
    monkeypatch.setattr(genai, "write", lambda source, path, cache: shutil.copytree(out / "genai", path))
    return model


def test_other_tokens_are_refused_and_nothing_is_kept(
    rebuilt: VerifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = genai.Runner.generate

    def faulty(self: Any, ids: Any, count: int) -> list[int]:
        found = honest(self, ids, count)
        return [*found[:2], (found[2] + 1) % VOCAB, *found[3:]]

    monkeypatch.setattr(genai.Runner, "generate", faulty)
    with pytest.raises(EquivalenceError, match="generates another text"):
        rx.export(rebuilt, "genai", tmp_path)
    assert not (tmp_path / "genai").exists()


def test_other_logits_are_refused_and_nothing_is_kept(
    rebuilt: VerifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = genai.Runner.logits
    monkeypatch.setattr(genai.Runner, "logits", lambda self, ids: honest(self, ids) * 1.01)
    with pytest.raises(EquivalenceError, match="logits at batch 1"):
        rx.export(rebuilt, "genai", tmp_path)
    assert not (tmp_path / "genai").exists()


def test_what_it_cannot_be_made_of_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.float32)
    (base / "tokenizer_config.json").unlink()
    checkpoint = rx.read(lora(tmp_path / "adapter", base, modules=LAYERS))
    model = rx.verify(checkpoint, rx.fuse(checkpoint))
    with pytest.raises(ExportError, match="tokenizer"):
        rx.export(model, "genai", tmp_path / "out")
    with pytest.raises(UsageError, match="fp32"):
        rx.export(model, "genai", tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out" / "genai").exists()


def test_two_tokens_that_float64_holds_for_equal_are_explained() -> None:
    near = genai.Divergence("a", 3, 7, 9, margin=1e-6, bound=1e-5)
    far = genai.Divergence("a", 3, 7, 9, margin=1e-4, bound=1e-5)
    assert near.explained
    assert not far.explained
    assert "9 instead of 7" in str(far)
    assert genai.ended([5, 6], 4, {2}) == [5, 6, 2]
    assert genai.ended([5, 2], 4, {2}) == [5, 2]
    assert genai.ended([5, 6, 7, 8], 4, {2}) == [5, 6, 7, 8]
