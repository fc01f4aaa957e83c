"""Norms with a forward of their own: plain where they scale and shift, whatever axis their channels are on, also without numbers."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm2d

from reparam_export.errors import FusionError
from reparam_export.layouts import layout_of


class Squared(torch.nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) ** 2


def of_transformers() -> list[torch.nn.Module]:
    convnext = pytest.importorskip("transformers.models.convnext.modeling_convnext")
    return [convnext.ConvNextLayerNorm(6, data_format=form) for form in ("channels_first", "channels_last")]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_norms_with_a_forward_of_their_own(device: str) -> None:
    for norm in (*of_transformers(), LayerNorm2d(6)):
        assert layout_of("norm", norm.to(device)) == "norm"
    with pytest.raises(FusionError, match="a forward of its own"):
        layout_of("norm", Squared(6).to(device))


def test_a_norm_that_adds_one_to_its_weight_is_refused_and_not_run_on_the_meta_device() -> None:
    nemotron = pytest.importorskip("transformers.models.nemotron.modeling_nemotron")
    with torch.device("meta"):
        norm = nemotron.NemotronLayerNorm1P(6)
    with pytest.raises(FusionError, match="a forward of its own"):
        layout_of("norm", norm)
