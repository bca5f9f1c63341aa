"""Products of two secrets that both depend on the input: element by element, and of matrices.

Both factors are masked afresh and opened, with a triple dealt by P2 (SecureNN, Algorithm 1; Beaver 1991): one round,
the same in all suites. A square opens its one factor once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tacit.ir.forms import Form
from tacit.ir.op import Level, Op, Sample, Subprotocol, expect, expect_kind
from tacit.ir.ops.linear import Product
from tacit.ir.ops.local import Sum
from tacit.ir.ops.securenn import Multiply
from tacit.ir.ops.spline import FixedSpline
from tacit.ir.ranges import Interval
from tacit.ir.types import RING_BITS, Batch, Type, broadcast

Tensor = torch.Tensor
_N = Batch()
_BOTH = frozenset({Level.FIXED, Level.PROTOCOL})
_X = Type("secret", (_N, 4, 3, 2), 12, 16)
# Multiply-adds that the bounds of one product of matrices may take.
_CHEAP = 1 << 24


class OfTwoSecrets(Product):
    """Base: the protocol of a bilinear map."""

    levels = _BOTH

    def form(self, *args: Form | Tensor) -> None:
        return None  # linear in each, not in both

    def parts(self, x: Type, y: Type) -> tuple[Subprotocol, ...]:
        return (Multiply(self, x.dims, y.dims, self.infer(x, y).dims),)


@dataclass(frozen=True)
class Times(OfTwoSecrets):
    """x times y element by element, with numpy's broadcasting of either; both have the same batch."""

    name = "times"

    def infer(self, x: Type, y: Type) -> Type:
        expect_kind("secret", x, y)
        expect(len(x.shape) == len(y.shape), f"{x} and {y} differ in their number of dimensions")
        return x.with_(shape=broadcast(x.shape, y.shape), frac=x.frac + y.frac, width=RING_BITS)

    def product(self, ring: Any, x: Tensor, w: Tensor) -> Tensor:
        return x * w

    def bound(self, x: Interval, w: Interval) -> Interval:
        return x * w

    def work(self, out: Type, w: Type) -> int:
        return out.numel

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(), (_X, _X)),
            Sample(cls(), (_X, _X.with_(shape=(_N, 4, 1, 1), frac=10))),
            Sample(cls(), (_X.with_(shape=(_N, 1, 3, 2)), _X.with_(shape=(_N, 4, 3, 1)))),
        )


@dataclass(frozen=True)
class MatMul(OfTwoSecrets):
    """x (N, ..., A, B) times y (N, ..., B, C), one product for each of the leading places, which are alike in both."""

    name = "matmul"

    def infer(self, x: Type, y: Type) -> Type:
        expect_kind("secret", x, y)
        expect(
            len(x.shape) == len(y.shape) >= 3 and x.shape[:-2] == y.shape[:-2] and x.shape[-1] == y.shape[-2],
            f"{x} does not fit {y}",
        )
        return x.with_(shape=(*x.shape[:-1], y.shape[-1]), frac=x.frac + y.frac, width=RING_BITS)

    def product(self, ring: Any, x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty((*x.shape[:-1], w.shape[-1]), dtype=x.dtype)
        left, right, target = (t.reshape(-1, *t.shape[-2:]) for t in (x, w, out))
        for i in range(len(left)):
            target[i] = ring.matmul(left[i], right[i])
        return out

    def work(self, out: Type, w: Type) -> int:
        return out.numel * w.dims[-2]

    def bound(self, x: Interval, w: Interval) -> Interval:
        """From centres and radii; where that takes long, alike at all places of the leading and outer dimensions."""
        shape = (*x.shape[:-1], w.shape[-1])
        if math.prod(shape) * x.shape[-1] > _CHEAP:
            rank = len(x.shape)
            x = x.hull(tuple(range(rank - 1))).narrowed(keep=(-1,))
            w = w.hull(tuple(range(rank - 2))).narrowed(keep=(-2, -1))
        centre = x.centre @ w.centre
        radius = x.centre.abs() @ w.radius + x.radius @ (w.centre.abs() + w.radius)
        return Interval.around(centre, radius, x.magnitude @ w.magnitude).expand(shape)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, y = _X.with_(shape=(_N, 2, 3, 4)), _X.with_(shape=(_N, 2, 4, 5), frac=10)
        return (
            Sample(cls(), (x, y)),
            Sample(cls(), (x.with_(shape=(Batch(2), 3, 4)), y.with_(shape=(Batch(2), 4, 1)))),
        )


@dataclass(frozen=True)
class SquaresModulo(Op):
    """The sum of squares along axes, which stay with one element, plus a public integer: modulo 2^64, however large.

    Nothing is claimed of its size, and nothing may compare or truncate it: it serves rows that are small, and is left
    unchosen (`choice.Choose`) in others.
    """

    name = "fixed.squares_modulo"
    levels = frozenset({Level.FIXED})
    modular = True

    over: tuple[int, ...]
    plus: int = 0

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(2 * x.frac < RING_BITS, f"squares of {x} have more fractional bits than there are")
        return Sum(self.over).infer(x).with_(frac=2 * x.frac, width=RING_BITS)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] * args[0]).sum(self.over, keepdim=True) + self.plus

    def bound(self, x: Interval) -> Interval:
        return Interval.full(tuple(1 if i + 1 in self.over else n for i, n in enumerate(x.shape)), -(2.0**63), 2.0**63)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1,), 5), (Type("secret", (Batch(), 4, 3), 24, 60),)),)


def square(of: int) -> FixedSpline:
    """x^2 of x with `of` fractional bits, exact, with twice as many: a polynomial without knots, one round."""
    reach = 1 << 40  # the origin is in the middle; beyond it the polynomial is the same
    return FixedSpline("square", of, 2 * of, -reach, reach, (0, 0, 1), 2 * of)
