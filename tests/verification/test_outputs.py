"""Predictions that differ are counted, with how near the two classes are in the reference."""

from __future__ import annotations

import torch

from reparam_export.verification.outputs import Reference, compare, predictions


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
