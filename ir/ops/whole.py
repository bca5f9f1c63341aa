"""Whole numbers, which have no fractional bits and are exact: the ends of their type, and of a table's indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.errors import CompileError
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
class FixedWithin(LocalOp):
    """The same whole numbers, proved to lie between these ends: those of a type, or of the indices of a table."""

    name = "within"

    low: int
    high: int
    indices: bool = False

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(x.frac == 0 and self.low <= self.high, f"{x} are no whole numbers from {self.low} to {self.high}")
        return x

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0]

    def bound(self, x: Interval) -> Interval:
        least, most = x.ends
        if least <= self.low - 1 or most >= self.high + 1:  # bounds of sums hold a little slack, of less than one
            what, remedy = ("indices", _REFUSES) if self.indices else ("integers", _WRAPS)
            ends = f"[{least:.0f}, {most:.0f}], outside of [{self.low}, {self.high}]"
            raise CompileError(f"its {what} may lie in {ends}; {remedy}")
        return x

    def form(self, *args: Form | Tensor) -> Form | None:
        return itself(args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(-(2**31), 2**31 - 1), (Type("secret", (_N, 5), 0, 20),)),)


_WRAPS = "PyTorch wraps them around there: convert to int64 first, as in x.long(), or give a narrower input_range"
_REFUSES = "PyTorch refuses these: clamp them, or declare with input_range which integers there are"


@dataclass(frozen=True)
class Within(ModelOp):
    """Integers of a type that wraps at these ends, or indices of a table that ends there.

    That they lie between is proved with the ranges, or is `claimed`: as the client refuses what would lead to others.
    """

    name = "model.within"
    batch_anywhere = True

    low: int
    high: int
    indices: bool = False
    claimed: bool = False

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        if self.claimed:
            return b.known(args[0], low=self.low, high=self.high)
        return b.emit(FixedWithin(self.low, self.high, self.indices), args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(0, 255, claimed=claimed), (real(_N, 7),)) for claimed in (False, True))
