"""Attached adapters start as the base, train alone, and what is saved is folded to what was trained."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import reparam_export as rx
from reparam_export.errors import CheckpointError, SharedWeightError, UsageError
from reparam_export.training import attach, save, trainable
from reparam_export.training.attach import INITIAL, Attached

SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SPEC = "timm:vit_tiny_patch16_224?" + "&".join(f"{key}={value}" for key, value in SHAPE.items())
TARGETS = ("blocks.*.attn.proj", "blocks.*.mlp.fc2")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("hydra", {"rank": 4, "scale": 0.5}),
    ("hydra", {"rank": 4, "branches": "parallel", "bias": False}),
    ("hydra", {"rank": 4, "branches": "sequential"}),
    ("lora", {"rank": 4, "scale": 2}),
    ("repadapter", {"rank": 4, "scale": 0.5}),
]


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SHAPE).eval()
    return model


def trained(model: nn.Module, images: Tensor = IMAGES) -> nn.Module:
    """A few steps of Adam, so that every trainable number has moved."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(images) - 1).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_an_untrained_adapter_gives_the_bases_outputs_bit_for_bit(
    vit: nn.Module, kind: str, settings: dict[str, Any]
) -> None:
    before = vit(IMAGES)
    assert torch.equal(attach(vit, kind, TARGETS, **settings)(IMAGES), before)


