"""The clear oracle: the meaning of a plan on ring integers, without cryptography.

A truncation is floor((x + t) / 2^f) for a public t. The oracle takes t from a recorded secure run, and then
reproduces it bit for bit; or it takes 2^(f-1), which rounds to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import torch

from tacit.ir.errors import DivergenceError
from tacit.ir.op import Level
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.runtime import ring as z64

Tensor = torch.Tensor
Values = Mapping[str, Tensor]
Offsets = Mapping[str, Sequence[Tensor]]


class Oracle:
    """What `reference` methods see: ring arithmetic, and the offset of each truncation."""

    ring: ModuleType = z64

    def __init__(self, recorded: Iterator[Tensor] | None = None) -> None:
        self._recorded = recorded

    def offset(self, x: Tensor, bits: int) -> Tensor:
        """t for a truncation of x by `bits`: recorded, or half."""
        if self._recorded is None:
            return torch.full_like(x, 1 << (bits - 1) if bits else 0)
        return next(self._recorded).view(x.shape)


def interpret(plan: Plan, weights: Values, inputs: Values, offsets: Offsets | None = None) -> dict[str, Tensor]:
    """The value of every line. `inputs` (by label) and weights (by label) are real at the model level.

    Below it, inputs are real and are encoded here; weights are ring integers already.
    """
    values: dict[str, Tensor] = {}
    for node in plan.nodes:
        oracle = Oracle(iter(offsets.get(node.name, ())) if offsets is not None else None)
        values[node.name] = _value(plan, node, oracle, values, weights, inputs)
    return values


def _value(plan: Plan, node: Node, oracle: Oracle, values: Values, weights: Values, inputs: Values) -> Tensor:
    if isinstance(node.op, Input):
        value = inputs[node.op.label]
        return value.double() if plan.level is Level.MODEL else z64.encode(value, node.type.frac)
    if isinstance(node.op, Weight):
        return weights[node.op.label]
    return node.op.reference(oracle, *(values[arg] for arg in node.args))


def compare(plan: Plan, secure: Values, clear: Values) -> None:
    """Raise DivergenceError at the first line whose secure value differs from the oracle's in any bit."""
    for node in plan.nodes:
        if node.name not in secure:
            continue
        wrong = secure[node.name] != clear[node.name]
        if bool(wrong.any()):
            where = tuple(int(i) for i in wrong.nonzero()[0])
            raise DivergenceError(
                f"%{node.name} = {node.op.name} (module '{node.path}'): {int(wrong.sum())} of {wrong.numel()} elements "
                f"differ between the secure run and the oracle, the first at {where}"
            )
