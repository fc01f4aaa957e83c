"""Kinds of peft that decompose the base while they are loaded: what is folded is the model as this machine rebuilds it.

Singular vectors and their like are no smooth function of a matrix, and libraries and processors compute them otherwise. Measured with
peft 0.21.2 on two layers of 96 x 128 and 128 x 64, rank 8: how far its own unfused outputs, computed in float64, move, relative to the
largest, when every number of the base moves by its last bit in float32, as another order of additions does:

    kinds without a decomposition   8e-8 to 2e-7 (LoRA 1e-7), 0 with another number of threads
    AdaMSS, TinyLoRA, OLoRA         2e-7, OLoRA 9e-8 with another number of threads
    KaSA                            1e-6
    OSF, PiSSA, PSOFT               2e-5, 2e-5, 6e-5
    FROD                            1.4, and 1.1 with another number of threads

FROD is another model every time, and refused (``peft_other``). The others are folded, and the headline, the certificate and a note say
what was folded.
"""

from __future__ import annotations

NAMES = {
    "ADAMSS": "AdaMSS", "OSF": "OSF", "PSOFT": "PSOFT", "TINYLORA": "TinyLoRA", "kasa": "KaSA", "olora": "OLoRA", "pissa": "PiSSA",
}  # fmt: skip
MOVES = {"KaSA": "1e-6", "OSF": "2e-5", "PiSSA": "2e-5", "PSOFT": "6e-5"}


def rebuilt_by(kind: str) -> str | None:
    """The name of the kind when it decomposes the base while it is loaded. kind: a peft_type, or what makes LoRA one of them."""
    return NAMES.get(kind)


def note_of(name: str) -> str:
    """What a user has to know, and the way out."""
    moves = f" (the last bit of the base's numbers moves its outputs by {MOVES.get(name)} of their size, those of plain LoRA by 1e-7)"
    return (
        f"{name} decomposes the base again while it is loaded, and another processor or library does not do it to the last bit alike"
        f"{moves if name in MOVES else ''}: this is the model as this machine rebuilds it. To have the trained one, save "
        "the adapter where it was trained as plain LoRA (PiSSA, OLoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...); "
        "others: peft.convert_to_lora), or the base that was left beside it"
    )
