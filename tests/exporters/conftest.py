"""A small real timm ViT, exported once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reparam_export.models import Input, Signature

IMAGES = Signature((Input("image", ("batch", 3, 32, 32)),), ("logits",))


def small_vit(seed: int = 0) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    with torch.no_grad():  # timm starts biases at zero; a test of names must see both, equal and different ones
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.1.") and name.endswith("bias"):
                parameter.normal_(0.0, 0.02)
    return model.eval()


@pytest.fixture(scope="session")
def vit() -> torch.nn.Module:
    return small_vit()


@pytest.fixture(scope="session")
def vit_file(vit: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reparam_export.exporters import onnx

    path = tmp_path_factory.mktemp("vit") / "model.onnx"
    onnx.write(vit, IMAGES, {"image": torch.randn(1, 3, 32, 32)}, path, metadata={"verdict": "exact"})
    return path


@pytest.fixture(scope="session")
def images() -> dict[str, Any]:
    return {"image": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()}
