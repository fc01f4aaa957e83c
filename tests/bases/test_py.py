"""``py:`` bases are the user's own function, with stated inputs and never random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from reparam_export.errors import CheckpointError, MissingSettingError, TensorMismatchError, UsageError
from reparam_export.models import Base, outputs_of_call, parse_input

SOURCE = """
from dataclasses import dataclass

import torch
from torch import nn

import sibling


@dataclass
class Size:
    width: int = 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(Size().width, sibling.CLASSES)

    def forward(self, x):
        y = self.head(x)
        return {"logits": y, "loss": None, "features": x * 2}


def random_net():
    return Net()


def fixed_net():
    net = Net()
    nn.init.ones_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    return net


def not_a_net():
    return {"head.weight": torch.ones(3, 6)}


def fails():
    raise RuntimeError("no such file: pretrained.pt")
"""
INPUTS = (parse_input("x=batch,6:float32"),)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "sibling.py").write_text("CLASSES = 3\n")
    return tmp_path / "net.py"


def test_builds_what_the_function_returns(file: Path) -> None:
    module, signature = Base(f"py:{file}:fixed_net", inputs=INPUTS).build()
    x = torch.randn(2, 6)
    logits, features = outputs_of_call(module, signature, (x,))
    torch.testing.assert_close(logits, x.sum(1, keepdim=True).expand(2, 3))
    assert torch.equal(features, x * 2)
    assert signature.outputs == ("logits", "features")
    assert not module.training


def test_puts_the_weights_into_it(file: Path, tmp_path: Path) -> None:
    state = nn.Linear(6, 3, dtype=torch.float16).state_dict(prefix="head.")
    torch.save(state, tmp_path / "base.pt")
    module, _ = Base(f"py:{file}:random_net", tmp_path / "base.pt", inputs=INPUTS).build()
    assert all(torch.equal(t, state[n]) and t.dtype == torch.float16 for n, t in module.state_dict().items())
    torch.save(state | {"head.bias": torch.ones(4)}, tmp_path / "base.pt")
    with pytest.raises(TensorMismatchError) as caught:
        Base(f"py:{file}:random_net", tmp_path / "base.pt", inputs=INPUTS).build()
    assert (caught.value.module, caught.value.expected, caught.value.found) == ("head", (3,), (4,))


def test_refuses_a_random_base(file: Path) -> None:
    with pytest.raises(MissingSettingError) as caught:
        Base(f"py:{file}:random_net", inputs=INPUTS).build()
    assert caught.value.option == "--base-weights"


def test_what_the_checkpoint_replaces_may_be_random(file: Path) -> None:
    replaced = {"head.weight": (3, 6), "head.bias": (3,)}
    module, _ = Base(f"py:{file}:random_net", replaced=replaced, inputs=INPUTS).build()
    assert not any(t.any() for t in module.state_dict().values())


def test_refuses_a_model_without_stated_inputs(file: Path) -> None:
    with pytest.raises(MissingSettingError) as caught:
        Base(f"py:{file}:fixed_net").build()
    assert (caught.value.setting, caught.value.option) == ("inputs", "--input")


@pytest.mark.parametrize(
    ("function", "inputs", "error"),
    [
        ("no_such_function", "x=batch,6:float32", UsageError),
        ("not_a_net", "x=batch,6:float32", CheckpointError),
        ("fails", "x=batch,6:float32", CheckpointError),
        ("fixed_net", "x=batch,7:float32", CheckpointError),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(
    file: Path, function: str, inputs: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        Base(f"py:{file}:{function}", inputs=(parse_input(inputs),)).build()
    assert type(caught.value) is error


def test_a_missing_or_broken_file_is_named(file: Path) -> None:
    with pytest.raises(UsageError):
        Base(f"py:{file.parent / 'gone.py'}:fixed_net", inputs=INPUTS).build()
    file.write_text("import no_such_module\n")
    with pytest.raises(CheckpointError, match="no_such_module"):
        Base(f"py:{file}:fixed_net", inputs=INPUTS).build()
