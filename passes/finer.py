"""More fractional bits for single values: those that are divided by, or that a function reads near where it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tacit.ir.build import MOST_FINE, fine_enough
from tacit.ir.op import Op
from tacit.ir.ops.affine import Convolving, Linear
from tacit.ir.ops.arithmetic import Add, AddScalar, Mul, MulScalar, SumAlong
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.moves import Move
from tacit.ir.ops.norms import Normalise, RootMeanSquare, UnitLength
from tacit.ir.ops.roles import Input
from tacit.passes.draft import Draft
from tacit.passes.trial import answering, count, look

_PRODUCTS = Linear, Convolving, Mul
_LINEAR = *_PRODUCTS, Move, Add, AddScalar, MulScalar, SumAlong, RootMeanSquare, Normalise, UnitLength
# Bits of a value, in front of the point and behind: what is beyond only a polynomial over more octaves would use.
_MOST_BITS = 34


def choose_finer(draft: Draft) -> Draft:
    """Work out which lines of the model level get more fractional bits than others, and how many.

    From the users back to where the bits are lost: products have plenty, sums and moves hand on what they get, an input
    is declared with more. So the scale of the network does not have to follow the one value that needs it.
    """
    if not _wanted(draft, {}):
        return draft
    real = answering(draft)
    looks = [look(real, rows) for rows in (draft.probes, draft.edges) if count(rows)]
    largest = looks[0].largest
    gains = {name: _power_above(max(seen.gains[name] for seen in looks)) for name in looks[0].gains}
    sizes = {name: size * draft.margin[1] for name, size in largest.items()}
    inputs = ((node.name, node.op) for node in draft.plan.nodes if isinstance(node.op, Input))
    sizes |= {name: max(-op.low, op.high) for name, op in inputs}
    return replace(draft, finer=_capped(_wanted(draft, gains), sizes), sizes=sizes, gains=gains)


def _wanted(draft: Draft, gains: Mapping[str, float]) -> dict[str, int]:
    """The bits of each line, and of those that products hand on, no more than cost nothing: a function or a comparison
    in front of a product keeps the bits of activations.

    gains: how much inputs have shown a layer to amplify what it reads. There is room for more, once: what is wanted in
    front of several layers would grow with each of them.
    """
    plan = draft.plan
    found: dict[str, int] = {}
    handed: dict[str, int] = {}  # through a product
    for node in reversed(plan.nodes):
        if not isinstance(node.op, Layer):
            continue
        product = isinstance(node.op, _PRODUCTS)
        gain = gains.get(node.name, math.inf)
        direct, through = _wanted_by(node.op, found.get(node.name, 0), gain, draft.margin[1]), 0
        if isinstance(node.op, _LINEAR):
            through = _wanted_by(node.op, handed.get(node.name, 0), gain, draft.margin[1])
        if product:
            direct, through = 0, max(direct, through)
        for arg in node.args:
            if plan.node(arg).type.batched:
                for bits, wanted in ((direct, found), (through, handed)):
                    if bits:
                        wanted[arg] = max(bits, wanted.get(arg, 0))
    for name, bits in handed.items():
        if isinstance(plan.node(name).op, (Input, *_LINEAR)):
            found[name] = max(bits, found.get(name, 0))
    return {name: bits for name, bits in found.items() if not _is_whole(plan.node(name).op)}


def _wanted_by(op: Layer, frac: int, gain: float, margin: int) -> int:
    """The bits of what a layer reads, where so many are wanted of its result."""
    most = max(fine_enough(1 / (gain * margin)), fine_enough(1 / gain, frac))
    return min(op.wants(frac), most)


def _power_above(gain: float) -> float:
    """Layers alike share their polynomials."""
    return 2.0 ** math.ceil(math.log2(max(gain, 2.0**-MOST_FINE)))


def _is_whole(op: Op) -> bool:
    """Whole numbers need no fractional bits."""
    return isinstance(op, Input) and op.integers


def _capped(wanted: Mapping[str, int], sizes: Mapping[str, float]) -> dict[str, int]:
    """As far as values of their size leave room."""
    return {
        name: min(bits, _MOST_BITS - math.ceil(math.log2(max(sizes.get(name, 1.0), 1.0))))
        for name, bits in wanted.items()
    }
