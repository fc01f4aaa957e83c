"""A user's own module as the one plain layer that it is, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import reparam_export as rx
from reparam_export.errors import FusionError, NotAffineError, UsageError


class Lora(nn.Module):
    """Bare parameters, no layer inside."""

    def __init__(self, inn: int, out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight, self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((out, inn), (2, inn), (out, 2)))
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + 0.5 * F.linear(F.linear(x, self.a), self.b)


class Sum(nn.Module):
    """Branches beside each other."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class Applied(nn.Module):
    """A layer with a function behind it."""

    def __init__(self, layer: nn.Module, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.layer(x))


def trained(norm: Any) -> Any:
    """A batch norm with statistics of its own."""
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 2)
    return norm


AFFINE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bare parameters": (lambda: Lora(5, 7), (2, 3, 5)),
    "bare parameters, no bias": (lambda: Lora(7, 4, bias=False), (2, 3, 7)),
    "bottleneck behind": (
        lambda: nn.Sequential(nn.Linear(5, 8), Sum(nn.Identity(), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)))),
        (4, 5),
    ),
    "norm behind rows": (lambda: nn.Sequential(nn.Linear(6, 9), trained(nn.BatchNorm1d(9))), (4, 6)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 9, bias=False)), (4, 6)),
    "conv and norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), trained(nn.BatchNorm2d(6))),
        (2, 3, 11, 8),
    ),
    "RepVGG": (
        lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), trained(nn.BatchNorm2d(4))),
        (2, 4, 6, 7),
    ),
    "LoRA on a convolution": (
        lambda: Sum(
            nn.Conv2d(3, 5, (3, 2), (2, 1), (0, 1), (1, 2)),
            nn.Sequential(nn.Conv2d(3, 2, (3, 2), (2, 1), (0, 1), (1, 2), bias=False), nn.Conv2d(2, 5, 1)),
        ),
        (2, 3, 9, 8),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), trained(nn.BatchNorm2d(8))),
        (2, 4, 6, 6),
    ),
    "groups that a sum undoes": (
        lambda: Sum(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1)),
        (2, 4, 6, 6),
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 4, 5, stride=2, padding=2), nn.Conv1d(4, 6, 1)), (2, 3, 13)),
    "three dimensions": (lambda: Sum(nn.Conv3d(2, 3, 2, padding=1), nn.Conv3d(2, 3, 2, padding=1)), (1, 2, 4, 3, 5)),
    "padding same": (lambda: nn.Sequential(nn.Conv2d(2, 3, 4, padding="same"), nn.Conv2d(3, 3, 1)), (1, 2, 7, 6)),
    "circular": (
        lambda: Sum(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        ),
        (1, 2, 7, 6),
    ),
    "a plain layer": (lambda: nn.Linear(3, 4), (2, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_affine_module_becomes_the_one_layer_it_is(name: str, dtype: torch.dtype) -> None:
    make, shape = AFFINE[name]
    torch.manual_seed(0)
    module = make().to(dtype).train(name == "dropout")
    before = copy.deepcopy(module)
    layer = rx.fuse_module(module)
    assert type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert layer.weight.dtype == dtype
    assert layer.training == module.training
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.state_dict().values(), strict=True)
    )
    x = torch.randn(shape).double()
    with torch.no_grad():
        expected = before.double().eval()(x)
        found = copy.deepcopy(layer).double()(x)
    terms = layer.weight[0].numel() + 1
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= terms * torch.finfo(dtype).eps * 8 * float(expected.abs().max())


def test_each_number_is_rounded_once() -> None:
    module = Lora(6, 5).to(torch.bfloat16)
    layer = rx.fuse_module(module)
    exact = module.weight.double() + 0.5 * module.b.double() @ module.a.double()
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))
    assert layer.bias is not None
    assert module.bias is not None
    assert torch.equal(layer.bias, module.bias)


def test_the_bias_is_as_the_wrapped_layers_or_as_needed() -> None:
    with_zeros = nn.Linear(4, 5)
    nn.init.zeros_(with_zeros.bias)
    assert rx.fuse_module(Sum(with_zeros)).bias is not None
    plain = nn.Linear(4, 5, bias=False)
    assert rx.fuse_module(Sum(plain, nn.Linear(4, 5, bias=False))).bias is None
    assert rx.fuse_module(Sum(plain, nn.Linear(4, 5))).bias is not None
    assert rx.fuse_module(Lora(4, 5, bias=False)).bias is None


def test_the_dtype_is_that_of_the_wrapped_layer() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)
            self.base = nn.Linear(6, 6).to(torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x.to(self.base.weight.dtype)).to(x.dtype) + self.up(self.down(x))

    assert rx.fuse_module(Mixed()).weight.dtype == torch.bfloat16


