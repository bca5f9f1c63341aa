"""Functions of one number as piecewise polynomials: all comparisons at once, the polynomial local after them.

With r dealt by P2 and c = x + r opened, x is compared with every knot t in the same round: PrivateCompare of c - t with
the bits of the same r. What is 1 for x >= t_i is b_i = w_i xor rho_i, w_i public to P0 and P1, rho_i a bit that P2
dealt. The result p_0(x) + sum_i b_i (p_i - p_{i-1})(x) is a polynomial in r and rho_i r^m with coefficients that P0 and
P1 know (powers of c = x + r), so that with r^m and rho_i r^m dealt it is local: three rounds for any number of segments
and any degree. Ring arithmetic is exact modulo 2^64; polynomials that are not selected may wrap, and cancel.

Why the digits of one r serve many comparisons: P2 knows r anyway. What it is sent for knot i are vectors with a
multiplier, a zero-sharing, a flip beta and a shift drawn afresh for each knot and element, of which it can compute the
one bit beta_i xor [x < t_i]: uniform and independent of all others, whatever the other knots are. The zero-sharing
makes each message uniform by itself, however often the shares of the digits are used. P0 and P1 learn c, uniform by r,
and for each knot a bit that is masked by its own rho_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.cost import DEALT, P0, P1, P2, PRF, RING, RING_BYTES, Cost, Randomness, links, packed_bits, prime_field
from tacit.ir.digits import Digits
from tacit.ir.functions import known_function
from tacit.ir.op import Level, Material, Op, Program, Round, Sample, Spec, Subprotocol, expect, expect_kind
from tacit.ir.ops import securenn
from tacit.ir.ops.comparison import TRUNCATION_WIDTH, Truncate, blind, blinding_of, check_window, digits_of
from tacit.ir.ranges import Interval
from tacit.ir.seen import ANSWERED, OPENED, ROUNDED, Seen, Sights, together
from tacit.ir.splines import Spline, fit, wrapped
from tacit.ir.types import RING_BITS, Batch, Shape, Type

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_N = Batch()
_FIXED, _PROTOCOL = frozenset({Level.FIXED}), frozenset({Level.PROTOCOL})
# Bits below its scale at which a function's value is rounded while it has no polynomials yet.
_FINER = 20


@dataclass(frozen=True)
class Piecewise(Subprotocol):
    """A spline of x at its own scale: three rounds, or one where there are no knots.

    Range: -2^(window-1) <= x - t < 2^(window-1) - 2^drop for every knot t. Outside it the segment is random.
    """

    shape: Shape
    window: int
    spline: Spline

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def knots(self) -> int:
        return len(self.spline.knots)

    @property
    def digits(self) -> Digits:
        return Digits(self.window - 1 - self.spline.drop)

    def randomness(self) -> tuple[Randomness, ...]:
        items = [Randomness("r", self.shape, RING, PRF)]
        if self.spline.degree > 1:
            items.append(Randomness("powers of r", (self.spline.degree - 1, self.n), RING, DEALT))
        if self.knots:
            gated = (self.knots, self.spline.degree + 1, self.n)
            items += [digits_of(self.digits, self.n), Randomness("rho powers of r", gated, RING, DEALT)]
        return (*items, *blinding_of(self.digits, self.n) * self.knots)

    def cost(self) -> Cost:
        opened = RING_BYTES * self.n
        if not self.knots:
            return Cost(1, links(p0_p1=opened, p1_p0=opened))
        blinded = self.knots * prime_field(self.digits.p).wire_bytes((self.digits.positions, self.n))
        answer = packed_bits(self.knots * self.n)
        return Cost(3, links(p0_p1=opened, p1_p0=opened, p0_p2=blinded, p1_p2=blinded, p2_p0=answer, p2_p1=answer))

    def seen(self) -> Sights:
        vectors = Seen(
            "Blinded vectors of the comparisons of one value with all knots of a function.",
            "Factors, refresh, shift and flip are drawn afresh for every knot: P2 learns one fair bit for each, "
            "independent of the value and of one another.",
        )
        rounded = ROUNDED if self.spline.drop else {}
        return together(OPENED, rounded, {P2: (vectors,)}, ANSWERED) if self.knots else OPENED

    def deal(self, party: Party) -> Material:
        at_p2, degree, n = party.rank == P2, self.spline.degree, self.n
        r = party.mask("r", self.shape)
        powers = [r.reshape(-1)]
        while at_p2 and len(powers) < degree:
            powers.append(powers[-1] * powers[0])
        material: Material = {"r": r, "powers": powers[0].view(1, -1)}
        if degree > 1:
            higher = party.share("powers of r", (degree - 1, n), torch.stack(powers[1:]) if at_p2 else None)
            if higher is not None:
                material["powers"] = torch.cat([material["powers"], higher])
        if not self.knots:
            return {} if at_p2 else material
        bits = party.share_digits(r if at_p2 else None, self.spline.drop, self.digits, n)
        rho = party.own().bits((self.knots, n)) if at_p2 else torch.empty(0)
        whole = torch.stack([torch.ones_like(powers[0]), *powers]) if at_p2 else None
        products = None if whole is None else rho.to(torch.int64)[:, None] * whole
        gated = party.share("rho powers of r", (self.knots, degree + 1, n), products)
        for i in range(self.knots):
            drawn = party.common_blinding(self.digits, n)
            material |= {f"{key} {i}": value for key, value in drawn.items()}
        if at_p2:
            return {"flip": party.ring.bit(r, self.window - 1) ^ rho}
        assert bits is not None and gated is not None
        return material | {"bits": bits, "gated": gated}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            return (yield from self._help(party, material))
        (c,) = yield from party.open(values[0] + material["r"])
        w = torch.empty((0, self.n), dtype=torch.uint8)
        if self.knots:
            if self.spline.drop:
                party.note_offset(c, self.spline.drop)
            w = yield from self._compared(party, material, c)
        gated = material.get("gated", torch.empty((0, self.spline.degree + 1, self.n), dtype=torch.int64))
        return party.piecewise.share(c, w, material["powers"], gated, self.spline.powers_of_x(), first=party.first)

    def _compared(self, party: Party, material: Material, c: Tensor) -> Program:
        """For each knot the bit w_i of [x >= t_i] = w_i xor rho_i, (knots, n), known to P0 and P1."""
        blinded, e = [], []
        for i, knot in enumerate(self.spline.knots):
            own = {key: material[f"{key} {i}"] for key in ("s", "z", "beta", "shift")} | {"bits": material["bits"]}
            shifted = c - knot
            blinded.append(blind(party, own, shifted, self.spline.drop, self.digits))
            e.append(party.ring.bit(shifted, self.window - 1) ^ own["beta"] ^ 1)
        yield Round(send={P2: tuple(blinded)})
        got = yield Round(recv={P2: (Spec((packed_bits(self.knots * self.n),), torch.uint8),)})
        flip = party.field.unpack_bits(got[P2][0], self.knots * self.n)
        return torch.stack(e) ^ flip.view(self.knots, self.n)

    def _help(self, party: Party, material: Material) -> Program:
        """P2: the opening passes it by; one blinded vector for each knot, one masked bit back."""
        yield Round()
        if not self.knots:
            return None
        zero = yield from find_zeros(party, self.digits, self.n, self.knots)
        answer = party.field.pack_bits(zero ^ material["flip"])
        yield Round(send={P0: (answer,), P1: (answer,)})
        return None


def find_zeros(party: Party, digits: Digits, n: int, count: int) -> Program:
    """As `find_zero`, for several comparisons in one message: (count, n)."""
    spec = (Spec(*party.field.packed_shape(digits.positions, n, digits.p)),) * count
    got = yield Round(recv={P0: spec, P1: spec})
    pairs = zip(got[P0], got[P1], strict=True)
    return torch.stack([party.field.has_zero(d0, d1, digits.positions, digits.p) for d0, d1 in pairs])


@dataclass(frozen=True)
class FixedFunction(Op):
    """A function of x = X / 2^of, rounded to `frac` fractional bits: what it is, before range analysis says where.

    error: of the polynomials that will stand for it, relative to |f| where that is above 1; everywhere if `relative`.
    """

    name = "fixed.function"
    levels = _FIXED

    function: str
    of: int
    frac: int
    error: float
    parameters: tuple[float, ...] = ()
    relative: bool = False

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(x.frac == self.of, f"expected an operand with {self.of} fractional bits, found {x}")
        return x.with_(frac=self.frac, width=RING_BITS)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        found = known_function(self.function).function(args[0].double() / 2.0**self.of, *self.parameters)
        offset = oracle.offset(args[0], _FINER) / 2.0**_FINER
        return torch.floor(found.nan_to_num() * 2.0**self.frac + offset).clamp(-(2.0**62), 2.0**62).to(torch.int64)

    def fitted(self, interval: Interval) -> FixedSpline:
        """The spline over this range; raises CompileError."""
        low, high = interval.ends
        found = fit(
            self.function,
            self.parameters,
            math.floor(low),
            math.ceil(high),
            self.of,
            error=self.error,
            relative=self.relative,
        )
        made = FixedSpline.of_spline(found, self.function, self.of, self.frac, self.parameters)
        return replace(made, error=self.error, relative=self.relative)

    def bound(self, x: Interval) -> Interval:
        return self.fitted(x).bound(x)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls("tanh", 12, 12, 2.0**-8), (Type("secret", (_N, 9), 12, 16),)),)


@dataclass(frozen=True)
class FixedSpline(Op):
    """The spline that stands for a function over low <= X <= high, truncated to `frac` fractional bits.

    function, parameters, error, relative: what it stands for and how closely, for readers and plots, as in
    `FixedFunction`, an error of 0 where nothing is said of it; the rest is that of `ir.splines.Spline`.
    """

    name = "fixed.spline"
    levels = _FIXED

    function: str
    of: int
    frac: int
    low: int
    high: int
    coefficients: tuple[int, ...]
    scale: int
    drop: int = 0
    knots: tuple[int, ...] = ()
    parameters: tuple[float, ...] = ()
    error: float = 0.0
    relative: bool = False

    @classmethod
    def of_spline(cls, s: Spline, function: str, of: int, frac: int, parameters: tuple[float, ...] = ()) -> FixedSpline:
        return cls(function, of, frac, s.low, s.high, s.coefficients, s.scale, s.drop, s.knots, parameters)

    @cached_property
    def spline(self) -> Spline:
        return Spline(self.low, self.high, self.knots, self.coefficients, self.drop, self.scale)

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(x.frac == self.of, f"expected an operand with {self.of} fractional bits, found {x}")
        pieces = len(self.knots) + 1
        expect(
            len(self.coefficients) in (2 * pieces, 3 * pieces, 4 * pieces),
            f"{len(self.coefficients)} coefficients are not those of {pieces} polynomials of degree 1 to 3",
        )
        ordered = (self.low, *self.knots, self.high)
        expect(all(a < b for a, b in pairwise(ordered)), "knots rise from low to high")
        expect(all(knot % (1 << self.drop) == 0 for knot in self.knots), "a knot is a multiple of 2^drop")
        expect(0 <= self.error < 1, f"an error of {self.error} is not between 0 and 1")
        expect(
            0 <= self.frac <= self.scale < 2 * RING_BITS,
            f"a scale of {self.scale} bits cannot be truncated to {self.frac}",
        )
        return x.with_(frac=self.frac, width=TRUNCATION_WIDTH - (self.scale - self.frac) + 1)

    def discloses(self) -> str:
        return "The ranges over which functions of one number are fitted: those that their operands can have."

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        offset = oracle.offset(args[0], self.drop) if self.drop and self.knots else torch.tensor(0)
        y, excess = self.spline.at(args[0], offset), self.scale - self.frac
        out: Tensor = (y + oracle.offset(y, excess)) >> excess if excess else y
        return out

    def bound(self, x: Interval) -> Interval:
        narrow = x.narrowed()
        low, high = self.spline.ends(narrow.low, narrow.high)
        return Interval(low, high).truncated(self.scale - self.frac).expand(tuple(x.shape))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (*(_sample(cls, *which) for which in _SAMPLES), _parabolas(cls))


def _parabolas(op: type[FixedSpline]) -> Sample:
    """Three of them, compared exactly."""
    s = Spline(-30000, 30000, (-4096, 8192), (1 << 20, 3, 1, -(1 << 22), 5, 0, 1 << 30, -7, 2), 0, 36)
    made = op.of_spline(s, "three_parabolas", 12, 14)
    made = replace(made, window=17) if isinstance(made, SplineOnShares) else made
    return Sample(made, (Type("secret", (_N, 9), 12, 16),))


def _sample(op: type[FixedSpline], name: str, parameters: tuple[float, ...], width: int, error: float) -> Sample:
    reach = 2 ** (width - 1) * 15 // 16
    found = fit(name, parameters, -reach, reach, 12, error=error)
    made = op.of_spline(found, name, 12, 14)
    if isinstance(made, SplineOnShares):
        made = replace(made, window=width + 1)
    return Sample(made, (Type("secret", (_N, 9), 12, width),))


# A few knots, many, and none; of all degrees.
_SAMPLES = (("gelu", (), 17, 2.0**-8), ("hardswish", (), 16, 2.0**-10), ("integer_power", (2.0,), 14, 2.0**-10))


@dataclass(frozen=True)
class SplineOnShares(FixedSpline):
    """A function of one number as polynomials between knots, in three rounds however many; then a truncation.

    x is compared with all knots at once (`Piecewise`).
    """

    name = "spline"
    suite = "fused"
    levels = _PROTOCOL

    window: int = RING_BITS

    def infer(self, x: Type) -> Type:
        if self.knots:  # a difference from a knot takes one bit more
            check_window(x.with_(width=min(x.width + 1, RING_BITS)), self.window, self.drop)
            expect(max(-self.knots[0], self.knots[-1]) < 1 << (self.window - 2), "a knot lies outside the window")
        expect(self.window - 1 - self.drop > 0, f"dropping {self.drop} of {self.window} bits leaves none to compare")
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        excess = self.scale - self.frac
        return (Piecewise(x.dims, self.window, self.spline), *((Truncate(x.dims, excess),) if excess else ()))

    def run(self, party: Party, *args: Any) -> Program:
        out = yield from party.part(*args)
        return (yield from party.part(out)) if self.scale > self.frac else out


@dataclass(frozen=True)
class TextbookSpline(FixedSpline):
    """The same by textbook means: powers of x by products, one DReLU for every knot, a product with each bit."""

    name = "securenn.spline"
    suite = "securenn"
    levels = _PROTOCOL

    def infer(self, x: Type) -> Type:
        securenn.check_width(x.with_(width=x.width + 1))
        expect(self.drop == 0, "the textbook suite compares all bits")
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        n, knots, excess = x.numel, len(self.knots), self.scale - self.frac
        compared = (*securenn.drelu(knots * n), securenn.select(knots * n)) if knots else ()
        powers = (securenn.select(n),) * (self.spline.degree - 1)
        return (*powers, *compared, *((Truncate(x.dims, excess),) if excess else ()))

    def run(self, party: Party, *args: Any) -> Program:
        if party.rank == P2:
            for _ in party.sized.parts:
                yield from party.part()
            return None
        x = args[0].reshape(-1)
        powers = [torch.full_like(x, int(party.first)), x]
        while len(powers) <= self.spline.degree:
            powers.append((yield from party.part(powers[-1], x)))
        rows = [[wrapped(a) for a in row] for row in self.spline.powers_of_x()]
        values = [sum(a * p for a, p in zip(row, powers, strict=True)) for row in rows]
        out = values[0]
        if self.knots:
            shifted = torch.cat([x - (knot if party.first else 0) for knot in self.knots])
            bits = yield from securenn.run_drelu(party, shifted)
            steps = torch.cat([b - a for a, b in pairwise(values)])
            gains = yield from party.part(steps, bits)
            out = out + gains.view(len(self.knots), -1).sum(0)
        out = out.view(args[0].shape)
        return (yield from party.part(out)) if self.scale > self.frac else out

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (_parabolas(cls),)
