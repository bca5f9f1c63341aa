"""More fractional bits for single values: those that are divided by, or that a function reads near where it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tacit.ir.ops.layer import Layer
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.passes.draft import Draft
from tacit.passes.trial import answering, look

# Bits of a value, in front of the point and behind: what is beyond only a polynomial over more octaves would use.
_MOST_BITS = 34
_ROOM = 4.0  # how many times as large as on the probes values may be


def choose_finer(draft: Draft) -> Draft:
    """Work out which lines of the model level get more fractional bits than others, and how many.

    From the users back to where the bits are lost: products have plenty, sums and moves hand on what they get, an input
    is declared with more. So the scale of the network does not have to follow the one value that needs it.
    """
    wanted = _wanted(draft.plan)
    return replace(draft, finer=_capped(draft, wanted)) if wanted else draft


def _wanted(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in reversed(plan.nodes):
        if not isinstance(node.op, Layer):
            continue
        bits = node.op.wants(found.get(node.name, 0))
        for arg in node.args:
            if bits and plan.node(arg).type.batched:
                found[arg] = max(bits, found.get(arg, 0))
    return {name: bits for name, bits in found.items() if _keeps(plan, name)}


def _keeps(plan: Plan, name: str) -> bool:
    """Whether the line has the bits that it is given: whole numbers need none."""
    op = plan.node(name).op
    return not (isinstance(op, Input) and op.integers)


def _capped(draft: Draft, wanted: Mapping[str, int]) -> dict[str, int]:
    """As far as values of their size leave room."""
    largest, found = look(answering(draft), draft.probes).largest, {}
    for name, bits in wanted.items():
        op = draft.plan.node(name).op
        reach = max(-op.low, op.high) if isinstance(op, Input) else largest.get(name, 1.0) * _ROOM
        found[name] = min(bits, _MOST_BITS - math.ceil(math.log2(max(reach, 1.0))))
    return found
