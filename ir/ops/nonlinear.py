"""Truncation, ReLU, max pool, argmax, equality: the ops of the fixed level and of the fused suite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.forms import Form
from tacit.ir.op import Level, Op, Program, Sample, Subprotocol, expect, expect_kind
from tacit.ir.ops.comparison import Select, Truncate, check_window
from tacit.ir.ranges import Interval
from tacit.ir.types import DTYPES, RING_BITS, Batch, Shape, Type, bits_for
from tacit.ir.windows import output_size

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_N = Batch()
_SLOTS = 1 << 20  # of a max pool: they are taken out one by one
_FIXED, _PROTOCOL = frozenset({Level.FIXED}), frozenset({Level.PROTOCOL})


@dataclass(frozen=True)
class Trunc(Op):
    """floor((x + t) / 2^bits), t public and uniform: the dealer's truncation, one round, never a failure."""

    name = "trunc"
    tight = True
    levels = _FIXED | _PROTOCOL
    rings = tuple(DTYPES)

    bits: int
    ring: int = RING_BITS

    @property
    def changes_ring(self) -> bool:
        return True

    def least_ring(self, *args: Type) -> int:
        return max(args[0].width + 1, self.bits + 2)

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(0 < self.bits <= min(x.frac, x.ring - 2), f"cannot truncate {x} by {self.bits} bits")
        # The fixed level comes before range analysis: there, every width is still the ring's, Z_2^64.
        expect(x.width < x.ring or x.ring == RING_BITS, f"{x} is too wide to be truncated: at most b{x.ring - 1}")
        width = max(min(x.width, x.ring - 1) - self.bits + 1, 3)
        return x.with_(frac=x.frac - self.bits, width=min(width, self.ring), ring=self.ring)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        offset: Tensor = oracle.offset(args[0], self.bits)
        return (args[0] + offset) >> self.bits

    def bound(self, x: Interval) -> Interval:
        return x.truncated(self.bits)

    def form(self, x: Form) -> Form:
        return x.relaxed(2.0**-self.bits, 0.0, 1.0)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        expect(x.width < x.ring, f"{x} is too wide to be truncated: at most b{x.ring - 1}")
        return (Truncate(x.dims, self.bits, x.ring, self.ring),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(16), (Type("secret", (_N, 5), 28, 40),)),
            Sample(cls(7), (Type("secret", (_N, 9), 12, 63),)),
            Sample(cls(40), (Type("secret", (_N, 3), 41, 63),)),
        )


@dataclass(frozen=True)
class FixedReLU(Op):
    """max(x, 0), truncated by `truncate` bits."""

    name = "fixed.relu"
    tight = True
    levels = _FIXED

    truncate: int = 0

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        return Trunc(self.truncate, x.ring).infer(x) if self.truncate else x

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        value = Trunc(self.truncate).reference(oracle, *args) if self.truncate else args[0]
        return value.clamp(min=0)

    def bound(self, x: Interval) -> Interval:
        return (x.truncated(self.truncate) if self.truncate else x).relu()

    def form(self, x: Form) -> Form:
        """Between low < 0 < high, max(x, 0) lies above its chord times x, and below the chord."""
        x = Trunc(self.truncate).form(x) if self.truncate else x
        low, high = x.interval.low, x.interval.high
        slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
        half = torch.where((low < 0) & (high > 0), -low * slope / 2, 0.0)
        return x.relaxed(slope, half, half)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Type("secret", (_N, 5), 12, 20),)), Sample(cls(16), (Type("secret", (_N, 5), 28, 40),)))


