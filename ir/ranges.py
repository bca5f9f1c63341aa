"""Intervals of ring integers, propagated soundly: float64 with an outward margin for its rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tacit.ir.types import bits_for

_MARGIN = 2.0**-40  # covers the rounding of sums of up to 2^12 terms of 53 bits, many times over


@dataclass(frozen=True)
class Interval:
    """Element-wise bounds of a value, in ring integers; shape of the value without the batch."""

    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def full(shape: tuple[int, ...], low: float, high: float) -> Interval:
        return Interval(torch.full(shape, low, dtype=torch.float64), torch.full(shape, high, dtype=torch.float64))

    @staticmethod
    def exactly(value: torch.Tensor) -> Interval:
        return Interval(value.double(), value.double())

    @staticmethod
    def around(centre: torch.Tensor, radius: torch.Tensor, magnitude: torch.Tensor) -> Interval:
        """centre +- radius, where `magnitude` bounds the sum of the absolute terms that were added up."""
        slack = magnitude * _MARGIN
        return Interval(centre - radius - slack, centre + radius + slack)

    @property
    def centre(self) -> torch.Tensor:
        return (self.low + self.high) / 2

    @property
    def radius(self) -> torch.Tensor:
        return (self.high - self.low) / 2

    @property
    def width(self) -> int:
        """Signed width in bits of the whole tensor."""
        return bits_for(float(self.low.min()), float(self.high.max()))

    def union(self, other: Interval) -> Interval:
        return Interval(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def meet(self, other: Interval) -> Interval:
        return Interval(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)

    def scaled(self, factor: float) -> Interval:
        a, b = self.low * factor, self.high * factor
        return Interval(torch.minimum(a, b), torch.maximum(a, b))

    def __mul__(self, other: Interval) -> Interval:
        corners = torch.stack(
            [self.low * other.low, self.low * other.high, self.high * other.low, self.high * other.high]
        )
        return Interval(corners.amin(0), corners.amax(0))

    def truncated(self, bits: int) -> Interval:
        """Of floor((x + t) / 2^bits), 0 <= t < 2^bits: up to one above the floor."""
        return Interval(torch.floor(self.low / 2.0**bits), torch.floor(self.high / 2.0**bits) + 1)

    def relu(self) -> Interval:
        return Interval(self.low.clamp(min=0), self.high.clamp(min=0))

    def reshape(self, shape: tuple[int, ...]) -> Interval:
        return Interval(self.low.reshape(shape), self.high.reshape(shape))
