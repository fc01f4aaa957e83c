"""What is written down of the plainest language models, against the classes of transformers themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from reparam_export.hf_folder import EMBEDDING, HEAD, KNOWN, bias_switches, carried, is_known, structure_of
from reparam_export.models import Base

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 24, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def built(config: dict[str, Any]) -> torch.nn.Module:
    fields = {k: v for k, v in config.items() if k != "model_type"}
    with torch.device("meta"):
        return getattr(transformers, config["architectures"][0])(
            transformers.AutoConfig.for_model(config["model_type"], **fields)
        )


def config_of(name: str, tmp_path: Path) -> dict[str, Any]:
    """The config that transformers itself would write."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    config = transformers.AutoConfig.for_model(name, **SMALL, architectures=[mapping[name]])
    config.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", KNOWN)
def test_structure_is_that_of_the_model_itself(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    assert is_known(config)
    names = {name: tuple(t.shape) for name, t in built(config).state_dict().items()}
    base = Base(f"hf:{tmp_path}")
    known = structure_of(config, names, base, exact=False)
    real = structure_of(config, names, base, exact=True)
    assert real.shapes is not None
    assert all(len(real.shapes[f"{module}.weight"]) == 1 for module in real.refused)  # its norms
    assert known.transposed | known.embeddings == real.transposed | real.embeddings
    assert known.embeddings == real.embeddings == {EMBEDDING.removesuffix(".weight")}
    assert set(known.order) == set(real.order)
    assert known.ties == real.ties == {}
    tied = {**config, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tied))
    without = {n: shape for n, shape in names.items() if n != HEAD}
    assert (
        structure_of(tied, without, base, exact=False).ties
        == structure_of(tied, without, base, exact=True).ties
        == {HEAD: EMBEDDING}
    )


@pytest.mark.parametrize(("name", "switch"), [(n, s) for n, switches in KNOWN.items() for s in switches])
def test_a_switch_gives_a_bias_to_the_modules_that_are_written_down(name: str, switch: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    names = set(built(config).state_dict())
    on = set(built({**config, switch: True}).state_dict())
    created = sorted(on - names)
    assert created
    assert bias_switches(config, names | set(created), created) == ({switch: True}, [])
    assert bias_switches(config, names | set(created[:1]), created[:1]) == ({switch: True}, created[1:])


def test_code_and_links_to_elsewhere_are_not_carried(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    for name in (
        "config.json",
        "tokenizer.model",
        "modeling.py",
        "model.safetensors.index.json",
        "adapter_config.json",
        "merges.txt",
    ):
        (source / name).write_text("{}")
    (source / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    assert [f.name for f in carried(source)] == ["config.json", "merges.txt", "tokenizer.model"]
