from __future__ import annotations

import copy
import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_format
import pytest
import torch
from torch import nn

from reparam_export.errors import ExportError, UsageError
from reparam_export.exporters import onnx
from reparam_export.models import Input, Signature

from .conftest import IMAGES, small_vit

ROWS = Signature((Input("x", ("batch", 4, 8)),), ("y",))
ROWS_EXAMPLE = {"x": torch.zeros(1, 4, 8)}


class Twins(nn.Module):
    """Two linear layers with equal (zero) biases, and a third that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.idle = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        nn.init.zeros_(self.one.bias)
        nn.init.zeros_(self.two.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(torch.relu(self.one(x)))
        return result


class Tied(nn.Module):
    """A language model's shape: the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.embed(ids))
        return result


def initializers(path: Path) -> dict[str, Any]:
    model = onnx_format.load(path)
    return {tensor.name: onnx_format.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx_format.load(path, load_external_data=False).metadata_props}


def test_every_parameter_stands_under_its_own_name_bit_for_bit(vit: nn.Module, vit_file: Path) -> None:
    held, transposed = initializers(vit_file), json.loads(metadata(vit_file)["transposed"])
    assert {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"} <= set(transposed)
    for name, tensor in vit.state_dict().items():
        stored = held[name].T if name in transposed else held[name]
        assert stored.tobytes() == tensor.numpy().tobytes(), name
    assert all(array.size <= 8 for name, array in held.items() if name not in vit.state_dict())


def test_metadata_is_kept_and_nothing_of_the_exporting_machine_gets_in(vit_file: Path) -> None:
    assert metadata(vit_file)["verdict"] == "exact"
    assert json.loads(metadata(vit_file)["unused"]) == []
    assert b"site-packages" not in vit_file.read_bytes()


def test_the_graph_is_as_lean_as_that_of_torch(vit: nn.Module, vit_file: Path) -> None:
    with onnx._quiet():
        program = torch.onnx.export(
            vit, (torch.zeros(2, 3, 32, 32),), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
        )
    assert program is not None
    nodes = onnx_format.load(vit_file).graph.node
    assert len(nodes) == len(program.model.graph)
    constants = set(initializers(vit_file))
    assert not [n.name for n in nodes if n.op_type == "Transpose" and n.input[0] in constants]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_is_dynamic(vit: nn.Module, vit_file: Path, batch: int) -> None:
    image = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    with onnx.Runner(vit_file) as runner, torch.no_grad():
        found = runner.run({"image": image.numpy()})["logits"]
        exact = copy.deepcopy(vit).double()(image.double()).numpy()
        floor = np.abs(vit(image).numpy() - exact).max()
    assert found.shape == (batch, 10)
    assert np.abs(found - exact).max() <= 8 * floor


def test_two_equal_biases_stay_two_and_an_unread_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "twins.onnx"
    onnx.write(Twins().eval(), ROWS, ROWS_EXAMPLE, path)
    assert {"one.weight", "one.bias", "two.weight", "two.bias"} <= set(initializers(path))
    assert json.loads(metadata(path)["unused"]) == ["idle.weight", "idle.bias"]


def test_parameters_of_zeros_and_ones_and_batch_norms_are_not_optimised_away(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.scale, self.shift = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.zeros(1))
            nn.init.zeros_(self.conv.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mul(self.norm(self.conv(x)), self.scale) + self.shift

    model, path = Plain().eval(), tmp_path / "plain.onnx"
    onnx.write(model, Signature((Input("x", ("batch", 3, 4, 4)),), ("y",)), {"x": torch.zeros(2, 3, 4, 4)}, path)
    assert set(model.state_dict()) - {"norm.num_batches_tracked"} <= set(initializers(path))


def test_numbers_that_are_nearly_nothing_stay_and_a_squeeze_of_a_long_axis_does_nothing(tmp_path: Path) -> None:
    class Guarded(nn.Module):
        """Linear attention's division, whose guard is far below what onnxscript takes for 0."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            positive = torch.relu(x)
            divided = positive / (positive.sum(-1, keepdim=True) + 1e-15)
            return divided, ((x * 1.000009).squeeze(1) - 3e-9).squeeze(-2), x.squeeze(1)

    path = tmp_path / "guarded.onnx"
    onnx.write(Guarded().eval(), replace(ROWS, outputs=("y", "z", "w")), ROWS_EXAMPLE, path)
    x = torch.randn(3, 4, 8)
    x[0, 1] = -1.0  # nothing of this row is above 0
    with onnx.Runner(path) as runner:
        found = runner.run({"x": x.numpy()})
    for name, expected in zip(("y", "z", "w"), Guarded()(x), strict=True):
        assert np.array_equal(found[name], expected.numpy()) or np.allclose(found[name], expected, rtol=3e-7, atol=0)


def test_tied_parameters_are_one_initializer(tmp_path: Path) -> None:
    model, path = Tied().eval(), tmp_path / "tied.onnx"
    tokens = Signature((Input("ids", ("batch", "sequence"), "int64", 20),), ("logits",))
    onnx.write(model, tokens, {"ids": torch.zeros(1, 1, dtype=torch.int64)}, path)
    assert len({"embed.weight", "head.weight"} & set(initializers(path))) == 1
    ids = torch.arange(15).reshape(3, 5)
    with onnx.Runner(path) as runner, torch.no_grad():
        np.testing.assert_allclose(runner.run({"ids": ids.numpy()})["logits"], model(ids).numpy(), atol=1e-6)


def test_bf16_parameters_are_exported_as_stored(tmp_path: Path) -> None:
    model, path = Twins().eval().bfloat16(), tmp_path / "model.onnx"
    onnx.write(model, ROWS, {"x": torch.zeros(2, 4, 8, dtype=torch.bfloat16)}, path)
    stored = initializers(path)["one.weight"]
    assert stored.dtype.name == "bfloat16"
    assert stored.T.tobytes() == model.one.weight.detach().view(torch.int16).numpy().tobytes()


def test_weights_above_the_threshold_go_to_a_file_beside(tmp_path: Path) -> None:
    model, path, inside = Twins().eval(), tmp_path / "model.onnx", tmp_path / "inside.onnx"
    onnx.write(model, ROWS, ROWS_EXAMPLE, inside)
    onnx.write(model, ROWS, ROWS_EXAMPLE, path, external=500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside.onnx", "model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size == 2 * 8 * 16 * 4  # tensors up to 256 bytes stay in the graph
    rows = {"x": np.ones((3, 4, 8), np.float32)}
    with onnx.Runner(path) as one, onnx.Runner(inside) as two:
        assert np.array_equal(one.run(rows)["y"], two.run(rows)["y"])
    assert onnx.differences(path, inside) == []
    onnx.write(model, ROWS, ROWS_EXAMPLE, path)
    assert not (tmp_path / "model.onnx.data").exists(), "the data file of the replaced model must go"


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")

    def full(_: object, file: Path, external_data: str | None = None) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(ExportError, match="No space left"):
        onnx.write(Twins().eval(), ROWS, ROWS_EXAMPLE, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"before"


def test_a_weight_that_changed_on_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    real = onnx_ir.save

    def bent(model: onnx_ir.Model, file: Path, **options: Any) -> None:
        value = model.graph.initializers["two.weight"]
        array = value.const_value.numpy().copy()  # type: ignore[union-attr]
        array[3, 5] = np.nextafter(array[3, 5], np.float32(9))
        value.const_value = onnx_ir.tensor(array, name="two.weight")
        real(model, file, **options)

    monkeypatch.setattr(onnx_ir, "save", bent)
    with pytest.raises(ExportError, match=r"two\.weight"):
        onnx.write(Twins().eval(), ROWS, ROWS_EXAMPLE, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_console_stays_empty(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx.write(Twins().eval(), ROWS, ROWS_EXAMPLE, tmp_path / "model.onnx")
    with onnx.Runner(tmp_path / "model.onnx") as runner:
        runner.run({"x": np.zeros((5, 4, 8), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_exported_is_an_export_error(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branch"):
        onnx.write(Branch().eval(), ROWS, ROWS_EXAMPLE, tmp_path / "model.onnx")

    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tensor([0.5] * x.shape[0])[:, None, None]

    with pytest.raises(ExportError, match=r"fixes axis 0 \('batch'\) of input 'x' at the size it is captured with, 2"):
        onnx.write(Counted().eval(), ROWS, ROWS_EXAMPLE, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="training mode"):
        onnx.write(Twins().train(), ROWS, ROWS_EXAMPLE, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="lacks input 'x'"):
        onnx.write(Twins().eval(), ROWS, {}, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="no file"), onnx.Runner(tmp_path / "model.onnx"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_wrong_inputs_to_a_runner_are_an_export_error(vit_file: Path) -> None:
    with onnx.Runner(vit_file) as runner, pytest.raises(ExportError):
        runner.run({"image": np.zeros((1, 3, 8, 8), np.float32)})
    with pytest.raises(ExportError, match="not open"):
        runner.run({"image": np.zeros((1, 3, 32, 32), np.float32)})


def test_graphs_of_the_same_architecture_are_the_same_and_others_are_not(vit_file: Path, tmp_path: Path) -> None:
    other, bent = tmp_path / "other.onnx", tmp_path / "bent.onnx"
    onnx.write(small_vit(seed=5), IMAGES, {"image": torch.zeros(1, 3, 32, 32)}, other)
    assert onnx.differences(vit_file, other) == []
    for change in ("operator", "attribute", "edge", "shape"):
        model = onnx_format.load(other)
        if change == "operator":
            next(n for n in model.graph.node if n.op_type == "Gelu" or n.op_type == "Erf").op_type = "Relu"
        elif change == "attribute":
            norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
            next(a for a in norm.attribute if a.name == "epsilon").f = 0.5
        elif change == "edge":
            first, second = [n for n in model.graph.node if n.op_type == "LayerNormalization"][:2]
            first.input[1] = second.input[1]
        else:
            tensor = next(t for t in model.graph.initializer if t.name == "head.bias")
            tensor.dims[:] = [2, 5]
        onnx_format.save(model, bent)
        assert onnx.differences(vit_file, bent), change


@pytest.mark.slow
def test_a_model_above_two_gigabytes(tmp_path: Path) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8192, 8192) for _ in range(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, path = Large().eval(), tmp_path / "model.onnx"
    onnx.write(model, Signature((Input("x", ("batch", 1, 8192)),), ("y",)), {"x": torch.zeros(2, 1, 8192)}, path)
    assert (tmp_path / "model.onnx.data").stat().st_size > 2**31
    x = torch.randn(3, 1, 8192)
    with onnx.Runner(path) as runner, torch.no_grad():
        np.testing.assert_allclose(runner.run({"x": x.numpy()})["y"], model(x).numpy(), atol=1e-5)
