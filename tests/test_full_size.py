"""A ViT-Base of full size with Hydra adapters, from the authors' file layout to an audited engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import reparam_export as rx


@pytest.mark.slow
def test_a_full_size_vit_with_hydra_adapters_becomes_an_engine(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    torch.save(timm.create_model("vit_base_patch16_224", num_classes=1000).state_dict(), tmp_path / "base.pt")
    tensors = {"head.weight": draw(100, 768), "head.bias": draw(100)}
    for block in range(12):
        for site, width in (("attn.hydra_proj", 768), ("mlp.hydra_mlp", 3072)):
            for branch, size in (("par", width), ("seq", 768)):
                name = f"blocks.{block}.{site}_{branch}"
                tensors |= {f"{name}.down_proj.weight": draw(8, size), f"{name}.down_proj.bias": draw(8)}
                tensors |= {f"{name}.up_proj.weight": draw(768, 8), f"{name}.up_proj.bias": draw(768)}
    torch.save(tensors, tmp_path / "ckpt.pt")
    checkpoint = rx.read(
        tmp_path / "ckpt.pt", "timm:vit_base_patch16_224", base_weights=tmp_path / "base.pt", settings={"scale": 0.7}
    )
    model = rx.verify(checkpoint, rx.fuse(checkpoint), count=4)
    assert model.certificate.verdict == "exact"
    assert sum(layer.entries for layer in model.certificate.layers) == 12 * (768 * 768 + 3072 * 768 + 2 * 768)
    artifact = rx.export(model, "trt", tmp_path / "out", batch=(1, 4, 8))
    assert artifact.audit is not None
    assert artifact.audit.relaid == ()
    assert artifact.audit.fused_tensors == 48
    assert artifact.audit.adapter_tensors_found == ()
