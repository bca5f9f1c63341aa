"""What `tacit.compile` is told beside the model: read, or refused with what it has to be."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tacit.ir.errors import CompileError
from tacit.ir.given import integer_of, number_of, shown
from tacit.ir.plan import MOST_MARGIN
from tacit.passes.draft import MOST_FRAC_BITS
from tacit.passes.lower import SUITES

Tensor = torch.Tensor
Range = tuple[float, float]
REVEALS = ("logits", "argmax", "correct")
RANGES = ("auto", "proved", "measured")
# Measured ranges have room for so many times what was seen: no less than the first, the second where it is cheap.
MARGIN = (4, 16)
# Without a declared range, inputs may reach this far at least; and no input may reach further than the last.
_LEAST_REACH, _MOST_REACH = 4.0, 2.0**40
_LEAST_ERROR, _MOST_ERROR = 2.0**-20, 2.0**-3


def read_choice(what: str, value: Any, among: Sequence[str]) -> str:
    """One of several words; raises CompileError."""
    if not isinstance(value, str) or value not in among:
        raise CompileError(f"{what} has to be one of {', '.join(among)}, not {shown(value)}")
    return str(value)


def read_reveal(value: Any) -> str:
    return read_choice("reveal", value, REVEALS)


def read_protocol(value: Any) -> str:
    return read_choice("protocol", value, tuple(SUITES))


def read_frac_bits(value: Any) -> int | None:
    """Whole numbers of any kind; raises CompileError."""
    if value is None:
        return None
    found = integer_of(value)
    if found is None or not 1 <= found <= MOST_FRAC_BITS:
        raise CompileError(f"frac_bits has to be an integer from 1 to {MOST_FRAC_BITS}, not {shown(value)}")
    return found


def read_max_error(value: Any) -> float | None:
    """Numbers of any kind; raises CompileError."""
    if value is None:
        return None
    found = number_of(value)
    if found is None or not _LEAST_ERROR <= found <= _MOST_ERROR:
        raise CompileError(f"max_error has to be a number from 2^-20 to 2^-3, not {shown(value)}")
    return found


def read_how(value: Any) -> str:
    """How ranges are found; raises CompileError."""
    return read_choice("ranges", value, RANGES)


def read_margin(value: Any) -> tuple[int, int]:
    """(least, wanted), or one number for both: powers of two from 2 on; raises CompileError."""
    given = _items(value) or [value]
    found = [integer_of(item) for item in given]
    powers = [item for item in found if item is not None and 2 <= item <= MOST_MARGIN and item & (item - 1) == 0]
    if len(powers) < len(found) or len(found) > 2 or powers != sorted(powers):
        raise CompileError(
            "margin has to be a power of two from 2 to 65536, or two of them, the least and the one that is wanted "
            f"where it is cheap, not {shown(value)}"
        )
    return powers[0], powers[-1]


def read_name(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[\w.]+", value)):
        raise CompileError(f"the name of a plan is a text of letters, digits, '_' and '.', not {shown(value)}")
    return value


def read_ranges(given: Any, examples: Sequence[Tensor]) -> list[Range]:
    """The range of each input; raises CompileError where one is none, or the example lies outside.

    Of integers that are indices, the tables tell more.
    """
    if given is None:
        return [_type_range(x) or _range_around(x) for x in examples]
    one = _pair(given)
    found = [one] * len(examples) if one is not None else [_pair(item) for item in _items(given)]
    pairs = [pair for pair in found if pair is not None]
    if not pairs or len(pairs) < len(found):
        raise CompileError(f"input_range has to be (low, high), or one such pair for each input, not {shown(given)}")
    for low, high in pairs:
        if not (math.isfinite(low) and math.isfinite(high) and low < high and max(-low, high) <= _MOST_REACH):
            raise CompileError(f"input_range has to be finite, below 2^40, with low < high, not ({low}, {high})")
    if len(pairs) != len(examples):
        raise CompileError(f"{len(pairs)} input ranges for {len(examples)} inputs")
    for (low, high), x in zip(pairs, examples, strict=True):
        if x.is_floating_point() and (float(x.min()) < low or float(x.max()) > high):
            raise CompileError(f"the example input lies outside input_range ({low}, {high})")
    return [pair if x.is_floating_point() else _whole(*pair, x) for pair, x in zip(pairs, examples, strict=True)]


def _range_around(x: Tensor) -> Range:
    """Symmetric, to the power of two at or above twice the largest magnitude."""
    reach = max(_LEAST_REACH, 2 * float(x.double().abs().max()))
    power = 2.0 ** math.ceil(math.log2(reach))
    if power > _MOST_REACH:
        raise CompileError(
            "the example input is too large: inputs have to lie below 2^40, and half of that without an input_range; "
            "divide them by a constant before, and multiply by it in the model"
        )
    return -power, power


def _type_range(x: Tensor) -> Range | None:
    """What a small type holds."""
    if x.dtype == torch.bool:
        return 0.0, 1.0
    small = x.dtype in (torch.uint8, torch.int8)
    return (float(torch.iinfo(x.dtype).min), float(torch.iinfo(x.dtype).max)) if small else None


def _whole(low: float, high: float, x: Tensor) -> Range:
    """The whole numbers from low to high that the type of x holds."""
    least, most = _type_range(x) or (low, high)
    found = float(math.ceil(max(low, least))), float(math.floor(min(high, most)))
    if found[0] > found[1]:
        raise CompileError(f"input_range ({low}, {high}) holds no {x.dtype}")
    return found


def _items(value: Any) -> list[Any]:
    """The elements of a tuple, list, array or tensor; none of anything else."""
    several = value.ndim > 0 if isinstance(value, (np.ndarray, Tensor)) else isinstance(value, (tuple, list))
    return list(value) if several else []


def _pair(value: Any) -> Range | None:
    ends = [number_of(end) for end in _items(value)]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]
