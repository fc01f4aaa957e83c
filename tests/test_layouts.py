"""Layers with a forward of their own: those that are plain when they are probed are folded, the others refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import own_model
from safetensors.torch import load_file
from test_cli import error_of, run
from torch import nn
from torch.nn import functional as F

import reparam_export as rx
from reparam_export.errors import FusionError
from reparam_export.layouts import layout_of


class Transposed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Cast(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.0001 * F.linear(x, self.weight, self.bias)


class Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias).clamp(-1e4, 1e4)


class NoBias(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Centred(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y - y.mean(-2, keepdim=True) if x.ndim > 2 else y


class More(nn.Linear):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * F.linear(x, self.weight, self.bias)


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class Words(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


class ScaledWords(nn.Embedding):
    scale = 8.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale


class Positions(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 2)


class Patches(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Transposed, Cast])
def test_a_linear_layer_that_is_plain_when_probed(kind: type[nn.Linear], bias: bool, device: str) -> None:
    assert layout_of("a", kind(30, 40, bias, device=device)) == "linear"


@pytest.mark.parametrize(
    ("layer", "layout"),
    [(Words(50, 4, padding_idx=49), "embedding"), (Patches(3, 8, 3, stride=2, padding=1, dilation=2), "conv")],
)
def test_embeddings_and_convolutions_that_are_plain_when_probed(layer: nn.Module, layout: str) -> None:
    assert layout_of("a", layer) == layout


@pytest.mark.parametrize(
    "layer",
    [
        *(kind(6, 4) for kind in (Scaled, Clipped, NoBias, Centred, More, Router)),
        ScaledWords(20, 4),
        Positions(20, 4),
        Same(3, 8, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_one_that_is_not_is_refused(layer: nn.Module) -> None:
    with pytest.raises(FusionError, match=f"a {type(layer).__name__} whose forward is not the plain map"):
        layout_of("a", layer)


def test_a_forward_put_on_one_layer_is_refused() -> None:
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(FusionError, match="a forward of its own"):
        layout_of("a", layer)


def randomized(model: Any, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model.double().eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_falcon_is_folded_by_rows_and_in_memory(tmp_path: Path, bias: bool) -> None:
    """Its own linear layers, x W^T + b; against peft's unfused forward in float64."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=bias, tie_word_embeddings=False
    )
    base = transformers.FalconForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", task_type="CAUSAL_LM")
    model = randomized(peft.get_peft_model(base, settings), tmp_path / "adapter")
    words = ("convert", tmp_path / "adapter", "--base", f"hf:{tmp_path / 'base'}", "--to", "safetensors")
    result = run(*words, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "shards" in result.stdout  # by rows
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (2, 9)))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").double().eval()(ids).logits
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())
    checkpoint = rx.read(tmp_path / "adapter", f"hf:{tmp_path / 'base'}")
    streamed = load_file(tmp_path / "out" / "hf" / "model.safetensors")
    assert all(torch.equal(streamed[name], tensor) for name, tensor in rx.fuse(checkpoint).tensors.items())


def gemma(**others: Any) -> Any:
    """Word embeddings with ``embed_scale`` as a buffer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, **others,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def bart(**others: Any) -> Any:
    """The same as a number."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, scale_embedding=True, bos_token_id=0, eos_token_id=2, pad_token_id=1, **others,
    )  # fmt: skip
    return transformers.BartForCausalLM(config)


def trained(base: Any, settings: Any, folder: Path) -> Any:
    """peft's model with random numbers, unfused, in float64; both folders are written."""
    import peft

    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder / "adapter")
    return model.double().eval()


ON_TABLES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 41]},
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [gemma, bart])
@pytest.mark.parametrize("name", ON_TABLES)
def test_embeddings_that_are_scaled_are_folded_as_peft_scales_its_part(
    name: str, make: Any, tied: bool, tmp_path: Path
) -> None:
    import peft
    import transformers

    settings = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **ON_TABLES[name])
    model = trained(make(tie_word_embeddings=tied), settings, tmp_path)
    words = ("convert", tmp_path / "adapter", "--base", f"hf:{tmp_path / 'base'}", "--to", "safetensors")
    result = run(*words, "-o", tmp_path / "out", "--witness", "required")
    assert result.exit_code == 0, result.output
    assert "second witness: peft" in result.stdout
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 60, (2, 9)))
    ids[0, :2] = torch.tensor([3, 41])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").double().eval()(ids).logits
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("streamed", [True, False])
def test_what_peft_adds_beside_the_scale_is_refused(streamed: bool, tmp_path: Path) -> None:
    """HiRA adds W * B A of the table to outputs that are already scaled."""
    import peft

    trained(gemma(), peft.HiraConfig(r=4, target_modules=["embed_tokens"]), tmp_path)
    words = ("convert", "--to", "safetensors") if streamed else ("fuse",)
    result = run(*words, tmp_path / "adapter", "--base", f"hf:{tmp_path / 'base'}", "-o", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert "model.embed_tokens: hira on embeddings that are multiplied by a number (embed_scale)" in error_of(result)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["Hira", "OFT", "TinyLora"])
def test_the_table_that_peft_saves_below_an_adapter_is_no_base(kind: str, tmp_path: Path) -> None:
    """peft saves the embeddings with every adapter on them; a folder is not the state dict of a whole model for that."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    more = {"Hira": {"r": 3}, "OFT": {"oft_block_size": 4}, "TinyLora": {}}[kind]
    settings = getattr(peft, f"{kind}Config")(target_modules=["embed_tokens", "q_proj"], **more)
    model = trained(transformers.LlamaForCausalLM(config), settings, tmp_path)
    checkpoint = rx.read(tmp_path / "adapter", f"hf:{tmp_path / 'base'}")
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(dict(rx.fuse(checkpoint).tensors))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (2, 9)))
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, plain.double().eval()(ids).logits
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())


def test_a_model_may_ask_its_layer_how_it_is_made(tmp_path: Path) -> None:
    spec = own_model(tmp_path, "self.fc = Linear(6, 4); self.fc.gain = 2.0", "self.fc(x) * self.fc.gain")
    torch.save({"fc.lora_A": torch.randn(2, 6), "fc.lora_B": torch.randn(4, 2)}, tmp_path / "lora.pt")
    torch.save(nn.ModuleDict({"fc": nn.Linear(6, 4)}).state_dict(), tmp_path / "base.pt")
    given: dict[str, Any] = {
        "base_weights": tmp_path / "base.pt",
        "inputs": ["x=batch,6"],
        "settings": {"lora_alpha": 3},
    }
    checkpoint = rx.read(tmp_path / "lora.pt", spec, **given)
    assert rx.verify(checkpoint, rx.fuse(checkpoint)).certificate.verdict == "exact"
