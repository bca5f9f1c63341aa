"""The record of what values were seen to be, on inputs that were shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from tacit.ir.ranges import Interval
from tacit.ir.types import Type

Tensor = torch.Tensor


@dataclass(frozen=True)
class Seen:
    """The least and the greatest element of a line over all inputs shown, as real numbers."""

    low: float
    high: float

    @property
    def one_sided(self) -> bool:
        return self.low > 0 or self.high < 0

    def widened(self, margin: int, declared: Type) -> Interval:
        """As far on both sides as a value can be that is so many times as large as the largest: (ring integers)."""
        more = (margin - 1) * max(-self.low, self.high)
        return _in_ring(self.low - more, self.high + more, margin, declared)

    def stretched(self, margin: int, declared: Type) -> Interval:
        """Of values on one side of 0: so many times as large, and as small."""
        ends = sorted((self.low * margin, self.low / margin, self.high * margin, self.high / margin))
        return _in_ring(ends[0], ends[-1], 0, declared)


def _in_ring(low: float, high: float, units: int, declared: Type) -> Interval:
    """units: for the rounding of what was seen, with its margin."""
    scale = 2.0**declared.frac
    return Interval.full(declared.at(1).dims[1:], low * scale - units, high * scale + units)


@dataclass
class Looks:
    """What was seen so far: of values, and in which of them each part of the inputs was watched."""

    ends: dict[int, Seen] = field(default_factory=dict)
    parts: dict[tuple[int, ...], tuple[Mapping[str, Tensor], set[int]]] = field(default_factory=dict)

    def note(self, part: Mapping[str, Tensor], values: Iterable[int]) -> None:
        """These inputs have been watched, all of them; they are kept, so that no others come to lie at their place."""
        self.parts.setdefault(_key(part), (part, set()))[1].update(values)

    def covers(self, part: Mapping[str, Tensor], values: Iterable[int]) -> bool:
        return _key(part) in self.parts and self.parts[_key(part)][1].issuperset(values)


def _key(part: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(id(x) for x in part.values())
