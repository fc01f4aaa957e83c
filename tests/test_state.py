"""Files of weights are read whole or refused; a module gets every tensor or an error that names it."""

from __future__ import annotations

import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reparam_export.errors import CheckpointError, MissingSettingError, TensorMismatchError, UsageError
from reparam_export.fit import check_replaced
from reparam_export.state import assign, load_state

STATE = {"a.weight": torch.randn(3, 2).bfloat16(), "b": torch.arange(4), "c": torch.tensor(2.0, dtype=torch.float64)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(
        t.dtype == right[n].dtype and torch.equal(t, right[n]) and not t.requires_grad for n, t in left.items()
    )


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_reads_what_torch_saved(tmp_path: Path, name: str, zipped: bool, wrapper: str | None) -> None:
    content: object = OrderedDict(STATE) if wrapper is None else {wrapper: STATE, "epoch": 7, "args": {"lr": 0.1}}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(load_state(tmp_path / name), STATE)


def test_reads_parameters_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "w.pt")
    assert same(load_state(tmp_path / "w.pt"), {"w": torch.ones(2)})


def test_reads_safetensors_and_npz(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert same(load_state(tmp_path / "w.safetensors"), STATE)
    arrays = {"x/kernel": np.arange(6.0).reshape(2, 3).T, "y": np.float32([1])}
    np.savez(tmp_path / "w.npz", **arrays)
    assert same(load_state(tmp_path / "w.npz"), {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()})


def test_reads_a_torchscript_archive(tmp_path: Path) -> None:
    linear = nn.Linear(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(linear).save(str(tmp_path / "w.pt"))
    assert same(load_state(tmp_path / "w.pt"), {k: v.detach() for k, v in linear.state_dict().items()})


@pytest.mark.parametrize("name", ["gone.pt", "gone.safetensors", "folder.pt"])
def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=name):
        load_state(tmp_path / name)


def test_an_unknown_suffix_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt2").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="ckpt2"):
        load_state(tmp_path / "w.ckpt2")


@pytest.mark.parametrize("name", ["w.pt", "legacy.pt", "w.safetensors", "w.npz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_a_checkpoint_error(tmp_path: Path, name: str, share: float) -> None:
    file, state = tmp_path / name, {"w": torch.randn(100, 100)}
    if name.endswith("safetensors"):
        save_file(state, file)
    elif name.endswith("npz"):
        np.savez(file, w=state["w"].numpy())
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name == "w.pt")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError):
        load_state(file)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was_here",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_more_than_tensors_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "x": Evil()}, "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"\.system"):
        load_state("w.pt")
    Path("raw.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        load_state("raw.bin")
    np.savez("w.npz", w=np.array([Evil()], dtype=object))
    with pytest.raises(CheckpointError):
        load_state("w.npz")
    torch.save(nn.Linear(1, 1), "module.pt")
    with pytest.raises(CheckpointError, match="Linear"):
        load_state("module.pt")
    assert not Path("was_here").exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        {},
        {"model": {}},
        {"a": torch.ones(1), "epoch": 3},
        {"optimizer": {"a": torch.ones(1)}, "rng": {"cpu": torch.ones(3, dtype=torch.uint8)}},
        [torch.ones(1)],
    ],
)
def test_a_file_without_one_dict_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="dict of names and tensors"):
        load_state(tmp_path / "w.pt")


def test_the_only_state_dict_of_a_training_checkpoint_is_found_wherever_it_lies(tmp_path: Path) -> None:
    moments = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}
    for content in ({"weights": STATE}, {"net": {"module": STATE}, "optimizer": moments, "rng_state": torch.ones(2)}):
        torch.save(content, tmp_path / "w.ckpt")
        assert same(load_state(tmp_path / "w.ckpt"), STATE)


