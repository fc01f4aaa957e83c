"""LoRA files of diffusion models: written by diffusers itself, or as kohya's and older code names the same tensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import reparam_export as rx
from reparam_export.errors import CheckpointError, MissingSettingError, TensorMismatchError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
State = dict[str, torch.Tensor]
ALPHA, RANK = 10, 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
SHAPES = ["sample=batch,4,8,8:float32", "timestep=batch:int64:1000", "encoder_hidden_states=batch,5,16:float32"]
NET = """
import torch
def unet():
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8).eval()
def text():
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=16, bos_token_id=0, eos_token_id=1)).eval()
class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unet, self.text_encoder = unet(), text()
    def forward(self, ids, sample, timestep):
        return self.unet(sample, timestep, self.text_encoder(input_ids=ids).last_hidden_state).sample
def both():
    return Both().eval()
"""
SCOPE: dict[str, Any] = {}
exec(NET, SCOPE)


def base(folder: Path, name: str = "unet") -> dict[str, Any]:
    (folder / "net.py").write_text(NET)
    inputs = {"unet": SHAPES, "text": ["input_ids=batch,8:int64:20"], "both": ["ids=batch,5:int64:20", *SHAPES[:2]]}
    return {"base": f"py:{folder / 'net.py'}:{name}", "inputs": inputs[name]}


def trained(name: str, **others: Any) -> Any:
    model = SCOPE[name]()
    targets = TARGETS if name == "unet" else ["q_proj", "v_proj", "out_proj"]
    given = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "init_lora_weights": False} | others
    if name == "unet":
        model.add_adapter(LoraConfig(**given))
    else:  # transformers' own way wants a newer peft
        model.peft_config = {"default": LoraConfig(**given)}
        inject_adapter_in_model(model.peft_config["default"], model)
    torch.manual_seed(3)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data = torch.randn_like(p) * 0.2
    return model


def error(checkpoint: rx.Checkpoint, model: nn.Module, name: str = "unet") -> float:
    """The largest difference of the outputs of fused weights from those of the model with its adapters, in float64."""
    plain = SCOPE[name]()
    plain.load_state_dict(dict(rx.fuse(checkpoint)))
    draw = torch.Generator().manual_seed(9)
    inputs: tuple[torch.Tensor, ...] = (torch.randint(0, 20, (3, 8), generator=draw),)
    if name == "unet":
        image, text = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((3, 4, 8, 8), (3, 5, 16)))
        inputs = (image, torch.tensor([10, 500, 999]), text)
    with torch.no_grad():
        return float((plain.double()(*inputs)[0] - copy.deepcopy(model).double()(*inputs)[0]).abs().max())


def saved(folder: Path, *, metadata: bool, text: bool = False, **others: Any) -> tuple[Any, Any]:
    """A pipeline's file, as diffusers saves it; the models whose adapters are in it."""
    from diffusers import StableDiffusionPipeline

    unet, encoder = trained("unet", **others), trained("text") if text else None
    layers: dict[str, Any] = {"unet_lora_layers": get_peft_model_state_dict(unet)}
    if metadata:
        layers["unet_lora_adapter_metadata"] = unet.peft_config["default"].to_dict()
    if encoder is not None:
        layers["text_encoder_lora_layers"] = get_peft_model_state_dict(encoder)
        if metadata:
            layers["text_encoder_lora_adapter_metadata"] = encoder.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder / "lora", **layers)
    return unet, encoder


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"use_rslora": True, "alpha_pattern": {"attn1.to_q": 3}, "rank_pattern": {"to_k": 2}},
        {"use_dora": True, "target_modules": ["to_q"]},
    ],
)
def test_the_configuration_in_the_header_says_everything(others: dict[str, Any], tmp_path: Path) -> None:
    unet, _ = saved(tmp_path, metadata=True, **others)
    found = rx.read(tmp_path / "lora", **base(tmp_path))
    assert found.format == "diffusers"
    assert error(found, unet) < 5e-6
    unet.save_lora_adapter(tmp_path / "adapter")
    assert error(rx.read(tmp_path / "adapter", **base(tmp_path)), unet) < 5e-6


