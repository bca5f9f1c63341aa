"""Norms that a model writes out by hand, as x * rsqrt(mean(x^2) + eps), are taken for what they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tacit.ir.op import Op
from tacit.ir.ops.approximated import Function
from tacit.ir.ops.arithmetic import AddScalar, MulScalar, SumAlong
from tacit.ir.ops.moves import Expand
from tacit.ir.ops.norms import RootMeanSquare, SumOfSquares, UnitLength
from tacit.ir.ops.products import Quotient, Times
from tacit.ir.plan import Node, Plan
from tacit.passes.draft import Draft

# Where eps is 0, a vector of zeros is divided by this.
_NO_EPS = 2.0**-60


def recognise_norms(draft: Draft) -> Draft:
    """x / sqrt(mean(x^2) + eps), x / |x| and x / (|x| + eps) become one line each, however they are put.

    The squares of small values, and an eps that is smaller still, have no place among the bits of activations. A norm
    as a whole knows that only their ratio counts.
    """
    plan = draft.plan
    found = {node.name: norm for node in plan.nodes if (norm := _norm(plan, node)) is not None}
    if not found:
        return draft
    nodes = [replace(n, op=found[n.name][0], args=(found[n.name][1],)) if n.name in found else n for n in plan.nodes]
    return draft.with_(plan.with_nodes(nodes).without_dead_lines())


def _norm(plan: Plan, node: Node) -> tuple[Op, str] | None:
    """The op that a product or a quotient stands for, and its operand."""
    for x, divisor, root in _divided(plan, node):
        op, inner = divisor.op, divisor
        added = 0.0
        if not root and isinstance(op, AddScalar) and op.value >= 0:  # |x| + eps
            added, inner = op.value, _operand(plan, divisor)
        if not root:
            if not (isinstance(inner.op, Function) and inner.op.function == "sqrt"):
                continue
            inner = _operand(plan, inner)
        eps = 0.0
        if isinstance(inner.op, AddScalar) and inner.op.value >= 0 and not added:  # sum or mean + eps
            eps, inner = inner.op.value, _operand(plan, inner)
        squares = _squares(plan, inner, x)
        if squares is None:
            continue
        over, mean = squares
        if added and not mean:
            return UnitLength(over, added, added=True), x
        if mean and not added:
            return RootMeanSquare(over, eps or _NO_EPS), x
        if not mean and not added and not eps:
            return UnitLength(over, _NO_EPS), x
        if not mean and not added:
            return None  # x / sqrt(sum + eps): the root and the divisor get the bits that they need
    return None


def _divided(plan: Plan, node: Node) -> Iterator[tuple[str, Node, bool]]:
    """Operand, what it is divided by, and whether that is under a root: x / d, x * (1 / d), x * rsqrt(d)."""
    if isinstance(node.op, Quotient):
        yield node.args[0], _source(plan, node.args[1]), False
    if isinstance(node.op, Times):
        for x, other in (node.args, node.args[::-1]):
            factor = _source(plan, other)
            if isinstance(factor.op, Function) and factor.op.function == "rsqrt":
                yield x, _operand(plan, factor), True
            if isinstance(factor.op, Function) and factor.op.function == "reciprocal":
                yield x, _operand(plan, factor), False


def _source(plan: Plan, name: str) -> Node:
    """The line itself, behind a repetition along the axes that were summed up."""
    node = plan.node(name)
    while isinstance(node.op, Expand):
        node = plan.node(node.args[0])
    return node


def _operand(plan: Plan, node: Node) -> Node:
    return _source(plan, node.args[0])


def _squares(plan: Plan, node: Node, x: str) -> tuple[tuple[int, ...], bool] | None:
    """The axes along which a line is the sum of the squares of x, or their mean."""
    if isinstance(node.op, SumOfSquares) and node.args == (x,):
        return node.op.over, False
    if isinstance(node.op, SumAlong):
        inner = plan.node(node.args[0])
        if isinstance(inner.op, Times) and inner.args == (x, x):
            return node.op.over, node.op.mean
    if isinstance(node.op, MulScalar):  # a mean as a sum and a factor
        inner = plan.node(node.args[0])
        found = _squares(plan, inner, x)
        if found is not None and not found[1]:
            count = _count(plan, x, found[0])
            return (found[0], True) if abs(node.op.value * count - 1) < 2.0**-20 else None
    return None


def _count(plan: Plan, x: str, over: tuple[int, ...]) -> int:
    count = 1
    for axis in over:
        count *= plan.node(x).type.at(1).dims[axis]
    return count
