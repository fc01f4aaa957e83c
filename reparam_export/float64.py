"""Float64 that stays float64: what a reference is computed in, whatever a library casts to inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def pure_float64(*, made: bool = False) -> Iterator[None]:
    """Inside, ``.float()``, ``.to(torch.float32)`` and ``dtype=torch.float32`` leave a float64 tensor float64.

    transformers and open_clip cast to float32 inside RMSNorm, rotary embedding, softmax and LayerNorm, which would
    leave float32 rounding in a float64 reference. Other casts are left alone, and so are numbers that were computed
    in float32 when the model was built, such as the ``inv_freq`` of a rotary embedding: they are its constants.

    made: what is made inside of integers, or of no tensor at all, is float64 too; a whole model in float64 needs it. Diffusion models make
    the frequencies of a timestep with ``arange(dtype=float32)`` and multiply the timestep by them: in float32 the rounding of a phase of
    up to 1000 would stand in the reference itself, and be missing from what the model is found to lose in float32.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def wide(value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == torch.float64

    def exact(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Is the first argument an integer tensor, or is there no tensor at all?"""
        if args and isinstance(args[0], torch.Tensor):
            return not args[0].is_floating_point() and not args[0].is_complex()
        return not any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values()))

    def kept(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return value.to(torch.float64)
        return torch.float64 if value is torch.float32 else value

    class KeepFloat64(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if (args and wide(args[0])) or (made and exact(args, kwargs)):
                if func is torch.Tensor.float:
                    return args[0].double()
                if func in (torch.Tensor.to, torch.Tensor.type_as):
                    args = (args[0], *map(kept, args[1:]))
                    kwargs = {k: kept(v) for k, v in kwargs.items()}
                else:
                    args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                    kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            try:
                return func(*args, **kwargs)
            except RuntimeError:  # some operators refuse two dtypes, where the model itself would have cast one down
                if not _mixed((*args, *kwargs.values())) or "out" in kwargs:
                    raise
                writes = str(getattr(func, "__name__", "")).endswith("_") and wide(args[0]) is False
                to = args[0].dtype if writes else torch.float64  # what is written to stays the tensor that it is
                return func(*_all_in(args, to), **{name: _in(value, to) for name, value in kwargs.items()})

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if made else default)
    try:
        with KeepFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


def _mixed(values: Iterable[Any]) -> bool:
    """Are there tensors of float32 and of float64, in lists too?"""
    import torch

    parts = [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
    return {torch.float32, torch.float64} <= {part.dtype for part in parts if isinstance(part, torch.Tensor)}


def _all_in(values: Iterable[Any], dtype: Any) -> tuple[Any, ...]:
    return tuple(_in(value, dtype) for value in values)


def _in(value: Any, dtype: Any) -> Any:
    """Floating point tensors in that dtype, in lists too; anything else as it is."""
    import torch

    if isinstance(value, list | tuple):
        parts = _all_in(value, dtype)
        return list(parts) if isinstance(value, list) else parts
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
