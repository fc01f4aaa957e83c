"""PEFT FourierFT folders: ``fourierft_spectrum`` of each module; the places are drawn from ``random_loc_seed``."""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import fourierft
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder

LOOKED_FOR = looked_for("FOURIERFT")
READ = ("n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling")

accepts = of_type("FOURIERFT")


def read(source: Source) -> Parts:
    return read_folder(source, "fourierft_spectrum", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    spectrum = layer.take("fourierft_spectrum")
    scale, seed = float(layer.setting("scaling", 150.0)), int(layer.setting("random_loc_seed", 777))
    return "fourierft", fourierft.Params(spectrum, scale, seed)