@pytest.mark.parametrize("kind", INITIAL)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_without_bias_and_transposed_layers_start_bit_for_bit_too(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias), Conv1D(8, 16))
    x = torch.randn(2, 5, 24)
    before = model(x)
    assert torch.equal(attach(model, kind, "*", rank=2)(x), before)
    assert not torch.equal(trained(model, x)(x), before)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_a_saved_adapter_is_read_folded_and_proven_without_an_option(
    vit: nn.Module, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model = trained(attach(vit, kind, TARGETS, train="head", **settings))
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    checkpoint = rx.read(tmp_path / "ckpt.pt")
    verified = rx.verify(checkpoint, rx.fuse(checkpoint), {"image": IMAGES})
    assert set(checkpoint.replaced) == {"head.weight", "head.bias"}
    assert {a.module for a in checkpoint.adapters} == {
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.proj", "mlp.fc2")
    }
    assert verified.certificate.verdict == "exact"
    with torch.no_grad():
        torch.testing.assert_close(verified.module()(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_saved_params_are_the_trained_ones(vit: nn.Module, tmp_path: Path) -> None:
    model = trained(attach(vit, "hydra", "blocks.0.attn.proj", rank=3, scale=0.25))
    save(model, tmp_path / "ckpt.pt", base=SPEC)
    (adapter,) = rx.read(tmp_path / "ckpt.pt").adapters
    live = model.get_submodule("blocks.0.attn.proj").params()  # type: ignore[operator]
    assert torch.equal(adapter.params.sequential.up.weight, live.sequential.up.weight)
    assert torch.equal(adapter.params.parallel.down.bias, live.parallel.down.bias)
    assert adapter.params.parallel_scale == adapter.params.sequential_scale == 0.25
    assert not adapter.params.parallel.up.weight.requires_grad


def test_training_moves_adapter_and_head_and_nothing_else(vit: nn.Module) -> None:
    before = copy.deepcopy(vit.state_dict())
    model = trained(attach(vit, "hydra", TARGETS, rank=4, scale=0.5, train="head"))
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}
    initial = attach(copy.deepcopy(vit.__class__(num_classes=5, **SHAPE)), "hydra", TARGETS, rank=4).state_dict()
    new = set(after) - set(before)
    assert new == set(initial) - set(before)
    assert all(bool(after[name].any()) for name in new)


def test_trainable_counts_adapter_and_trained_modules(vit: nn.Module) -> None:
    model = attach(vit, "lora", "blocks.*.attn.proj", rank=4, train=("head",))
    assert trainable(model) == 2 * (4 * 48 + 48 * 4) + (5 * 48 + 5)


def test_an_attached_model_can_be_copied_moved_and_reloaded(vit: nn.Module) -> None:
    model = trained(attach(vit, "hydra", TARGETS, rank=4))
    expected = model(IMAGES)
    other = attach(
        copy.deepcopy(timm.create_model("vit_tiny_patch16_224", num_classes=5, **SHAPE)), "hydra", TARGETS, rank=4
    )
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IMAGES), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
    double = copy.deepcopy(model).double()
    assert double(IMAGES.double()).dtype == torch.float64
    assert torch.equal(model(IMAGES), expected)


def test_running_statistics_that_training_moved_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    trained(attach(model.train(), "lora", "0", rank=2), torch.randn(8, 6) + 3)
    save(model, tmp_path / "ckpt.pt", base=None)
    replaced = rx.read(tmp_path / "ckpt.pt").replaced
    assert torch.equal(replaced["1.running_mean"], model.state_dict()["1.running_mean"])
    assert set(replaced) == {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize(
    ("base", "base_state", "held"),
    [
        (SPEC, None, True),
        (f"{SPEC}&pretrained=true", None, False),
        (None, None, False),
        (None, True, True),
        (SPEC, False, False),
    ],
)
def test_the_base_is_in_the_file_where_it_exists_nowhere_else(
    vit: nn.Module, tmp_path: Path, base: str | None, base_state: bool | None, held: bool
) -> None:
    plain = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    model = trained(attach(vit, "lora", TARGETS, rank=2, train="head"))
    save(model, tmp_path / "ckpt.pt", base=base, base_state=base_state)
    state = rx.read(tmp_path / "ckpt.pt").base_state
    assert set(state) == ({name for name in plain if not name.startswith("head.")} if held else set())
    assert all(torch.equal(state[name], plain[name]) for name in state)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "glora", "rank": 4}, "hydra, lora, repadapter"),
        ({"targets": "block.*.attn.proj"}, "blocks.0.attn.proj"),
        ({"targets": "blocks.0.norm1"}, "LayerNorm"),
        ({"targets": ()}, "targets"),
        ({"targets": ("blocks.0.attn.proj", "nothing")}, "'nothing'"),
        ({"train": "haed"}, "head"),
        ({"rank": 0}, "rank"),
        ({"rank": None}, "rank"),
        ({"alpha": 8}, "alpha"),
        ({"branches": "none"}, "branches"),
    ],
)
def test_a_wrong_call_is_refused_and_leaves_the_model_alone(
    vit: nn.Module, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        attach(vit, **({"kind": "hydra", "targets": TARGETS, "rank": 4} | arguments))
    assert named in str(caught.value)
    assert not any(isinstance(module, Attached) for module in vit.modules())
    assert all(p.requires_grad for p in vit.parameters())


def test_a_missing_rank_is_a_usage_error(vit: nn.Module) -> None:
    with pytest.raises(UsageError):
        attach(vit, "lora", TARGETS)


def test_an_adapted_layer_takes_no_second_adapter(vit: nn.Module) -> None:
    attach(vit, "lora", "blocks.0.attn.proj", rank=2)
    with pytest.raises(UsageError):
        attach(vit, "lora", "blocks.0.attn.proj", rank=2)


def test_a_layer_whose_weight_is_read_past_its_forward_is_refused() -> None:
    with pytest.raises(UsageError, match="MultiheadAttention"):
        attach(nn.Sequential(nn.MultiheadAttention(8, 2)), "lora", "*.out_proj", rank=2)


def test_a_tied_weight_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    with pytest.raises(SharedWeightError) as caught:
        attach(model, "lora", "1", rank=2)
    assert set(caught.value.owners) == {"0.weight", "1.weight"}


@pytest.mark.parametrize(
    ("name", "base"), [("ckpt.txt", SPEC), ("ckpt.safetensors", SPEC), ("ckpt.pt", "py:net.py:make")]
)
def test_what_could_not_be_read_back_is_not_written(vit: nn.Module, tmp_path: Path, name: str, base: str) -> None:
    attach(vit, "lora", TARGETS, rank=2)
    with pytest.raises(UsageError):
        save(vit, tmp_path / name, base=base)
    assert not any(tmp_path.iterdir())


def test_a_model_without_adapters_is_not_saved(vit: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        save(vit, tmp_path / "ckpt.pt", base=SPEC)


def test_a_failed_save_leaves_the_old_file(vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(attach(vit, "lora", TARGETS, rank=2), tmp_path / "ckpt.pt", base=SPEC)
    before = (tmp_path / "ckpt.pt").read_bytes()

    def fail(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save(vit, tmp_path / "ckpt.pt", base=SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_diverged_training_run_is_refused_on_reading(vit: nn.Module, tmp_path: Path) -> None:
    attach(vit, "lora", TARGETS, rank=2)
    with torch.no_grad():
        vit.get_submodule("blocks.0.attn.proj").adapter["pair_up_weight"].fill_(float("nan"))  # type: ignore[index, union-attr]
    save(vit, tmp_path / "ckpt.pt", base=SPEC)
    with pytest.raises(CheckpointError):
        rx.read(tmp_path / "ckpt.pt")
