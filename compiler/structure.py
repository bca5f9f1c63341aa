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


def named_leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves by where they stand, as in "0", "logits", "1.mask"; a leaf alone has no name."""
    if isinstance(value, Mapping):
        inside = [(str(key), value[key]) for key in sorted(value)]
    elif isinstance(value, (tuple, list)):
        inside = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {name: value}
    return {k: v for key, item in inside for k, v in named_leaves(item, f"{name}.{key}" if name else key).items()}
