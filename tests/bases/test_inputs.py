"""The inputs of well-known models of transformers and diffusers, from what the libraries say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reparam_export.adapters.probed import exactly
from reparam_export.errors import CheckpointError, MissingSettingError
from reparam_export.models import Base, outputs_of_call, samples

T = pytest.importorskip("transformers")
D = pytest.importorskip("diffusers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
EYES = {"image_size": 16, "patch_size": 8, **SMALL}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
}  # fmt: skip
TOKENS = ("batch", "sequence")


def clip() -> Any:
    text = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 1}
    return T.CLIPModel(T.CLIPConfig(projection_dim=8, text_config=text | SMALL, vision_config=EYES))


def whisper() -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = T.WhisperConfig(
        vocab_size=50, d_model=16, num_mel_bins=8, max_source_positions=20, max_target_positions=20, **LAYERS, **ids
    )
    return T.WhisperForConditionalGeneration(config)


def sam() -> Any:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "mlp_dim": 24,
    }
    prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    mask = {
        "hidden_size": 16,
        "mlp_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    vision |= {"output_channels": 16, "global_attn_indexes": [0], "window_size": 2, "num_pos_feats": 8}
    return T.SamModel(T.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask))


def t5() -> Any:
    return T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )


def wav2vec2() -> Any:
    shape = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 5), "num_feat_extract_layers": 2}
    return T.Wav2Vec2ForCTC(
        T.Wav2Vec2Config(vocab_size=20, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **shape, **SMALL)
    )


def segformer() -> Any:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    config = T.SegformerConfig(
        num_encoder_blocks=2, num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, **sizes
    )
    return T.SegformerForSemanticSegmentation(config)


def llava() -> Any:
    text = T.LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **SMALL)
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=text, vision_config=T.CLIPVisionConfig(**EYES), image_token_index=49)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (t5, {"input_ids": TOKENS, "attention_mask": TOKENS, "decoder_input_ids": ("batch", "target")}),
        (whisper, {"input_features": ("batch", 8, 40), "decoder_input_ids": ("batch", "target")}),
        (clip, {"input_ids": TOKENS, "attention_mask": TOKENS, "pixel_values": ("batch", 3, 16, 16)}),
        (sam, {"pixel_values": ("batch", 3, 32, 32), "input_points": ("batch", 1, 1, 2)}),
        (segformer, {"pixel_values": ("batch", 3, 224, 224)}),
        (wav2vec2, {"input_values": ("batch", 16000)}),
        (llava, {"input_ids": TOKENS, "attention_mask": TOKENS}),
    ],
)
def test_models_of_transformers(make: Callable[[], Any], expected: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    direct = make().eval()
    direct.save_pretrained(tmp_path)
    module, signature = Base(f"hf:{tmp_path}").build()
    assert {i.name: i.shape for i in signature.inputs} == expected
    inputs = samples(signature, 2, seed=0)
    # in float64: in float32 the last bits depend on where in memory the weights lie, which is another place for those of a file
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with exactly(torch.float64):
        found = outputs_of_call(module.double(), signature, tuple(inputs.values()))
        answers = direct.double()(**inputs)
    for x, name in zip(found, signature.outputs, strict=True):
        assert float((x - answers[name]).abs().max()) <= 1e-12 * float(answers[name].abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["diffusers", "py"])
def test_a_unet_of_sdxl_takes_its_conditions_in_a_dict(scheme: str, tmp_path: Path) -> None:
    told = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34,
    }
    torch.manual_seed(0)
    direct = D.UNet2DConditionModel(**UNET, **told).eval()
    direct.save_pretrained(tmp_path)
    (tmp_path / "net.py").write_text(
        "from diffusers import UNet2DConditionModel\n"
        f"def unet():\n    return UNet2DConditionModel.from_pretrained({str(tmp_path)!r})\n"
    )
    module, signature = Base(
        f"diffusers:{tmp_path}" if scheme == "diffusers" else f"py:{tmp_path / 'net.py'}:unet"
    ).build()
    names = [i.name for i in signature.inputs]
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    inputs = samples(signature, 2, seed=0)
    (found,) = outputs_of_call(module, signature, tuple(inputs.values()))
    dictionary = {name: inputs.pop(name) for name in ("text_embeds", "time_ids")}
    assert torch.allclose(found, direct(**inputs, added_cond_kwargs=dictionary).sample, atol=1e-5)
    assert signature.outputs == ("out_sample",)


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_of_flux_gets_the_positions_of_its_patches(tmp_path: Path) -> None:
    sizes = {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    more = {
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    direct = D.FluxTransformer2DModel(**sizes, **more).eval()
    direct.save_pretrained(tmp_path)
    module, signature = Base(f"diffusers:{tmp_path}").build()
    inputs = samples(signature, 2, seed=0)
    assert set(inputs) == {"hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance"}
    (found,) = outputs_of_call(module, signature, tuple(inputs.values()))
    grid = torch.tensor([(0.0, row, column) for row in range(4) for column in range(4)])
    assert torch.allclose(found, direct(**inputs, img_ids=grid, txt_ids=torch.zeros(16, 3)).sample, atol=1e-5)


def test_a_tensor_in_two_shards_of_a_model_of_diffusers_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    D.UNet2DConditionModel(**UNET).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    first, second, *_ = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    Base(f"diffusers:{tmp_path}").build()
    part = load_file(tmp_path / first)
    name = next(iter(part))
    save_file(load_file(tmp_path / second) | {name: part[name] + 1}, tmp_path / second)
    with pytest.raises(CheckpointError, match=rf"{name} in {first} and {name} in {second} are both"):
        Base(f"diffusers:{tmp_path}").build()


def test_what_is_no_model_of_diffusers_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Base(f"diffusers:{tmp_path}").build()
    (tmp_path / "config.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="give the folder of its unet"):
        Base(f"diffusers:{tmp_path}").build()
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel", "num_layers": 1, "sample_size": 8}')
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors"):
        Base(f"diffusers:{tmp_path}").build()


def test_a_model_that_can_be_called_with_none_of_them_says_why(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch, transformers\n"
        "class Odd(transformers.ViTModel):\n"
        "    def forward(self, pixel_values):\n        raise KeyError('odd')\n"
        f"def odd():\n    torch.manual_seed(0)\n    return Odd(transformers.ViTConfig(**{EYES!r}))\n"
    )
    with pytest.raises(MissingSettingError, match="KeyError: 'odd'"):
        Base(f"py:{tmp_path / 'net.py'}:odd").build()
