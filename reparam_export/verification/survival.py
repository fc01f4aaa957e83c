"""Survival: the share of an adapter's change that the storage format keeps.

Per layer, the projection of the stored change on the exact change, <stored - W, exact - W> / |exact - W|^2: 1 keeps all of it on average,
0.5 half. The weight proof measures it with the same read-out; here the layers are put together. In all, the change is that of all
layers as one vector, so a layer counts by the square of its change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reparam_export.verification.certificate import LayerEvidence


def overall(layers: Sequence[LayerEvidence]) -> float:
    """The survival of all layers together."""
    changed = math.fsum(layer.change for layer in layers)
    if not changed > 0:
        return least(layers)
    return math.fsum(layer.survival * layer.change for layer in layers) / changed


def least(layers: Sequence[LayerEvidence]) -> float:
    """The least survival of any layer."""
    return min((layer.survival for layer in layers), default=1.0)
