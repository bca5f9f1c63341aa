"""What the caller is told where no scale keeps the promise: the layer at which the error arises, and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tacit.ir.ops.approximated import Function
from tacit.ir.ops.model import ModelOp
from tacit.ir.plan import Node
from tacit.passes.draft import Draft, Values
from tacit.passes.trial import DRAWS, in_fixed_point

Tensor = torch.Tensor
# A result that is off by this part of its largest value may have jumped; and an error grown so many times is noted.
_STEP, _AMPLIFIED = 2.0**-7, 4.0
_FEW_DRAWS = 4  # of the truncations, where each takes long


@dataclass(frozen=True)
class _Grown:
    """A layer with its operands on one row, and how far they and its result are off, relative to the largest value.

    slack: the largest error of the first operand, absolute.
    """

    node: Node
    before: float
    after: float
    slack: float
    operands: tuple[Tensor, ...]

    @property
    def factor(self) -> float:
        return min(self.after, 1.0) / self.before

    @property
    def jumped(self) -> bool:
        """Whether the result is on the other side of a step than it should be."""
        op = self.node.op
        if not isinstance(op, ModelOp) or not op.jumps() or self.after < _STEP:
            return False
        return float(op.margin(*self.operands).double().min()) <= 2 * self.slack

    @property
    def amplified(self) -> bool:
        return self.factor > _AMPLIFIED and self.gain > _AMPLIFIED

    @property
    def gain(self) -> float:
        """What the layer multiplies differences with, at most."""
        op = self.node.op
        if not isinstance(op, ModelOp) or not op.amplifies():
            return 0.0
        return float(op.gain(*self.operands).nan_to_num(0.0, posinf=0.0).max())


def doubt(draft: Draft, row: Values, missed: int, tried: int, *, approximated: bool) -> str:
    """What names the layer of the draft, which has its scale, at which the error of this probe grows most."""
    return _told(_culprit(draft, row, approximated), draft, missed, tried)


def _culprit(draft: Draft, row: Values, approximated: bool) -> _Grown:
    """The first layer that jumped, in some draw of the truncations; else the one whose result is off by the largest
    multiple of what its operands are, one that divides by data before others. In a blank input a lucky draw rounds all
    elements alike."""
    real: dict[str, Tensor] = {}
    draft.estimate(row, lambda node, value: real.update({node.name: value.double()}), faithful=True)
    fixed = in_fixed_point(draft, approximated, fused=False)
    ops = [node.op for node in draft.plan.nodes if isinstance(node.op, ModelOp)]
    chance = any(op.jumps() or op.amplifies() for op in ops)
    grown: list[_Grown] = []
    for seed in range(1 if not chance else _FEW_DRAWS if draft.large else DRAWS):
        grown = _grown(draft, real, _errors(draft, real, fixed, row, seed))
        for one in grown:
            if one.jumped:
                return one
        if any(op.jumps() for op in ops):
            continue
        if amplified := [one for one in grown if one.amplified]:
            return max(amplified, key=lambda one: one.factor)
    if not any(one.after for one in grown):  # exact here, and not in float32
        return max(grown, key=lambda one: one.gain)
    return max([one for one in grown if one.amplified] or grown, key=lambda one: one.factor)


def _errors(draft: Draft, real: Values, fixed: Draft, row: Values, seed: int) -> dict[str, float]:
    """By how much the result of each layer is off in fixed point."""
    errors: dict[str, float] = {}

    def visit(node: Node, value: Tensor) -> None:
        layer = draft.plan.by_name.get(node.origin or node.name)
        if layer is None or real[layer.name].numel() != value.numel():
            return  # a step on the way to the layer's result
        found = value.reshape(-1) / 2.0**node.type.frac
        errors[layer.name] = float((found - real[layer.name].reshape(-1)).abs().nan_to_num().max())

    fixed.estimate(row, visit, faithful=not draft.large, seed=seed)
    return errors


def _grown(draft: Draft, real: Values, errors: Mapping[str, float]) -> list[_Grown]:
    unit = 2.0 ** -(draft.frac_bits or 0)

    def relative(name: str) -> float:
        return errors.get(name, 0.0) / max(float(real[name].abs().nan_to_num().max()), 2.0**-20)

    return [
        _Grown(
            node,
            max(*(relative(arg) for arg in node.args), unit),
            relative(node.name),
            errors.get(node.args[0], unit),
            tuple(real[arg] for arg in node.args),
        )
        for node in draft.plan.nodes
        if node.args and isinstance(node.op, ModelOp) and node.name in errors
    ]


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
    gain = found.gain
    if gain > _AMPLIFIED:
        return head + (
            f"It divides by what its input holds, and multiplies what differs in a blank or faint one by {gain:.3g}, "
            f"the rounding to {bits} fractional bits too, as it does that of float32. What helps: a larger eps (of a "
            "norm, the factor is at most 1/sqrt(eps)), no second norm behind it, or inputs that are never blank"
        )
    if isinstance(op, Function):
        return head + (
            f"Its relative error is {found.after:.1g}, that of its operand {found.before:.1g}: the polynomials that "
            "stand for it are as far off. What helps: a smaller max_error, or values of ordinary size there"
        )
    return head + (
        f"Its relative error is {found.after:.1g}, that of its operand {found.before:.1g}, with {bits} fractional "
        "bits. What helps: values of ordinary size there (a norm before this layer), or a narrower input_range"
    )
