"""Float64 that stays float64: what a reference is computed in, whatever a library casts to inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def pure_float64() -> Iterator[None]:
    """Inside, ``.float()``, ``.to(torch.float32)`` and ``dtype=torch.float32`` leave a float64 tensor float64.

    transformers and open_clip cast to float32 inside RMSNorm, rotary embedding, softmax and LayerNorm, which would
    leave float32 rounding in a float64 reference. Other casts are left alone, and so are numbers that were computed
    in float32 when the model was built, such as the ``inv_freq`` of a rotary embedding: they are its constants.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def wide(value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == torch.float64

    def kept(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return value.to(torch.float64)
        return torch.float64 if value is torch.float32 else value

    class KeepFloat64(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if args and wide(args[0]):
                if func is torch.Tensor.float:
                    return args[0]
                if func in (torch.Tensor.to, torch.Tensor.type_as):
                    args = (args[0], *map(kept, args[1:]))
                    kwargs = {k: kept(v) for k, v in kwargs.items()}
                else:
                    args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                    kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            return func(*args, **kwargs)

    with KeepFloat64():
        yield
