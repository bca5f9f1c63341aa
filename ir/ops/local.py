"""Ops that P0 and P1 compute on their own shares: linear in the shared values, no message."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.forms import REALS, Form
from tacit.ir.op import LocalOp, Program, Sample, expect, expect_kind
from tacit.ir.ranges import Interval
from tacit.ir.types import Batch, Shape, Type, broadcast
from tacit.ir.windows import Span, adaptive_spans, average_spans

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_N = Batch()
_MOST_AREAS = 1 << 24  # their sizes are one table


def grown(x: Type, width: int) -> int:
    """Widths inferred from types alone stop at the ring; range analysis says more."""
    return min(width, x.ring)


@dataclass(frozen=True)
class Add(LocalOp):
    """x + y at one scale, with numpy's broadcasting."""

    name = "add"

    def infer(self, x: Type, y: Type) -> Type:
        expect_kind("secret", x, y)
        expect(x.frac == y.frac, f"scales differ: f{x.frac} and f{y.frac}; shift one of them first")
        return x.with_(shape=broadcast(x.shape, y.shape), width=grown(x, max(x.width, y.width) + 1))

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0] + shares[1]

    def bound(self, x: Interval, y: Interval) -> Interval:
        return x + y

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 4, 3, 3), 12, 20)
        return (Sample(cls(), (x, x)), Sample(cls(), (x, Type("secret", (4, 1, 1), 12, 30))))


@dataclass(frozen=True)
class Sub(LocalOp):
    """x - y at one scale, with numpy's broadcasting."""

    name = "sub"

    def infer(self, x: Type, y: Type) -> Type:
        return Add().infer(x, y)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0] - shares[1]

    def bound(self, x: Interval, y: Interval) -> Interval:
        return x - y

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 5), 12, 20)
        return (Sample(cls(), (x, x)),)


@dataclass(frozen=True)
class AddPublic(LocalOp):
    """x + value for a public ring integer: P0 alone adds it."""

    name = "add_public"
    tight = True

    value: int

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        return x.with_(width=grown(x, max(x.width, self.value.bit_length() + 1) + 1))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        value: int = oracle.ring.wrapped(self.value)
        return args[0] + value

    def run(self, party: Party, *args: Any) -> Program:
        return args[0] + party.ring.wrapped(self.value, party.type.ring) if party.first else args[0]
        yield  # pragma: no cover  (makes this a generator)

    def bound(self, x: Interval) -> Interval:
        return x + Interval.full((), self.value, self.value)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(-3), (Type("secret", (_N, 5), 12, 20),)),)


@dataclass(frozen=True)
class MulPublic(LocalOp):
    """x times value / 2^bits, for a public integer: the result has `bits` more fractional bits."""

    name = "mul_public"
    tight = True

    value: int
    bits: int = 0

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        return x.with_(frac=x.frac + self.bits, width=grown(x, x.width + abs(self.value).bit_length()))

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        value: int = ring.wrapped(self.value, ring.bits_of(shares[0]))
        return shares[0] * value

    def bound(self, x: Interval) -> Interval:
        return x.scaled(self.value)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 5), 12, 20)
        return (Sample(cls(-37, 6), (x,)), Sample(cls(1 << 16, 16), (x,)))


def _areas(heights: list[int], widths: list[int]) -> Tensor:
    expect(len(heights) * len(widths) <= _MOST_AREAS, f"a pool has at most {_MOST_AREAS} windows")
    return torch.outer(torch.tensor(heights), torch.tensor(widths))


@dataclass(frozen=True)
class _Pool(LocalOp):
    """Averages over rectangles: sums, each times round(2^bits / size of its rectangle).

    Where all sizes are the same power of two, `bits` is its logarithm and the factor is 1: dividing then
    costs nothing at all, the scale takes it up.
    """

    def rectangles(self, height: int, width: int) -> tuple[list[Span], list[Span], Tensor]:
        """Row spans, column spans, and the divisors (OH, OW)."""
        raise NotImplementedError

    def factors(self, height: int, width: int, bits: int) -> Tensor:
        return torch.round(2.0**bits / self.rectangles(height, width)[2].double()).to(torch.int64)

    def scale_bits(self, height: int, width: int, wanted: int) -> int:
        """How many bits the factors take: exact where possible, else `wanted`."""
        sizes = {int(v) for v in self.rectangles(height, width)[2].flatten()}
        size = sizes.pop()
        return size.bit_length() - 1 if not sizes and size & (size - 1) == 0 else wanted

    def _infer(self, x: Type, bits: int) -> Type:
        expect_kind("secret", x)
        expect(len(x.shape) == 4, f"expected N x C x H x W, found {x}")
        height, width = x.at(1).dims[2:]
        rows, columns, _ = self.rectangles(height, width)
        area = max(b - a for a, b in rows) * max(b - a for a, b in columns)
        most = area * int(self.factors(height, width, bits).max())
        summed = x.width + most.bit_length()
        return x.with_(shape=(*x.shape[:2], len(rows), len(columns)), frac=x.frac + bits, width=grown(x, summed))

    def _compute(self, ring: Any, x: Tensor, bits: int) -> Tensor:
        height, width = x.shape[2:]
        rows, columns, _ = self.rectangles(height, width)
        sums: Tensor = ring.window_sums(x, rows, columns)
        return sums * self.factors(height, width, bits)

    def _bound(self, x: Interval, bits: int) -> Interval:
        height, width = x.shape[1:]
        factors = self.factors(height, width, bits).double()
        rows, columns, _ = self.rectangles(height, width)
        narrow = x.per_channel(0).narrowed(keep=(0,))
        if narrow.shape[1:] == (1, 1):  # the same bounds everywhere: times the number of elements, from least to most
            lengths = [torch.tensor([b - a for a, b in spans], dtype=torch.float64) for spans in (rows, columns)]
            weights = torch.outer(*lengths) * factors
            ends = narrow.scaled(float(weights.min())).union(narrow.scaled(float(weights.max())))
            return ends.expand((len(x.low), len(rows), len(columns)))

        low, high, size = REALS.window_sums(torch.stack([x.low, x.high, x.magnitude]), rows, columns)
        found = Interval.around((low + high) / 2 * factors, (high - low) / 2 * factors, size * factors)
        return found.not_below_zero(x)


