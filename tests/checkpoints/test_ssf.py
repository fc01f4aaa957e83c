"""SSF: the recorded models are dongzelian/SSF's own, run as published; and what else their files can be. BitFit: whole tensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, MORE_CASES, own_model
from safetensors.torch import save_file

import reparam_export as rx
from reparam_export.errors import (
    CheckpointError,
    FusionError,
    MissingSettingError,
    ReparamError,
    TensorMismatchError,
    UsageError,
)

VIT, SWIN = CASES["ssf_vit"], MORE_CASES["ssf_swin"]
SPEC = VIT.options["base"]


def saved(case: Any = VIT) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(case.folder / case.path, weights_only=True))


def trained_only(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What was trained, and the base."""
    trained = {n: t for n, t in state.items() if "ssf" in n or n.startswith("head")}
    return trained, {n: t for n, t in state.items() if n not in trained}


def test_every_pair_lands_on_the_layer_that_it_follows() -> None:
    modules = [adapter.module for adapter in VIT.read().adapters]
    blocks = [
        f"blocks.{n}.{layer}"
        for n in range(2)
        for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert sorted(modules) == sorted([*blocks, "patch_embed.proj", "norm"])
    swin = [adapter.module for adapter in SWIN.read().adapters]
    assert {"patch_embed.norm", "layers.1.blocks.0.norm2", "layers.1.blocks.0.attn.qkv", "norm"} <= set(swin)


def test_the_script_says_which_model_and_size_it_trained() -> None:
    assert rx.read(VIT.folder / VIT.path).base == "timm:vit_tiny_patch16_224_in21k?img_size=32"


def test_only_what_was_trained_goes_with_base_weights_and_gives_the_same(tmp_path: Path) -> None:
    trained, base = trained_only(saved()["state_dict"])
    torch.save({f"module.{n}": t for n, t in trained.items()}, tmp_path / "ssf.pt")
    torch.save(base | {"head.weight": torch.ones(1000, 24), "head.bias": torch.ones(1000)}, tmp_path / "base.pt")
    apart = rx.read(tmp_path / "ssf.pt", SPEC, base_weights=tmp_path / "base.pt")
    expected = rx.fuse(VIT.read())
    assert rx.fuse(apart).sha256() == expected.sha256()
    beside = rx.read(VIT.folder / VIT.path, SPEC, base_weights=tmp_path / "base.pt")
    assert rx.fuse(beside).sha256() == expected.sha256()  # the trained head, not the base's


def test_a_base_of_16_bits_is_proven(tmp_path: Path) -> None:
    state = {n: t.bfloat16() for n, t in saved()["state_dict"].items()}
    save_file(state, tmp_path / "ssf.safetensors")
    checkpoint = rx.read(tmp_path / "ssf.safetensors", SPEC)
    assert rx.verify(checkpoint, rx.fuse(checkpoint), count=2).certificate.verdict == "exact"


def test_a_file_with_the_moving_average_wants_to_know_which_of_the_two(tmp_path: Path) -> None:
    content = saved()
    average = {n: t * 0.5 for n, t in content["state_dict"].items()}
    torch.save(content | {"state_dict_ema": average}, tmp_path / "both.pth.tar")
    with pytest.raises(MissingSettingError, match=r"--set weights=state_dict_ema\|state_dict") as caught:
        rx.read(tmp_path / "both.pth.tar", SPEC)
    assert caught.value.setting == "weights"
    with pytest.raises(UsageError, match="expected state_dict_ema or state_dict, found"):
        rx.read(tmp_path / "both.pth.tar", SPEC, settings={"weights": "ema"})
    found = {}
    for name in ("state_dict_ema", "state_dict"):
        checkpoint = rx.read(tmp_path / "both.pth.tar", SPEC, settings={"weights": name})
        found[name] = checkpoint.replaced["head.weight"]
        assert checkpoint.settings == {"weights": name}
    assert torch.equal(found["state_dict_ema"], average["head.weight"])
    assert torch.equal(found["state_dict"], content["state_dict"]["head.weight"])
    assert rx.read(tmp_path / "both.pth.tar", inspecting=True).missing[0].setting == "weights"


def test_a_tensor_too_few_or_too_many_is_refused(tmp_path: Path) -> None:
    state = saved()["state_dict"]
    for name, changed in {
        "blocks.0.ssf_shift_1": {n: t for n, t in state.items() if n != "blocks.0.ssf_shift_1"},
        "blocks.1.mlp.fc2": {n: t for n, t in state.items() if "blocks.1.mlp.ssf_" not in n or not n.endswith("2")},
        "blocks.0.attn.ssf_scale_3": state
        | {f"blocks.0.attn.ssf_{part}_3": torch.ones(24) for part in ("scale", "shift")},
        "blocks.0.attn.extra": state | {"blocks.0.attn.extra": torch.ones(3)},
        "blocks.0.norm1": state | {f"blocks.0.ssf_{part}_1": torch.ones(23) for part in ("scale", "shift")},
    }.items():
        torch.save(changed, tmp_path / "ssf.pt")
        with pytest.raises(TensorMismatchError, match=name):
            rx.fuse(rx.read(tmp_path / "ssf.pt", SPEC))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("stages.0.blocks.0.ssf", "a sum, which no layer makes"), ("layers.0.blocks.0.axial_shift.ssf", "AS-MLP")],
)
def test_models_without_a_layer_for_every_scale_are_refused_by_name(name: str, reason: str, tmp_path: Path) -> None:
    torch.save({f"{name}_{part}_1": torch.ones(4) for part in ("scale", "shift")}, tmp_path / "ssf.pt")
    with pytest.raises(FusionError, match=reason) as caught:
        rx.read(tmp_path / "ssf.pt")
    assert name in str(caught.value)


