"""From real numbers to fixed point: choose the scale, write the fixed-point ops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from tacit.ir.build import FixedBuilder, Label
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.model import Argmax
from tacit.ir.ops.nonlinear import FixedReLU, Trunc
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.ir.types import Type
from tacit.passes.draft import Draft, Values

Tensor = torch.Tensor
# Logits are to be within 2^-8 of the float model's; where the largest is below 1, within 2^-8 of it, and where it is
# above 32, within 2^-13 of it. Probes are few, so the error seen on them is held to a quarter.
_TOLERANCE, _LEAST_LOGIT = 2.0**-10, 2.0**-8
_TRIAL_FRAC, _LEAST_FRAC, MOST_FRAC_BITS = 12, 8, 20
# Functions are approximated to four units of the scale of activations, and to this where that is less.
_MOST_ERROR = 2.0**-10
# Weights get some bits more than activations: they cost nothing in any comparison.
EXTRA_WEIGHT_BITS = 4


def choose_scale(draft: Draft) -> Draft:
    """Set `frac_bits` where the caller did not: the fewest with which the probes' logits are accurate enough.

    The error of the whole network is proportional to 2^-frac: one trial run on the clear oracle tells it.
    """
    if draft.frac_bits is not None:
        return draft
    error, allowed = logit_error(draft.with_(draft.plan, frac_bits=_TRIAL_FRAC))
    extra = math.ceil(math.log2(max(error, 1e-12) / allowed))
    return draft.with_(draft.plan, frac_bits=min(max(_TRIAL_FRAC + extra, _LEAST_FRAC), MOST_FRAC_BITS))


def logit_error(draft: Draft) -> tuple[float, float]:
    """For a draft of the model level: the error of the probes' logits in fixed point, and what is allowed of it."""
    probes = _some(draft.probes, draft.affordable)
    real = draft.with_(_ending_at(draft.plan, _logits(draft.plan)))
    exact = real.estimate(probes).double()
    trial = expand_to_fixed_point(real)
    fixed = trial.estimate(probes).double() / 2.0 ** trial.plan.node(trial.plan.result).type.frac
    finite = exact.isfinite()  # a function may be undefined at a probe; range analysis names it
    exact, fixed = exact[finite], fixed[finite]
    if not len(exact):
        return 1.0, 1.0
    largest = float(exact.abs().max())
    allowed = _TOLERANCE * (min(1.0, max(largest, _LEAST_LOGIT)) if largest < 32 else largest / 32)
    return float((fixed - exact).abs().max()), allowed


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

    Inputs and activations have `frac_bits` fractional bits, weights four more, less what they spare. A product has
    the sum of both; it is truncated after the ReLU that follows it, or before the next product. Additions align scales
    by shifts, averages put their divisor into the scale, and an answer is revealed untruncated.
    """
    assert draft.frac_bits is not None
    plan, weight_frac = draft.plan, draft.frac_bits + EXTRA_WEIGHT_BITS
    error = min(_MOST_ERROR, 2.0 ** (2 - draft.frac_bits)) if draft.max_error is None else draft.max_error
    b = FixedBuilder(draft.weights, frac=draft.frac_bits, weight_frac=weight_frac, max_error=error, spared=draft.spared)
    names: dict[str, str] = {}
    for node in plan.nodes:
        with b.at(node.path, node.source, node.name):
            names[node.name] = _expand(b, node, names)
    return replace(draft.with_(b.plan(plan, names[plan.result]), b.encoded), model=draft)


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
