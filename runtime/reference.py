"""The clear oracle: the meaning of a plan on ring integers, without cryptography.

A truncation is floor((x + t) / 2^f) for a public t. The oracle takes t from a recorded secure run, and then
reproduces it bit for bit; or it takes 2^(f-1), which rounds to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tacit.ir.errors import DivergenceError
from tacit.ir.op import Level
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.runtime import ring as z64
from tacit.runtime.estimate import EstimatedRing

Tensor = torch.Tensor
Values = Mapping[str, Tensor]
Offsets = Mapping[str, Sequence[Tensor]]


class Oracle:
    """What `reference` methods see: ring arithmetic, and the offset of each truncation."""

    def __init__(
        self, recorded: Iterator[Tensor] | None = None, ring: Any = z64, chance: torch.Generator | None = None
    ) -> None:
        self._recorded = recorded
        self._chance = chance
        self.ring = ring

    def offset(self, x: Tensor, bits: int) -> Tensor:
        """t for a truncation of x by `bits`: recorded, drawn, or half."""
        if self._recorded is not None:
            return next(self._recorded).view(x.shape)
        if self._chance is not None:
            return torch.randint(1 << bits, x.shape, generator=self._chance)
        return torch.tensor(1 << (bits - 1) if bits else 0)


def interpret(
    plan: Plan,
    weights: Values,
    inputs: Values,
    offsets: Offsets | None = None,
    *,
    visit: Callable[[Node, Tensor], None] | None = None,
    estimate: bool = False,
    chance: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The value of every line. `inputs` (by label) and weights (by label) are real at the model level.

    Below it, inputs are real and are encoded here; weights are ring integers already. With `visit`, each value is
    shown to it and dropped after its last use: the answer then holds the result alone. `estimate` computes in
    float32 where that is faster (see `runtime.estimate`): to try scales and measure ranges, not to be exact. `chance`
    draws the offsets of truncations that were not recorded, as the dealer does.
    """
    values: dict[str, Tensor] = {}
    ring: Any = EstimatedRing() if estimate else z64
    real = torch.float32 if estimate else torch.float64
    last = _last_uses(plan) if visit else {}
    for node in plan.nodes:
        oracle = Oracle(iter(offsets.get(node.name, ())) if offsets is not None else None, ring, chance)
        values[node.name] = _value(plan, node, oracle, values, weights, inputs, real)
        if visit:
            visit(node, values[node.name])
            for name in last[node.name]:
                del values[name]
    return values


def _last_uses(plan: Plan) -> dict[str, list[str]]:
    """For each line, the values that are not needed after it; the result is always needed."""
    user = {node.name: node.name for node in plan.nodes} | {arg: n.name for n in plan.nodes for arg in n.args}
    out: dict[str, list[str]] = {node.name: [] for node in plan.nodes}
    for name, last in user.items():
        if name != plan.result:
            out[last].append(name)
    return out


def _value(
    plan: Plan, node: Node, oracle: Oracle, values: Values, weights: Values, inputs: Values, real: torch.dtype
) -> Tensor:
    if isinstance(node.op, Input):
        value = inputs[node.op.label]
        return value.to(real) if plan.level is Level.MODEL else z64.encode(value, node.type.frac)
    if isinstance(node.op, Weight):
        return weights[node.op.label].to(real if plan.level is Level.MODEL else torch.int64)
    return node.op.reference(oracle, *(values[arg] for arg in node.args))


def compare(plan: Plan, secure: Values, clear: Values) -> None:
    """Raise DivergenceError at the first line whose secure value differs from the oracle's in any bit of its ring."""
    for node in plan.nodes:
        if node.name not in secure:
            continue
        wrong = secure[node.name] != clear[node.name].to(secure[node.name].dtype)
        if bool(wrong.any()):
            where = tuple(int(i) for i in wrong.nonzero()[0])
            raise DivergenceError(
                f"%{node.name} = {node.op.name} (module '{node.path}'): {int(wrong.sum())} of {wrong.numel()} elements "
                f"differ between the secure run and the oracle, the first at {where}"
            )