def test_a_mean_before_the_last_norm_leaves_no_layer_for_the_last_scale(tmp_path: Path) -> None:
    state = {
        n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: t for n, t in saved()["state_dict"].items()
    }
    torch.save(state, tmp_path / "ssf.pt")
    with pytest.raises(FusionError, match=r"norm: a Identity .* cannot be folded"):
        rx.fuse(rx.read(tmp_path / "ssf.pt", f"{SPEC}&global_pool=avg"))


LAYERS = "self.fc, self.norm, self.head = Linear(4, 6), torch.nn.LayerNorm(6), Linear(6, 3)"


def test_trained_biases_norms_and_a_head_are_taken_whole(tmp_path: Path) -> None:
    tensors = {
        "fc.bias": torch.randn(6),
        "norm.weight": torch.randn(6),
        "norm.bias": torch.randn(6),
        "head.weight": torch.randn(3, 6),
    }
    save_file(tensors, tmp_path / "bitfit.safetensors")
    base = own_model(tmp_path, LAYERS, "self.head(self.norm(self.fc(x)))")
    checkpoint = rx.read(tmp_path / "bitfit.safetensors", base, inputs=["x=batch,4:float32"])
    assert checkpoint.format == "bitfit"
    fused = rx.fuse(checkpoint)
    assert all(torch.equal(fused[name], tensor) for name, tensor in tensors.items())
    assert rx.verify(checkpoint, fused, count=2).certificate.verdict == "exact"


NORMS = {
    "torch": "torch.nn.RMSNorm(6)",
    "transformers": "__import__('transformers').models.llama.modeling_llama.LlamaRMSNorm(6)",
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_bias_on_a_norm_that_reads_none_is_refused(norm: str, tmp_path: Path) -> None:
    layers = LAYERS.replace("torch.nn.LayerNorm(6)", NORMS[norm]).replace("Linear(6, 3)", "Linear(6, 3, bias=False)")
    base = own_model(tmp_path, layers, "self.head(self.norm(self.fc(x)))")
    tensors = {"fc.bias": torch.randn(6), "norm.weight": torch.randn(6), "head.bias": torch.randn(3)}
    for more in ({}, {"norm.bias": torch.randn(6)}):
        save_file(tensors | more, tmp_path / "bitfit.safetensors")
        checkpoint = rx.read(tmp_path / "bitfit.safetensors", base, inputs=["x=batch,4:float32"])
        if not more:
            assert torch.equal(
                rx.fuse(checkpoint)["head.bias"], tensors["head.bias"]
            )  # a linear layer has a place for one
            continue
        with pytest.raises(TensorMismatchError, match=r"norm\.bias: .* RMSNorm has none|LlamaRMSNorm has none"):
            rx.fuse(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_for_a_table_of_numbers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"fc.bias": torch.randn(6), "norm.weight": (torch.randn(6) * 9).to(dtype)}
    save_file(tensors, tmp_path / "bitfit.safetensors")
    base = own_model(tmp_path, LAYERS, "self.head(self.norm(self.fc(x)))")
    with pytest.raises(CheckpointError, match=r"norm\.weight.*(int|bool)"):
        rx.fuse(rx.read(tmp_path / "bitfit.safetensors", base, inputs=["x=batch,4:float32"]))


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias_2", "other.bias"])
def test_other_tensors_are_no_bitfit_or_fit_no_base(name: str, tmp_path: Path) -> None:
    save_file({"fc.bias": torch.randn(6), name: torch.randn(6)}, tmp_path / "bitfit.safetensors")
    base = own_model(tmp_path, LAYERS, "self.head(self.norm(self.fc(x)))")
    with pytest.raises(ReparamError):
        rx.fuse(rx.read(tmp_path / "bitfit.safetensors", base, inputs=["x=batch,4:float32"]))
