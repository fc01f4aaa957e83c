"""PEFT folders of every type that weights alone can reproduce, made on the spot by peft on small models, with peft's own unfused answer.

``tests/checkpoints/test_peft_types.py`` folds each; ``benchmarks/peft_types.py`` makes the README's table of them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import peft.tuners.boft.layer
import torch
from peft.tuners.lora import config as settings
from torch import nn
from transformers.pytorch_utils import Conv1D

import reparam_export as rx
from reparam_export.float64 import pure_float64


class OnTheCpu:
    """peft's CUDA kernel of BOFT, which it would compile: block-diagonal matrices of (factors, blocks, b, b)."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


peft.tuners.boft.layer.get_fbd_cuda = OnTheCpu


class Linears(nn.Module):
    """With and without a bias, wide and narrow, and transformers' transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 8, bias=False)
        self.third, self.norm, self.head = Conv1D(12, 8), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


class Convolutions(nn.Module):
    """Strided and padded, with a kernel and without, with and without a bias, in one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 8, 1, bias=False)
        self.third = nn.Conv1d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(2)
        return self.head(torch.tanh(self.third(x)).mean(-1))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(30, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.fc(self.embed(ids))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Two stacks of matrices and a router that are read directly, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 12) / 4), nn.Parameter(torch.randn(3, 12, 16) / 4)
        self.router = nn.Parameter(torch.randn(3, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = (x @ self.router.T).softmax(-1)
        y = torch.einsum("eio,...eo->...ei", self.down, torch.tanh(torch.einsum("eoi,...i->...eo", self.up, x)))
        return (y * share[..., None]).sum(-2)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.experts, self.head = nn.Linear(12, 12), Experts(), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(torch.tanh(self.fc(x))))


class Transposed(nn.Module):
    """Stacks of matrices (in, out), as in gpt-oss, with more outputs than inputs."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 12, 16) / 4), nn.Parameter(torch.randn(2, 16, 12) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(torch.einsum("eio,...i->...eo", self.up, x))
        return torch.einsum("eio,...ei->...o", self.down, y)


class Everything(nn.Module):
    """Tokens, layers of several kinds and experts of both memory orders."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.experts = nn.Embedding(30, 12), nn.Linear(12, 12), Experts()
        self.mixed, self.conv, self.head = Transposed(), nn.Conv1d(12, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mixed(self.experts(torch.tanh(self.fc(self.embed(ids)))))
        return self.head(torch.tanh(self.conv(x.transpose(1, 2))).mean(-1))


INPUTS = {
    Everything: "ids=batch,7:int64:30",
    Linears: "x=batch,12:float32",
    Convolutions: "x=batch,4,6,6:float32",
    Tokens: "ids=batch,7:int64:30",
    Attention: "x=batch,4,12:float32",
    Mixture: "x=batch,12:float32",
}
LINEAR, PLAIN = ["first", "second", "third"], ["first", "second"]  # with and without the transposed layer


@dataclass(frozen=True)
class PeftCase:
    """One folder: which type, which settings on which model, and whether it has a closed form here."""

    name: str
    config: Callable[[], Any]
    net: type[nn.Module] = Linears
    probed: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def kind(self) -> str:
        with quiet():
            return str(self.config().peft_type.value)

    def make(self, folder: Path) -> tuple[rx.Checkpoint, nn.Module]:
        """The folder as peft writes it, read; and peft's own model, unfused."""
        model, spec = base(self.net, folder, self.dtype)
        torch.manual_seed(1)
        with quiet():
            adapted = peft.get_peft_model(model, self.config())
            shake(adapted)
            adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
            again = peft.PeftModel.from_pretrained(base(self.net, folder, self.dtype)[0], folder / "adapter")
        return rx.read(folder / "adapter", spec, inputs=[INPUTS[self.net]]), again.eval()


def base(net: type[nn.Module], folder: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, str]:
    """The plain model, the same every time, and its spec for the command line."""
    torch.manual_seed(0)
    model = net().to(dtype)
    file = folder / "net.py"
    file.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from peft_types import {net.__name__}\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        f"    return {net.__name__}().to({dtype})\n"
    )
    return model, f"py:{file}:build"


def shake(model: nn.Module) -> None:
    """Every trained number away from where training begins."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


def answer(model: nn.Module, checkpoint_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """peft's own unfused forward in float64, constants and all."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        inputs = [t.double() if t.is_floating_point() else t for t in checkpoint_inputs.values()]
        with torch.no_grad(), pure_float64(), quiet():
            return model.double()(*inputs)
    finally:
        torch.set_default_dtype(default)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """peft warns of what it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def case(
    name: str, config: Any, targets: list[str] | None = None, net: type[nn.Module] = Linears, **more: Any
) -> PeftCase:
    probed, dtype = more.pop("probed", False), more.pop("dtype", torch.float32)
    if targets is not None:
        more["target_modules"] = targets
    return PeftCase(name, lambda: config(**more), net, probed, dtype)


CONV = ["first", "second", "third"]
EXPERTS = ["experts.up", "experts.down", "experts.router"]
BLOCKS = settings.BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["second"], nblocks=2)
RANDOM: dict[str, Any] = {"init_weights": False}
CASES = [
    case("lora", peft.LoraConfig, LINEAR, r=3, lora_alpha=7),
    case("lora bf16", peft.LoraConfig, LINEAR, r=3, lora_alpha=7, dtype=torch.bfloat16),
    case(
        "lora rslora patterns",
        peft.LoraConfig,
        LINEAR,
        r=3,
        lora_alpha=7,
        use_rslora=True,
        rank_pattern={"second": 2},
        alpha_pattern={"first": 5},
    ),
    case("lora bias all", peft.LoraConfig, ["first"], r=3, lora_alpha=7, bias="all", lora_bias=True),
    case(
        "lora only bias",
        peft.LoraConfig,
        ["first"],
        r=3,
        lora_alpha=7,
        bias="lora_only",
        modules_to_save=["norm", "head"],
    ),
    case("lora convolutions", peft.LoraConfig, CONV, Convolutions, r=3, lora_alpha=7),
    case("lora embedding", peft.LoraConfig, ["embed", "fc"], Tokens, r=3, lora_alpha=7),
    case("lora tokens", peft.LoraConfig, ["fc"], Tokens, r=3, trainable_token_indices={"embed": [2, 7, 29]}),
    case("lora attention", peft.LoraConfig, ["attn"], Attention, r=3, lora_alpha=7),
    case(
        "lora experts",
        peft.LoraConfig,
        ["fc"],
        Mixture,
        r=2,
        lora_alpha=7,
        target_parameters=EXPERTS,
    ),
    case(
        "lora experts patterns",
        peft.LoraConfig,
        ["fc"],
        Mixture,
        r=4,
        lora_alpha=7,
        target_parameters=EXPERTS,
        rank_pattern={r".*\.up": 3, "experts.router": 2},
        alpha_pattern={r"(.*\.)?down": 5, "experts.router": 3, "fc": 11},
    ),
    case(
        "lora experts rslora and layers of every kind",
        peft.LoraConfig,
        ["embed", "fc", "conv"],
        Everything,
        r=4,
        lora_alpha=7,
        use_rslora=True,
        target_parameters=["experts.up", "mixed.up", "mixed.down"],
        rank_pattern={"mixed.down": 2, "embed": 3},
        alpha_pattern={"mixed.up": 5, "embed": 6, "conv": 3},
        modules_to_save=["head"],
    ),
    case(
        "lora experts and tokens",
        peft.LoraConfig,
        ["fc"],
        Everything,
        r=2,
        lora_alpha=7,
        target_parameters=["experts.down", "mixed.up"],
        trainable_token_indices={"embed": [2, 7, 29]},
    ),
    case(
        "lora parameter of a layer",
        peft.LoraConfig,
        [],
        r=2,
        lora_alpha=7,
        target_parameters=["first.weight", "second.weight"],
    ),
    case("lora mica", peft.LoraConfig, ["embed", "fc"], Tokens, r=2, lora_alpha=7, init_lora_weights="mica"),
    case(
        "lora velora",
        peft.LoraConfig,
        PLAIN,
        r=2,
        lora_alpha=7,
        velora_config=settings.VeloraConfig(num_groups=4),
    ),
    case(
        "lora monteclora",
        peft.LoraConfig,
        PLAIN,
        r=2,
        lora_alpha=7,
        monteclora_config=settings.MontecloraConfig(),
    ),
    case("lora pissa", peft.LoraConfig, LINEAR, r=3, lora_alpha=7, init_lora_weights="pissa", probed=True),
    case("lora pissa bf16", peft.LoraConfig, PLAIN, r=3, init_lora_weights="pissa", probed=True, dtype=torch.bfloat16),
    case("lora olora", peft.LoraConfig, PLAIN, r=3, lora_alpha=7, init_lora_weights="olora", probed=True),
    case(
        "lora kasa",
        peft.LoraConfig,
        PLAIN,
        r=2,
        lora_alpha=7,
        kasa_config=settings.KasaConfig(),
        probed=True,
    ),
    case(
        "lora bdlora",
        peft.LoraConfig,
        PLAIN,
        r=4,
        lora_alpha=7,
        use_bdlora=settings.BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["second"], nblocks=2),
        probed=True,
    ),
    case("dora", peft.LoraConfig, LINEAR, r=3, lora_alpha=7, use_dora=True),
    case("dora bf16", peft.LoraConfig, LINEAR, r=3, lora_alpha=7, use_dora=True, dtype=torch.bfloat16),
    case("dora convolutions", peft.LoraConfig, CONV, Convolutions, r=3, lora_alpha=7, use_dora=True),
    case("dora embedding", peft.LoraConfig, ["embed", "fc"], Tokens, r=3, lora_alpha=7, use_dora=True),
    case("adalora", peft.AdaLoraConfig, LINEAR, init_r=4, lora_alpha=7, total_step=10),
    case(
        "adalora convolution",
        peft.AdaLoraConfig,
        ["first", "second"],
        Convolutions,
        init_r=3,
        lora_alpha=5,
        total_step=10,
    ),
    case("loha", peft.LoHaConfig, PLAIN, r=3, alpha=7),
    case("loha convolutions", peft.LoHaConfig, CONV, Convolutions, r=3, alpha=7),
    case("loha tucker", peft.LoHaConfig, CONV, Convolutions, r=3, alpha=7, use_effective_conv2d=True),
    case("lokr", peft.LoKrConfig, PLAIN, r=2, alpha=7, rank_pattern={"second": 1}, alpha_pattern={"second": 3}),
    case("lokr both", peft.LoKrConfig, PLAIN, r=1, alpha=7, decompose_both=True, decompose_factor=4),
    case("lokr whole", peft.LoKrConfig, PLAIN, r=16, alpha=7),
    case("lokr convolutions", peft.LoKrConfig, ["first", "second"], Convolutions, r=1, alpha=7),
    case("lokr tucker", peft.LoKrConfig, ["first"], Convolutions, r=1, alpha=7, use_effective_conv2d=True),
    case("lokr conv1d", peft.LoKrConfig, ["third"], Convolutions, r=8, alpha=7, probed=True),
    case("ia3", peft.IA3Config, LINEAR, feedforward_modules=["second", "third"]),
    case("ia3 convolutions", peft.IA3Config, ["first", "second"], Convolutions, feedforward_modules=["first"]),
    case("ia3 pattern", peft.IA3Config, PLAIN, feedforward_modules="f.*"),
    case("oft", peft.OFTConfig, PLAIN, oft_block_size=4, **RANDOM),
    case("oft bf16", peft.OFTConfig, PLAIN, oft_block_size=4, bias="all", dtype=torch.bfloat16, **RANDOM),
    case("oft cayley", peft.OFTConfig, PLAIN, oft_block_size=4, use_cayley_neumann=False, **RANDOM),
    case("oft terms", peft.OFTConfig, PLAIN, r=2, oft_block_size=0, num_cayley_neumann_terms=3, **RANDOM),
    case(
        "oft shared constrained",
        peft.OFTConfig,
        PLAIN,
        oft_block_size=4,
        block_share=True,
        coft=True,
        eps=0.3,
        **RANDOM,
    ),
    case("oft embedding", peft.OFTConfig, ["embed", "fc"], Tokens, oft_block_size=3, **RANDOM),
    case("oft 1 x 1", peft.OFTConfig, ["second"], Convolutions, oft_block_size=3, **RANDOM),
    case("boft", peft.BOFTConfig, PLAIN, boft_block_size=4, **RANDOM),
    case("boft butterfly", peft.BOFTConfig, PLAIN, boft_block_size=2, boft_n_butterfly_factor=2, **RANDOM),
    case("boft butterflies", peft.BOFTConfig, ["second"], boft_block_size=4, boft_n_butterfly_factor=3, **RANDOM),
    case(
        "boft convolutions",
        peft.BOFTConfig,
        ["first", "second"],
        Convolutions,
        boft_block_num=2,
        boft_block_size=0,
        **RANDOM,
    ),
    case("hra", peft.HRAConfig, PLAIN, r=3, **RANDOM),
    case("hra gram-schmidt", peft.HRAConfig, PLAIN, r=3, apply_GS=True, **RANDOM),
    case("hra convolutions", peft.HRAConfig, ["first", "second"], Convolutions, r=3, **RANDOM),
    case("vera", peft.VeraConfig, LINEAR, r=3, **RANDOM),
    case("vera drawn", peft.VeraConfig, LINEAR, r=3, save_projection=False, projection_prng_key=7, **RANDOM),
    case("pvera", peft.PveraConfig, PLAIN, r=3, **RANDOM),
    case("pvera drawn", peft.PveraConfig, PLAIN, r=3, save_projection=False, projection_prng_key=7, **RANDOM),
    case("fourierft", peft.FourierFTConfig, LINEAR, n_frequency=40, scaling=30.0, n_frequency_pattern={"first": 17}),
    case("waveft", peft.WaveFTConfig, LINEAR, n_frequency=40, scaling=3.0),
    case("waveft sparse", peft.WaveFTConfig, LINEAR, n_frequency=40, scaling=3.0, use_idwt=False),
    case("waveft db2", peft.WaveFTConfig, PLAIN, n_frequency=40, scaling=3.0, wavelet_family="db2", probed=True),
    case("randlora", peft.RandLoraConfig, LINEAR, r=3, randlora_alpha=5, **RANDOM),
    case("randlora sparse", peft.RandLoraConfig, PLAIN, r=4, randlora_alpha=5, sparse=True, **RANDOM),
    case(
        "randlora drawn",
        peft.RandLoraConfig,
        PLAIN,
        r=3,
        randlora_alpha=5,
        save_projection=False,
        probed=True,
        **RANDOM,
    ),
    case("miss", peft.MissConfig, PLAIN, r=5, **RANDOM),
    case("miss mini", peft.MissConfig, PLAIN, r=4, mini_r=2, init_weights="mini"),
    case("miss bat", peft.MissConfig, PLAIN, r=4, init_weights="bat"),
    case("road 1", peft.RoadConfig, PLAIN, variant="road_1", group_size=8, **RANDOM),
    case("road 2", peft.RoadConfig, PLAIN, variant="road_2", group_size=4, **RANDOM),
    case("road 4", peft.RoadConfig, PLAIN, variant="road_4", group_size=2, **RANDOM),
    case("c3a", peft.C3AConfig, PLAIN, block_size=4, **RANDOM),
    case("shira", peft.ShiraConfig, PLAIN, r=2, **RANDOM),
    case("glora", peft.GloraConfig, PLAIN, r=3, config_D_E="vector", **RANDOM),
    case(
        "glora vectors",
        peft.GloraConfig,
        PLAIN,
        config_A_B="vector",
        config_C="vector",
        config_D_E="constant",
        **RANDOM,
    ),
    case(
        "glora constants", peft.GloraConfig, PLAIN, config_A_B="constant", config_C="none", config_D_E="none", **RANDOM
    ),
    case("delora", peft.DeloraConfig, PLAIN, r=3, delora_lambda=5, rank_pattern={"second": 2}, **RANDOM),
    case("hira", peft.HiraConfig, LINEAR, r=3, **RANDOM),
    case("hira convolutions", peft.HiraConfig, CONV, Convolutions, r=3, **RANDOM),
    case("hira pattern", peft.HiraConfig, LINEAR, r=3, rank_pattern={"second": 2}, **RANDOM),
    case("hira embedding", peft.HiraConfig, ["embed", "fc"], Tokens, r=3, **RANDOM),
    case("vblora", peft.VBLoRAConfig, LINEAR, r=3, num_vectors=9, vector_length=4, topk=2),
    case(
        "vblora topk",
        peft.VBLoRAConfig,
        PLAIN,
        r=3,
        num_vectors=9,
        vector_length=4,
        topk=3,
        save_only_topk_weights=True,
    ),
    case("beft", peft.BeftConfig, PLAIN),
    case("deft", peft.DeftConfig, LINEAR, r=3, alpha=5),
    case("deft qr", peft.DeftConfig, PLAIN, r=3, decomposition_method="qr"),
    case("deft para", peft.DeftConfig, PLAIN, r=3, decomposition_method="qr", para=True),
    case("gralora", peft.GraloraConfig, LINEAR, r=4, alpha=6, gralora_k=2, **RANDOM),
    case("gralora hybrid", peft.GraloraConfig, PLAIN, r=4, alpha=6, gralora_k=4, hybrid_r=2, **RANDOM),
    case("ln tuning", peft.LNTuningConfig, ["norm"]),
    case("trainable tokens", peft.TrainableTokensConfig, ["embed"], Tokens, token_indices=[2, 7, 29]),
    case("adamss", peft.AdamssConfig, PLAIN, r=4, num_subspaces=2, probed=True),
    case("adamss head", peft.AdamssConfig, PLAIN, r=4, num_subspaces=2, modules_to_save=["head"], probed=True),
    case("osf", peft.OSFConfig, PLAIN, effective_rank=3, probed=True),
    case("osf leaves an embedding out", peft.OSFConfig, ["embed", "fc"], Tokens, effective_rank=2, probed=True),
    case("peanut", peft.PeanutConfig, PLAIN, r=2, depth=1, probed=True, **RANDOM),
    case("psoft", peft.PsoftConfig, PLAIN, r=3, probed=True, **RANDOM),
    case("supertuning", peft.SupertuningConfig, PLAIN, sparsity=0.7, r=2, lora_alpha=3, probed=True),
    case("tinylora", peft.TinyLoraConfig, LINEAR, r=2, u=3, probed=True),
    case("tinylora embedding", peft.TinyLoraConfig, ["embed", "fc"], Tokens, r=2, u=3, probed=True),
    case("unilora", peft.UniLoraConfig, LINEAR, r=2, theta_d_length=16, save_indices=True, probed=True),
    case("unilora drawn", peft.UniLoraConfig, LINEAR, r=2, theta_d_length=16, probed=True),
]
