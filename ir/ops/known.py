"""What is known of a value by its meaning and intervals cannot see: |x| is not negative, a norm is limited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.forms import Form, itself
from tacit.ir.op import LocalOp, Sample, expect, expect_kind
from tacit.ir.ops.layer import real
from tacit.ir.ops.model import ModelOp
from tacit.ir.ranges import Interval
from tacit.ir.types import Batch, Type

if TYPE_CHECKING:
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Known(LocalOp):
    """The same value, of which it is known that low <= v <= high, in ring integers. Nothing is computed or sent.

    Whoever writes it answers for the claim: it has to hold with all roundings. The oracle checks it (`overflow`).
    """

    name = "known"
    tight = True

    low: float
    high: float

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(self.low <= self.high, f"no value lies in [{self.low}, {self.high}]")
        return x

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0]

    def bound(self, x: Interval) -> Interval:
        return x.meet(Interval.full((1,) * len(x.shape), self.low, self.high))

    def form(self, *args: Form | Tensor) -> Form | None:
        return itself(args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(-(2.0**30), 2.0**30), (Type("secret", (_N, 5), 12, 20),)),)


@dataclass(frozen=True)
class WithinHull(LocalOp):
    """The same value, of which it is known that it is nearly an average of v along the last axis but one.

    Operands: the value and v, whose scale has `shift` fractional bits fewer. The weights of the average add up to
    1 +- 1/16, with the negative ones no more than that: attention. Four units of v's scale are left for roundings.
    """

    name = "within_hull"

    shift: int = 0

    def infer(self, x: Type, v: Type) -> Type:
        expect_kind("secret", x, v)
        expect(x.frac == v.frac + self.shift and x.shape[-1] == v.shape[-1], f"{x} is no average of {v}")
        return x

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0]

    def bound(self, x: Interval, v: Interval) -> Interval:
        hull = v.hull((len(v.shape) - 2,)).narrowed()
        slack, unit = hull.magnitude * (3 / 16) + 4, 2.0**self.shift
        low, high = (hull.low - slack) * unit, (hull.high + slack) * unit
        return x.meet(Interval(low, high))

    def form(self, *args: Form | Tensor) -> Form | None:
        return itself(args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 3, 5), 14, 20)
        return (Sample(cls(2), (x, x.with_(shape=(_N, 4, 5), frac=12))),)


@dataclass(frozen=True)
class Among(LocalOp):
    """The same value, of which it is known that each element is one of those of v along its last axis: a maximum.

    Operands: the value and v, alike in shape but for the last axis, and at one scale.
    """

    name = "among"
    tight = True

    def infer(self, x: Type, v: Type) -> Type:
        expect_kind("secret", x, v)
        expect(x.frac == v.frac and x.shape[:-1] == v.shape[:-1], f"the elements of {x} are none of {v}")
        return x

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0]

    def bound(self, x: Interval, v: Interval) -> Interval:
        hull = v.hull((len(v.shape) - 1,))
        return x.meet(Interval(hull.low[..., :1], hull.high[..., :1]))

    def form(self, *args: Form | Tensor) -> Form | None:
        return itself(args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 3, 5), 12, 20)
        return (Sample(cls(), (x, x.with_(shape=(_N, 3, 4), width=24))),)


@dataclass(frozen=True)
class Absolute(ModelOp):
    """|x| = 2 ReLU(x) - x, of one truncated x, so that it is never negative."""

    name = "model.abs"
    aten = ("aten.abs.default", "aten.abs_.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Any, **k: Any) -> str:
        out: str = graph.emit(cls(), k["self"])
        return out

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].abs()

    def expand(self, b: FixedBuilder, *args: str) -> str:
        from tacit.ir.ops.local import MulPublic

        x = b.at_scale(args[0])
        return b.known(b.minus(b.emit(MulPublic(2), b.relu(x)), x), low=0.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7),)),)