@pytest.mark.parametrize("average", ["model_ema", "ema.module", "state_dict"])
def test_of_several_models_in_a_file_one_must_be_named(tmp_path: Path, average: str) -> None:
    outer, _, inner = average.partition(".")
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save({"model": STATE, outer: {inner: other} if inner else other, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(MissingSettingError, match=f"--set base_weights=.*{average}") as caught:
        load_state(tmp_path / "w.pt")
    assert caught.value.setting == "base_weights"
    assert same(load_state(tmp_path / "w.pt", "model"), STATE)
    assert same(load_state(tmp_path / "w.pt", average), other)
    with pytest.raises(UsageError, match=f"expected one of .*{average}"):
        load_state(tmp_path / "w.pt", "weights")


def test_the_name_that_all_names_begin_with_goes_where_that_makes_them_the_models(tmp_path: Path) -> None:
    own = {name: torch.randn(tensor.shape) for name, tensor in nn.Sequential(nn.Linear(3, 2)).state_dict().items()}
    module = nn.Sequential(nn.Linear(3, 2))
    assign(module, {f"net.model.{name}": tensor for name, tensor in own.items()})
    assert same(module.state_dict(), own)
    with pytest.raises(TensorMismatchError, match=r"0\.weight is missing"):
        assign(module, {f"{name.replace('0', 'net')}.0": tensor for name, tensor in own.items()} | {"b": torch.ones(2)})


def test_the_integers_of_openais_clip_archives_are_no_tensors_of_the_model() -> None:
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8), "vocab_size": torch.tensor(50)}
    own = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    module = nn.Linear(3, 2)
    assign(module, own | sizes)
    assert same(module.state_dict(), own)
    with pytest.raises(TensorMismatchError, match="vocab_size is left over"):
        assign(module, own | {"vocab_size": torch.ones(1)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def full() -> dict[str, torch.Tensor]:
    return {k: torch.randn(v.shape).half() if v.is_floating_point() else v for k, v in Tied().state_dict().items()} | {
        "embedding.weight": (weight := torch.randn(4, 3).half()),
        "head.weight": weight.clone(),
    }


def test_assigns_the_tensors_themselves_and_keeps_ties() -> None:
    module, state = Tied(), full()
    assign(module, state)
    assert module.embedding.weight is module.head.weight
    assert same({k: v.detach() for k, v in module.state_dict().items()}, state)
    assert module.norm.weight.data_ptr() == state["norm.weight"].data_ptr()


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_one_name_of_a_tied_tensor_is_enough(name: str) -> None:
    module, state = Tied(), full()
    weight = state.pop(name)
    assign(module, state)
    assert torch.equal(module.head.weight, weight)
    assert module.embedding.weight is module.head.weight


@pytest.mark.parametrize(
    ("change", "tensor", "owner", "expected", "found"),
    [
        ({"norm.bias": None}, "norm.bias", "norm", (3,), None),
        ({"norm.bias": torch.ones(2)}, "norm.bias", "norm", (3,), (2,)),
        ({"norm.bias": torch.ones(1, 3)}, "norm.bias", "norm", (3,), (1, 3)),
        ({"norm.bias": torch.ones(3).int()}, "norm.bias", "norm", torch.float32, torch.int32),
        ({"head.bias": torch.ones(4)}, "head.bias", "head", None, (4,)),
        ({"position_ids": torch.ones(4)}, "position_ids", "", None, (4,)),
        ({"x.embeddings.position_ids": torch.ones(4)}, "x.embeddings.position_ids", "x.embeddings", None, (4,)),
    ],
)
def test_missing_left_over_and_misshaped_tensors_are_refused(
    change: dict[str, torch.Tensor | None], tensor: str, owner: str, expected: object, found: object
) -> None:
    state = {k: v for k, v in (full() | change).items() if v is not None}
    with pytest.raises(TensorMismatchError) as caught:
        assign(Tied(), state)
    error = caught.value
    assert (error.tensor, error.module, error.expected, error.found) == (tensor, owner, expected, found)
    assert tensor in str(error)


def test_tied_tensors_with_different_numbers_are_refused() -> None:
    with pytest.raises(TensorMismatchError) as caught:
        assign(Tied(), full() | {"head.weight": torch.zeros(4, 3).half()})
    assert caught.value.tensor == "head.weight"


def test_a_refused_state_leaves_the_module_alone() -> None:
    module = Tied()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(TensorMismatchError):
        assign(module, full() | {"more": torch.ones(1)})
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("change", [None, torch.ones(9, 9)])
def test_optional_tensors_may_be_missing_or_have_another_shape_and_are_zero(change: torch.Tensor | None) -> None:
    module, state = nn.Linear(2, 3), {"bias": torch.ones(3)}
    assign(module, state if change is None else state | {"weight": change}, optional={"weight"})
    assert torch.equal(module.weight, torch.zeros(3, 2))
    assert torch.equal(module.bias, torch.ones(3))


def test_constants_of_older_versions_may_be_left_over() -> None:
    constants = {"bert.embeddings.position_ids": torch.arange(4)[None], "layers.0.rotary_emb.inv_freq": torch.ones(2)}
    state = {k: v for k, v in full().items() if k != "norm.num_batches_tracked"}
    assign(Tied(), state | constants)


def test_checks_what_a_checkpoint_replaces() -> None:
    module = nn.Sequential(nn.Linear(2, 3, bias=False))
    check_replaced(module, {"0.weight": (3, 2), "0.bias": (3,)})
    for name, shape, found in (("0.weight", (2, 2), (3, 2)), ("1.weight", (3, 2), None), ("1.bias", (3,), None)):
        with pytest.raises(TensorMismatchError) as caught:
            check_replaced(module, {name: shape})
        assert (caught.value.tensor, caught.value.expected, caught.value.found) == (name, shape, found)


def test_a_torchscript_archive_that_runs_code_when_it_is_loaded_is_refused_unloaded(tmp_path: Path) -> None:
    written = tmp_path / "written.pt"

    class Sets(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.place = str(written)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

        @torch.jit.export
        def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
            return self.weight, self.place, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
            self.weight, self.place, self.training = state[0], state[1], state[2]
            torch.save(self.weight, self.place)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Sets()).save(str(tmp_path / "w.pt"))
    with pytest.raises(CheckpointError, match="runs code of its own"):
        load_state(tmp_path / "w.pt")
    assert not written.exists()


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(10**8, np.uint8))
    with pytest.raises(CheckpointError, match="unpacks to"):
        load_state(tmp_path / "w.npz")
