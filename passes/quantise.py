"""From real numbers to fixed point: choose the scale, write the fixed-point ops, bound every value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from tacit.ir.build import FixedBuilder, Label
from tacit.ir.errors import CompileError
from tacit.ir.op import inferred
from tacit.ir.ops.comparison import TRUNCATION_WIDTH
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.model import Argmax
from tacit.ir.ops.nonlinear import FixedReLU, Trunc
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.ir.ranges import Interval
from tacit.ir.types import Type, bits_for
from tacit.passes.draft import Draft, Values

Tensor = torch.Tensor
# Logits are to be within 2^-8 of the float model's. Probes are few, so the error seen on them is held to a quarter.
_TOLERANCE = 2.0**-10
_TRIAL_FRAC, _LEAST_FRAC, MOST_FRAC_BITS = 12, 8, 20
# Weights get some bits more than activations: they cost nothing in any comparison.
_EXTRA_WEIGHT_BITS = 4
# Room of one bit above what calibration data showed; the plan says so.
_CALIBRATION_MARGIN = 2.0
CALIBRATED = "calibrated"
# The widest value that every protocol takes: a difference and a truncation still fit.
_WIDEST = TRUNCATION_WIDTH - 1


def choose_scale(draft: Draft) -> Draft:
    """Set `frac_bits` where the caller did not: the fewest with which the probes' logits are accurate enough.

    The error of the whole network is proportional to 2^-frac: one trial run on the clear oracle tells it.
    """
    if draft.frac_bits is not None:
        return draft
    probes = _some(draft.probes, draft.affordable)
    real = draft.with_(_ending_at(draft.plan, _logits(draft.plan)), frac_bits=_TRIAL_FRAC)
    exact = real.estimate(probes).double()
    trial = expand_to_fixed_point(real)
    fixed = trial.estimate(probes).double() / 2.0 ** trial.plan.node(trial.plan.result).type.frac
    allowed = _TOLERANCE * max(1.0, float(exact.abs().max()) / 32)
    error = float((fixed - exact).abs().max())
    extra = math.ceil(math.log2(max(error, 1e-12) / allowed))
    return draft.with_(draft.plan, frac_bits=min(max(_TRIAL_FRAC + extra, _LEAST_FRAC), MOST_FRAC_BITS))


def _some(values: Values, count: int) -> Values:
    """So many rows of each tensor, or all; taken evenly from first to last."""
    rows = len(next(iter(values.values())))
    chosen = torch.linspace(0, rows - 1, min(count, rows)).round().long()
    return {label: x[chosen] for label, x in values.items()}


def _logits(plan: Plan) -> str:
    """The value whose accuracy counts: what the argmax compares, or the result."""
    argmaxes = plan.find(Argmax)
    return argmaxes[-1].args[0] if argmaxes else plan.result


def _ending_at(plan: Plan, name: str) -> Plan:
    end = plan.index[name] + 1
    return plan.with_nodes(plan.nodes[:end], result=name)


def expand_to_fixed_point(draft: Draft) -> Draft:
    """Replace every layer by its fixed-point form; weights become ring integers.

    Inputs and activations have `frac_bits` fractional bits, weights four more. A product has the sum of
    both; it is truncated after the ReLU that follows it, or before the next product. Additions align scales
    by shifts, averages put their divisor into the scale, and an answer is revealed untruncated.
    """
    assert draft.frac_bits is not None
    plan, weight_frac = draft.plan, draft.frac_bits + _EXTRA_WEIGHT_BITS
    b = FixedBuilder(draft.weights, frac=draft.frac_bits, weight_frac=weight_frac)
    names: dict[str, str] = {}
    for node in plan.nodes:
        with b.at(node.path, node.source):
            names[node.name] = _expand(b, node, names)
    return draft.with_(b.plan(plan, names[plan.result]), b.encoded)


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


def bound_ranges(draft: Draft) -> Draft:
    """Give every value the width it needs, proved from the input's range and the weights.

    Intervals are propagated element by element through the quantised network, truncation included, in float64
    with an outward margin. Calibration data, where given, narrows them to twice what was seen, and the
    plan says so. A value that would not fit is a compile error that names the layer.
    """
    plan, seen = draft.plan, _observed(draft)
    last = {arg: node.name for node in plan.nodes for arg in node.args}
    intervals: dict[str, Interval] = {}
    types: dict[str, Type] = {}
    nodes = []
    for node in plan.nodes:
        operands = [_operand(plan, arg, draft.weights, intervals) for arg in node.args]
        interval = _interval(node, draft.weights, operands)
        if node.name in seen and not node.op.declares:
            interval = interval.meet(seen[node.name])
        if not isinstance(node.op, Weight):  # as float64 they would take twice the memory of the model
            intervals[node.name] = interval
        nodes.append(_with_width(node, interval, types))
        types[node.name] = nodes[-1].type
        for arg in node.args:
            if last[arg] == node.name:
                intervals.pop(arg, None)
    return draft.with_(plan.with_nodes(nodes, ranges=CALIBRATED if draft.calibration else "proved"))


def _operand(plan: Plan, name: str, weights: Values, known: Mapping[str, Interval]) -> Interval:
    op = plan.node(name).op
    return Interval.exactly(weights[op.label]) if isinstance(op, Weight) else known[name]


def _interval(node: Node, weights: Values, operands: Sequence[Interval]) -> Interval:
    if isinstance(node.op, Weight):
        value = weights[node.op.label]
        return Interval.full((), float(value.min()), float(value.max()))
    if isinstance(node.op, Input):
        scale = 2.0**node.type.frac
        return Interval.full(node.type.at(1).dims[1:], math.floor(node.op.low * scale), math.ceil(node.op.high * scale))
    found: Interval = node.op.bound(*operands)
    return found


def _with_width(node: Node, interval: Interval, types: Mapping[str, Type]) -> Node:
    low, high = interval.ends
    width = bits_for(low, high)
    if width > _WIDEST:
        scale = 2.0**node.type.frac
        raise CompileError(
            f"module '{node.path or node.op.name}' ({node.op.name}{', ' + node.source if node.source else ''}): "
            f"its values may lie anywhere in [{low / scale:.3g}, {high / scale:.3g}], which takes {width} bits "
            f"at {node.type.frac} fractional bits; {_WIDEST} fit. "
            "Give a narrower input_range, calibration data, or fewer frac_bits."
        )
    if not node.op.declares:
        width = min(width, inferred(node.op, tuple(types[arg] for arg in node.args)).width)
    return replace(node, type=node.type.with_(width=width))


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
        margin = (_CALIBRATION_MARGIN - 1) * max(-low, high) + 1
        out[name] = Interval.full(draft.plan.node(name).type.at(1).dims[1:], low - margin, high + margin)
    return out
