"""From fixed point to protocols: a suite says which subprotocol stands for each op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import count
from typing import Any

from tacit.ir.build import Builder
from tacit.ir.cost import Cost
from tacit.ir.errors import CompileError
from tacit.ir.op import Level, Op
from tacit.ir.ops import bilinear, choice, linear, local, nonlinear, securenn, spline, wins
from tacit.ir.ops.comparison import ROOM_BITS
from tacit.ir.ops.nonlinear import FixedArgmax, FixedEqual, FixedMaxPool2d, FixedReLU, Trunc
from tacit.ir.ops.outputs import Pack
from tacit.ir.ops.roles import Input, Mask, Reveal
from tacit.ir.plan import Node
from tacit.ir.tree import Leaf, text_of
from tacit.ir.types import RING_BITS, bits_for
from tacit.passes.draft import Draft

# Writes the protocol form of a node whose operands are already lowered; returns the name of its result.
Lowering = Callable[[Builder, Node, tuple[str, ...]], str]


def _attributes(op: Op) -> dict[str, Any]:
    return {field.name: getattr(op, field.name) for field in fields(op)}  # type: ignore[arg-type]


def _direct(target: type[Op], **changes: Any) -> Lowering:
    """The op of the suite that takes the same operands and attributes."""

    def lower(b: Builder, node: Node, args: tuple[str, ...]) -> str:
        return b.emit(target(**_attributes(node.op) | changes), *args, name=node.name, width=node.type.width)

    return lower


def _product(target: type[Op]) -> Lowering:
    """A product with a mask line of its own for the weight; identical masks are merged later."""

    def lower(b: Builder, node: Node, args: tuple[str, ...]) -> str:
        mask = b.emit(Mask(), args[1], name=b.fresh("m"))
        return b.emit(target(**_attributes(node.op)), *args, mask, name=node.name, width=node.type.width)

    return lower


# A sign and a digit to compare: what is known to be 0 has a width of 1.
_LEAST_WINDOW = 2


def _windowed(target: type[Op], slack: int) -> Lowering:
    """A comparison that looks at no more bits than its operands have; a difference has one more."""

    def lower(b: Builder, node: Node, args: tuple[str, ...]) -> str:
        window = max(_LEAST_WINDOW, max(b.types[arg].width for arg in args) + slack)
        attributes = _attributes(node.op)
        dropped = attributes.get("drop", attributes.get("truncate", 0))
        window = max(window, dropped + 1 + ROOM_BITS) if dropped else window
        attributes["window"] = window
        return b.emit(target(**attributes), *args, name=node.name, width=node.type.width)

    return lower


def _windowed_by_first(target: type[Op]) -> Lowering:
    """A comparison of the first operand alone."""

    def lower(b: Builder, node: Node, args: tuple[str, ...]) -> str:
        attributes = _attributes(node.op) | {"window": max(_LEAST_WINDOW, b.types[args[0]].width)}
        return b.emit(target(**attributes), *args, name=node.name, width=node.type.width)

    return lower


# How many more bytes an image may cost for a round less: at 5 Gbit/s, what a batch of 60 sends within 0.1 ms.
_ROUND_BYTES = 1024


def _argmax(b: Builder, node: Node, args: tuple[str, ...]) -> str:
    """A tournament, or all pairs at once where the rounds it saves are worth the bytes it takes."""
    x = b.types[args[0]].at(1)
    tree, pairs = nonlinear.Argmax(x.width + 1), wins.ArgmaxByWins(x.width + wins.SLACK)
    counted = 1 < x.dims[-1] <= wins.MOST_CLASSES and pairs.window <= RING_BITS
    by_wins = counted and _weight(pairs.cost(x)) < _weight(tree.cost(x))
    return b.emit(pairs if by_wins else tree, *args, name=node.name, width=node.type.width)


def _weight(cost: Cost) -> int:
    return cost.online_bytes + cost.offline_bytes + _ROUND_BYTES * cost.rounds


def _between_knots(b: Builder, node: Node, args: tuple[str, ...]) -> str:
    """A spline whose comparisons look at no more bits than a difference from a knot has."""
    op = node.op
    assert isinstance(op, spline.FixedSpline)
    knots = bits_for(op.low, op.high)  # the operand may be narrower than the range of the fit
    attributes = _attributes(op) | {"window": max(b.types[args[0]].width, knots, op.drop + ROOM_BITS) + 1}
    return b.emit(spline.SplineOnShares(**attributes), *args, name=node.name, width=node.type.width)


def _textbook_relu(b: Builder, node: Node, args: tuple[str, ...]) -> str:
    """ReLU and truncation apart: the textbook suite knows no fused form."""
    assert isinstance(node.op, FixedReLU)
    bits = node.op.truncate
    if not bits:
        return b.emit(securenn.TextbookReLU(), *args, name=node.name, width=node.type.width)
    return b.emit(Trunc(bits), b.emit(securenn.TextbookReLU(), *args), name=node.name, width=node.type.width)


def _squares_modulo(target: type[spline.FixedSpline]) -> Lowering:
    """Squares, their sum and a constant: all lines are as wide as the ring."""

    def lower(b: Builder, node: Node, args: tuple[str, ...]) -> str:
        op = node.op
        assert isinstance(op, bilinear.SquaresModulo)
        square = target(**_attributes(bilinear.square(b.types[args[0]].frac)))
        total = b.emit(local.Sum(op.over), b.emit(square, *args, width=RING_BITS), width=RING_BITS)
        return b.emit(local.AddPublic(op.plus), total, name=node.name, width=RING_BITS)

    return lower


FUSED: Mapping[type[Op], Lowering] = {
    linear.FixedLinear: _product(linear.Linear),
    linear.FixedConv2d: _product(linear.Conv2d),
    linear.FixedMul: _product(linear.Mul),
    FixedReLU: _windowed(nonlinear.ReLU, 0),
    FixedMaxPool2d: _windowed(nonlinear.MaxPool2d, 1),
    FixedArgmax: _argmax,
    FixedEqual: _windowed(nonlinear.Equal, 1),
    choice.FixedPositive: _windowed(choice.Positive, 0),
    choice.FixedChoose: _windowed_by_first(choice.Choose),
    spline.FixedSpline: _between_knots,
    bilinear.SquaresModulo: _squares_modulo(spline.SplineOnShares),
}
SECURENN: Mapping[type[Op], Lowering] = {
    linear.FixedLinear: _direct(securenn.TextbookLinear),
    linear.FixedConv2d: _direct(securenn.TextbookConv2d),
    linear.FixedMul: _direct(securenn.TextbookMul),
    FixedReLU: _textbook_relu,
    FixedMaxPool2d: _direct(securenn.TextbookMaxPool2d, drop=0),
    FixedArgmax: _direct(securenn.TextbookArgmax),
    FixedEqual: _direct(securenn.TextbookEqual),
    choice.FixedPositive: _direct(choice.TextbookPositive),
    choice.FixedChoose: _direct(choice.TextbookChoose),
    spline.FixedSpline: _direct(spline.TextbookSpline, drop=0),
    bilinear.SquaresModulo: _squares_modulo(spline.TextbookSpline),
}
SUITES: Mapping[str, Mapping[type[Op], Lowering]] = {"fused": FUSED, "securenn": SECURENN}


def lower_to_protocol(draft: Draft) -> Draft:
    """Replace every op of the fixed level by a subprotocol of the plan's suite; local ops stay."""
    plan, suite = draft.plan, SUITES[draft.plan.protocol]
    b = Builder(Level.PROTOCOL, reserved=(node.name for node in plan.nodes))
    for node in plan.nodes:
        with b.at(node.path, node.source, node.origin):
            _lower(b, node, suite)
    margins = {node.name: node.margin for node in plan.nodes}  # the result of a line keeps its name
    lowered = b.plan(plan, plan.result)
    return draft.with_(lowered.with_nodes(replace(node, margin=margins.get(node.name, 0)) for node in lowered.nodes))


