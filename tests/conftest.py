"""The recorded cases: checkpoints as their authors' code wrote them, with the outputs of their own unfused forward."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reparam_export as rx

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """One recorded case: how to read it, and what its authors' code answered."""

    name: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)  # of rx.read; file names are relative to the case's folder
    inputs_of: str = ""  # the case whose inputs these are too

    @property
    def folder(self) -> Path:
        return DATA / self.name

    def arguments(self) -> tuple[Path, dict[str, Any]]:
        given = dict(self.options)
        if "base_weights" in given:
            given["base_weights"] = self.folder / given["base_weights"]
        if "config" in given:
            given["config"] = [self.folder / name for name in given["config"]]
        return self.folder / self.path, given

    def read(self) -> rx.Checkpoint:
        path, given = self.arguments()
        return rx.read(path, **given)

    def command(self) -> list[str]:
        """The same as arguments of the command line."""
        path, given = self.arguments()
        words = [str(path)]
        for name in ("base", "base_weights"):
            if name in given:
                words += [f"--{name.replace('_', '-')}", str(given[name])]
        for file in given.get("config", ()):
            words += ["--config", str(file)]
        for name, value in given.get("settings", {}).items():
            words += ["--set", f"{name}={value}"]
        return words

    def inputs(self) -> dict[str, torch.Tensor]:
        tensor = torch.from_numpy(np.load(DATA / (self.inputs_of or self.name) / "inputs.npy"))
        if tensor.is_floating_point():
            return {"image": tensor}
        mask = self.folder / "attention_mask.npy"
        return {
            "input_ids": tensor,
            "attention_mask": torch.from_numpy(np.load(mask)) if mask.exists() else torch.ones_like(tensor),
        }

    def expected(self) -> torch.Tensor:
        """The authors' unfused forward in float64; without transformers' casts to float32 where that was recorded."""
        pure = self.folder / "expected64_pure.npy"
        return torch.from_numpy(np.load(pure if pure.exists() else self.folder / "expected64.npy"))


def vit(folder: str, name: str = "vit_tiny_patch16_224") -> str:
    """The base spec of a recorded timm model."""
    kwargs = DATA / folder / "timm_kwargs.json"
    given = (
        json.loads(kwargs.read_text())
        if kwargs.exists()
        else json.loads((DATA / folder / "meta.json").read_text())["model"]["kwargs"]
    )
    words = (f"{key}={tuple(value) if isinstance(value, list) else value}" for key, value in given.items())
    return f"timm:{name}?" + "&".join(words).replace(" ", "")


def own_model(folder: Path, layers: str, forward: str) -> str:
    """Write a user's own model file; returns the base spec. layers: an assignment to attributes of self; forward: an expression in x."""
    (folder / "net.py").write_text(
        "import torch\n"
        "from torch.nn import Linear\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        f"        {layers}\n"
        "    def forward(self, x):\n"
        f"        return {forward}\n"
        "def build():\n"
        "    return Net()\n"
    )
    return f"py:{folder / 'net.py'}:build"


CASES = {
    case.name: case
    for case in (
        Case(
            "hydra_vtab", "ckpt.pt", {"base": vit("hydra_vtab"), "base_weights": "base.pt", "config": ["config.yaml"]}
        ),
        Case(
            "hydra_clip",
            "hydra_weights.pt",
            {"base": "open_clip:openai", "base_weights": "base.pt", "settings": {"scale": 1.0}},
        ),
        Case("hydra_nlu", "ckpt"),
        Case(
            "glora_vit",
            "digits.pt",
            {"base": vit("glora_vit"), "base_weights": "base.pt", "config": ["checkpoint-3.pth.tar"]},
        ),
        Case("glora_llama", "adapter", {"config": ["eval_config.json"]}),
        Case(
            "repadapter_vit",
            "ckpt.pt",
            {"base": vit("repadapter_vit"), "base_weights": "base.pt", "config": ["config.yaml"]},
        ),
        Case("repadapter_linear", "ckpt.pt", {"base": vit("repadapter_linear"), "base_weights": "base.pt"}),
        Case("peft_lora", "."),
        Case("peft_lora_bert_lorabias", "."),
        Case("peft_lora_embed_head", "."),
        Case("peft_lora_gpt2", "."),
        Case("peft_lora_trainable_tokens", "."),
        Case(
            "peft_lora_vit_conv",
            ".",
            {"base": vit("peft_base_vit"), "base_weights": "../peft_base_vit/model.safetensors"},
        ),
        Case("ssf_vit", "model_best.pth.tar", {"base": vit("ssf_vit")}),
    )
}
MORE_CASES = {  # not exported in every test: peft's types beside LoRA, and another family of models
    name: Case(name, ".")
    for name in (
        "peft_beft_bert", "peft_c3a", "peft_deft", "peft_dora_gpt2", "peft_fourierft", "peft_glora_bert", "peft_hra_bert",
        "peft_ia3_bert", "peft_ln_tuning_bert", "peft_oft_bert", "peft_oft_share_coft", "peft_road", "peft_unilora",
        "peft_vera_noproj", "peft_waveft",
    )
} | {
    name: Case(name, ".", CASES["peft_lora_vit_conv"].options, "peft_lora_vit_conv")
    for name in ("peft_boft_vit_conv", "peft_dora_vit_conv", "peft_lokr_vit_conv")
}  # fmt: skip
SWIN = Case("ssf_swin", "model_best.pth.tar", {"base": vit("ssf_swin", "swin_tiny_patch4_window7_224")})
MORE_CASES |= {SWIN.name: SWIN}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each recorded case in turn."""
    return CASES[request.param]


@pytest.fixture
def hydra() -> Case:
    return CASES["hydra_vtab"]


@pytest.fixture
def glora() -> Case:
    return CASES["glora_vit"]
