"""What values were seen to be, on inputs that were shown: the stuff of measured ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch

from tacit.ir.ops.known import Known
from tacit.ir.ops.local import MulPublic
from tacit.ir.ops.nonlinear import Trunc
from tacit.ir.ops.roles import Weight
from tacit.ir.plan import Node, Plan
from tacit.passes.draft import Draft, Values
from tacit.passes.seen import Seen

Tensor = torch.Tensor


def observe(draft: Draft) -> Mapping[str, Seen]:
    """For each line of the fixed level that inputs reach: what it was on the calibration data.

    Whole numbers are left out: they may be indices, which have to be right for every input. Networks that differ in
    their scales alone show the same, up to rounding, which margins cover: they share one look at each part of the data.
    """
    values = _values(draft.plan)
    for part in draft.calibration:
        if not draft.looks.covers(part, values.values()):
            visit = _widening(draft.looks.ends, values)
            for some in draft.chunks(part):
                draft.estimate(some, visit)
            draft.looks.note(part, values.values())
    return {name: draft.looks.ends[value] for name, value in values.items() if value in draft.looks.ends}


def watch(draft: Draft) -> Callable[[Node, Tensor], None]:
    """A visitor of an estimate that widens what was seen."""
    return _widening(draft.looks.ends, _values(draft.plan))


def _widening(ends: dict[int, Seen], values: Mapping[str, int]) -> Callable[[Node, Tensor], None]:
    def visit(node: Node, value: Tensor) -> None:
        if node.name in values:
            low, high = (float(v) / 2.0**node.type.frac for v in torch.aminmax(value))
            before = ends.get(values[node.name], Seen(low, high))
            ends[values[node.name]] = Seen(min(low, before.low), max(high, before.high))

    return visit


def note(draft: Draft, part: Values) -> None:
    """These inputs have been watched, all of them."""
    draft.looks.note(part, _values(draft.plan).values())


def _values(plan: Plan) -> dict[str, int]:
    """Which real number each line stands for that is watched: alike in networks that differ in their scales alone.

    Truncations and shifts stand for what they read. Lines of one kind that one layer writes about the same values are
    told apart by their order.
    """
    found: dict[str, int] = {}
    count: Counter[int] = Counter()
    for node in plan.nodes:
        shift = isinstance(node.op, MulPublic) and node.op.value == 1 << node.op.bits
        if shift or isinstance(node.op, (Trunc, Known)):
            found[node.name] = found[node.args[0]]
            continue
        what = node.op.label if isinstance(node.op, Weight) else type(node.op)
        kind = hash((what, node.origin, *(found[arg] for arg in node.args)))
        count[kind] += 1
        found[node.name] = hash((kind, count[kind]))
    watched = (n for n in plan.nodes if n.type.batched and n.type.frac and not n.op.declares)
    return {node.name: found[node.name] for node in watched}
