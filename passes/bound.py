"""Ranges: how large every value can become, proved from the input's range and the weights, or measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tacit.ir.errors import CompileError
from tacit.ir.op import inferred
from tacit.ir.ops.comparison import TRUNCATION_WIDTH
from tacit.ir.ops.known import Known
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.ops.spline import FixedFunction
from tacit.ir.plan import Node, Plan
from tacit.ir.ranges import DENSE, Interval, compact
from tacit.ir.types import RING_BITS, SMALL_RING_BITS, Type, bits_for
from tacit.passes.draft import Draft, Values
from tacit.passes.forms import Forms
from tacit.passes.observed import observe
from tacit.passes.seen import Seen

# The widest value that every protocol takes: a difference and a truncation still fit.
WIDEST = TRUNCATION_WIDTH - 1
# Bits of the ring above what was measured that stay free: a value that leaves its range by less wraps around nothing.
FREE_BITS = 4
WIDEST_MEASURED = RING_BITS - FREE_BITS


class TooWide(CompileError):
    """A value does not fit the ring; `excess`: by how many bits."""

    def __init__(self, message: str, excess: int) -> None:
        super().__init__(message)
        self.excess = excess


@dataclass(frozen=True)
class Bounded:
    """A line with its interval, those of its operands, and its margin if it was measured rather than proved."""

    node: Node
    interval: Interval
    operands: tuple[Interval, ...] = ()
    margin: int = 0


def bounded(draft: Draft) -> Draft:
    """Give every value the width it needs, proved from the input's range and the weights, or measured.

    Intervals are propagated through the quantised network, truncation included, element by element or channel by
    channel, in float64 with an outward margin. Where proofs do not fit the ring, and the draft says "auto", values
    whose proved interval is wider get a multiple of what inputs have shown; the lines say so. A value that would not
    fit either is a compile error that names the layer. A function of one number becomes polynomials here, over the
    range of its operand.
    """
    if draft.ranges != "measured":
        try:
            return _typed(draft, intervals(draft))
        except CompileError:
            if draft.ranges == "proved" or not draft.calibration:
                raise
    draft = replace(draft, ranges="measured")
    return _typed(draft, intervals(draft, observe(draft)))


def _typed(draft: Draft, found: Iterator[Bounded]) -> Draft:
    ends: dict[str, tuple[Node, int, int]] = {}
    for one in found:
        width = RING_BITS if one.node.op.modular else bits_for(*one.interval.ends)
        widest = WIDEST_MEASURED if one.margin else WIDEST
        if width > widest and not one.node.op.modular:
            raise TooWide(_too_wide(draft, one, width, widest), width - widest)
        ends[one.node.name] = one.node, width, one.margin
    types: dict[str, Type] = {}
    nodes = []
    for node, width, margin in ends.values():
        if not node.op.declares:
            width = min(width, inferred(node.op, tuple(types[arg] for arg in node.args)).width)
        types[node.name] = node.type.with_(width=width)
        nodes.append(replace(node, type=types[node.name], margin=margin))
    return draft.with_(draft.plan.with_nodes(nodes))


def intervals(draft: Draft, seen: Mapping[str, Seen] | None = None) -> Iterator[Bounded]:
    """Every line of the fixed level with its interval; one is dropped after its last use.

    seen: what inputs have shown, if ranges may be measured. A function may then be read off a narrower range than the
    one its operand had before: the operand comes again, ahead of it, with that range.
    """
    plan, seen = draft.plan, seen or {}
    last = {arg: node.name for node in plan.nodes for arg in node.args}
    known: dict[str, Interval] = {}
    forms = Forms(plan)
    for node in plan.nodes:
        operands = tuple(_operand(plan, arg, draft.weights, known) for arg in node.args)
        if isinstance(node.op, FixedFunction):
            node, narrower = _fitted(draft, node, operands[0], seen.get(node.args[0]))
            if narrower is not None:
                yield narrower
                operands = (narrower.interval,)
        interval = _claimed(plan, node, _interval(node, draft.weights, operands))
        found = Bounded(node, forms.narrowed(node, interval, operands), operands)
        if node.name in seen:
            found = _measured(draft, found, seen[node.name])
        if not isinstance(node.op, Weight):  # as float64 they would take twice the memory of the model
            known[node.name] = found.interval
        yield found
        for arg in node.args:
            if last[arg] == node.name:
                known.pop(arg, None)
                forms.forget(arg)


def _claimed(plan: Plan, node: Node, interval: Interval) -> Interval:
    """What is known of the same value in the only line that reads it holds of it, too."""
    users = plan.users(node.name)
    if len(users) == 1 and isinstance(users[0].op, Known):
        return interval.meet(Interval.full((1,) * len(interval.shape), users[0].op.low, users[0].op.high))
    return interval


def _margins(draft: Draft, name: str) -> Iterator[int]:
    """From the one that is wanted of a line down to the least."""
    least, margin = draft.margin
    margin = draft.margins.get(name, margin)
    while margin > least:
        yield margin
        margin //= 2
    yield least


def _measured(draft: Draft, found: Bounded, seen: Seen) -> Bounded:
    """With the range that was seen and its margin, where that takes bits enough less than the proved one."""
    proved, node = found.interval, found.node
    if node.op.tight:
        return found
    for margin in _margins(draft, node.name):
        narrow = proved.meet(seen.widened(margin, node.type))
        if bits_for(*narrow.ends) <= WIDEST_MEASURED:
            break
    bits, most = (bits_for(*interval.ends) for interval in (narrow, proved))
    leaves = most <= SMALL_RING_BITS < bits + FREE_BITS
    return replace(found, interval=narrow, margin=margin) if bits < most and not leaves else found


def _fitted(draft: Draft, node: Node, proved: Interval, seen: Seen | None) -> tuple[Node, Bounded | None]:
    """A function of one number becomes polynomials where its operand turns out to lie; and that operand, if a range
    that was measured had to be narrowed for it: functions may grow fast, or end somewhere."""
    assert isinstance(node.op, FixedFunction)
    first: CompileError | None = None
    for interval, margin in _where(draft, node, proved, seen):
        try:
            fitted = replace(node, op=node.op.fitted(interval))
        except CompileError as error:
            first = first or error
            continue
        operand = draft.plan.node(node.args[0])
        return fitted, Bounded(operand, interval, (), margin) if margin else None
    assert first is not None
    raise _located(node, first) from None


def _where(draft: Draft, node: Node, proved: Interval, seen: Seen | None) -> Iterator[tuple[Interval, int]]:
    """Ranges over which a function may be fitted, the widest first; 0 for the margin of the operand as it is.

    A value that was positive everywhere may get its margin as a factor: it then stays so.
    """
    yield proved, 0
    if seen is None:
        return
    operand = draft.plan.node(node.args[0])
    for margin in _margins(draft, operand.name):
        yield proved.meet(seen.widened(margin, operand.type)), margin
        if seen.one_sided:
            yield proved.meet(seen.stretched(margin, operand.type)), margin


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


def _too_wide(draft: Draft, found: Bounded, width: int, widest: int) -> str:
    """The layer, its range, the range of what it reads, and what would help, most likely first."""
    node = found.node
    inputs = [n.op for n in draft.plan.find(Input) if isinstance(n.op, Input) and not n.op.integers]
    reads = [
        _reals(interval, draft.plan.node(arg).type.frac)
        for interval, arg in zip(found.operands, node.args, strict=True)
        if draft.plan.node(arg).type.batched
    ]
    lines = [
        f"module '{node.path or node.op.name}' ({node.op.name}{', ' + node.source if node.source else ''}): its values "
        f"may lie anywhere in {_reals(found.interval, node.type.frac)}, which takes {width} bits at {node.type.frac} "
        f"fractional bits; {widest} fit.",
        f"It reads values in {', '.join(reads)}." if reads else "",
        "What helps:",
    ]
    if draft.ranges == "proved":
        lines.append(
            '  - ranges="auto": they are then measured, with a margin, where the proved ones are too wide, as they '
            "become in deep networks"
        )
    spans = ", ".join(f"({op.low:g}, {op.high:g})" for op in inputs)
    lines.append(f"  - a narrower input_range; it is {spans}")
    lines.append("  - weights of ordinary size: a norm behind this layer, or smaller weights in it")
    return "\n".join(line for line in lines if line)


def _reals(interval: Interval, frac: int) -> str:
    low, high = (end / 2.0**frac for end in interval.ends)
    return f"[{low:.3g}, {high:.3g}]"
