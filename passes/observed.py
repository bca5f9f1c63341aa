"""What values were seen to be, on inputs that were shown: the stuff of measured ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tacit.ir.plan import Node, Plan
from tacit.ir.ranges import Interval
from tacit.ir.types import Type
from tacit.passes.draft import Draft, Values

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


def observe(draft: Draft) -> Mapping[str, Seen]:
    """For each line of the fixed level that inputs reach: what it was on the calibration data.

    Whole numbers are left out: they may be indices, which have to be right for every input. Networks that differ in
    their scales alone show the same, up to rounding, which margins cover: they share one look at each part of the data.
    """
    ends, covered = _looks(draft)
    for part in draft.calibration:
        if _key(part) not in covered:
            for some in draft.chunks(part):
                draft.estimate(some, watch(draft))
            note(draft, part)
    return ends


def watch(draft: Draft) -> Callable[[Node, Tensor], None]:
    """A visitor of an estimate that widens what was seen."""
    ends, _ = _looks(draft)

    def visit(node: Node, value: Tensor) -> None:
        if node.type.batched and node.type.frac and not node.op.declares:
            low, high = (float(v) / 2.0**node.type.frac for v in torch.aminmax(value))
            before = ends.get(node.name, Seen(low, high))
            ends[node.name] = Seen(min(low, before.low), max(high, before.high))

    return visit


def note(draft: Draft, part: Values) -> None:
    """These inputs have been watched, all of them."""
    _looks(draft)[1][_key(part)] = part  # kept, so that no others come to lie at their place


def _looks(draft: Draft) -> tuple[dict[str, Seen], dict[tuple[int, ...], Values]]:
    found: tuple[dict[str, Seen], dict[tuple[int, ...], Values]]
    found = draft.looks.setdefault(_structure(draft.plan), ({}, {}))
    return found


def _key(part: Values) -> tuple[int, ...]:
    return tuple(id(x) for x in part.values())


def _structure(plan: Plan) -> int:
    return hash(tuple((node.name, type(node.op), node.args) for node in plan.nodes))
