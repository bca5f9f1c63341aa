"""What the caller is told where no scale keeps the promise: the layer at which the error arises, and what helps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tacit.ir.ops.model import ModelOp
from tacit.ir.plan import Node
from tacit.passes.draft import Draft, Values
from tacit.passes.quantise import expand_to_fixed_point

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Grown:
    """A layer, the largest error of its operands and of its result, each relative to the largest value, on one row."""

    node: Node
    before: float
    after: float
    operands: tuple[Tensor, ...]


def doubt(draft: Draft, row: Values, missed: int, tried: int) -> str:
    """What names the layer of the draft, which has its scale, at which the error of this probe grows most."""
    return _told(_culprit(draft, row), draft, missed, tried)


def _culprit(draft: Draft, row: Values) -> _Grown:
    """The layer whose result is off by the largest multiple of what its operands are off by."""
    real: dict[str, Tensor] = {}
    draft.estimate(row, lambda node, value: real.update({node.name: value.double()}), faithful=True)
    fixed = expand_to_fixed_point(draft)
    errors: dict[str, float] = {}

    def visit(node: Node, value: Tensor) -> None:
        layer = draft.plan.by_name.get(node.origin or node.name)
        if layer is None or real[layer.name].numel() != value.numel():
            return  # a step on the way to the layer's result
        exact = real[layer.name].reshape(-1)
        size = float(exact.abs().nan_to_num().max())
        error = float((value.reshape(-1) / 2.0**node.type.frac - exact).abs().nan_to_num().max())
        errors[layer.name] = error / max(size, 2.0**-20)

    fixed.estimate(row, visit, faithful=True)
    unit = 2.0 ** -(draft.frac_bits or 0)
    grown = []
    for node in draft.plan.nodes:
        if node.args and isinstance(node.op, ModelOp) and node.name in errors:
            before = max(*(errors.get(arg, 0.0) for arg in node.args), unit)
            grown.append(_Grown(node, before, errors[node.name], tuple(real[arg] for arg in node.args)))
    return max(grown, key=lambda g: min(g.after, 1.0) / g.before)


def _told(found: _Grown, draft: Draft, missed: int, tried: int) -> str:
    node, op, bits = found.node, found.node.op, draft.frac_bits or 0
    assert isinstance(op, ModelOp)
    where = f"module '{node.path or draft.plan.name}' ({op.name}{', ' + node.source if node.source else ''})"
    head = f"{where}: {missed} of {tried} inputs that were tried are not within the promised 2^-8 of the float model. "
    if op.jumps():
        margin = op.margin(*found.operands).double()
        near = float(margin[margin > 0].min()) if bool((margin > 0).any()) else 0.0
        return head + (
            f"Its result jumps where a value passes a threshold, and one lies {near:.1g} beside it, which {bits} "
            f"fractional bits do not tell apart: they are steps of {2.0**-bits:.1g}. What helps: thresholds in the "
            "middle between two values of the data, as trees are trained with, or data on a grid that keeps away from "
            "them"
        )
    if op.amplifies():
        gain = float(op.gain(*found.operands).nan_to_num(0.0, posinf=0.0).max())
        return head + (
            f"It divides by what its input holds, and multiplies what differs in a blank or faint one by {gain:.3g}, "
            f"the rounding to {bits} fractional bits too, as it does that of float32. What helps: a larger eps (of a "
            "norm, the factor is at most 1/sqrt(eps)), no second norm behind it, or inputs that are never blank"
        )
    return head + (
        f"Its relative error is {found.after:.1g}, that of its operand {found.before:.1g}, with {bits} fractional "
        "bits. What helps: values of ordinary size there (a norm before this layer), or a narrower input_range"
    )
