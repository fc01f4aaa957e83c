"""Predictions that differ are counted, with how near the two classes are in the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reparam_export.errors import FusionError
from reparam_export.models import Input, Signature
from reparam_export.verification.outputs import Reference, check_apart, compare, jolt, judged_again, predictions, run


def test_a_prediction_that_differs_is_counted_with_its_margin() -> None:
    expected = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    found = torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.5, 0.0], [2.0, 0.0, 1.0]])
    same, margins = predictions(found, expected)
    assert same.tolist() == [True, False, False]
    assert margins.tolist() == [0.5, 1.0]
    reference = Reference({"x": torch.zeros(3, 1)}, {"y": expected}, {"y": 1e-7}, "float32")
    (evidence,) = compare("fused", lambda inputs: [found], reference, 3)
    assert (evidence.agree, evidence.differing, evidence.margin) == (1 / 3, 2, 1.0)
    (evidence,) = compare("fused", lambda inputs: [expected.float()], reference, 3)
    assert (evidence.agree, evidence.differing, evidence.margin) == (1.0, 0, None)


def test_every_position_of_a_sequence_is_a_prediction() -> None:
    expected = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    found = expected.clone()
    found[1, 2, 0] = 1.5
    same, margins = predictions(found, expected)
    assert same.shape == (2, 4)
    assert margins.tolist() == [1.0]


class Calls(nn.Module):
    """Raises what it is given, one error for each call; then it answers."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.errors:
            raise self.errors.pop(0)
        return 2 * x


X = Signature((Input("x", ("batch", 3), "float32"),), ("y",))


def test_an_error_that_is_not_of_dtypes_is_told_at_once() -> None:
    model = Calls(RuntimeError("the cache is full"))
    with pytest.raises(FusionError, match="RuntimeError: the cache is full"):
        run(model, X, {"x": torch.ones(2, 3)}, torch.float64)
    assert not model.errors


def test_of_two_errors_the_first_is_told() -> None:
    model = Calls(RuntimeError("expected scalar type Float but found Double"), RuntimeError("something else"))
    with pytest.raises(FusionError, match="expected scalar type Float"):
        run(model, X, {"x": torch.ones(2, 3)}, torch.float64)
    once = Calls(RuntimeError("expected scalar type Float but found Double"))
    (found,) = run(once, X, {"x": torch.ones(2, 3)}, torch.float64)
    assert torch.equal(found, 2 * torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(("floor", "leak", "allowed"), [(1e-6, 1e-7, True), (1e-6, 1e-5, False), (1e-2, 1e-3, True)])
def test_samples_may_depend_on_each_other_by_less_than_rounding(floor: float, leak: float, allowed: bool) -> None:
    class Leaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = x @ x.T
            return y + leak * (len(x) - 1)

    model = Leaks()
    signature = Signature((Input("x", ("batch", 3), "float32"),), ("y",), axes={"y": ((0, 1), (1, 1))})
    inputs = {"x": torch.ones(4, 3)}
    (all_of_them,) = run(model, signature, inputs, torch.float64)
    reference = Reference(inputs, {"y": all_of_them - 2 * leak}, {"y": floor}, "float32", signature.axes)
    if allowed:
        check_apart(model, signature, reference)
    else:
        with pytest.raises(FusionError, match="answers a sample otherwise"):
            check_apart(model, signature, reference)


def test_a_run_with_other_roundings_moves_weights_as_far_as_one_rounding() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = torch.nn.Linear(200, 100).to(dtype)
        before = layer.weight.detach().clone()
        weight = jolt(layer, 1).weight.detach()  # type: ignore[operator, union-attr]
        assert torch.equal(layer.weight, before)  # its tensors are the checkpoint's
        moved = (weight != before).double().mean()
        allowed = 1.6 * before.double().abs() * torch.finfo(dtype).eps + 1e-7
        assert 0.06 < float(moved) < 0.11
        assert bool(((weight.double() - before.double()).abs() <= allowed).all())


def test_a_luckily_small_floor_is_corrected_by_more_draws_and_a_fault_is_not_explained_by_them() -> None:
    expected = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    lucky = Reference({"x": torch.zeros(1, 1)}, {"y": expected}, {"y": 1e-8}, "float32")
    (evidence,) = compare("fused", lambda inputs: [(expected + 3e-6).float()], lucky, 1)
    assert not evidence.passed
    again = judged_again(evidence, Reference(lucky.inputs, lucky.outputs, {"y": 1e-6}, "float32"))
    assert again.passed
    assert (again.error, again.floor, again.bound) == (evidence.error, 1e-6, 8e-6)
    (evidence,) = compare("fused", lambda inputs: [(expected + 3e-5).float()], lucky, 1)
    assert not judged_again(evidence, Reference(lucky.inputs, lucky.outputs, {"y": 1e-6}, "float32")).passed
