"""From real numbers to fixed point: the ops of the fixed level, at a scale that is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tacit.ir.build import FixedBuilder, Label
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.nonlinear import FixedReLU, Trunc
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node
from tacit.ir.types import Type
from tacit.passes.draft import Draft

# Functions are approximated to four units of the scale of activations, and to this where that is less.
_MOST_ERROR = 2.0**-10
# Weights get some bits more than activations: they cost nothing in any comparison.
EXTRA_WEIGHT_BITS = 4


def expand_to_fixed_point(draft: Draft, *, outline: bool = False) -> Draft:
    """Replace every layer by its fixed-point form; weights become ring integers.

    Inputs and activations have `frac_bits` fractional bits, weights four more, less what they spare. A product has
    the sum of both; it is truncated after the ReLU that follows it, or before the next product. Additions align scales
    by shifts, averages put their divisor into the scale, and an answer is revealed untruncated.

    outline: for the plan alone; the weights then hold no data.
    """
    assert draft.frac_bits is not None
    plan, weight_frac = draft.plan, draft.frac_bits + EXTRA_WEIGHT_BITS
    error = default_error(draft.frac_bits) if draft.max_error is None else draft.max_error
    b = FixedBuilder(
        draft.weights,
        frac=draft.frac_bits,
        weight_frac=weight_frac,
        max_error=error,
        spared=draft.spared,
        finer=draft.finer,
        sizes=draft.sizes,
        gains={name: gain * draft.margin[1] for name, gain in draft.gains.items()},
        outline=outline,
    )
    names: dict[str, str] = {}
    for node in plan.nodes:
        with b.at(node.path, node.source, node.name):
            names[node.name] = _expand(b, node, names)
    return replace(draft.with_(b.plan(plan, names[plan.result]), b.encoded), model=draft)


def default_error(frac_bits: int) -> float:
    """How far polynomials may be from the functions that they stand for."""
    return min(_MOST_ERROR, 2.0 ** (2 - frac_bits))


def _expand(b: FixedBuilder, node: Node, names: Mapping[str, str]) -> str:
    if isinstance(node.op, Weight):
        return Label(node.op.label)
    if isinstance(node.op, Input):
        declared = Type("secret", node.type.shape, 0 if node.op.integers else b.frac)
        return b.declare(node.op, declared, name=node.name)
    assert isinstance(node.op, Layer)
    return node.op.expand(b, *(names[arg] for arg in node.args))


def fuse_truncation_into_relu(draft: Draft) -> Draft:
    """trunc(relu(x)) becomes one relu with truncation, where the untruncated value has no other use.

    The fused form compares only the bits that survive: as many fewer as are truncated, and no round more.
    """
    plan = draft.plan
    fused: dict[str, Node | None] = {}
    for node in plan.find(Trunc):
        relu = plan.node(node.args[0])
        if isinstance(relu.op, FixedReLU) and relu.op.truncate == 0 and len(plan.users(relu.name)) == 1:
            assert isinstance(node.op, Trunc)
            fused[relu.name] = None
            fused[node.name] = replace(node, op=FixedReLU(node.op.bits), args=relu.args)
    nodes = (fused.get(node.name, node) for node in plan.nodes)
    return draft.with_(plan.with_nodes(node for node in nodes if node is not None))
