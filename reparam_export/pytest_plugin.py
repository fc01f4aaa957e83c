"""A pytest plugin: the fixture ``assert_equivalent``, for a project that trains adapters and wants its tests to say that they fold.

def test_the_adapter_folds(assert_equivalent):
    assert_equivalent("ckpt.pt", base="timm:vit_base_patch16_224", to="onnx")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from reparam_export import VerifiedModel


@pytest.fixture
def assert_equivalent(tmp_path: Path) -> Callable[..., VerifiedModel]:
    """A function ``(checkpoint, *, inputs=None, dtype=None, to=(), precision="fp32", seed=0, **read) -> VerifiedModel``.

    checkpoint: its path, or what ``reparam_export.read`` returned. It is fused and proven; for every target in ``to`` ("onnx",
    "trt", "safetensors", one or several) the exported file is proven, too, in a folder below ``tmp_path``. Further keywords are
    those of ``read`` (base, base_weights, config, settings). What is not the trained model fails the test with the layer, the
    error and its bound; what cannot be read or folded is an error of its own, as in ``read`` and ``fuse``.
    """

    def check(
        checkpoint: Any,
        *,
        inputs: Any = None,
        dtype: str | None = None,
        to: str | tuple[str, ...] = (),
        precision: str = "fp32",
        seed: int = 0,
        **read: Any,
    ) -> VerifiedModel:
        __tracebackhide__ = True
        import reparam_export as rx
        from reparam_export.errors import EquivalenceError

        opened = checkpoint if isinstance(checkpoint, rx.Checkpoint) else rx.read(checkpoint, **read)
        try:
            model = rx.verify(opened, rx.fuse(opened, dtype), inputs, seed=seed)
            for target in (to,) if isinstance(to, str) else to:
                rx.export(model, target, tmp_path / "reparam-export", precision=precision)
        except EquivalenceError as error:
            pytest.fail(f"{opened.path}: {error}", pytrace=False)
        return model

    return check