@dataclass(frozen=True)
class ReLU(FixedReLU):
    """max(x, 0), truncation fused, in three rounds: one opening, one PrivateCompare, one bit (`comparison.Select`)."""

    name = "relu"
    suite = "fused"
    levels = _PROTOCOL
    rings = tuple(DTYPES)

    window: int = RING_BITS
    ring: int = RING_BITS  # of a truncated result; else it is that of x

    @property
    def changes_ring(self) -> bool:
        return self.truncate > 0

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        check_window(x, self.window, self.truncate)
        if not self.truncate:
            expect(self.ring == RING_BITS, "a result that is not truncated stays in its ring")
            return x
        expect(0 < self.truncate <= x.frac, f"cannot truncate {x} by {self.truncate} bits")
        # Unlike in a truncation alone, x may take all bits of its ring.
        width = max(x.width - self.truncate + 1, 3)
        return x.with_(frac=x.frac - self.truncate, width=min(width, self.ring), ring=self.ring)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        target = self.ring if self.truncate else x.ring
        return (Select(x.dims, self.window, self.truncate, self.truncate, ring=x.ring, target=target),)

    def run(self, party: Party, *args: Any) -> Program:
        return (yield from party.part(*args))[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 37), 28, 40)
        return (
            Sample(cls(16, 40), (x,)),
            Sample(cls(0, 41), (x,)),
            Sample(cls(12, 63), (x,)),
            Sample(cls(), (x.with_(width=64),)),
            Sample(cls(8, 13), (x.with_(frac=10, width=12),)),
        )


@dataclass(frozen=True)
class FixedMaxPool2d(Op):
    """Maximum over windows. Differences below 2^drop may be decided either way, as t has it."""

    name = "fixed.max_pool2d"
    tight = True
    levels = _FIXED

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    ceil_mode: bool = False
    drop: int = 0

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(len(x.shape) == 4, f"expected N x C x H x W, found {x}")
        expect(
            all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True)),
            "the padding is at most half the window",
        )
        expect(0 < math.prod(self.kernel) <= _SLOTS, f"a window has at most {_SLOTS} elements")
        return x.with_(shape=(*x.shape[:2], *self.output(x.at(1).dims)))

    def output(self, shape: Shape) -> Shape:
        return tuple(
            output_size(*args, ceil_mode=self.ceil_mode)
            for args in zip(shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )

    def slots(self, x: Tensor, lowest: int | float) -> list[Tensor]:
        """The k-th element of every window, for every k, each (N, C, OH, OW); `lowest` fills the padding."""
        out = self.output(tuple(x.shape))
        need = [
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(out, self.stride, self.dilation, self.kernel, strict=True)
        ]
        before = self.padding
        after = [max(0, n - size - p) for n, size, p in zip(need, x.shape[2:], before, strict=True)]
        if any(before) or any(after):
            x = F.pad(x, (before[1], after[1], before[0], after[0]), value=lowest)
        return [
            x[
                :,
                :,
                i * self.dilation[0] : i * self.dilation[0] + (out[0] - 1) * self.stride[0] + 1 : self.stride[0],
                j * self.dilation[1] : j * self.dilation[1] + (out[1] - 1) * self.stride[1] + 1 : self.stride[1],
            ]
            for i in range(self.kernel[0])
            for j in range(self.kernel[1])
        ]

    @property
    def lowest(self) -> int:
        """What fills the padding: below every value, and a difference with it still fits."""
        return -1 << 61

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        slots = self.slots(args[0], self.lowest)
        if self.drop:
            return tournament(slots, lambda a, b: b + _positive(oracle, a - b, self.drop))
        return torch.stack(slots).amax(0)

    def bound(self, x: Interval) -> Interval:
        shape = (len(x.low), *self.output((1, *x.shape)))
        narrow = x.per_channel(0).narrowed(keep=(0,))
        if narrow.shape[1:] == (1, 1):
            best = narrow.expand(shape)
        else:
            best = Interval(*(torch.stack(self.slots(v[None], -math.inf)).amax(0)[0] for v in (x.low, x.high)))
        # At each level of the tournament, a slot that loses by less than 2^drop may still be taken.
        levels = len(_levels(math.prod(self.kernel)))
        return best - Interval.full((), 0.0, levels * 2.0**self.drop) if self.drop else best

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 2, 5, 6), 28, 40)
        return (
            _samples(cls((2, 2), (2, 2)), x)
            + _samples(cls((3, 3), (2, 2), (1, 1), (1, 1), True, 16), x)
            + _samples(cls((2, 1), (1, 1), dilation=(2, 1)), x)
        )