def test_without_it_alpha_is_asked_for_and_diffusers_own_way_can_be_had(tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet, _ = saved(tmp_path, metadata=False, rank_pattern={"to_k": 2})
    with pytest.raises(MissingSettingError, match=r"alpha = rank, which is --set lora_alpha=rank") as caught:
        rx.read(tmp_path / "lora", **base(tmp_path))
    assert caught.value.setting == "lora_alpha"
    given = rx.read(tmp_path / "lora", **base(tmp_path), settings={"lora_alpha": ALPHA})
    assert error(given, unet) < 5e-6
    as_diffusers = SCOPE["unet"]()
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tmp_path / "lora")
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=as_diffusers)
    found = rx.read(tmp_path / "lora", **base(tmp_path), settings={"lora_alpha": "rank"})
    assert error(found, as_diffusers) < 5e-6
    assert error(found, unet) > 1e-2


def test_of_two_models_in_a_pipelines_file_one_is_chosen(tmp_path: Path) -> None:
    unet, text = saved(tmp_path, metadata=True, text=True)
    with pytest.raises(MissingSettingError, match=r"--set part=(unet\|text_encoder|text_encoder\|unet)"):
        rx.read(tmp_path / "lora", **base(tmp_path))
    found = rx.read(tmp_path / "lora", **base(tmp_path), settings={"part": "unet"})
    assert any(note.startswith("left out: text_encoder (12 tensors)") for note in found.notes)
    assert error(found, unet) < 5e-6
    other = rx.read(tmp_path / "lora", **base(tmp_path, "text"), settings={"part": "text_encoder"})
    assert error(other, text, "text") < 5e-6
    with pytest.raises(UsageError, match="setting part: expected"):
        rx.read(tmp_path / "lora", **base(tmp_path), settings={"part": "te"})


OLD = (("to_out.0.lora_A", "to_out_lora.down"), ("to_out.0.lora_B", "to_out_lora.up"))
OLD += tuple((f"to_{x}.lora_{new}", f"to_{x}_lora.{old}") for x in "qkv" for new, old in (("A", "down"), ("B", "up")))  # type: ignore[assignment]


@pytest.mark.parametrize("age", ["lora.down", "processors"])
def test_older_names_of_the_same_tensors(age: str, tmp_path: Path) -> None:
    unet, _ = saved(tmp_path, metadata=False, target_modules=TARGETS[:-1])
    state = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    if age == "lora.down":
        old = {n.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): t for n, t in state.items()}
    else:
        old = {}
        for name, tensor in state.items():
            for new, was in OLD:
                name = name.replace(f".{new}.", f".processor.{was}.").removeprefix("unet.")
            old[name] = tensor
    assert old.keys().isdisjoint(state)
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    found = rx.read(tmp_path / "pytorch_lora_weights.bin", **base(tmp_path), settings={"lora_alpha": ALPHA})
    assert found.format == "diffusers"
    assert error(found, unet) < 5e-6


