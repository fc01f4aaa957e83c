"""LoRA of diffusion models: diffusers' own files, kohya's of one part or several, a UNet in a wrapper, a FLUX transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from test_diffusion_files import ALPHA, SCOPE, kohya, saved, trained

from .made import Made, Wild, adapted
from .models import draw

INPUTS = {
    "sample": draw(3, 4, 8, 8),
    "timestep": torch.tensor([10, 500, 999]),
    "encoder_hidden_states": draw(3, 16, 16),  # as many tokens as is known of such models
}


@torch.no_grad()
def answered(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    found: torch.Tensor = model.double().eval()(**wide)[0]
    return found


def of_unet(write: Callable[[Path], tuple[Path, Any]], **settings: Any) -> Callable[[Path], Made]:
    """A file for the UNet that lies in ``base``; write: makes the file, and the model with the adapter in it."""

    def make(folder: Path) -> Made:
        SCOPE["unet"]().save_pretrained(folder / "base")
        path, model = write(folder)
        options = {"base": f"diffusers:{folder / 'base'}", "settings": settings}
        return Made(path, INPUTS, answered(model, INPUTS), options)

    return make


def of_a_pipeline(folder: Path) -> tuple[Path, Any]:
    return folder / "lora", saved(folder, metadata=True)[0]


def without_metadata(folder: Path) -> tuple[Path, Any]:
    return folder / "lora", saved(folder, metadata=False)[0]


def of_the_model(folder: Path) -> tuple[Path, Any]:
    model = trained("unet")
    model.save_lora_adapter(folder / "lora")
    return folder / "lora", model


def with_up_and_down(folder: Path) -> tuple[Path, Any]:
    model = saved(folder, metadata=False)[0]
    state = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    old = {n.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): t for n, t in state.items()}
    torch.save(old, folder / "pytorch_lora_weights.bin")
    return folder / "pytorch_lora_weights.bin", model


def of_kohya(folder: Path) -> tuple[Path, Any]:
    return kohya(folder)[:2]


WIDE = """
import torch
def unet():
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=32).eval()
class Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = unet()
    def forward(self, latent, timestep, hidden, text, ids):
        return self.model(latent, timestep, hidden, added_cond_kwargs={"text_embeds": text, "time_ids": ids}).sample
def flat():
    return Flat().eval()
"""


def in_a_wrapper(folder: Path) -> Made:
    """SDXL's UNet takes a dict, so it stands in a model of the user's own; the file names its layers with `_`."""
    (folder / "net.py").write_text(WIDE)
    scope: dict[str, Any] = {}
    exec(WIDE, scope)
    model = scope["flat"]()
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.model)
    torch.manual_seed(3)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
            module, _, kind = name.removesuffix(".default.weight").rpartition(".")
            stem = f"lora_unet_{module.replace('.', '_')}"
            state[f"{stem}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[kind] }.weight"] = parameter.data.clone()
            state[f"{stem}.alpha"] = torch.tensor(float(ALPHA))
    save_file(state, folder / "lora.safetensors")
    inputs = {
        "latent": draw(3, 4, 8, 8), "timestep": torch.tensor([10, 500, 999]), "hidden": draw(3, 5, 16), "text": draw(3, 8),
        "ids": draw(3, 6).abs(),
    }  # fmt: skip
    shapes = ["latent=batch,4,8,8", "timestep=batch:int64:1000", "hidden=batch,5,16", "text=batch,8", "ids=batch,6"]
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.no_grad():
        expected = model.double()(**wide)
    return Made(
        folder / "lora.safetensors", inputs, expected, {"base": f"py:{folder / 'net.py'}:flat", "inputs": shapes}
    )


def of_flux(folder: Path) -> Made:
    from diffusers import FluxTransformer2DModel

    def flux() -> Any:
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        ).eval()  # fmt: skip

    flux().save_pretrained(folder / "base")
    model = adapted(flux(), folder / "base", folder / "adapter", target_modules=["to_q", "to_out.0", "proj_mlp"])
    grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in (1, 4, 4)))
    inputs = {
        "hidden_states": draw(2, 16, 8), "encoder_hidden_states": draw(2, 16, 32), "pooled_projections": draw(2, 16),
        "timestep": draw(2).abs(), "img_ids": grid, "txt_ids": torch.zeros(16, 3),
    }  # fmt: skip
    options = {"base": f"diffusers:{folder / 'base'}"}
    return Made(folder / "adapter", inputs, answered(model, inputs), options)


DIFFUSION = [
    Wild("pipeline's file, configuration in its header", "diffusers", of_unet(of_a_pipeline), "diffusers"),
    Wild(
        "pipeline's file without a configuration", "diffusers", of_unet(without_metadata, lora_alpha=ALPHA), "diffusers"
    ),
    Wild("`save_lora_adapter`", "diffusers", of_unet(of_the_model), "diffusers"),
    Wild("`lora.up`, `lora.down`", "diffusers before 0.21", of_unet(with_up_and_down, lora_alpha=ALPHA), "diffusers"),
    Wild("UNet and text encoder in one file", "kohya", of_unet(of_kohya, part="unet"), "LyCORIS"),
    Wild("SDXL's UNet in a wrapper, `_` for dots", "OneTrainer, kohya", in_a_wrapper, "LyCORIS"),
    Wild("FLUX transformer, peft folder", "peft", of_flux),
]
