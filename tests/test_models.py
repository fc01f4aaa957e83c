"""Bases by spec, stated inputs, samples, real inputs, and a float64 that stays float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reparam_export.errors import CheckpointError, UsageError
from reparam_export.models import (
    Base,
    Input,
    Signature,
    outputs_of_call,
    parse_input,
    plain,
    pure_float64,
    read_inputs,
    samples,
    split_argument,
)
from reparam_export.verification.outputs import run

TEXT = Signature(
    (
        Input("input_ids", ("batch", "sequence"), "int64", 50, {"sequence": 9}),
        Input("attention_mask", ("batch", "sequence"), "int64", 2, {"sequence": 9}),
    ),
    ("logits",),
)
IMAGE = Signature((Input("image", ("batch", 3, 4, 4)),), ("logits",))


@pytest.mark.parametrize("spec", ["", "timm", "timm:", "tim:vit", "vit_base_patch16_224", "_hidden:x"])
def test_an_unknown_scheme_is_a_usage_error_that_lists_them(spec: str) -> None:
    with pytest.raises(UsageError, match="diffusers, hf, open_clip, py, timm"):
        Base(spec).build()


def test_keywords_are_literals_or_strings() -> None:
    name, keywords = split_argument("vit?a=1&b=0.5&c=true&d=None&e=(3,4)&f=avg&g='7'&h=[1]&i=1e-6&j=")
    assert name == "vit"
    assert keywords == {
        "a": 1, "b": 0.5, "c": True, "d": None, "e": (3, 4), "f": "avg", "g": "7", "h": [1], "i": 1e-6, "j": "",
    }  # fmt: skip
    assert split_argument("vit") == ("vit", {})
    for wrong in ("vit?a", "vit?a=1&a=2", "vit?=3", "vit?a b=3"):
        with pytest.raises(UsageError):
            split_argument(wrong)


def test_inputs_are_stated_by_name_axes_and_dtype() -> None:
    assert parse_input("image=batch,3,64,64:float32") == Input("image", ("batch", 3, 64, 64))
    assert parse_input("image=batch,3") == Input("image", ("batch", 3))
    ids = parse_input("ids=batch,sequence:int64:120")
    assert ids == Input("ids", ("batch", "sequence"), "int64", 120, {"sequence": 16})
    assert samples(Signature((ids,), ()), 5, seed=0)["ids"].shape == (5, 16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x=",
        "x y=batch,3",
        "x=batch,3:float32:9",
        "x=batch,3:int64:9:9",
        "=batch,3",
        "x=3,4",
        "x=batch,0",
        "x=batch,-1",
        "x=batch,",
        "x=batch,3:float16",
        "x=batch:int64:0",
    ],
)
def test_an_input_that_cannot_be_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_input(text)


def test_samples_are_seeded_and_in_range() -> None:
    first, again, other = samples(TEXT, 40, 1), samples(TEXT, 40, 1), samples(TEXT, 40, 2)
    ids, mask = first["input_ids"], first["attention_mask"]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(ids, other["input_ids"])
    assert ids.shape == mask.shape == (40, 9)
    assert (ids.dtype, ids.min().item(), ids.max().item()) == (torch.int64, 0, 49)
    assert mask[0::2].all()
    assert torch.equal(mask[1::2], torch.tensor([1] * 6 + [0] * 3).expand(20, 9))
    image = samples(IMAGE, 500, 0)["image"]
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (500, 3, 4, 4))
    assert abs(image.std().item() - 1) < 0.05


def test_reads_one_array_or_several_by_name(tmp_path: Path) -> None:
    image, ids = np.random.randn(2, 3, 4, 4).astype(np.float32), np.arange(14).reshape(2, 7)
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "ids.npy", ids)
    np.savez(tmp_path / "both.npz", attention_mask=ids % 2, input_ids=ids)
    assert torch.equal(read_inputs(tmp_path / "image.npy", IMAGE)["image"], torch.from_numpy(image))
    text = read_inputs(tmp_path / "ids.npy", TEXT)
    assert list(text) == ["input_ids", "attention_mask"]
    assert torch.equal(text["input_ids"], torch.from_numpy(ids))
    assert text["attention_mask"].all()
    assert torch.equal(read_inputs(tmp_path / "both.npz", TEXT)["attention_mask"], torch.from_numpy(ids % 2))


IDS = np.arange(14).reshape(2, 7)


@pytest.mark.parametrize(
    ("arrays", "signature", "named"),
    [
        ({"image": np.zeros((2, 3, 4, 5), np.float32)}, IMAGE, "5"),
        ({"image": np.zeros((3, 4, 4), np.float32)}, IMAGE, "batch"),
        ({"image": np.zeros((0, 3, 4, 4), np.float32)}, IMAGE, "0"),
        ({"image": np.zeros((2, 3, 4, 4))}, IMAGE, "float64"),
        ({"image": np.full((2, 3, 4, 4), np.nan, np.float32)}, IMAGE, "finite"),
        ({"pixels": np.zeros((2, 3, 4, 4), np.float32)}, IMAGE, "pixels"),
        ({"input_ids": IDS, "attention_mask": IDS, "labels": IDS}, TEXT, "labels"),
        ({"input_ids": IDS.astype(np.int32), "attention_mask": IDS % 2}, TEXT, "int32"),
        ({"input_ids": IDS + 37, "attention_mask": IDS % 2}, TEXT, "50"),
        ({"input_ids": IDS - 1, "attention_mask": IDS % 2}, TEXT, "-1"),
        ({"input_ids": IDS, "attention_mask": IDS}, TEXT, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :6] % 2}, TEXT, "7"),
        ({"input_ids": IDS, "attention_mask": IDS[:1] % 2}, TEXT, "2"),
    ],
)
def test_inputs_that_do_not_fit_are_usage_errors(
    tmp_path: Path, arrays: dict[str, np.ndarray], signature: Signature, named: str
) -> None:
    np.savez(tmp_path / "inputs.npz", **arrays)
    with pytest.raises(UsageError, match=named) as caught:
        read_inputs(tmp_path / "inputs.npz", signature)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


def test_inputs_that_cannot_be_read_are_usage_errors(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("gone.npy", "objects.npy", "broken.npz", "empty.npy"):
        with pytest.raises(UsageError, match=name):
            read_inputs(tmp_path / name, IMAGE)


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, object]:
        return {"y": x * scale, "none": None, "z": x + 1, "many": (x, x)}

    def other(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, -x


def test_a_call_gives_all_tensors_in_order() -> None:
    x = torch.ones(2, 3)
    signature = Signature((Input("x", ("batch", 3)),), ("y", "z"), {"scale": 5.0, "by_name": True})
    first, second = plain(Nested(), signature)(x)
    assert torch.equal(first, x * 5)
    assert torch.equal(second, x + 1)
    by_method = Signature(signature.inputs, ("a", "b"), {"method": "other"})
    assert torch.equal(outputs_of_call(Nested(), by_method, (x,))[1], -x)


def test_float64_stays_float64() -> None:
    x, narrow = torch.randn(2, 3, dtype=torch.float64), torch.ones(3)
    casts = (
        lambda: x.float(),
        lambda: x.to(torch.float32),
        lambda: x.to(dtype=torch.float32),
        lambda: x.to("cpu", torch.float32),
        lambda: x.to(narrow),
        lambda: x.type_as(narrow),
        lambda: x.type(torch.float32),
        lambda: F.softmax(x, dim=-1, dtype=torch.float32),
        lambda: torch.softmax(x, -1, torch.float32),
        lambda: x.sum(dtype=torch.float32),
        lambda: torch.zeros_like(x, dtype=torch.float32),
    )
    assert [cast().dtype for cast in casts] == [torch.float32] * len(casts)
    with pure_float64():
        assert [cast().dtype for cast in casts] == [torch.float64] * len(casts)
        assert torch.equal(x.to(torch.float32), x)
        assert x.to(torch.float16).dtype == torch.float16
        assert x.half().dtype == torch.float16
        assert torch.ones(2).float().dtype == torch.float32
        assert torch.arange(3).to(torch.float32).dtype == torch.float32
    assert x.float().dtype == torch.float32


def test_numbers_made_in_the_forward_of_a_float64_reference_are_float64() -> None:
    class Moments(torch.nn.Module):
        """The frequencies of a timestep as diffusion models make them: in float32, whatever the model is in."""

        def forward(self, moment: torch.Tensor) -> torch.Tensor:
            frequencies = torch.exp(-9.21 * torch.arange(4, dtype=torch.float32) / 4)
            halves = torch.ones(4) / 3
            return torch.sin(moment[:, None].float() * frequencies[None]) + halves

    moments = torch.tensor([3, 517, 999])
    signature = Signature((Input("moment", ("batch",), "int64", 1000),), ("y",))
    exact = torch.sin(moments[:, None].double() * torch.exp(-9.21 * torch.arange(4, dtype=torch.float64) / 4)) + 1 / 3
    (found,) = run(Moments(), signature, {"moment": moments}, torch.float64)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=0, atol=1e-13)
    (rounded,) = run(Moments(), signature, {"moment": moments}, torch.float32)
    assert 1e-7 < float((rounded - exact).abs().max()) < 1e-3  # so that the floor has it
    assert torch.get_default_dtype() == torch.float32


def test_pure_float64_lets_mixed_dtypes_meet_in_float64_and_writes_into_what_is_float32() -> None:
    wide, narrow = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3)
    target, row = torch.zeros(3, 3), torch.tensor([1])
    with pure_float64():
        assert torch.equal(wide @ narrow, wide @ narrow.double())
        assert torch.equal(torch.nn.functional.linear(wide, narrow), wide @ narrow.double().T)
        assert torch.equal(torch.einsum("ij,jk->ik", wide, narrow), torch.einsum("ij,jk->ik", wide, narrow.double()))
        target.index_add_(0, row, wide[:1])
    assert torch.equal(target[1], wide[0].float())


def test_axes_of_samples_are_found_where_they_are_not_one_row_a_sample(tmp_path: Path) -> None:
    from conftest import own_model

    outputs = "{'rows': x, 'each': x @ x.T, 'last': x.T, 'doubled': x.reshape(-1, 3), 'one': self.fc.weight.sum(), 'column': x[:, :1]}"
    spec = own_model(tmp_path, "self.fc = Linear(6, 4)", outputs)
    _, signature = Base(spec, inputs=(parse_input("x=batch,6:float32"),)).build()
    assert dict(signature.axes) == {"each": ((0, 1), (1, 1)), "last": ((1, 1),), "doubled": ((0, 2),), "one": ()}
    spec = own_model(tmp_path, "self.fc = Linear(6, 4)", "torch.zeros(3 * len(x) - 1)")
    with pytest.raises(CheckpointError, match="not made of samples"):
        Base(spec, inputs=(parse_input("x=batch,6:float32"),)).build()