def test_alphas_of_single_modules_in_the_file(tmp_path: Path) -> None:
    unet, _ = saved(tmp_path, metadata=False, alpha_pattern={"attn1.to_q": 3})
    state = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    modules = [n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")]
    alphas = {f"{m}.alpha": torch.tensor(3.0 if m.endswith("attn1.to_q") else float(ALPHA)) for m in modules}
    save_file(state | alphas, tmp_path / "alphas.safetensors")
    assert error(rx.read(tmp_path / "alphas.safetensors", **base(tmp_path)), unet) < 5e-6
    del alphas[f"{modules[0]}.alpha"]
    save_file(state | alphas, tmp_path / "lacking.safetensors")
    with pytest.raises(CheckpointError, match="LoRA without alpha"):
        rx.read(tmp_path / "lacking.safetensors", **base(tmp_path))


def test_alphas_of_single_modules_that_contradict_the_header_are_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    unet, _ = saved(tmp_path, metadata=True, alpha_pattern={"attn1.to_q": 3})
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    modules = [n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")]
    alphas = {f"{m}.alpha": torch.tensor(3.0 if m.endswith("attn1.to_q") else float(ALPHA)) for m in modules}
    save_file(state | alphas, tmp_path / "alike.safetensors", header)
    assert error(rx.read(tmp_path / "alike.safetensors", **base(tmp_path)), unet) < 5e-6
    metadata = json.loads(header["lora_adapter_metadata"])
    other = json.dumps(metadata | {"unet.lora_alpha": 0.1, "unet.alpha_pattern": {}})
    tenths = {name: torch.tensor(0.1, dtype=torch.float16) for name in alphas}  # not 0.1 to the last bit
    save_file(state | tenths, tmp_path / "tenths.safetensors", {"lora_adapter_metadata": other})
    assert rx.read(tmp_path / "tenths.safetensors").adapters[0].params.scale == 0.1 / RANK
    q = next(m for m in modules if m.endswith("attn1.to_q"))
    for wrong, said in (({f"{q}.alpha": torch.tensor(float(ALPHA))}, f"alpha is {ALPHA}, .* says 3"),
                        ({"unet.x.alpha": torch.tensor(1.0)}, "without LoRA")):  # fmt: skip
        save_file(state | alphas | wrong, tmp_path / "odd.safetensors", header)
        with pytest.raises(CheckpointError, match=said):
            rx.read(tmp_path / "odd.safetensors", **base(tmp_path))


def kohya(folder: Path) -> tuple[Path, Any, Any]:
    """The file of kohya's scripts for a U-Net and its text encoder, and the models with the same adapters."""
    models = {"lora_unet": trained("unet"), "lora_te": trained("text")}
    state: State = {}
    for prefix, model in models.items():
        for name, tensor in get_peft_model_state_dict(model).items():
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            stem = f"{prefix}_{module.replace('.', '_')}"
            state[f"{stem}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[kind] }.weight"] = tensor.contiguous()
            state[f"{stem}.alpha"] = torch.tensor(float(ALPHA))
    save_file(state, folder / "kohya.safetensors")
    return folder / "kohya.safetensors", models["lora_unet"], models["lora_te"]


def test_of_two_models_in_a_kohya_file_one_is_chosen_or_the_base_holds_both(tmp_path: Path) -> None:
    file, unet, text = kohya(tmp_path)
    with pytest.raises(TensorMismatchError, match=r"--set part=(te\|unet|unet\|te) reads one of them"):
        rx.fuse(rx.read(file, **base(tmp_path)))
    found = rx.read(file, **base(tmp_path), settings={"part": "unet"})
    assert "left out: te (18 tensors)" in found.notes
    assert error(found, unet) < 5e-6
    assert error(rx.read(file, **base(tmp_path, "text"), settings={"part": "te"}), text, "text") < 5e-6
    whole = dict(rx.fuse(rx.read(file, **base(tmp_path, "both"))))
    assert len(rx.read(file, **base(tmp_path, "both")).adapters) == len(found.adapters) + 6
    parts = {f"unet.{n}": t for n, t in rx.fuse(found).items()}
    assert all(torch.equal(whole[n], t) for n, t in parts.items())
    with pytest.raises(UsageError, match="setting part: expected"):
        rx.read(file, **base(tmp_path), settings={"part": "te1"})


def test_names_of_the_original_models_are_said_to_be_that(tmp_path: Path) -> None:
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(24, 4)},
        tmp_path / "comfy.safetensors",
    )
    with pytest.raises(CheckpointError, match="save_lora_adapter"):
        rx.read(tmp_path / "comfy.safetensors", settings={"lora_alpha": 4})


@pytest.mark.parametrize("header", ["{", "[1]"])
def test_a_header_that_is_no_configuration_is_refused(header: str, tmp_path: Path) -> None:
    state = {"unet.conv1.lora_A.weight": torch.ones(4, 8), "unet.conv1.lora_B.weight": torch.ones(24, 4)}
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata in the header"):
        rx.read(tmp_path / "lora.safetensors")