def _positive(oracle: Any, x: Tensor, drop: int) -> Tensor:
    """x where floor((x + t) / 2^drop) >= 0, else 0."""
    kept = (x + oracle.offset(x, drop)) >> drop >= 0 if drop else x >= 0
    return torch.where(kept, x, 0)


def tournament(slots: Sequence[Tensor], best: Any) -> Tensor:
    """Pairs of slots meet, all pairs of a level at once, until one is left; a is the earlier one."""
    level = torch.stack(list(slots))
    while len(level) > 1:
        half = len(level) // 2
        winners = best(level[0 : 2 * half : 2], level[1 : 2 * half : 2])
        level = torch.cat([winners, level[2 * half :]])
    return level[0]


def _levels(n: int) -> list[int]:
    """How many pairs meet at each level of a tournament of n slots."""
    pairs = []
    while n > 1:
        pairs.append(n // 2)
        n -= n // 2
    return pairs


@dataclass(frozen=True)
class MaxPool2d(FixedMaxPool2d):
    """A tournament tree: ceil(log2 n) comparisons deep, all windows at once; max(a, b) = b + ReLU(a - b)."""

    name = "max_pool2d"
    suite = "fused"
    levels = _PROTOCOL
    rings = tuple(DTYPES)

    window: int = RING_BITS

    def infer(self, x: Type) -> Type:
        # A difference, also with a padded slot, takes one bit more than the values.
        check_window(x.with_(width=min(x.width + 1, x.ring)), self.window, self.drop)
        expect(x.width < x.ring, f"{x} leaves no room for a difference")
        return super().infer(x)

    @property
    def lowest(self) -> int:
        return -1 << (self.window - 2)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        one = self.infer(x).dims
        return tuple(
            Select((pairs, *one), self.window, drop=self.drop, ring=x.ring, target=x.ring)
            for pairs in _levels(math.prod(self.kernel))
        )

    def run(self, party: Party, *args: Any) -> Program:
        if party.rank > 1:
            for _ in party.sized.parts:
                yield from party.part()
            return None
        level = torch.stack(self.slots(args[0], self.lowest if party.first else 0))
        while len(level) > 1:
            half = len(level) // 2
            a, b = level[0 : 2 * half : 2], level[1 : 2 * half : 2]
            (gain,) = yield from party.part(a - b)
            level = torch.cat([b + gain, level[2 * half :]])
        return level[0]


@dataclass(frozen=True)
class FixedArgmax(Op):
    """The index of the largest of the last dimension; the first of equals."""

    name = "fixed.argmax"
    levels = _FIXED
    reveals = "argmax"
    answer = "the class of each of its inputs, and no logits"

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(len(x.shape) == 2, f"expected N x classes, found {x}")
        return Type("secret", x.shape[:1], 0, bits_for(0, x.at(1).dims[1] - 1), x.ring)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        best, index = args[0][:, 0], torch.zeros(len(args[0]), dtype=torch.int64)
        for i in range(1, args[0].shape[1]):
            better = args[0][:, i] > best
            best, index = torch.where(better, args[0][:, i], best), torch.where(better, i, index)
        return index

    def bound(self, x: Interval) -> Interval:
        return Interval.full((), 0.0, float(x.low.shape[0] - 1))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(s for n in (2, 7, 10) for s in _samples(cls(), Type("secret", (_N, n), 28, 40)))


@dataclass(frozen=True)
class Argmax(FixedArgmax):
    """A tournament tree that carries the index along: three rounds a level, exact comparisons."""

    name = "argmax"
    suite = "fused"
    levels = _PROTOCOL
    rings = tuple(DTYPES)

    window: int = RING_BITS

    def infer(self, x: Type) -> Type:
        check_window(x.with_(width=min(x.width + 1, x.ring)), self.window, 0)
        expect(x.width < x.ring, f"{x} leaves no room for a difference")
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        n, classes = x.dims
        pairs, ring = _levels(classes), x.ring
        # At the first level the indices are public: the bit alone selects them. The last level's maximum is not used.
        return tuple(
            Select(
                (count, n),
                self.window,
                relu=i < len(pairs) - 1,
                bit=i == 0,
                payloads=int(i > 0),
                ring=ring,
                target=ring,
            )
            for i, count in enumerate(pairs)
        )

    def run(self, party: Party, *args: Any) -> Program:
        parts = party.sized.parts
        if party.rank > 1:
            for _ in parts:
                yield from party.part()
            return None
        value = args[0].t().contiguous()
        index = torch.arange(len(value), dtype=value.dtype).reshape(-1, 1) * int(party.first)
        for i, part in enumerate(parts):
            half = part.shape[0]  # type: ignore[attr-defined]
            a, b = value[0 : 2 * half : 2], value[1 : 2 * half : 2]
            ia, ib = index[0 : 2 * half : 2], index[1 : 2 * half : 2]
            if i == 0:
                *gain, bit = yield from party.part(a - b)
                chosen = torch.arange(1, 2 * half, 2, dtype=bit.dtype).reshape(-1, 1) * int(party.first) - bit
                index = index.expand(-1, value.shape[1])
            else:
                *gain, step = yield from party.part(a - b, ia - ib)
                chosen = ib + step
            value = torch.cat([b + gain[0], value[2 * half :]]) if gain else value
            index = torch.cat([chosen, index[2 * half :]])
        return index[0]


@dataclass(frozen=True)
class FixedEqual(Op):
    """1 where x = y, else 0, for integers."""

    name = "fixed.equal"
    levels = _FIXED

    def infer(self, x: Type, y: Type) -> Type:
        expect_kind("secret", x, y)
        expect(x.frac == 0 == y.frac and x.shape == y.shape, f"expected integers of one shape, found {x} and {y}")
        return x.with_(width=2)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] == args[1]).long()

    def bound(self, x: Interval, y: Interval) -> Interval:
        return Interval.full(tuple(x.low.shape), 0.0, 1.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return _samples(cls(), Type("secret", (_N,), 0, 3), Type("secret", (_N,), 0, 3))


@dataclass(frozen=True)
class Equal(FixedEqual):
    """[x >= y] + [y >= x] - 1: both comparisons in the same three rounds."""

    name = "equal"
    suite = "fused"
    levels = _PROTOCOL
    rings = tuple(DTYPES)

    window: int = RING_BITS

    def infer(self, x: Type, y: Type) -> Type:
        for side in (x, y):
            check_window(side.with_(width=min(side.width + 1, side.ring)), self.window, 0)
            expect(side.width < side.ring, f"{side} leaves no room for a difference")
        return super().infer(x, y)

    def parts(self, x: Type, y: Type) -> tuple[Subprotocol, ...]:
        return (Select((2, *x.dims), self.window, relu=False, bit=True, ring=x.ring, target=x.ring),)

    def run(self, party: Party, *args: Any) -> Program:
        if party.rank > 1:
            yield from party.part()
            return None
        x, y = args
        (bits,) = yield from party.part(torch.stack([x - y, y - x]))
        return bits[0] + bits[1] - int(party.first)


def _samples(op: Op, *args: Type) -> tuple[Sample, ...]:
    """A sample of the op; those of the protocol level also state the window their operands need."""
    if hasattr(op, "window"):
        op = replace(op, window=max(arg.width for arg in args) + 1)  # type: ignore[type-var]
    return (Sample(op, args),)
