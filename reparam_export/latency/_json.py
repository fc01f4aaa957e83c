"""A dataclass of dataclasses from its JSON, checked against its annotations."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
LARGEST = 2**63 - 1  # of a whole number: what is beyond is no time, count or size, and no float may hold it


def build(target: type[T], content: Mapping[str, Any]) -> T:
    """``target`` from ``content``. Keys it does not know are left for a later version; raises ValueError for the rest."""
    built: T = _value(target, content, target.__name__)
    return built


def _value(target: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(target), get_args(target)
    if target is Any:
        return value
    if is_dataclass(target) and isinstance(target, type):
        return _dataclass(target, value, where)
    if origin in (Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _value(inner, value, where)
    if origin is Literal:
        return _checked(value in arguments, value, where, target)
    if origin in (tuple, list):
        _checked(isinstance(value, list), value, where, target)
        return origin(_value(arguments[0], item, where) for item in value)
    if origin is dict:
        _checked(isinstance(value, dict), value, where, target)
        return {str(k): _value(arguments[1], item, f"{where}[{k}]") for k, item in value.items()}
    if target is float and value in ("nan", "inf", "-inf"):  # which JSON cannot hold
        return float(value)
    kinds = (int, float) if target is float else target
    fits = isinstance(value, kinds) and (target is bool or not isinstance(value, bool))
    fits = fits and not (isinstance(value, int) and abs(value) > LARGEST)
    return target(_checked(fits, value, where, target))


def _dataclass(target: type[Any], value: Any, where: str) -> Any:
    _checked(isinstance(value, Mapping), value, where, target)
    hints, given = get_type_hints(target), {}
    for field in fields(target):
        if field.name in value:
            given[field.name] = _value(hints[field.name], value[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}.{field.name} is missing")
    return target(**given)


def _checked(fits: bool, value: Any, where: str, target: Any) -> Any:
    if not fits:
        raise ValueError(f"{where} should be {getattr(target, '__name__', target)}, found {value!r:.80}")
    return value
