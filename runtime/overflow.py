"""Overflow: values that leave the range their line states, found by the clear oracle.

A line says that |v| <= 15/16 of 2^(width-1). That is proved, or measured and then only likely. Where it does not hold,
a comparison answers at random and a sum wraps. Sums and products are looked at in float64, which does not wrap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from tacit.ir.errors import RangeError
from tacit.ir.op import LocalOp
from tacit.ir.ops.linear import Product
from tacit.ir.ops.roles import Mask, Weight
from tacit.ir.plan import Node, Plan
from tacit.ir.types import RING_BITS, Shape
from tacit.runtime.estimate import EstimatedRing
from tacit.runtime.reference import Oracle, Values, interpret

Tensor = torch.Tensor
_ROUNDING = 1 + 2.0**-30


class _RealRing(EstimatedRing):
    """Products of float64 tensors."""

    @staticmethod
    def matmul(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        return x.double() @ w.double()

    @staticmethod
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.double(), weight.double())

    @staticmethod
    def conv2d(x: Tensor, weight: Tensor, stride: Shape, padding: Shape, dilation: Shape, groups: int) -> Tensor:
        return F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups)


def limit(node: Node) -> float:
    """The largest magnitude that a line may have, in ring integers."""
    return 15 / 16 * 2.0 ** (node.type.width - 1)


def magnitude(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    """|v| of every element of a line as if no sum wrapped, from its operands; float64."""
    if isinstance(node.op, (LocalOp, Product)):
        operands = [values[arg].double() for arg in node.args]
        return node.op.reference(Oracle(ring=_RealRing()), *operands).abs()
    return values[node.name].double().abs()


class RangeWatch:
    """A visitor of `interpret`: tells of each line with a value outside its range, and how many times as large as it
    may be each of its values is: more than 1, where it is outside."""

    def __init__(self, plan: Plan, tell: Callable[[Node, Tensor], None]) -> None:
        self._tell = tell
        self._uses = Counter(arg for node in plan.nodes for arg in set(node.args))
        self._values: dict[str, Tensor] = {}

    def __call__(self, node: Node, value: Tensor) -> None:
        self._values[node.name] = value
        # Of a value as wide as the ring nothing is claimed.
        if node.type.kind == "secret" and not isinstance(node.op, (Mask, Weight)) and node.type.width < RING_BITS:
            size = magnitude(node, self._values) / (limit(node) * _ROUNDING)
            if bool((size > 1).any()):
                self._tell(node, size)
        for arg in set(node.args):
            self._uses[arg] -= 1
            if not self._uses[arg]:
                del self._values[arg]
        if not self._uses[node.name]:
            del self._values[node.name]


def interpret_checked(plan: Plan, weights: Values, inputs: Values) -> dict[str, Tensor]:
    """As `reference.interpret`, for the result; raises RangeError at the first line with a value outside its range."""

    def tell(node: Node, size: Tensor) -> None:
        raise RangeError(_told(plan, node, int((size > 1).sum()), size.numel()))

    return interpret(plan, weights, inputs, visit=RangeWatch(plan, tell))


def _told(plan: Plan, node: Node, count: int, total: int) -> str:
    reach = limit(node) / 2.0**node.type.frac
    where = f"module '{node.path}' " if node.path else ""
    how = f"measured, with a margin of {node.margin}" if node.margin else f"ranges={plan.ranges}"
    return (
        f"{where}(%{node.name} = {node.op.name}): {count} of {total} values leave [-{reach:.4g}, {reach:.4g}], the "
        f"range for which the plan was compiled ({how}). Compile with calibration data like this input, with a larger "
        'margin, or with ranges="proved"'
    )


def headroom(node: Node, largest: float) -> int:
    """How many times the largest magnitude seen could double before it left the range; negative beyond it."""
    return math.floor(math.log2(limit(node) / largest)) if largest else node.type.width - 1
