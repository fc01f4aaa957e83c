"""The universal kind, against layers of the peft library and layers that are not affine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import own_model
from torch import nn

import reparam_export as rx
from reparam_export.adapters import probed
from reparam_export.affine import Affine
from reparam_export.errors import NotAffineError

CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], init_lora_weights=False),
    "dora": peft.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], init_lora_weights=False, use_dora=True),
    "loha": peft.LoHaConfig(r=3, alpha=7, target_modules=["layer"], init_weights=False),
    "lokr": peft.LoKrConfig(r=3, alpha=7, target_modules=["layer"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["layer"], feedforward_modules=[], init_ia3_weights=False),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["layer"], init_weights=False),
    "hra": peft.HRAConfig(r=2, target_modules=["layer"], init_weights=False),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_peft_layer_is_probed_to_float64(name: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), CONFIGS[name])
    layer = model.base_model.model.layer.double().eval()
    fused = probed.fuse(Affine(torch.zeros(8, 12, dtype=torch.float64)), probed.Params(layer, name))
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)  # peft makes some constants in the default dtype
    try:
        expected = layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(fused(x), expected, rtol=1e-10, atol=1e-10)


class Gated(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(6, 6), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.gate(x)


class OfPosition(nn.Module):
    """Affine in x, but another map at every position of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.arange(x.shape[-2], dtype=x.dtype)[:, None]


@pytest.mark.parametrize(
    "module",
    [
        Gated(nn.Sigmoid()),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
        nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)),
        OfPosition(),
    ],
    ids=["gate", "activation", "norm", "position"],
)
def test_a_module_that_is_not_affine_is_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(NotAffineError) as caught:
        probed.fuse(Affine(torch.zeros(6, 6, dtype=torch.float64)), probed.Params(module, "blocks.3.fc"))
    assert caught.value.modules == ("blocks.3.fc",)
    assert caught.value.exit_code == 4


def test_dropout_is_off_and_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).train()
    fused = probed.fuse(Affine(torch.zeros(6, 6, dtype=torch.float64)), probed.Params(module))
    assert torch.equal(fused.weight.float(), module[0].weight.detach())
    assert module.training
    assert module[0].weight.dtype == torch.float32


def test_a_layer_without_a_closed_form_goes_through_the_whole_proof(tmp_path: Path) -> None:
    """peft's DoRA layer, module and all, as the adapter of a model: fused, proven, and equal to peft's own forward."""
    base = own_model(tmp_path, "self.layer = Linear(12, 8)", "torch.tanh(self.layer(x))")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), CONFIGS["dora"])
    layer = model.base_model.model.layer.eval()
    torch.save(
        {"layer.adapter.conv_A.weight": torch.ones(2, 12, 1), "layer.adapter.conv_B.weight": torch.ones(12, 1, 1)},
        tmp_path / "c.pt",
    )
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,12:float32"])
    checkpoint = replace(checkpoint, adapters=(rx.Adapter("layer", "probed", probed.Params(layer, "layer")),))
    proven = rx.verify(checkpoint, rx.fuse(checkpoint))
    assert proven.certificate.verdict == "exact"
    x = proven.reference.inputs["x"]
    with torch.no_grad():
        expected = torch.tanh(layer.double()(x.double()))
    assert float((proven.reference.outputs["output"] - expected).abs().max()) < 1e-12
