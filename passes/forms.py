"""Affine forms of a network's values, as far as they are cheap: see `ir.forms`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from tacit.ir.forms import Form
from tacit.ir.op import LocalOp
from tacit.ir.ops.linear import Product
from tacit.ir.ops.nonlinear import Trunc
from tacit.ir.ops.roles import Weight
from tacit.ir.plan import Node, Plan
from tacit.ir.ranges import Interval
from tacit.ir.types import dim_at

Tensor = torch.Tensor
# Multiply-adds that all forms of a network may take, and numbers that one of them may have.
_CHEAP, _ROOM = 1 << 29, 1 << 24
# What is affine loses nothing, and a truncation next to nothing: their results have no unknowns of their own.
_EXACT = LocalOp, Product, Trunc


class Forms:
    """The forms of the lines so far. Each unknown goes through all lines to come: there are as many as that is cheap.

    So they begin where the rest of the network is small: at the input of a perceptron, behind the last pool of a
    convolutional network.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._forms: dict[str, Form] = {}
        self._unknowns, self._left = 0, _CHEAP
        backwards = list(reversed(plan.nodes))
        self._work = dict(zip((n.name for n in backwards), accumulate(work(plan, n) for n in backwards), strict=True))
        sizes = accumulate((n.type.at(1).numel if n.type.batched else 0 for n in backwards), max)
        self._size = dict(zip((n.name for n in backwards), sizes, strict=True))

    def narrowed(self, node: Node, interval: Interval, operands: Sequence[Interval]) -> Interval:
        """The interval of a line, made narrower by its form; operands: those of what it reads, exact for constants."""
        if not node.type.batched or dim_at(node.type.shape[0], 1) != 1:
            return interval
        form = self._of(node, operands)
        if form is not None:
            form = form.within(interval)
        if not isinstance(node.op, _EXACT) and self._affords(node):
            form = (form or Form.box(interval)).named(self._unknowns)
            self._unknowns = len(form.terms)
        if form is None:
            return interval
        self._forms[node.name] = form
        found = form.interval
        # What is not repeated in memory is computed with element by element.
        return interval if bool((found.low <= interval.low).all() and (found.high >= interval.high).all()) else found

    def forget(self, name: str) -> None:
        self._forms.pop(name, None)

    def _of(self, node: Node, operands: Sequence[Interval]) -> Form | None:
        known: list[Form | Tensor] = []
        for arg, interval in zip(node.args, operands, strict=True):
            constant = isinstance(self._plan.node(arg).op, Weight)
            if not constant and arg not in self._forms:
                return None
            known.append(interval.low if constant else self._forms[arg])
        found: Form | None = node.op.form(*known)
        return found

    def _affords(self, node: Node) -> bool:
        """Unknowns for all elements of the line; they are then paid for."""
        size = node.type.at(1).numel
        price = size * self._work[node.name]
        if price > self._left or (self._unknowns + size) * self._size[node.name] > _ROOM:
            return False
        self._left -= price
        return True


def work(plan: Plan, node: Node) -> int:
    """Multiply-adds for one input, or elements."""
    if isinstance(node.op, Product):
        return node.op.work(node.type.at(1), plan.node(node.args[1]).type.at(1))
    return node.type.at(1).numel if node.type.batched else 0