def _lower(b: Builder, node: Node, suite: Mapping[type[Op], Lowering]) -> None:
    lowering = suite.get(type(node.op))
    if lowering is not None:
        lowering(b, node, node.args)
    elif Level.PROTOCOL in node.op.levels:
        b.copy(node)
    else:
        raise CompileError(f"module '{node.path}': this protocol suite has no form of {node.op.name}")


def reveal_result(draft: Draft) -> Draft:
    """The client, and it alone, learns the result.

    Whole numbers come back as int64 where nothing else is said: floats without fractional bits are packed to say so.
    """
    b, plan = Builder(Level.PROTOCOL), draft.plan
    for node in plan.nodes:
        b.copy(node)
    last, result = plan.node(plan.result), plan.result
    if last.type.frac == 0 and plan.reveal == "logits" and not last.op.reveals and not isinstance(last.op, Pack):
        result = b.emit(Pack(text_of(Leaf(last.type.shape, "float32"))), result)
    return draft.with_(b.plan(plan, b.emit(Reveal(), result)))


def hoist_weight_openings(draft: Draft) -> Draft:
    """Move weights and the openings of their masks to the front, once per session; one mask for each weight.

    The same mask may serve the same weight again, because the other factor is masked afresh each time.
    """
    plan = draft.plan
    first: dict[tuple[str, ...], str] = {}
    aliases = {n.name: first.setdefault(n.args, n.name) for n in plan.find(Mask)}
    nodes = [
        replace(n, args=tuple(aliases.get(a, a) for a in n.args))
        for n in plan.nodes
        if aliases.get(n.name, n.name) == n.name
    ]
    session = [n for n in nodes if n.op.session]
    return draft.with_(plan.with_nodes([*session, *(n for n in nodes if not n.op.session)]))


def schedule_rounds(draft: Draft) -> Draft:
    """Order the lines by the round in which they start, so that messages which share a round stand together."""
    plan = draft.plan
    start, place = plan.schedule.start, plan.index
    online = sorted((n for n in plan.nodes if not n.op.session), key=lambda n: (start[n.name], place[n.name]))
    return draft.with_(plan.with_nodes([*(n for n in plan.nodes if n.op.session), *online]))


def number_lines(draft: Draft) -> Draft:
    """Short names in order: %0, %1, ... for values, %w0, %m0 for weights and masks, %y revealed; inputs keep theirs."""
    names = {node.name: node.name for node in draft.plan.find(Input)}
    taken, counters = set(names), {prefix: count() for prefix in ("", "w", "m", "y")}
    for node in draft.plan.nodes:
        if node.name not in names:
            names[node.name] = _next_name(_prefix(node.op), counters, taken)
            taken.add(names[node.name])
    nodes = [replace(n, name=names[n.name], args=tuple(names[a] for a in n.args)) for n in draft.plan.nodes]
    return draft.with_(draft.plan.with_nodes(nodes, result=names[draft.plan.result]))


def _prefix(op: Op) -> str:
    if isinstance(op, Reveal):
        return "y"
    return "m" if isinstance(op, Mask) else "w" if op.session else ""


def _next_name(prefix: str, counters: Mapping[str, Iterator[int]], taken: set[str]) -> str:
    if prefix == "y" and prefix not in taken:
        return prefix
    return next(name for name in (f"{prefix}{i}" for i in counters[prefix]) if name not in taken)
