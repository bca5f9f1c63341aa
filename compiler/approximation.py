"""How close the polynomials of a plan are to the functions they stand for: what an error plot shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tacit.ir.functions import FUNCTIONS
from tacit.ir.ops.spline import FixedSpline
from tacit.ir.plan import Node, Plan

Tensor = torch.Tensor


@dataclass(frozen=True)
class Curve:
    """A function over the range of its fit, float64: places in rising order, its values, those of its polynomials.

    bound: what the plan says the error stays below, at each place; infinite where it says nothing.
    """

    function: str
    line: str  # of the plan, the first of those with the same polynomials
    x: Tensor
    exact: Tensor
    found: Tensor
    bound: Tensor
    module: str = ""

    @property
    def error(self) -> Tensor:
        return self.found - self.exact


def curve(op: FixedSpline, line: str = "", points: int = 20_000, module: str = "") -> Curve:
    """At so many places of the range at most: all ring integers of it where there are no more.

    Half of them are spaced by equal factors where none is negative: functions such as 1 / x change most near 0.
    """
    count = min(points, op.high - op.low + 1)
    places = torch.linspace(op.low, op.high, count, dtype=torch.float64)
    if op.low >= 0:
        near = torch.logspace(math.log2(max(op.low, 1)), math.log2(op.high), count // 2, base=2.0, dtype=torch.float64)
        places = torch.cat([places[:: 2 if count == points else 1], near, places[-1:]])
    integers = places.round().long().clamp(op.low, op.high).unique()  # type: ignore[no-untyped-call]
    half = torch.tensor(1 << (op.drop - 1) if op.drop else 0)
    found = op.spline.at(integers, half).double() / 2.0**op.scale
    x = integers.double() / 2.0**op.of
    exact = FUNCTIONS[op.function].function(x, *op.parameters)
    size = exact.abs() if op.relative else exact.abs().clamp(min=1)
    return Curve(op.function, line, x, exact, found, size * op.error if op.error else size * math.inf, module)


def curves(plan: Plan, points: int = 20_000) -> Iterator[Curve]:
    """One for each different spline of a plan whose function is known here."""
    for node in _different(plan):
        if _function(node) in FUNCTIONS:
            assert isinstance(node.op, FixedSpline)
            yield curve(node.op, node.name, points, node.path)


def unknown_functions(plan: Plan) -> list[str]:
    """Those that a plan approximates and nobody has registered here."""
    approximate = (node for node in _different(plan) if isinstance(node.op, FixedSpline) and node.op.error)
    return list(dict.fromkeys(name for name in map(_function, approximate) if name not in FUNCTIONS))


def _function(node: Node) -> str:
    assert isinstance(node.op, FixedSpline)
    return node.op.function


def _different(plan: Plan) -> list[Node]:
    """The first line of each spline, with what it stands for."""
    first: dict[tuple[object, ...], Node] = {}
    for node in plan.find(FixedSpline):
        op = node.op
        assert isinstance(op, FixedSpline)
        first.setdefault((op.function, op.parameters, op.of, op.spline, op.error, op.relative), node)
    return list(first.values())
