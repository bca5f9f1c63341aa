"""Ranges: how large every value can become, proved from the input's range and the weights, or measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tacit.ir.errors import CompileError
from tacit.ir.op import inferred
from tacit.ir.ops.comparison import TRUNCATION_WIDTH
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.ops.spline import FixedFunction
from tacit.ir.plan import Node, Plan
from tacit.ir.ranges import DENSE, Interval, compact
from tacit.ir.types import Type, bits_for
from tacit.passes.draft import Draft, Values

Tensor = torch.Tensor
# Room of one bit above what calibration data showed; the plan says so.
_MARGIN = 2
PROVED, CALIBRATED = "proved", f"calibrated_{_MARGIN}x"
# The widest value that every protocol takes: a difference and a truncation still fit.
WIDEST = TRUNCATION_WIDTH - 1


@dataclass(frozen=True)
class Bounded:
    """A line with its interval, those of its operands, and whether calibration narrowed it."""

    node: Node
    interval: Interval
    operands: tuple[Interval, ...]
    narrowed: bool


def bound_ranges(draft: Draft) -> Draft:
    """Give every value the width it needs, proved from the input's range and the weights.

    Intervals are propagated through the quantised network, truncation included, element by element or channel by
    channel, in float64 with an outward margin. Calibration data, where given, narrows them to twice what was seen;
    the plan then says so, unless the proved ones were as narrow everywhere. A value that would not fit is a compile
    error that names the layer. A function of one number becomes polynomials here, over the range of its operand.
    """
    types: dict[str, Type] = {}
    nodes, label = [], PROVED
    for found in intervals(draft):
        label = CALIBRATED if found.narrowed else label
        nodes.append(_with_width(draft, found, types))
        types[found.node.name] = nodes[-1].type
    return draft.with_(draft.plan.with_nodes(nodes, ranges=label))


def intervals(draft: Draft) -> Iterator[Bounded]:
    """Every line of the fixed level with its interval; one is dropped after its last use."""
    plan, seen = draft.plan, _observed(draft)
    last = {arg: node.name for node in plan.nodes for arg in node.args}
    known: dict[str, Interval] = {}
    for node in plan.nodes:
        operands = tuple(_operand(plan, arg, draft.weights, known) for arg in node.args)
        node = _fitted(node, operands)
        proved = _interval(node, draft.weights, operands)
        # Whole numbers may be indices, which have to be right for every input.
        measured = node.name in seen and not node.op.declares and node.type.frac > 0
        interval = proved.meet(seen[node.name]) if measured else proved
        if not isinstance(node.op, Weight):  # as float64 they would take twice the memory of the model
            known[node.name] = interval
        yield Bounded(node, interval, operands, interval.ends != proved.ends)
        for arg in node.args:
            if last[arg] == node.name:
                known.pop(arg, None)


def _fitted(node: Node, operands: Sequence[Interval]) -> Node:
    """A function of one number becomes polynomials where its operand turns out to lie."""
    if not isinstance(node.op, FixedFunction):
        return node
    try:
        return replace(node, op=node.op.fitted(*operands))
    except CompileError as error:
        raise _located(node, error) from None


def _located(node: Node, error: CompileError) -> CompileError:
    name = node.path or getattr(node.op, "function", "")
    where = f"module '{name}'" if name else "the model"
    return CompileError(f"{where}{' (' + node.source + ')' if node.source else ''}: {error}")


def _operand(plan: Plan, name: str, weights: Values, known: Mapping[str, Interval]) -> Interval:
    op = plan.node(name).op
    return Interval.exactly(weights[op.label]) if isinstance(op, Weight) else known[name]


def _interval(node: Node, weights: Values, operands: Sequence[Interval]) -> Interval:
    if isinstance(node.op, Weight):
        value = weights[node.op.label]
        return Interval.full((), float(value.min()), float(value.max()))
    if isinstance(node.op, Input):
        scale = 2.0**node.type.frac
        exact = Interval(*node.op.ends(node.type.at(1).dims[1:])).map(lambda v: v * scale)
        return Interval(exact.map(torch.floor).low, exact.map(torch.ceil).high)
    try:
        found: Interval = node.op.bound(*operands)
    except CompileError as error:
        raise _located(node, error) from None
    if found.low.dim() == len(node.type.shape):  # a constant brings a dimension of one element for the batch
        found = Interval(found.low[0], found.high[0])
    return _coarser(found)


def _coarser(x: Interval) -> Interval:
    """Large bounds alike along the inner dimensions; channels are first or last, and keep bounds of their own."""
    if max(compact(x.low).numel(), compact(x.high).numel()) <= 2 * DENSE or x.low.dim() < 3:
        return x
    return x.hull(tuple(range(1, x.low.dim() - 1)))


def _with_width(draft: Draft, found: Bounded, types: Mapping[str, Type]) -> Node:
    node = found.node
    width = bits_for(*found.interval.ends)
    if width > WIDEST:
        raise CompileError(_too_wide(draft, found, width))
    if not node.op.declares:
        width = min(width, inferred(node.op, tuple(types[arg] for arg in node.args)).width)
    return replace(node, type=node.type.with_(width=width))


def _too_wide(draft: Draft, found: Bounded, width: int) -> str:
    """The layer, its range, the range of what it reads, and what would help, most likely first."""
    node, frac = found.node, draft.frac_bits or 0
    inputs = [n.op for n in draft.plan.find(Input) if isinstance(n.op, Input) and not n.op.integers]
    reads = [
        _reals(interval, draft.plan.node(arg).type.frac)
        for interval, arg in zip(found.operands, node.args, strict=True)
        if draft.plan.node(arg).type.batched
    ]
    lines = [
        f"module '{node.path or node.op.name}' ({node.op.name}{', ' + node.source if node.source else ''}): its values "
        f"may lie anywhere in {_reals(found.interval, node.type.frac)}, which takes {width} bits at {node.type.frac} "
        f"fractional bits; {WIDEST} fit.",
        f"It reads values in {', '.join(reads)}." if reads else "",
        "What helps:",
    ]
    if not draft.calibration:
        lines.append(
            "  - calibration=x with typical inputs: ranges are then measured, with a margin, where the proved ones are "
            "too wide, as they become in deep networks"
        )
    fewer = frac - -(-(width - WIDEST) // 2)  # a product takes the bits of both of its factors
    if fewer >= 1:
        lines.append(f"  - frac_bits={fewer} or less; it is {frac}")
    spans = ", ".join(f"({op.low:g}, {op.high:g})" for op in inputs)
    lines.append(f"  - a narrower input_range; it is {spans}")
    lines.append("  - weights of ordinary size: a norm behind this layer, or smaller weights in it")
    return "\n".join(line for line in lines if line)


def _reals(interval: Interval, frac: int) -> str:
    low, high = (end / 2.0**frac for end in interval.ends)
    return f"[{low:.3g}, {high:.3g}]"


def _observed(draft: Draft) -> dict[str, Interval]:
    """Twice the range of every value on the calibration data."""
    if not draft.calibration:
        return {}
    ends: dict[str, tuple[float, float]] = {}

    def visit(node: Node, value: Tensor) -> None:
        if node.type.batched:
            low, high = (float(v) for v in torch.aminmax(value))
            before = ends.get(node.name, (low, high))
            ends[node.name] = min(low, before[0]), max(high, before[1])

    step = draft.affordable
    for i in range(0, len(next(iter(draft.calibration.values()))), step):
        draft.estimate({label: x[i : i + step] for label, x in draft.calibration.items()}, visit)
    out = {}
    for name, (low, high) in ends.items():
        margin = (_MARGIN - 1) * max(-low, high) + 1
        out[name] = Interval.full(draft.plan.node(name).type.at(1).dims[1:], low - margin, high + margin)
    return out
