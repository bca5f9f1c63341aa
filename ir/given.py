"""What callers hand over: read, or refused with what it has to be."""

from __future__ import annotations

import math
import operator
import os
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tacit.ir.errors import InputError, shortened


def number_of(value: Any) -> float | None:
    """A number as Python, NumPy and PyTorch have them; None for anything else, truth values among them."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        if value.ndim or value.dtype in (torch.bool, np.bool_):
            return None
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def integer_of(value: Any) -> int | None:
    """A whole number of any kind; None for anything else, truth values among them."""
    try:
        return None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return None


def batch_of(value: Any) -> int:
    """The size of a batch; raises InputError."""
    found = integer_of(value)
    if found is None or found < 1:
        raise InputError(f"batch has to be an integer of at least 1, not {shown(value)}")
    return found


def path_of(value: Any, what: str) -> Path:
    """The name of a file or a folder; raises InputError."""
    try:
        found = os.fsdecode(value)
    except TypeError:
        found = ""
    if not found or "\0" in found:
        raise InputError(f"{what} has to be the name of a file or folder, not {shown(value)}")
    return Path(found)


def shown(value: Any) -> str:
    """As a message quotes it: a text, a number or its kind, and never the elements of a tensor."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return shortened(" ".join(repr(value).split()))