@dataclass(frozen=True)
class AvgPool2d(_Pool):
    """Average pool as PyTorch defines it: windows, padding, ceil_mode, count_include_pad."""

    name = "avg_pool2d"

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int = 0  # 0: the size of the window
    bits: int = 0

    def rectangles(self, height: int, width: int) -> tuple[list[Span], list[Span], Tensor]:
        padded = zip(self.padding, self.kernel, strict=True)
        expect(all(2 * p <= k for p, k in padded), "the padding is at most half the window")
        spans = [
            average_spans(size, k, s, p, ceil_mode=self.ceil_mode, count_include_pad=self.count_include_pad)
            for size, k, s, p in zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        ]
        sizes = _areas(spans[0][1], spans[1][1])
        return spans[0][0], spans[1][0], torch.full_like(sizes, self.divisor) if self.divisor else sizes

    def infer(self, x: Type) -> Type:
        return self._infer(x, self.bits)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return self._compute(ring, shares[0], self.bits)

    def bound(self, x: Interval) -> Interval:
        return self._bound(x, self.bits)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 2, 5, 6), 12, 20)
        return (
            Sample(cls((2, 2), (2, 2), bits=2), (x,)),
            Sample(cls((3, 2), (2, 2), (1, 1), True, False, bits=10), (x,)),
        )


@dataclass(frozen=True)
class AdaptiveAvgPool2d(_Pool):
    """Adaptive average pool to a fixed output size."""

    name = "adaptive_avg_pool2d"

    output: tuple[int, ...]
    bits: int = 0

    def rectangles(self, height: int, width: int) -> tuple[list[Span], list[Span], Tensor]:
        rows, heights = adaptive_spans(height, self.output[0])
        columns, widths = adaptive_spans(width, self.output[1])
        return rows, columns, _areas(heights, widths)

    def infer(self, x: Type) -> Type:
        return self._infer(x, self.bits)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return self._compute(ring, shares[0], self.bits)

    def bound(self, x: Interval) -> Interval:
        return self._bound(x, self.bits)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 2, 5, 6), 12, 20)
        return (Sample(cls((1, 1), 10), (x,)), Sample(cls((2, 3), 12), (x,)))


@dataclass(frozen=True)
class Sum(LocalOp):
    """The sum along axes, which stay with one element. Axis 0 is the batch, and stays whole."""

    name = "sum"

    over: tuple[int, ...]

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(all(0 < axis < len(x.shape) for axis in self.over), f"{self.over} are not axes of {x}, or the batch")
        expect(len(set(self.over)) == len(self.over), f"{self.over} name an axis twice")
        shape = tuple(1 if i in self.over else d for i, d in enumerate(x.shape))
        return x.with_(shape=shape, width=grown(x, x.width + (self.count(x.at(1).dims) - 1).bit_length()))

    def count(self, dims: Shape) -> int:
        return math.prod(dims[axis] for axis in self.over)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0].sum(self.over, keepdim=True)

    def bound(self, x: Interval) -> Interval:
        return x.summed(tuple(axis - 1 for axis in self.over))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1, 3)), (Type("secret", (_N, 4, 3, 2), 12, 20),)),)


@dataclass(frozen=True)
class SumBatch(LocalOp):
    """The sum over the batch, as a tensor of one element. The batch is taken to be below 2^31."""

    name = "sum_batch"
    reveals = "correct"
    answer = (
        "one sum over its whole batch, such as how many inputs are of the class it expected, and nothing on any single "
        "one (unless the batch is but one)"
    )

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(len(x.shape) == 1, f"expected one number per batch element, found {x}")
        return x.with_(shape=(1,), width=grown(x, x.width + 31))

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0].sum(0, keepdim=True)

    def bound(self, x: Interval) -> Interval:
        factor = 2.0**31
        return x.reshape((1,)).scaled(factor).union(Interval.full((1,), 0.0, 0.0))

    def form(self, *args: Form | Tensor) -> Form | None:
        return None  # rows of a form are no batch

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Type("secret", (_N,), 0, 2),)),)
