"""Inputs as PyTorch models take them: tensors, and tuples, lists and dictionaries of them, nested as one likes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_order(value: Any) -> Any:
    """The same structure with the keys of every dictionary sorted: their order says nothing."""
    if isinstance(value, Mapping):
        return {key: in_order(value[key]) for key in sorted(value)}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(in_order(item) for item in value)
    return value


def leaves(value: Any) -> list[Any]:
    """What stands at the leaves, from first to last, dictionaries by their sorted keys."""
    if isinstance(value, Mapping):
        return [leaf for key in sorted(value) for leaf in leaves(value[key])]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]
