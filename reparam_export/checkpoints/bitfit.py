"""BitFit and norm tuning: a state dict of trained biases, of norms, and of a head, under the base's own names; taken whole.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", 2022.
"""

from __future__ import annotations

import re

from reparam_export.checkpoints import Parts, Source

LOOKED_FOR = "tensors of biases, norms and a head only, under the base's own names (BitFit, norm tuning)"
HEAD = r"(?:head|classifier|score|fc_norm)"
NORM = r"(?:ln|norm|layer_?norm|layrnorm)[^.]*|[^.]*(?:_ln|_norm|_layer_?norm|_layrnorm)"
WHOLE = re.compile(rf"(?:.+\.)?(?:[^.]+\.bias|{HEAD}\.(?:[^.]+\.)*(?:weight|bias)|(?:{NORM})\.weight)", re.IGNORECASE)
BIAS = re.compile(rf"(?!(?:.+\.)?{HEAD}\.).+\.(?:bias|weight)", re.IGNORECASE)  # something beside the head


def accepts(source: Source) -> bool:
    names = list(source.tensors)
    return (
        "peft_type" not in source.config
        and all(WHOLE.fullmatch(n) for n in names)
        and any(BIAS.fullmatch(n) for n in names)
    )


def read(source: Source) -> Parts:
    return Parts((), dict(source.tensors))
