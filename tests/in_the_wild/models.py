"""Models whose layers, inputs or outputs are not those of a plain language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from .made import SMALL, Made, Wild, adapted, answers, ids, saved, scrambled

EYES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 96, "max_position_embeddings": 16, "bos_token_id": 94, "eos_token_id": 95, "pad_token_id": 1}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def shaken(build: Callable[[], Any]) -> Any:
    """The model with random numbers on top of those it is made with: its norms keep their 1."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def on(build: Callable[[], Any], inputs: dict[str, torch.Tensor], **settings: Any) -> Callable[[Path], Made]:
    """A LoRA on a model of transformers."""

    def make(folder: Path) -> Made:
        base = saved(shaken(build), folder / "base")
        model = adapted(shaken(build), base, folder / "adapter", **settings)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        return Made(folder / "adapter", inputs, answers(model, **wide))

    return make


def nemotron() -> Any:
    return transformers.NemotronForCausalLM(transformers.NemotronConfig(**SMALL))


def falcon() -> Any:
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True, new_decoder_architecture=True,
        num_kv_heads=2,
    )  # fmt: skip
    return transformers.FalconForCausalLM(config)


def clip() -> Any:
    vision = EYES | {"image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(
        transformers.CLIPConfig(projection_dim=8, text_config=TEXT | EYES, vision_config=vision)
    )


def sam() -> Any:
    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "mlp_dim": 40,
        "output_channels": 16, "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8,
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 8}
    mask = {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 16,
    }
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    return transformers.SamModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def convolutions(folder: Path) -> Made:
    """LoRA on the convolutions and on linear layers of a model whose norms look at channels first."""
    import timm

    def net() -> Any:
        torch.manual_seed(0)
        sizes = {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
        return scrambled(timm.create_model("convnext_atto", num_classes=5, **sizes).eval(), std=0.3)

    torch.save(net().state_dict(), folder / "base.pt")
    model = adapted(net(), folder / "base.pt", folder / "adapter", target_modules=["stem.0", "downsample.1", "fc1"])
    spec = "timm:convnext_atto?num_classes=5&dims=(8,16,32,32)&depths=(1,1,1,1)"
    image = draw(3, 3, 224, 224)  # the size that timm says
    options = {"base": spec, "base_weights": folder / "base.pt"}
    return Made(folder / "adapter", {"image": image}, answers(model, image=image.double()), options)


def tokens(last: int | None = None) -> torch.Tensor:
    made = ids(94)
    if last is not None:
        made[:, -1] = last
    return made


PICTURE = {"input_ids": tokens(95), "pixel_values": draw(3, 3, 16, 16)}
POINTS = {"pixel_values": draw(2, 3, 32, 32), "input_points": draw(2, 1, 1, 2).abs() * 8}
BOTH = {"input_ids": tokens(), "decoder_input_ids": tokens()}
MODELS = [
    Wild("Nemotron, all linear layers", "peft", on(nemotron, {"input_ids": tokens()}, target_modules="all-linear")),
    Wild(
        "Falcon, whose linear layers have a forward of their own",
        "peft",
        on(falcon, {"input_ids": tokens()}, target_modules="all-linear"),
    ),
    Wild("CLIP, images x texts", "peft", on(clip, PICTURE, target_modules=["q_proj", "visual_projection"])),
    Wild("SAM", "peft", on(sam, POINTS, target_modules=["qkv"])),
    Wild("T5", "peft", on(t5, BOTH, target_modules=["q", "v", "wo"])),
    Wild("ConvNeXt, convolutions and linear layers", "peft", convolutions),
]
