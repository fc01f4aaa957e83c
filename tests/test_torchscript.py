"""TorchScript archives: what ``torch.jit.load`` gives, without loading their code."""

from __future__ import annotations

import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reparam_export.errors import CheckpointError
from reparam_export.state import load_state

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:`torch.jit")


class Net(nn.Module):
    """Modules that are shared, inside each other and without bias; buffers, views, numbers, and attributes that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.tied = self.a
        self.seq = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.low = nn.Linear(2, 2, bias=False).half()
        self.w = nn.Parameter(torch.randn(4, 6)[:, ::2].detach())
        self.register_buffer("n", torch.tensor(7))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.plain, self.list, self.ints, self.text, self.named = torch.ones(3), [torch.ones(2)], [1, 2], "x", {"a": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(x) + self.w.sum() + self.plain.sum() + self.list[0].sum() + self.ints[0] + self.named["a"]  # type: ignore[no-any-return]


def net(file: Path, make: Callable[[nn.Module], Any] = torch.jit.script) -> Path:
    torch.manual_seed(0)
    make(Net()).save(str(file))
    return file


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 3))], ids=["script", "trace"]
)
def test_it_is_the_state_that_torch_gives(make: Any, tmp_path: Path) -> None:
    file = net(tmp_path / "w.pt", make)
    expected = torch.jit.load(str(file)).state_dict()  # type: ignore[no-untyped-call]
    found = load_state(file)
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())


def archive(file: Path, content: bytes, code: dict[str, str] | None = None, **storages: bytes) -> Path:
    """An archive of these parts."""
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("w/data.pkl", content)
        made.writestr("w/constants.pkl", pickle.dumps(()))
        for name, text in (code or {}).items():
            made.writestr(f"w/code/{name}", text)
        for name, numbers in storages.items():
            made.writestr(f"w/data/{name[1:]}", numbers)
    return file


def test_code_in_a_file_that_is_named_like_numbers_is_not_loaded(tmp_path: Path) -> None:
    """A class ``__torch__.data.x`` lies in ``code/__torch__/data/x.py``."""
    written = tmp_path / "written"
    code = (
        "class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n  def __setstate__(self, state: int) -> NoneType:\n"
        f"    torch.save(state, {str(written)!r})\n"
    )
    content = b"\x80\x02c__torch__.data.x\nM\n)\x81K\x01b."
    file = archive(tmp_path / "w.pt", content, {"__torch__/data/x.py": code})
    with pytest.raises(CheckpointError, match="runs code of its own"):
        load_state(file)
    file = archive(tmp_path / "w.pt", content, {"__torch__/data/x.pyc": code})
    with pytest.raises(CheckpointError, match="holds a int, no attributes by name"):
        load_state(file)
    assert not written.exists()


class Calls:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_name_that_is_code_is_refused_unrun(tmp_path: Path) -> None:
    file = archive(tmp_path / "w.pt", pickle.dumps(Calls(tmp_path / "written"), 2), {"x.py": ""})
    with pytest.raises(CheckpointError, match="which is code, not weights; it was not run"):
        load_state(file)
    assert not (tmp_path / "written").exists()


def tensor(shape: str, strides: str, offset: str = "I0\n", count: str = "I4\n") -> bytes:
    """data.pkl of a module with one tensor in a storage of 4 float32."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n{count}tQ"
    made = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{offset}{shape}{strides}I00\nccollections\nOrderedDict\n(tRtR"
    return f"\x80\x02c__torch__\nM\n)\x81}}(S'w'\n{made}ub.".encode("latin-1")


CODE = {"__torch__.py": 'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n'}
NUMBERS = bytes(torch.arange(4.0).numpy())


def test_a_storage_is_not_left(tmp_path: Path) -> None:
    good = archive(tmp_path / "w.pt", tensor("(I2\nI2\nt", "(I1\nI2\nt"), CODE, _0=NUMBERS)
    assert torch.equal(load_state(good)["w"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    for content in (
        tensor("(I2\nI3\nt", "(I3\nI1\nt"),
        tensor("(I2\nI2\nt", "(I2\nI1\nt", "I1\n"),
        tensor("(I2\nI2\nt", "(I-2\nI1\nt"),
        tensor("(I2\nI2\nt", "(I1\nt"),
        tensor("(I9999999999\nI9999999999\nt", "(I0\nI1\nt"),
        tensor("(I2\nt", "(I1\nt", count="I400000000000\n"),
    ):
        with pytest.raises(CheckpointError, match="expected a whole TorchScript archive"):
            load_state(archive(tmp_path / "w.pt", content, CODE, _0=NUMBERS))
    with pytest.raises(CheckpointError, match="expected a whole TorchScript archive"):
        load_state(archive(tmp_path / "w.pt", tensor("(I2\nt", "(I1\nt"), CODE))


def test_a_module_that_holds_itself_ends(tmp_path: Path) -> None:
    content = b"\x80\x02c__torch__\nM\n)\x81q\x00}(S'm'\nh\x00ub."
    with pytest.raises(CheckpointError, match="holds itself"):
        load_state(archive(tmp_path / "w.pt", content, CODE))


def test_a_tensor_takes_no_state_of_its_own(tmp_path: Path) -> None:
    """pickle's BUILD would call ``Tensor.__setstate__``, which grows the storage over memory that nobody wrote."""
    grown = tensor("(I2\nt", "(I1\nt").replace(b"(tRtR", b"(tRtR(I9\n(I4\nt(I1\ntI00\ntb", 1)
    with pytest.raises(CheckpointError, match="a state for a tensor"):
        load_state(archive(tmp_path / "w.pt", grown, CODE, _0=NUMBERS))


def test_what_only_says_that_it_is_a_tensor_is_none(tmp_path: Path) -> None:
    content = b"\x80\x02c__torch__\nM\n)\x81}(S'w'\nc__torch__\nM\n)\x81}(S'dtype'\nI1\nubub."
    assert not load_state(archive(tmp_path / "w.pt", content, CODE))


def test_modules_that_are_shared_without_end_end(tmp_path: Path) -> None:
    """Each holds the one below twice: 2^60 names in a few kilobytes."""
    content = b"\x80\x02c__torch__\nM\n)\x81q\x00"
    for level in range(1, 61):
        content += (
            b"c__torch__\nM\n)\x81}(S'a'\nh"
            + bytes([level - 1])
            + b"S'b'\nh"
            + bytes([level - 1])
            + b"ubq"
            + bytes([level])
        )
    with pytest.raises(CheckpointError, match="more modules than a model has"):
        load_state(archive(tmp_path / "w.pt", content + b".", CODE))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_archive_is_one_error_or_the_same_numbers(seed: int, tmp_path: Path) -> None:
    content, draw = bytearray(net(tmp_path / "w.pt").read_bytes()), random.Random(seed)
    expected = load_state(tmp_path / "w.pt")
    for _ in range(draw.randint(1, 9)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    (tmp_path / "w.pt").write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = load_state(tmp_path / "w.pt")
        except CheckpointError:
            return
    assert all(torch.equal(found[n], t) for n, t in expected.items() if n in found)
