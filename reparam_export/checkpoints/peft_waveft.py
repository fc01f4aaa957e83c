"""PEFT WaveFT folders: ``waveft_spectrum`` of each module; the places are drawn from ``random_loc_seed``.

Haar's wavelet (db1) and no transform have a formula; other wavelets go through peft's own layers.
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import waveft
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft import Layer, looked_for, of_type, read_folder
from reparam_export.checkpoints._peft_layers import read_layers

LOOKED_FOR = looked_for("WAVEFT")
READ = (
    "n_frequency", "n_frequency_pattern", "proportional_parameters", "random_loc_seed", "scaling", "use_idwt", "wavelet_family",
)  # fmt: skip

accepts = of_type("WAVEFT")


def read(source: Source) -> Parts:
    if _wavelet(source) not in ("db1", "none"):
        return read_layers(source)
    return read_folder(source, "waveft_spectrum", _params, READ)


def _params(layer: Layer) -> tuple[str, Any]:
    spectrum = layer.take("waveft_spectrum")
    scale, seed = float(layer.setting("scaling", 25.0)), int(layer.setting("random_loc_seed", 777))
    return "waveft", waveft.Params(spectrum, scale, seed, _wavelet(layer.source))


def _wavelet(source: Source) -> str:
    return str(source.config.get("wavelet_family", "db1")) if source.config.get("use_idwt", True) else "none"
