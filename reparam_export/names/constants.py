"""Buffers that hold no learned number: later versions of the libraries compute them, so files have them and models do not."""

from __future__ import annotations

from typing import Any

# Each is (name, dtypes): a learned tensor of that name would have another dtype.
INTEGER, MASK = ("torch.int64", "torch.int32"), ("torch.bool", "torch.uint8", "torch.float32", "torch.float16")
CONSTANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embeddings.position_ids", INTEGER),
    ("embeddings.token_type_ids", INTEGER),
    ("attn.relative_position_index", INTEGER),
    ("attn.masked_bias", MASK),
    ("rotary_emb.inv_freq", ("torch.float32", "torch.float16", "torch.bfloat16")),
    ("input_resolution", INTEGER),  # these three say how large the model of an archive of OpenAI's CLIP is
    ("context_length", INTEGER),
    ("vocab_size", INTEGER),
)


def is_constant(name: str, tensor: Any) -> bool:
    """Whether the tensor is one of the CONSTANTS, which a file may hold though the model has no such tensor."""
    return any(
        (name == suffix or name.endswith("." + suffix))
        and f"torch.{str(tensor.dtype).removeprefix('torch.')}" in dtypes
        for suffix, dtypes in CONSTANTS
    )
