"""A vocabulary of another size than the base's: tokens were added, or the table was padded to a multiple, before the adapter was trained.

The checkpoint then brings the embedding whole; the model is built for as many tokens as it has rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reparam_export.errors import TensorMismatchError

Shapes = Mapping[str, tuple[int, ...]]


def fit_vocabulary(config: Any, model_class: Any, replaced: Shapes) -> None:
    """Set ``vocab_size`` of the config to the rows of the embedding among these tensors, where it has another number.

    replaced: shapes of the whole tensors of a checkpoint. Raises TensorMismatchError for an output table with other rows than the
    embedding has then, which no config can say.
    """
    import torch

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    tables = {name: shape for name, shape in replaced.items() if len(shape) == 2 and shape[0] != size}
    if size is None or not tables:
        return
    with torch.device("meta"):
        model = model_class(config)
    table, head = token_layers(model)
    inputs, outputs = _names(model, table), _names(model, head)
    rows = next((tables[name][0] for name in inputs if name in tables), None)
    rows = size if rows is None else rows
    for name in outputs:
        if name not in inputs and replaced.get(name, (rows,))[0] != rows:
            raise TensorMismatchError(
                f"{name}: the checkpoint brings {replaced[name][0]} rows, and the embedding has {rows}; "
                f"a {type(config).__name__} has one vocabulary; is this the base that it was trained on?",
                module=name.rpartition(".")[0],
                tensor=name,
                expected=rows,
                found=replaced[name][0],
            )
    if table is not None and table.weight.shape[0] == size:
        text.vocab_size = rows


def token_layers(model: Any) -> tuple[Any, Any]:
    """The layer that tokens go in by, and the one that they come out of; None for what a model of transformers does not have."""

    def of(method: str) -> Any:
        try:
            return getattr(model, method)()
        except (AttributeError, NotImplementedError):  # transformers' way to say so, as of CLIPModel
            return None

    return of("get_input_embeddings"), of("get_output_embeddings")


def _names(model: Any, part: Any) -> list[str]:
    """The names of the weight of this module."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules(remove_duplicate=False)
        if module is part and part is not None
    ]