def test_groups_stay_where_they_hold() -> None:
    make, _ = AFFINE["depthwise"]
    layer = rx.fuse_module(make())
    assert isinstance(layer, nn.Conv2d)
    assert (layer.groups, tuple(layer.weight.shape)) == (4, (8, 1, 3, 3))
    dense = rx.fuse_module(AFFINE["groups that a sum undoes"][0]())
    assert isinstance(dense, nn.Conv2d)
    assert dense.groups == 1


def test_a_wider_kernel_than_any_inside_is_said_with_like() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(3, 4, 3))
    with pytest.raises(NotAffineError, match=r"another convolution$"):
        rx.fuse_module(module)
    layer = rx.fuse_module(module, like=nn.Conv2d(2, 4, 5))
    x = torch.randn(1, 2, 8, 9)
    torch.testing.assert_close(layer(x), module(x), rtol=1e-4, atol=1e-5)


def test_a_peft_layer_is_the_layer_that_peft_merges() -> None:
    config = peft.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False, use_dora=True)
    model: Any = peft.get_peft_model(nn.ModuleDict({"layer": nn.Linear(6, 4)}), config)
    layer = rx.fuse_module(model.base_model.model["layer"])
    merged = model.merge_and_unload()["layer"]
    torch.testing.assert_close(layer.weight.data, merged.weight.data, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "an activation": lambda: Applied(nn.Linear(4, 4), torch.relu),
    "a gate": lambda: Applied(nn.Linear(4, 4), lambda x: x * torch.sigmoid(x)),
    "a softmax": lambda: Applied(nn.Linear(4, 4), lambda x: x.softmax(-1)),
    "the position": lambda: Applied(nn.Linear(4, 4), lambda x: x + torch.arange(x.shape[1], dtype=x.dtype)[:, None]),
    "the other rows": lambda: Applied(nn.Linear(4, 4), lambda x: x - x.mean(1, keepdim=True)),
    "chance": lambda: Applied(nn.Linear(4, 4), lambda x: x + torch.randn_like(x)),
    "no number": lambda: Applied(nn.Linear(4, 4), lambda x: x / 0),
    "an activation on images": lambda: Applied(nn.Conv2d(2, 3, 3), torch.relu),
    "a place in the image": lambda: Applied(nn.Conv2d(2, 3, 3), lambda x: x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)),
    "the whole image": lambda: Applied(nn.Conv2d(2, 3, 3), lambda x: x + x.mean((2, 3), keepdim=True)),
    "another size": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Upsample(scale_factor=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_layer_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotAffineError, match=r"^blocks\.0\.fc: \w+ is not a") as caught:
        rx.fuse_module(REFUSED[name](), name="blocks.0.fc")
    assert caught.value.modules == ("blocks.0.fc",)
    assert "cannot be folded" in str(caught.value)


def test_a_bias_inside_the_padding_is_refused_as_what_it_is() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1))
    with pytest.raises(NotAffineError, match=r"no convolution at the borders, as where a bias is padded with zeros"):
        rx.fuse_module(module, like=nn.Conv2d(2, 4, 3, padding=1))
    module[0].bias = None
    assert rx.fuse_module(module, like=nn.Conv2d(2, 4, 3, padding=1)).weight.shape == (4, 2, 3, 3)


def test_what_does_not_say_its_sizes_or_is_no_such_module_is_a_wrong_call() -> None:
    with pytest.raises(UsageError, match=r"pass like="):
        rx.fuse_module(nn.Identity())
    assert rx.fuse_module(nn.Identity(), like=nn.Linear(3, 3)).weight.tolist() == torch.eye(3).tolist()
    with pytest.raises(UsageError, match="not what like says"):
        rx.fuse_module(nn.Linear(3, 4), like=nn.Linear(5, 4))
    with pytest.raises(UsageError, match=r"pass like="):
        rx.fuse_module(Applied(nn.Linear(3, 4), lambda x: (x, x)))
    with pytest.raises(UsageError, match=r"expected an nn.Module"):
        rx.fuse_module(torch.relu)  # type: ignore[arg-type]


def test_a_number_beyond_the_format_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).half()
    for layer in module:
        nn.init.constant_(layer.weight, 6e4)
    with pytest.raises(FusionError, match=r"not finite after rounding to torch.float16"):
        rx.fuse_module(module)


class Gated(nn.Module):
    """Affine but for one condition on what it is given."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.layer, self.when = nn.Linear(8, 8), when

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        odd = {
            "large": float(y.abs().max()) > 1000,
            "batch": x.shape[0] > 64,
            "position": x.ndim > 2 and x.shape[-2] > 3,
            "dtype": x.dtype == torch.float32,
        }
        return y * 2 if odd[self.when] else y


@pytest.mark.parametrize("when", ["large", "batch", "position", "dtype"])
def test_a_module_that_answers_otherwise_now_and_then_is_refused(when: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(NotAffineError):
        rx.fuse_module(Gated(when))
