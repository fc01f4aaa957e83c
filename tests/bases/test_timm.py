"""``timm:`` bases equal what timm itself builds and loads, and refuse what timm would skip or guess."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from reparam_export.errors import CheckpointError, MissingSettingError, TensorMismatchError, UsageError
from reparam_export.models import Base, outputs_of_call, samples, split_argument

DATA = Path(__file__).parents[1] / "data"
WEIGHTS = DATA / "hydra_vtab" / "base.pt"
SIZE = "img_size=32&patch_size=8&embed_dim=96&depth=3&num_heads=3"
SPEC = f"timm:vit_tiny_patch16_224?{SIZE}"
KEYWORDS = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}
HEAD = {"head.weight": (10, 96), "head.bias": (10,)}


def test_equals_a_direct_construction_by_timm() -> None:
    module, signature = Base(SPEC, WEIGHTS).build()
    direct = timm.create_model("vit_tiny_patch16_224", num_classes=4, **KEYWORDS).eval()
    direct.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    images = samples(signature, 3, seed=1)
    assert torch.equal(outputs_of_call(module, signature, tuple(images.values()))[0], direct(images["image"]))
    assert signature.inputs[0].shape == ("batch", 3, 32, 32)
    assert signature.outputs == ("logits",)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_the_checkpoints_head_decides_the_number_of_classes() -> None:
    module, _ = Base(SPEC, WEIGHTS, replaced=HEAD).build()
    assert module.num_classes == 10
    assert not module.state_dict()["head.weight"].any()


def test_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (Base(SPEC, WEIGHTS, replaced=HEAD).build()[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


def test_keeps_the_dtype_of_the_file(tmp_path: Path) -> None:
    state = {k: v.bfloat16() for k, v in torch.load(WEIGHTS, weights_only=True).items()}
    torch.save(state, tmp_path / "base.pt")
    module, _ = Base(SPEC, tmp_path / "base.pt").build()
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_a_base_in_memory_equals_the_one_in_the_file() -> None:
    state = torch.load(WEIGHTS, weights_only=True)
    module, _ = Base(SPEC, state=state).build()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_a_model_without_a_head_has_features(tmp_path: Path) -> None:
    state = {k: v for k, v in torch.load(WEIGHTS, weights_only=True).items() if not k.startswith("head")}
    torch.save(state, tmp_path / "base.pt")
    _, signature = Base(f"{SPEC}&num_classes=0", tmp_path / "base.pt").build()
    assert signature.outputs == ("features",)


def test_the_head_may_have_another_name_and_the_input_other_channels(tmp_path: Path) -> None:
    direct = timm.create_model("resnet10t", num_classes=7, in_chans=1).eval()
    torch.save(direct.state_dict(), tmp_path / "base.pth")
    module, signature = Base("timm:resnet10t?in_chans=1", tmp_path / "base.pth").build()
    images = samples(signature, 1, seed=0)
    assert images["image"].shape[1] == 1
    assert all(torch.equal(tensor, direct.state_dict()[name]) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        assert torch.equal(module(images["image"]), direct(images["image"]))
    assert module.num_classes == 7


@pytest.mark.parametrize(
    "spec",
    [
        "mixer_s16_224?img_size=32",
        "swin_tiny_patch4_window7_224?img_size=64&window_size=2",
        "vit_tiny_patch16_224?img_size=[32,64]",
    ],
)
def test_images_have_the_size_that_the_spec_says(tmp_path: Path, spec: str) -> None:
    name, keywords = split_argument(spec)
    torch.save(timm.create_model(name, num_classes=3, **keywords).state_dict(), tmp_path / "base.pt")
    _, signature = Base(f"timm:{spec}", tmp_path / "base.pt").build()
    size = keywords["img_size"]
    assert signature.inputs[0].shape == ("batch", 3, *(size if isinstance(size, list) else (size, size)))


def test_refuses_a_base_without_weights() -> None:
    with pytest.raises(MissingSettingError) as caught:
        Base(SPEC).build()
    assert (caught.value.setting, caught.value.option) == ("weights", "--base-weights")


@pytest.mark.parametrize(
    "keyword", ["checkpoint_path=side.pth", "pretrained_cfg_overlay={'url':'x'}", "cache_dir=/", "pretrained_cfg={}"]
)
def test_a_spec_cannot_make_timm_load_files_of_its_own(keyword: str) -> None:
    with pytest.raises(UsageError, match="--base-weights"):
        Base(f"{SPEC}&{keyword}", WEIGHTS).build()


def test_refuses_weights_twice() -> None:
    with pytest.raises(UsageError):
        Base(f"{SPEC}&pretrained=true", WEIGHTS).build()


@pytest.mark.parametrize("spec", ["timm:vit_tinny_patch16_224", "timm:hf-hub:timm/vit_tiny_patch16_224"])
def test_an_unknown_name_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match="vit_tin"):
        Base(spec, WEIGHTS).build()


@pytest.mark.parametrize("keyword", ["no_such_keyword=3", "depth", "depth=3", "embed_dim=97"])
def test_a_wrong_keyword_is_a_usage_error(keyword: str) -> None:
    with pytest.raises(UsageError):
        Base(f"{SPEC}&{keyword}", WEIGHTS).build()


@pytest.mark.parametrize(
    ("change", "tensor", "expected", "found"),
    [
        ({"norm.weight": None}, "norm.weight", (96,), None),
        ({"norm.weight": torch.ones(95)}, "norm.weight", (96,), (95,)),
        ({"more.weight": torch.ones(2)}, "more.weight", None, (2,)),
    ],
)
def test_refuses_weights_that_do_not_fit(
    tmp_path: Path, change: dict[str, torch.Tensor | None], tensor: str, expected: object, found: object
) -> None:
    state = torch.load(WEIGHTS, weights_only=True) | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "base.pt")
    with pytest.raises(TensorMismatchError) as caught:
        Base(SPEC, tmp_path / "base.pt").build()
    error = caught.value
    assert (error.tensor, error.expected, error.found) == (tensor, expected, found)


def test_refuses_a_replaced_tensor_that_the_model_does_not_have_in_that_shape() -> None:
    with pytest.raises(TensorMismatchError) as caught:
        Base(SPEC, WEIGHTS, replaced={"norm.weight": (95,)}).build()
    assert (caught.value.module, caught.value.expected, caught.value.found) == ("norm", (95,), (96,))


JAX_SPEC = "timm:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=8&depth=2&num_heads=2"


def jax_file(path: Path, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """A small ViT in the layout of Google's ``ViT-B_16.npz`` (ImageNet-21k, with its pre_logits)."""
    rng = np.random.default_rng(0)
    wide, heads, size, hidden = 8, 2, 4, 32
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, wide),
        "embedding/kernel": (8, 8, 3, wide),
        "embedding/bias": (wide,),
        "Transformer/posembed_input/pos_embedding": (1, 5, wide),
        "Transformer/encoder_norm/scale": (wide,),
        "Transformer/encoder_norm/bias": (wide,),
        "head/kernel": (wide, 6),
        "head/bias": (6,),
        "pre_logits/kernel": (wide, wide),
        "pre_logits/bias": (wide,),
    }
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (wide,), f"{block}/{norm}/bias": (wide,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}/{part}/kernel": (wide, heads, size), f"{attention}/{part}/bias": (heads, size)}
        shapes |= {f"{attention}/out/kernel": (heads, size, wide), f"{attention}/out/bias": (wide,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_0/kernel": (wide, hidden), f"{block}/MlpBlock_3/Dense_0/bias": (hidden,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_1/kernel": (hidden, wide), f"{block}/MlpBlock_3/Dense_1/bias": (wide,)}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return arrays


def test_a_google_jax_file_lands_where_it_belongs(tmp_path: Path) -> None:
    arrays = jax_file(tmp_path / "ViT.npz")
    replaced = {"head.weight": (3, 8), "head.bias": (3,)}
    state = Base(JAX_SPEC, tmp_path / "ViT.npz", replaced=replaced).build()[0].state_dict()
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    qkv = [arrays[f"{attention}/{part}/kernel"].reshape(8, 8).T for part in ("query", "key", "value")]
    expected = {
        "blocks.1.attn.qkv.weight": np.concatenate(qkv),
        "blocks.1.attn.proj.weight": arrays[f"{attention}/out/kernel"].reshape(8, 8).T,
        "blocks.0.mlp.fc1.weight": arrays["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].T,
        "blocks.0.norm2.bias": arrays["Transformer/encoderblock_0/LayerNorm_2/bias"],
        "patch_embed.proj.weight": arrays["embedding/kernel"].transpose(3, 2, 0, 1),
        "pos_embed": arrays["Transformer/posembed_input/pos_embedding"],
        "head.weight": np.zeros((3, 8)),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array)


def test_a_google_jax_file_brings_its_own_head(tmp_path: Path) -> None:
    arrays = jax_file(tmp_path / "ViT.npz", **{"pre_logits/kernel": None, "pre_logits/bias": None})
    state = Base(JAX_SPEC, tmp_path / "ViT.npz").build()[0].state_dict()
    np.testing.assert_array_equal(state["head.weight"], arrays["head/kernel"].T)


@pytest.mark.parametrize(
    ("changes", "spec", "tensor"),
    [
        ({}, JAX_SPEC, "pre_logits/kernel"),  # belongs to the head that is used, and timm drops it
        ({"extra/kernel": np.ones(3, np.float32)}, JAX_SPEC, "extra/kernel"),
        (
            {"Transformer/encoderblock_1/LayerNorm_0/bias": None},
            JAX_SPEC,
            "Transformer/encoderblock_1/LayerNorm_0/bias",
        ),
        ({}, JAX_SPEC.replace("depth=2", "depth=1"), "Transformer/encoderblock_1/LayerNorm_0/scale"),
        ({}, JAX_SPEC.replace("img_size=16", "img_size=32"), "Transformer/posembed_input/pos_embedding"),
        ({}, JAX_SPEC + "&init_values=0.1", "blocks.0.ls1.gamma"),
    ],
)
def test_refuses_what_timm_would_skip_in_a_jax_file(
    tmp_path: Path, changes: dict[str, np.ndarray | None], spec: str, tensor: str
) -> None:
    jax_file(tmp_path / "ViT.npz", **changes)
    replaced = {} if tensor == "pre_logits/kernel" else {"head.weight": (3, 8), "head.bias": (3,)}
    with pytest.raises(TensorMismatchError) as caught:
        Base(spec, tmp_path / "ViT.npz", replaced=replaced).build()
    assert caught.value.tensor == tensor


def test_refuses_a_jax_file_for_another_kind_of_model(tmp_path: Path) -> None:
    jax_file(tmp_path / "ViT.npz")
    with pytest.raises(CheckpointError):
        Base("timm:resnet10t", tmp_path / "ViT.npz").build()
