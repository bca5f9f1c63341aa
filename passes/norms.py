"""Norms that a model writes out by hand, as x * rsqrt(mean(x^2) + eps), are taken for what they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tacit.ir.op import Op
from tacit.ir.ops.approximated import Function
from tacit.ir.ops.arithmetic import Add, AddScalar, MulScalar, SumAlong
from tacit.ir.ops.moves import Expand
from tacit.ir.ops.norms import Normalise, RootMeanSquare, SumOfSquares, UnitLength, Variance
from tacit.ir.ops.products import Quotient, Times
from tacit.ir.plan import Node, Plan
from tacit.passes.draft import Draft

# Where eps is 0, a vector of zeros is divided by this.
_NO_EPS = 2.0**-60
_ROUNDING = 2.0**-20


@dataclass(frozen=True)
class _Squares:
    """What a root is taken of: `times` the mean of the squares along axes, of x or of its differences from its mean."""

    x: str
    over: tuple[int, ...]
    count: int
    times: float
    centred: bool


def recognise_norms(draft: Draft) -> Draft:
    """x / sqrt(mean(x^2) + eps), x / |x|, x / (|x| + eps), (x - mean) / (std + eps) become one line, however put.

    The squares of small values, and an eps that is smaller still, have no place among the bits of activations. A norm
    as a whole knows that only their ratio counts.
    """
    plan, nodes, changed = draft.plan, list[Node](), False
    for node in plan.nodes:
        found = _norm(plan, node)
        changed = changed or found is not None
        nodes += [node] if found is None else _written(node, *found)
    return draft.with_(plan.with_nodes(nodes).without_dead_lines()) if changed else draft


def _written(node: Node, op: Op, x: str, factor: float) -> list[Node]:
    """The norm, and the factor by which it differs from what was written."""
    if abs(factor - 1) < _ROUNDING:
        return [replace(node, op=op, args=(x,))]
    norm = replace(node, name=f"{node.name}_norm", op=op, args=(x,))
    return [norm, replace(node, op=MulScalar(factor), args=(norm.name,))]


def _norm(plan: Plan, node: Node) -> tuple[Op, str, float] | None:
    """The op that a product or a quotient stands for, its operand, and a factor."""
    for x, divisor, below_root in _divided(plan, node):
        inner, added, eps = divisor, 0.0, 0.0
        if not below_root:
            if isinstance(inner.op, AddScalar) and inner.op.value >= 0:  # |x| + eps
                added, inner = inner.op.value, _operand(plan, inner)
            if not (isinstance(inner.op, Function) and inner.op.function == "sqrt"):
                continue
            inner = _operand(plan, inner)
        if isinstance(inner.op, AddScalar) and inner.op.value >= 0 and not added:  # of squares, + eps
            eps, inner = inner.op.value, _operand(plan, inner)
        squares = _squares(plan, inner, x)
        if squares is not None and plan.node(squares.x).type.shape == node.type.shape:
            return _as_norm(squares, eps, added)
    return None


def _as_norm(s: _Squares, eps: float, added: float) -> tuple[Op, str, float]:
    """x / sqrt(times mean + eps) is 1 / sqrt(times) of x / sqrt(mean + eps / times); likewise behind the root."""
    root = math.sqrt(s.times)
    if s.centred:
        return Normalise(s.over, (added / root if added else eps / s.times) or _NO_EPS, bool(added)), s.x, 1 / root
    if added or not eps:
        length = math.sqrt(s.times / s.count)  # of which the length is a multiple
        op = UnitLength(s.over, added / length, added=True) if added else UnitLength(s.over, _NO_EPS)
        return op, s.x, 1 / length
    return RootMeanSquare(s.over, eps / s.times), s.x, 1 / root


def _divided(plan: Plan, node: Node) -> Iterator[tuple[str, Node, bool]]:
    """Operand, what it is divided by, and whether that is below a root: x / d, x * (1 / d), x * rsqrt(d)."""
    if isinstance(node.op, Quotient):
        yield node.args[0], _source(plan, node.args[1]), False
    if isinstance(node.op, Times):
        for x, other in (node.args, node.args[::-1]):
            factor = _source(plan, other)
            if isinstance(factor.op, MulScalar) and factor.op.value == 1.0:  # as in 1.0 / d
                factor = _operand(plan, factor)
            if isinstance(factor.op, Function) and factor.op.function in ("rsqrt", "reciprocal"):
                yield x, _operand(plan, factor), factor.op.function == "rsqrt"


def _source(plan: Plan, name: str) -> Node:
    """The line itself, behind a repetition along the axes that were summed up."""
    node = plan.node(name)
    while isinstance(node.op, Expand):
        node = plan.node(node.args[0])
    return node


def _operand(plan: Plan, node: Node) -> Node:
    return _source(plan, node.args[0])


def _squares(plan: Plan, node: Node, x: str) -> _Squares | None:
    """The line as a multiple of the mean of the squares of x; where x is a difference from a mean, as a variance."""
    if isinstance(node.op, MulScalar) and node.op.value > 0:
        found = _squares(plan, plan.node(node.args[0]), x)
        return None if found is None else replace(found, times=found.times * node.op.value)
    if isinstance(node.op, Variance):
        count = _count(plan, node.args[0], node.op.over)
        if _centred(plan, x) != (node.args[0], node.op.over) or count <= node.op.correction:
            return None
        return _Squares(node.args[0], node.op.over, count, count / (count - node.op.correction), centred=True)
    if isinstance(node.op, SumOfSquares):
        squared, over, mean = node.args[0], node.op.over, False
    elif isinstance(node.op, SumAlong):
        inner = plan.node(node.args[0])
        if not isinstance(inner.op, Times) or inner.args[0] != inner.args[1]:
            return None
        squared, over, mean = inner.args[0], node.op.over, node.op.mean
    else:
        return None
    count, about = _count(plan, x, over), _centred(plan, x)
    if squared != x and (about is None or _centred(plan, squared) != about):
        return None
    centred = about is not None and about[1] == over
    return _Squares(about[0] if about and centred else x, over, count, 1.0 if mean else float(count), centred)


def _centred(plan: Plan, name: str) -> tuple[str, tuple[int, ...]] | None:
    """Of which value a line is the difference from its mean, and along which axes."""
    node = plan.node(name)
    if not isinstance(node.op, Add):
        return None
    for x, other in (node.args, node.args[::-1]):
        negative = _source(plan, other)
        if isinstance(negative.op, MulScalar) and negative.op.value == -1:
            mean = _operand(plan, negative)
            if isinstance(mean.op, SumAlong) and mean.op.mean and mean.args == (x,):
                return x, mean.op.over
    return None


def _count(plan: Plan, x: str, over: tuple[int, ...]) -> int:
    return math.prod(plan.node(x).type.at(1).dims[axis] for axis in over)
