"""``open_clip:`` bases: OpenAI's layout in float32 and float16, as a state dict and as a TorchScript archive."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reparam_export.errors import (
    CheckpointError,
    MissingBackendError,
    MissingSettingError,
    TensorMismatchError,
    UsageError,
)
from reparam_export.models import Base, outputs_of_call, pure_float64, samples

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    open_clip = pytest.importorskip("open_clip")

CLIP = Path(__file__).parents[1] / "data" / "hydra_clip"
GEOMETRY = {"input_resolution", "context_length", "vocab_size"}


def stored() -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(CLIP / "base.pt", weights_only=True)
    return state


def as_openai_ships(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear and convolution weights and projections in float16, the rest float32, as OpenAI's convert_weights does."""
    kept = ("ln_", "embedding", "logit_scale")
    return {k: v if any(w in k for w in kept) or not v.is_floating_point() else v.half() for k, v in state.items()}


def test_float64_equals_the_recorded_hydra_model_after_folding() -> None:
    module, signature = Base("open_clip:openai", CLIP / "base.pt").build()
    module.double()
    adapter = torch.load(CLIP / "ckpt.pt", weights_only=True)
    for i in range(2):
        prefix = f"visual.transformer.resblocks.{i}.mlp"
        linear, p = module.get_submodule(f"{prefix}.c_proj"), {}
        for side in ("par", "seq"):
            for part in ("up_proj", "down_proj"):
                for kind in ("weight", "bias"):
                    p[side, part, kind] = adapter[f"{prefix}.ad_lin.adapter_{side}.{part}.{kind}"].double()
        weight, bias = {}, {}
        for side in ("par", "seq"):
            weight[side] = p[side, "up_proj", "weight"] @ p[side, "down_proj", "weight"]
            bias[side] = p[side, "up_proj", "weight"] @ p[side, "down_proj", "bias"] + p[side, "up_proj", "bias"]
        w, b = linear.weight, linear.bias
        linear.weight = nn.Parameter(w + weight["par"] + weight["seq"] @ w, requires_grad=False)
        linear.bias = nn.Parameter(b + bias["par"] + weight["seq"] @ b + bias["seq"], requires_grad=False)
    images = torch.from_numpy(np.load(CLIP / "inputs.npy")).double()
    (features,) = outputs_of_call(module, signature, (images,))
    assert np.abs(features.numpy() - np.load(CLIP / "expected64.npy")).max() < 1e-13


def test_has_every_tensor_of_the_file_under_its_name() -> None:
    module, signature = Base("open_clip:openai", CLIP / "base.pt").build()
    state, ours = stored(), module.state_dict()
    assert set(ours) == set(state) - GEOMETRY
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items())
    assert (signature.inputs[0].shape, signature.outputs) == (("batch", 3, 32, 32), ("features",))


def test_a_float16_file_stays_float16_and_takes_float32_images(tmp_path: Path) -> None:
    state = as_openai_ships(stored())
    torch.save(state, tmp_path / "base.pt")
    module, signature = Base("open_clip:openai", tmp_path / "base.pt").build()
    assert all(state[n].dtype == t.dtype and torch.equal(state[n], t) for n, t in module.state_dict().items())
    images = samples(signature, 2, seed=0)["image"]
    half = outputs_of_call(module, signature, (images,))[0]
    module.double()
    with pure_float64():
        exact = outputs_of_call(module, signature, (images.double(),))[0]
    assert (half.dtype, exact.dtype) == (torch.float16, torch.float64)
    assert (half - exact).abs().max() < 0.01


def test_reads_the_torchscript_archive_that_openai_ships(tmp_path: Path) -> None:
    state = as_openai_ships(stored())

    class Holder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    for name, tensor in state.items():
        module: nn.Module = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, Holder())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(root, torch.ones(1)).save(str(tmp_path / "ViT.pt"))
    ours = Base("open_clip:openai", tmp_path / "ViT.pt").build()[0].state_dict()
    assert set(ours) == set(state) - GEOMETRY
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items())


def test_a_named_model_equals_open_clips_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    sizes |= {"text_cfg": {"context_length": 4, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}}
    direct = open_clip.create_model("ViT-B-32", load_weights=False, **sizes).eval()
    torch.save(direct.state_dict(), tmp_path / "base.pt")
    keywords = "&".join(f"{key}={value}".replace(" ", "") for key, value in sizes.items())
    module, signature = Base(f"open_clip:ViT-B-32?{keywords}", tmp_path / "base.pt").build()
    images = samples(signature, 2, seed=0)["image"]
    direct.requires_grad_(False)  # attention takes another path when gradients are wanted
    assert torch.equal(outputs_of_call(module, signature, (images,))[0], direct.encode_image(images))
    torch.save(direct.state_dict() | {"input_resolution": torch.tensor(32)}, tmp_path / "openai.pt")
    quick, signature = Base(f"open_clip:ViT-B-32?{keywords}", tmp_path / "openai.pt").build()
    assert type(quick.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_refuses_a_base_without_weights() -> None:
    with pytest.raises(MissingSettingError) as caught:
        Base("open_clip:openai").build()
    assert caught.value.option == "--base-weights"


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("open_clip:no-such-model", UsageError),
        ("open_clip:openai?image_size=3", UsageError),
        ("open_clip:ViT-B-32?no_such_keyword=3", UsageError),
    ],
)
def test_a_wrong_name_or_keyword_is_a_usage_error(spec: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Base(spec, CLIP / "base.pt").build()


@pytest.mark.parametrize(
    ("name", "change", "expected", "found"),
    [
        ("visual.ln_post.bias", None, (128,), None),
        ("visual.ln_post.bias", torch.ones(3), (128,), (3,)),
        ("visual.more", torch.ones(3), None, (3,)),
    ],
)
def test_refuses_weights_that_do_not_fit(
    tmp_path: Path, name: str, change: torch.Tensor | None, expected: object, found: object
) -> None:
    torch.save({k: v for k, v in (stored() | {name: change}).items() if v is not None}, tmp_path / "base.pt")
    with pytest.raises(TensorMismatchError) as caught:
        Base("open_clip:openai", tmp_path / "base.pt").build()
    assert (caught.value.tensor, caught.value.expected, caught.value.found) == (name, expected, found)


def test_refuses_another_layout() -> None:
    with pytest.raises(CheckpointError):
        Base("open_clip:openai", CLIP.parent / "hydra_vtab" / "base.pt").build()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingBackendError) as caught:
        Base("open_clip:openai", CLIP / "base.pt").build()
    assert caught.value.extra == "open-clip"
