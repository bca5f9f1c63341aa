"""Types of the values in a plan: who can see them, their shape, and how integers encode reals.

A value of kind ``secret`` is additively shared between P0 and P1 in Z_2^64, or in Z_2^32 where its range
allows it (r32). It stands for the real number v / 2^frac, and the compiler states that |v| <= 15/16 of
2^(width-1): comparisons look at no more bits than that. The sixteenth is room for the rounding of a comparison
that leaves out low bits; sums, differences and products with constants keep it.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tacit.ir.errors import PlanError, number, shortened

MAX_DIMENSIONS, MAX_ELEMENTS = 32, 1 << 40  # of a value: what is counted in 64 bits has room for all that follows
RING_BITS = 64
SMALL_RING_BITS = 32
DTYPES = {RING_BITS: torch.int64, SMALL_RING_BITS: torch.int32}

# The kinds of a value, each a promise about who learns it.
KINDS = {
    "real": "a real-valued tensor of the model level; not yet placed at any party",
    "secret": "additive shares at P0 and P1",
    "masked": "a value minus a mask that only P2 knows; P0 and P1 both hold the difference",
    "client": "in the clear at the client, and there alone",
}


@dataclass(frozen=True)
class Batch:
    """The symbolic batch dimension, or a whole multiple of it: N, 4N."""

    factor: int = 1

    def __str__(self) -> str:
        return "N" if self.factor == 1 else f"{number(self.factor)}N"


Dim = int | Batch
Shape = tuple[int, ...]


def dim_at(dim: Dim, batch: int) -> int:
    """The dimension as a number, for a batch of that size."""
    return dim.factor * batch if isinstance(dim, Batch) else dim


@dataclass(frozen=True)
class Type:
    """Kind, shape (the batch may be symbolic), fractional bits, signed width in bits, and the ring's bits."""

    kind: str
    shape: tuple[Dim, ...]
    frac: int = 0
    width: int = RING_BITS
    ring: int = RING_BITS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"unknown kind '{shortened(self.kind)}'; known: {', '.join(KINDS)}")
        if not self.shape or any(dim_at(d, 1) < 1 for d in self.shape):
            raise PlanError(f"a shape has one or more dimensions, each at least 1: {shortened(shape_text(self.shape))}")
        if len(self.shape) > MAX_DIMENSIONS or math.prod(dim_at(d, 1) for d in self.shape) > MAX_ELEMENTS:
            raise PlanError(f"a value has at most {MAX_DIMENSIONS} dimensions and 2^40 elements")
        if self.ring not in DTYPES:
            raise PlanError(f"a ring has {' or '.join(map(str, DTYPES))} bits, not {number(self.ring)}")
        if not 1 <= self.width <= self.ring or not 0 <= self.frac < RING_BITS:
            raise PlanError(f"f{number(self.frac)}, b{number(self.width)} do not fit the ring of {self.ring} bits")

    def __str__(self) -> str:
        dims = "x".join(str(d) for d in self.shape)
        if self.kind == "real":
            return f"real<{dims}>"
        ring = "" if self.ring == RING_BITS else f", r{self.ring}"
        return f"{self.kind}<{dims}, f{self.frac}, b{self.width}{ring}>"

    @staticmethod
    def parse(text: str) -> "Type":
        """The inverse of `str`; raises PlanError."""
        found = re.fullmatch(r"(\w+)<([\dNx]+)(?:, f(\d{1,4}), b(\d{1,4})(?:, r(\d{1,4}))?)?>", text)
        if not found:
            raise PlanError(f"'{shortened(text)}' is not a type, as in secret<Nx784, f12, b16>")
        kind, dims, frac, width, ring = found.groups()
        if (kind == "real") != (frac is None):
            raise PlanError(f"'{shortened(text)}': real values have no scale, all others have one (f12, b16)")
        shape = tuple(_parse_dim(d) for d in dims.split("x"))
        return Type(kind, shape, int(frac or 0), int(width or RING_BITS), int(ring or RING_BITS))

    @property
    def batched(self) -> bool:
        return isinstance(self.shape[0], Batch)

    def at(self, batch: int) -> "Type":
        """This type for a batch of that size: every dimension a number."""
        return replace(self, shape=tuple(dim_at(d, batch) for d in self.shape))

    def with_(
        self,
        *,
        shape: tuple[Dim, ...] | None = None,
        frac: int | None = None,
        width: int | None = None,
        kind: str | None = None,
        ring: int | None = None,
    ) -> "Type":
        """A copy with some fields changed."""
        return Type(
            self.kind if kind is None else kind,
            self.shape if shape is None else shape,
            self.frac if frac is None else frac,
            self.width if width is None else width,
            self.ring if ring is None else ring,
        )

    @cached_property
    def dims(self) -> Shape:
        """The shape as numbers; only for types without a symbolic batch."""
        if any(isinstance(d, Batch) for d in self.shape):
            raise PlanError(f"{self} still has a symbolic batch")
        return tuple(d for d in self.shape if not isinstance(d, Batch))

    @property
    def numel(self) -> int:
        return math.prod(self.dims)

    @property
    def dtype(self) -> torch.dtype:
        """How the parties hold shares of it."""
        return DTYPES[self.ring]


def _parse_dim(text: str) -> Dim:
    found = re.fullmatch(r"(\d{0,18})N|(\d{1,18})", text)
    if not found:
        raise PlanError(f"'{shortened(text)}' is not a dimension, as in Nx784")
    if found.group(2):
        return int(found.group(2))
    return Batch(int(found.group(1) or 1))


def broadcast(x: tuple[Dim, ...], y: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The common shape under numpy's rules; raises PlanError."""
    size = max(len(x), len(y))
    left, right = (1,) * (size - len(x)) + x, (1,) * (size - len(y)) + y
    out: list[Dim] = []
    for a, b in zip(left, right, strict=True):
        if a != b and a != 1 and b != 1:
            raise PlanError(f"shapes {shape_text(x)} and {shape_text(y)} do not broadcast")
        out.append(b if a == 1 else a)
    return tuple(out)


def shape_text(shape: tuple[Dim, ...]) -> str:
    return "x".join(number(d) if isinstance(d, int) else str(d) for d in shape)


def bits_for(low: float, high: float) -> int:
    """The smallest signed width b with |v| <= 15/16 of 2^(b-1) for all v from low to high."""
    magnitude = max(high, -low, 0.5)
    return max(1, math.ceil(math.log2(magnitude * 16 / 15)) + 1)
