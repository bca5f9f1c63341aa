"""Overflow: values that leave the range their line states, found by the clear oracle.

A line says that |v| <= 15/16 of 2^(width-1). That is proved, or measured and then only likely. Where it does not hold,
a comparison answers at random and a sum wraps. Sums and products are looked at in float64, which does not wrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def interpret_checked(plan: Plan, weights: Values, inputs: Values) -> dict[str, Tensor]:
    """As `reference.interpret`; raises RangeError at the first line with a value outside its range."""
    values = interpret(plan, weights, inputs)
    for node in plan.nodes:
        if node.type.kind != "secret" or isinstance(node.op, (Mask, Weight)) or node.type.width == RING_BITS:
            continue  # of a value as wide as the ring nothing is claimed
        outside = magnitude(node, values) > limit(node) * _ROUNDING
        if bool(outside.any()):
            raise RangeError(_told(plan, node, int(outside.sum()), outside.numel()))
    return values


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
