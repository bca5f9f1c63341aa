"""Intervals of ring integers, propagated soundly: float64 with an outward margin for its rounding.

Bounds have the shape of the value, without the batch. Along a dimension in which they do not vary they are stored
once, with stride 0: an image bounded channel by channel takes as much memory as it has channels, and the
methods below compute on no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch

from tacit.ir.types import bits_for, broadcast

Tensor = torch.Tensor
_MARGIN = 2.0**-32  # covers the rounding of sums of up to 2^20 terms of 53 bits
_EXACT = 2.0**53  # up to here, a rounded result is on the right side of every integer
# Above so many elements, a product bounds a whole channel at once instead of every element.
DENSE = 1 << 16


def compact(value: Tensor) -> Tensor:
    """The tensor without the repetitions along dimensions of stride 0, which become of size 1."""
    for dim, (stride, size) in enumerate(zip(value.stride(), value.shape, strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
    return value


def _outward(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Make up for the rounding of one operation, where integers are no longer exact."""
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    low = torch.where(low.abs() > _EXACT, torch.nextafter(low, -infinity), low)
    return low, torch.where(high.abs() > _EXACT, torch.nextafter(high, infinity), high)


@dataclass(frozen=True)
class Interval:
    """Element-wise bounds of a value, in ring integers; shape of the value without the batch."""

    low: Tensor
    high: Tensor

    @staticmethod
    def full(shape: tuple[int, ...], low: float, high: float) -> Interval:
        return Interval(*(torch.tensor(v, dtype=torch.float64).expand(shape) for v in (low, high)))

    @staticmethod
    def exactly(value: Tensor) -> Interval:
        value = value.double()
        return Interval(value, value)

    @staticmethod
    def around(centre: Tensor, radius: Tensor, magnitude: Tensor) -> Interval:
        """centre +- radius, where `magnitude` bounds the sum of the absolute terms that were added up."""
        slack = magnitude * _MARGIN
        return Interval(centre - radius - slack, centre + radius + slack)

    @property
    def shape(self) -> torch.Size:
        return self.low.shape

    @property
    def centre(self) -> Tensor:
        return self._combined(lambda low, high: (low + high) / 2)

    @property
    def radius(self) -> Tensor:
        return self._combined(lambda low, high: (high - low) / 2)

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value, element by element."""
        return self._combined(lambda low, high: torch.maximum(low.abs(), high.abs()))

    @property
    def width(self) -> int:
        """Signed width in bits of the whole tensor."""
        return bits_for(*self.ends)

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest of all bounds."""
        return float(compact(self.low).min()), float(compact(self.high).max())

    def _combined(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return function(compact(self.low), compact(self.high)).expand(self.low.shape)

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """The image under an increasing function, applied element by element."""
        low, high = (function(compact(v)).expand(v.shape) for v in (self.low, self.high))
        return Interval(low, high)

    def _joined(self, other: Interval, function: Callable[..., tuple[Tensor, Tensor]]) -> Interval:
        """function(low, high, other's low, other's high), on no more elements than there are different ones."""
        shape = torch.Size(d for d in broadcast(self.shape, other.shape) if isinstance(d, int))
        low, high = function(*(compact(v) for v in (self.low, self.high, other.low, other.high)))
        return Interval(low.expand(shape), high.expand(shape))

    def union(self, other: Interval) -> Interval:
        return self._joined(other, lambda a, b, c, d: (torch.minimum(a, c), torch.maximum(b, d)))

    def meet(self, other: Interval) -> Interval:
        return self._joined(other, lambda a, b, c, d: (torch.maximum(a, c), torch.minimum(b, d)))

    def hull(self, dims: tuple[int, ...]) -> Interval:
        """Wider bounds that do not vary along these dimensions."""
        low, high = compact(self.low).amin(dims, keepdim=True), compact(self.high).amax(dims, keepdim=True)
        return Interval(low.expand(self.low.shape), high.expand(self.high.shape))

    def not_below_zero(self, *terms: Interval) -> Interval:
        """Of sums with positive factors, whose slack does not reach below 0 where no term does."""
        least = min(float(compact(x.low).min()) for x in terms)
        return self.map(lambda v: v.clamp(min=0)) if least >= 0 else self

    def narrowed(self, keep: tuple[int, ...] = ()) -> Interval:
        """Without the repetitions: dimensions that do not vary have size 1, but for those to keep."""
        shape = [
            size if dim - self.low.dim() in keep or dim in keep or a > 1 or b > 1 else 1
            for dim, (size, a, b) in enumerate(
                zip(self.low.shape, compact(self.low).shape, compact(self.high).shape, strict=True)
            )
        ]
        low, high = (v[tuple(slice(0, n) for n in shape)] for v in (self.low, self.high))
        return Interval(low, high)

    def expand(self, shape: tuple[int, ...]) -> Interval:
        """Repeated to this shape, without taking memory."""
        return Interval(self.low.expand(shape), self.high.expand(shape))

    def per_channel(self, dim: int, limit: int = DENSE) -> Interval:
        """Hulls along all dimensions but `dim`, if the value has more than `limit` elements."""
        dim %= self.low.dim()
        others = tuple(d for d in range(self.low.dim()) if d != dim)
        narrow = self.narrowed()
        small = max(narrow.low.numel(), narrow.high.numel()) <= limit
        return self if small or not others else self.hull(others)

    def __add__(self, other: Interval) -> Interval:
        return self._joined(other, lambda a, b, c, d: _outward(a + c, b + d))

    def __sub__(self, other: Interval) -> Interval:
        return self._joined(other, lambda a, b, c, d: _outward(a - d, b - c))

    def scaled(self, factor: float) -> Interval:
        low, high = (self.low, self.high) if factor >= 0 else (self.high, self.low)
        shape = self.low.shape
        low, high = _outward(compact(low) * factor, compact(high) * factor)
        return Interval(low.expand(shape), high.expand(shape))

    def __mul__(self, other: Interval) -> Interval:
        def corners(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
            ends = (a * c, a * d, b * c, b * d)
            return _outward(reduce(torch.minimum, ends), reduce(torch.maximum, ends))

        return self._joined(other, corners)

    def truncated(self, bits: int) -> Interval:
        """Of floor((x + t) / 2^bits), 0 <= t < 2^bits: up to one above the floor."""
        whole = self.map(lambda v: torch.floor(v / 2.0**bits))
        return Interval(whole.low, Interval(whole.high, whole.high).map(lambda v: v + 1).high)

    def relu(self) -> Interval:
        return self.map(lambda v: v.clamp(min=0))

    def summed(self, dims: tuple[int, ...]) -> Interval:
        """Of sums along dimensions, which stay with one element."""
        shape = tuple(1 if i in dims else n for i, n in enumerate(self.shape))
        narrow = self.narrowed()
        times = float(torch.Size(self.shape[i] for i in dims if narrow.shape[i] == 1).numel())
        narrow = narrow.scaled(times)
        low, high, size = (v.sum(dims, keepdim=True) for v in (narrow.low, narrow.high, narrow.magnitude))
        return Interval.around((low + high) / 2, (high - low) / 2, size).not_below_zero(self).expand(shape)

    def rearranged(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """Under a function that only moves, repeats or drops elements."""
        if self.low.numel() > 1 and compact(self.low).numel() == compact(self.high).numel() == 1:
            shape = function(torch.empty(self.low.shape, device="meta")).shape
            return Interval(compact(self.low).reshape(()).expand(shape), compact(self.high).reshape(()).expand(shape))
        return Interval(function(self.low), function(self.high))

    def reshape(self, shape: tuple[int, ...]) -> Interval:
        return self.rearranged(lambda v: v.reshape(shape))
