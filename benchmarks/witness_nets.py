"""Small models for ``benchmarks/witness_mutations.py``: square layers, so that a tensor put the wrong way round still fits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class Block(nn.Module):
    """As in a language model: projections of their own, and the packed one of other models."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.qkv, self.up, self.down = nn.Linear(12, 36), nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.mix, self.norm = Conv1D(12, 12), nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        a, b, c = self.qkv(self.norm(x)).chunk(3, -1)
        return (
            x
            + self.mix(torch.tanh(q) * torch.sigmoid(k) + v + torch.tanh(a) * b + c)
            + self.down(torch.tanh(self.up(x)))
        )


class Blocks(nn.Module):
    """Three blocks between an embedding and the head that shares its table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head, self.classifier = nn.Linear(12, 30, bias=False), nn.Linear(30, 4)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(torch.tanh(self.head(x)))


class Experts(nn.Module):
    """Two stacks of square matrices that are read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 12, 12) / 4), nn.Parameter(torch.randn(3, 12, 12) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(torch.einsum("eoi,...i->...eo", self.up, x))
        return torch.einsum("eio,...eo->...ei", self.down, inner).square().sum(-2)


class Mixture(nn.Module):
    """A mixture of experts without its router."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts, self.classifier = nn.Embedding(30, 12), Experts(), nn.Linear(12, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.experts(self.embed(ids))))


class Tied(LlamaForCausalLM):
    """A language model of transformers whose head is its embedding, as the config says."""

    def __init__(self) -> None:
        super().__init__(
            LlamaConfig(
                vocab_size=30, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                max_position_embeddings=32, tie_word_embeddings=True, use_cache=False,
            )
        )  # fmt: skip


class Pixels(nn.Module):
    """Convolutions and square linear layers, for LyCORIS; names with underscores and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_1 = nn.Conv2d(4, 12, 3, padding=1)
        self.to_q, self.to_v = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem_1(x)).flatten(2).mT
        return self.head(self.norm(torch.tanh(self.to_q(x)) * x + self.to_v(x)).mean(1))


def unet() -> nn.Module:
    """The denoiser of a small diffusion model."""
    from diffusers import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    return model.eval()
