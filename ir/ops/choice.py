"""The bit of a comparison, and a value chosen by it: the fixed level, the fused suite, the textbook suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.op import Level, Op, Program, Sample, Subprotocol, expect, expect_kind
from tacit.ir.ops import securenn
from tacit.ir.ops.comparison import Select, check_window
from tacit.ir.ranges import Interval
from tacit.ir.types import DTYPES, RING_BITS, Batch, Type

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_FIXED, _PROTOCOL = frozenset({Level.FIXED}), frozenset({Level.PROTOCOL})
_X = Type("secret", (Batch(), 9), 28, 40)


@dataclass(frozen=True)
class FixedPositive(Op):
    """1 where x >= 0, else 0."""

    name = "fixed.positive"
    levels = _FIXED

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        return x.with_(frac=0, width=2)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] >= 0).long()

    def bound(self, x: Interval) -> Interval:
        return Interval.full(tuple(x.shape), 0.0, 1.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X,)),)


@dataclass(frozen=True)
class FixedChoose(Op):
    """value where x >= 0, else 0; operands x, value, of one shape."""

    name = "fixed.choose"
    tight = True
    levels = _FIXED

    def infer(self, x: Type, value: Type) -> Type:
        expect_kind("secret", x, value)
        expect(x.shape == value.shape, f"expected operands of one shape, found {x} and {value}")
        return value

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return torch.where(args[0] >= 0, args[1], 0)

    def bound(self, x: Interval, value: Interval) -> Interval:
        return value.union(Interval.full((), 0.0, 0.0))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X, _X.with_(frac=12, width=50))),)


@dataclass(frozen=True)
class Positive(FixedPositive):
    """1 where x >= 0, else 0, in three rounds: one opening, one PrivateCompare, one bit (`comparison.Select`)."""

    name = "positive"
    suite = "fused"
    levels = _PROTOCOL
    rings = tuple(DTYPES)

    window: int = RING_BITS

    def infer(self, x: Type) -> Type:
        check_window(x, self.window, 0)
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        return (Select(x.dims, self.window, relu=False, bit=True, ring=x.ring, target=x.ring),)

    def run(self, party: Party, *args: Any) -> Program:
        return (yield from party.part(*args))[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls(40), (_X,)), Sample(cls(), (_X.with_(width=64),))


@dataclass(frozen=True)
class Choose(FixedChoose):
    """The value where x >= 0, else 0, in three rounds: x and the value are opened behind masks, x alone is compared."""

    name = "choose"
    suite = "fused"
    levels = _PROTOCOL
    rings = tuple(DTYPES)

    window: int = RING_BITS

    def infer(self, x: Type, value: Type) -> Type:
        check_window(x, self.window, 0)
        return super().infer(x, value)

    def parts(self, x: Type, value: Type) -> tuple[Subprotocol, ...]:
        return (Select(x.dims, self.window, relu=False, payloads=1, ring=x.ring, target=x.ring),)

    def run(self, party: Party, *args: Any) -> Program:
        return (yield from party.part(*args))[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(40), (_X, _X.with_(frac=12, width=50))),)


@dataclass(frozen=True)
class TextbookPositive(FixedPositive):
    """DReLU by ShareConvert and ComputeMSB."""

    name = "securenn.positive"
    suite = "securenn"
    levels = _PROTOCOL

    def infer(self, x: Type) -> Type:
        securenn.check_width(x)
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        return securenn.drelu(x.numel)

    def run(self, party: Party, *args: Any) -> Program:
        bit = yield from securenn.run_drelu(party, args[0])
        return None if bit is None else bit.view(args[0].shape)


@dataclass(frozen=True)
class TextbookChoose(FixedChoose):
    """DReLU, then a product with the value."""

    name = "securenn.choose"
    suite = "securenn"
    levels = _PROTOCOL

    def infer(self, x: Type, value: Type) -> Type:
        securenn.check_width(x)
        return super().infer(x, value)

    def parts(self, x: Type, value: Type) -> tuple[Subprotocol, ...]:
        return (*securenn.drelu(x.numel), securenn.select(x.numel))

    def run(self, party: Party, *args: Any) -> Program:
        bit = yield from securenn.run_drelu(party, args[0])
        if bit is None:
            return (yield from party.part())
        out = yield from party.part(args[1].reshape(-1), bit)
        return out.view(args[1].shape)
