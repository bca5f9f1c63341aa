"""How close the polynomials of a plan are to the functions they stand for: what an error plot shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tacit.ir.functions import FUNCTIONS
from tacit.ir.ops.spline import FixedSpline
from tacit.ir.plan import Plan

Tensor = torch.Tensor


@dataclass(frozen=True)
class Curve:
    """A function over the range of its fit, float64: places, its values, those of its polynomials, their difference."""

    function: str
    line: str  # of the plan, the first of those with the same polynomials
    x: Tensor
    exact: Tensor
    found: Tensor

    @property
    def error(self) -> Tensor:
        return self.found - self.exact


def curve(op: FixedSpline, line: str = "", points: int = 20_000) -> Curve:
    """At so many places of the range at most: all ring integers of it where there are no more."""
    places = torch.linspace(op.low, op.high, min(points, op.high - op.low + 1), dtype=torch.float64).round().long()
    half = torch.tensor(1 << (op.drop - 1) if op.drop else 0)
    found = op.spline.at(places, half).double() / 2.0**op.scale
    x = places.double() / 2.0**op.of
    return Curve(op.function, line, x, FUNCTIONS[op.function].function(x, *op.parameters), found)


def curves(plan: Plan, points: int = 20_000) -> Iterator[Curve]:
    """One for each different spline of a plan whose function is known here."""
    seen = set()
    for node in plan.find(FixedSpline):
        assert isinstance(node.op, FixedSpline)
        key = (node.op.function, node.op.parameters, node.op.of, node.op.spline)
        if key not in seen and node.op.function in FUNCTIONS:
            seen.add(key)
            yield curve(node.op, node.name, points)
