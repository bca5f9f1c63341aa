"""Piecewise polynomials on ring integers, and their fit to a function: what stands for sigmoid, exp, 1 / x.

The real x = X / 2^frac of a range [low, high] is cut at knots; on each segment a polynomial in X - origin with integer
coefficients gives round(2^scale f(x)), to an error that the caller states. Each segment is as long as the error allows;
Chebyshev interpolation (numpy.polynomial.chebyshev) is within a small factor of the best polynomial. Degree and the
number of low bits that the comparison with the knots leaves out are those that cost the fewest bytes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from tacit.ir.cost import RING_BYTES, prime_field
from tacit.ir.digits import Digits
from tacit.ir.errors import CompileError
from tacit.ir.functions import known_function
from tacit.ir.types import bits_for

Tensor = torch.Tensor
Floats = NDArray[np.float64]
Function = Callable[[Floats], Floats]
MOST_DEGREE, _MOST_KNOTS = 3, 800
# As many segments are found quickly.
_FEW = 40
# Results of the polynomial stay below 2^61, where a truncation still works.
_RESULT_BITS = 60
# Where errors are looked at, dense towards both ends: a quick look, and another for what passes it.
_QUICK, _DENSE = (np.cos(np.linspace(np.pi, 0.0, count)) for count in (17, 513))
# Chebyshev's points, and from values there to coefficients of powers, for each degree.
_POINTS = tuple(chebyshev.chebpts1(d + 1) for d in range(MOST_DEGREE + 1))
_POWERS = tuple(np.linalg.inv(np.polynomial.polynomial.polyvander(_POINTS[d], d)) for d in range(MOST_DEGREE + 1))
_STEPS = np.array([1.0, 1.25, 1.5, 1.75])  # from a power of two to the next
_ROUNDING = 2.0**-48  # of a polynomial of degree 3, in float64
_ELEMENTS = 1 << 20  # whose bounds are found at once
_COMPARED = (4, 5, 6, 7, 8, 10, 12, 16, 24)  # bits that comparisons may look at


@dataclass(frozen=True)
class Spline:
    """Integer polynomials of one degree between knots, all of which are multiples of 2^drop.

    coefficients: degree + 1 for each segment, of powers of X - origin, the lowest first. An X less than 2^drop below a
    knot may get the polynomial of either side, as the public offset of the comparison has it; both are accurate there.
    """

    low: int
    high: int
    knots: tuple[int, ...]
    coefficients: tuple[int, ...]
    drop: int
    scale: int

    @property
    def degree(self) -> int:
        return len(self.coefficients) // (len(self.knots) + 1) - 1

    @property
    def origins(self) -> tuple[int, ...]:
        """The middle of each segment: powers of X - origin are then smallest."""
        ends = (self.low, *self.knots, self.high)
        return tuple((a + b) >> 1 for a, b in pairwise(ends))

    @property
    def segments(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Origin, first X for which it may be used, coefficients."""
        n, step = self.degree + 1, 1 << self.drop
        starts = (self.low, *(knot - step for knot in self.knots))
        rows = [self.coefficients[i : i + n] for i in range(0, len(self.coefficients), n)]
        return list(zip(self.origins, starts, rows, strict=True))

    def powers_of_x(self) -> list[list[int]]:
        """The coefficients of powers of X itself, exact; they are used modulo 2^64."""
        out = []
        for origin, _, row in self.segments:
            shifted = [
                sum(a * math.comb(j, m) * (-origin) ** (j - m) for j, a in enumerate(row) if j >= m)
                for m in range(len(row))
            ]
            out.append(shifted)
        return out

    def at(self, x: Tensor, offset: Tensor) -> Tensor:
        """The ring integers at scale `scale`, where floor((x + offset) / 2^drop) chooses the segment; modulo 2^64."""
        knots, rows = _tables(self)
        segment = torch.bucketize((x + offset) >> self.drop, knots, right=True)
        out = rows[segment, -1]
        for j in range(self.degree - 1, -1, -1):
            out = out * x + rows[segment, j]
        return out

    def ends(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the result for low <= X <= high, element by element in float64: at ends and turning points.

        Beyond the range of the fit, the outer polynomials go on.
        """
        some = max(1, _ELEMENTS // (len(self.knots) + 1))
        parts = zip(torch.split(low.reshape(-1), some), torch.split(high.reshape(-1), some), strict=True)
        least, greatest = zip(*(self._ends(*part) for part in parts), strict=True)
        return torch.cat(least).view(low.shape), torch.cat(greatest).view(low.shape)

    def _ends(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Of vectors, for all segments at once: (segments, n)."""
        rows = _columns(row for _, _, row in self.segments)
        middle, start = _column(self.origins), _column((-math.inf, *(start for _, start, _ in self.segments[1:])))
        stop = _column((*(knot - 1 for knot in self.knots), math.inf))
        begin, end = torch.maximum(low, start), torch.minimum(high, stop)
        reach = torch.maximum((end - middle).abs(), (begin - middle).abs())
        slack = _powers(rows.abs(), reach) * _ROUNDING
        least, greatest = torch.full_like(low, torch.inf), torch.full_like(low, -torch.inf)
        for place in (begin, end, *_columns(_turns(row, origin) for origin, _, row in self.segments)):
            inside = (begin <= end) & (place >= begin) & (place <= end)
            value = _powers(rows, place - middle)
            least = torch.minimum(least, torch.where(inside, value - slack, torch.inf).amin(0))
            greatest = torch.maximum(greatest, torch.where(inside, value + slack, -torch.inf).amax(0))
        return least, greatest

    def bytes_of_element(self, window: int) -> float:
        """What one evaluation costs, online and offline; see `ops.spline.Piecewise`."""
        return _cost(len(self.knots), self.degree, Digits(window - 1 - self.drop))


def wrapped(value: int) -> int:
    """An integer modulo 2^64, as int64 holds it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _columns(values: Iterable[Sequence[float]]) -> Tensor:
    """Several numbers of each segment, (how many, segments, 1)."""
    return torch.tensor([[float(v) for v in value] for value in values], dtype=torch.float64).mT[..., None]


def _column(values: Iterable[float]) -> Tensor:
    """A number of each segment, (segments, 1)."""
    return _columns((value,) for value in values)[0]


def _powers(rows: Tensor, x: Tensor) -> Tensor:
    """The polynomials with these coefficients, of powers of x from the lowest."""
    return sum((row * x**j for j, row in enumerate(rows)), torch.zeros_like(x))


@lru_cache(maxsize=512)
def _tables(spline: Spline) -> tuple[Tensor, Tensor]:
    """The knots in steps of the comparison, and for each segment the coefficients of powers of X."""
    knots = torch.tensor([knot >> spline.drop for knot in spline.knots], dtype=torch.int64)
    return knots, torch.tensor([[wrapped(a) for a in row] for row in spline.powers_of_x()], dtype=torch.int64)


@lru_cache(maxsize=1 << 16)
def _turns(row: tuple[int, ...], origin: int) -> tuple[float, float]:
    """Where the derivative of a polynomial of degree 3 or less is zero; NaN for what there is not."""
    slope = [j * float(a) for j, a in enumerate(row)][1:]
    while slope and slope[-1] == 0.0:
        slope.pop()
    roots = np.roots(slope[::-1]) if len(slope) > 1 else np.array([])
    found = [origin + float(root.real) for root in roots if abs(root.imag) <= 1e-6 * max(1.0, abs(root))]
    first, second = (*found, math.nan, math.nan)[:2]
    return first, second


def _cost(knots: int, degree: int, digits: Digits) -> float:
    field = prime_field(digits.p)
    compared = 2 * field.wire_bytes((digits.positions, 1)) + 0.25
    dealt = RING_BYTES * (degree + 1)
    return 2 * RING_BYTES + RING_BYTES * (degree - 1) + field.wire_bytes((digits.rows, 1)) + knots * (compared + dealt)


def fit(
    name: str, parameters: tuple[float, ...], low: int, high: int, frac: int, *, error: float, relative: bool = False
) -> Spline:
    """The spline of the fewest bytes that approximates a known function for low <= X <= high, x = X / 2^frac.

    The error is at most `error` where |f(x)| <= 1 and `error` times |f(x)| above; with `relative`, `error` times
    |f(x)| everywhere. Raises CompileError where the function is not defined, or the error cannot be reached. Ranges
    are rounded outwards to powers of two, so that those alike share their fit, unless the function grows a lot there.
    """
    known_function(name).check(name, low / 2.0**frac, high / 2.0**frac)
    function = _on_integers(name, parameters, frac)
    ends = [low, max(high, low + 1)]
    for i, up in enumerate((False, True)):
        coarse, fine = (_outward(ends[i], up, bits) for bits in (1, 2))
        before, after = (float(np.abs(function(np.array([float(v)])))[0]) for v in (ends[i], coarse))
        ends[i] = coarse if after <= 2.01 * max(before, 1.0) else fine
    ends[1] = max(ends[1], ends[0] + 1)
    found = _fit(name, parameters, ends[0], ends[1], frac, error, relative)
    if found is None:
        begin, end = (float(x) / 2.0**frac for x in ends)
        raise CompileError(
            f"{name} cannot be approximated to {error:.2g} in [{begin:.4g}, {end:.4g}] by "
            f"{_MOST_KNOTS} segments: give a larger max_error, a narrower input_range, or calibration data"
        )
    return found


def _outward(value: int, up: bool, bits: int) -> int:
    """Rounded to so many significant bits."""
    step = 1 << max(0, abs(value).bit_length() - bits)
    return -(-value // step) * step if up else value // step * step


def _on_integers(name: str, parameters: tuple[float, ...], frac: int) -> Function:
    """The function of X = x 2^frac."""
    known = known_function(name)

    def function(x: Floats) -> Floats:
        found: Floats = known.function(torch.from_numpy(x / 2.0**frac), *parameters).numpy()
        return found

    return function


@lru_cache(maxsize=4096)
def _fit(
    name: str, parameters: tuple[float, ...], low: int, high: int, frac: int, error: float, relative: bool
) -> Spline | None:
    """None where no degree reaches the error, which takes long to find out, too."""
    function = _on_integers(name, parameters, frac)
    powers = np.outer(2.0 ** np.arange(bits_for(low, high)), _STEPS).ravel()
    # Functions bend, and may be largest, around 0: a part of the range that those in proportion to it would all miss.
    marks = np.unique(_within(np.rint(np.concatenate([-powers, [0.0], powers])), low, high))
    places = np.concatenate([low + (high - low) * (_QUICK + 1) / 2, marks])
    largest = float(np.abs(function(places)).max())
    if not math.isfinite(largest):
        raise CompileError(f"{name} is infinite somewhere in [{low / 2.0**frac:.4g}, {high / 2.0**frac:.4g}]")
    scale = min(_RESULT_BITS, _RESULT_BITS - math.ceil(math.log2(max(largest, 2.0**-16) * (1 + error))))
    window = bits_for(low, high) + 1
    fitter = _Fitter(function, low, high, scale, error, relative, marks)
    best: Spline | None = None
    for degree in range(MOST_DEGREE, 0, -1):  # the most likely first: it limits what the others may take
        grids = window - 1, *(c for c in _COMPARED if c < window - 1)
        # All bits first: knots anywhere, so that none of the coarser ones needs fewer.
        fewest = -1
        for compared in grids:
            most = _affordable(best, degree, window, compared)
            if compared == grids[0] and (limit := max(_affordable(best, degree, window, c) for c in grids)) <= _FEW:
                most = limit  # where that is not enough, it is not on any other grid
            found = fitter.run(degree, window - 1 - compared, most) if most >= fewest else None
            fewest = max(fewest, most + 1 if found is None else len(found.knots)) if fewest < 0 else fewest
            if found is None:
                continue
            if best is None or found.bytes_of_element(window) < best.bytes_of_element(window):
                best = found
    return best


def _within(values: Floats, least: float, most: float) -> Floats:
    """np.clip costs as much again as all else that is done with so few values."""
    return np.minimum(np.maximum(values, least), most)


def _affordable(best: Spline | None, degree: int, window: int, compared: int) -> int:
    """How many knots of this degree would still be cheaper."""
    if best is None:
        return _MOST_KNOTS
    digits, budget = Digits(compared), best.bytes_of_element(window)
    free = _cost(0, degree, digits)
    return min(_MOST_KNOTS, max(0, math.floor((budget - free) / (_cost(1, degree, digits) - free))))


def _reach(ends: Sequence[int], start: int) -> int:
    """How far a segment from here gets, where others got from one of these ends to the next."""
    i = max(bisect_right(ends, start) - 1, 0)
    begin, end, after = ends[i], ends[min(i + 1, len(ends) - 1)], ends[min(i + 2, len(ends) - 1)]
    return end + (after - end) * (start - begin) // max(1, end - begin)


@dataclass(frozen=True)
class _Fitter:
    """One function over one range."""

    function: Function
    low: int
    high: int
    scale: int
    error: float
    relative: bool
    marks: Floats  # places around 0 that are looked at beside those in proportion to a segment
    # Of each degree, where segments of any length ended: a coarser grid has its own close to them.
    reached: dict[int, list[int]] = field(default_factory=dict)

    def run(self, degree: int, drop: int, most: int) -> Spline | None:
        """From left to right, every segment as long as it can be; None beyond so many knots."""
        step, start = 1 << drop, self.low
        knots: list[int] = []
        rows: list[tuple[int, ...]] = []
        guess = max(1, (self.high - self.low) // step // 4)
        ends, before = self.reached.get(degree), guess
        while True:
            whole = self.polynomial(start, self.high + 1, degree, step if knots else 0)
            if whole is not None:
                rows.append(whole)
                self.reached.setdefault(degree, [self.low, *knots, self.high + 1])
                return Spline(
                    self.low, self.high, tuple(knots), tuple(a for row in rows for a in row), drop, self.scale
                )
            if len(knots) == most:
                return None
            first = start // step
            if ends is not None:
                guess = max(1, _reach(ends, start) // step - first)
            close = ends is not None or len(knots) > 1
            found = self._longest(start, first, guess, degree, step, inner=bool(knots), close=close)
            if found is None:
                return None
            length, row = found
            rows.append(row)
            # Over many octaves, each segment is longer than the one before by about the same factor.
            guess, before = (length * min(2 * before, length) // before if knots else length), length
            start = (first + length) * step
            knots.append(start)

    def _longest(
        self, start: int, first: int, guess: int, degree: int, step: int, *, inner: bool, close: bool
    ) -> tuple[int, tuple[int, ...]] | None:
        """The largest number of steps that one polynomial covers, to a 64th; around a guess, which may be close."""
        most = -(-self.high // step) - 1 - first

        def attempt(length: int) -> tuple[int, ...] | None:
            if length < 1 or length > most:
                return None
            return self.polynomial(start, (first + length) * step, degree, step if inner else 0)

        good, bad, best = 0, most + 1, None
        trial = min(max(guess, 1), most)
        aside = trial // 32 + 1 if close else trial
        while good < trial < bad:
            row = attempt(trial)
            if row is None:
                bad = trial
            else:
                good, best = trial, row
            if good and bad - good <= max(1, good // 64):
                break
            if good and bad <= most:
                trial = min(2 * good, (good + bad) // 2)
            elif good:
                trial = min(good + aside, most)
            else:
                trial = max(1, bad - aside if close and bad > aside else bad // 2)
            aside *= 2
        return None if best is None else (good, best)

    def polynomial(self, begin: int, end: int, degree: int, room: int) -> tuple[int, ...] | None:
        """Integer coefficients for begin - room < X < end around the middle; None if they are not accurate enough."""
        origin = (begin + min(end, self.high)) >> 1
        left, right = float(max(begin - max(room - 1, 0), self.low) - origin), float(end - 1 - origin)
        centre, half = (left + right) / 2, max(right - left, 1.0) / 2
        for d in range(degree, -1, -1):
            # Lower powers have room for longer segments: their coefficients are larger integers.
            if d > 1 and d * math.log2(max(half, 1.0)) > self.scale + 8:
                continue
            nodes = _within(centre + half * _POINTS[d], left, right)
            quick = _within(np.rint(centre + half * _QUICK), left, right)
            # A call of a function costs as much for one number as for a hundred.
            exact = self._exact(np.concatenate([nodes, quick]) + origin)
            fitted, exact = _POWERS[d] @ exact[: len(nodes)], exact[len(nodes) :]
            if not self._accurate(fitted, (quick - centre) / half, exact):
                return None
            row = self._integers(fitted, centre, half)
            rounded = np.array(row, dtype=np.float64) / 2.0**self.scale
            if not self._accurate(rounded, quick, exact):
                continue
            first, last = np.searchsorted(self.marks, (left + origin, right + origin + 1))
            dense = _within(np.rint(centre + half * _DENSE), left, right)
            places = np.concatenate([dense, self.marks[first:last] - origin])
            if self._accurate(rounded, places, self._exact(places + origin)):
                return (*row, *(0,) * (degree - len(row) + 1))
        return None

    def _exact(self, places: Floats) -> Floats:
        """The function; sums of large integers in floats may round to where it is not defined."""
        return self.function(_within(places, self.low, self.high))

    def _accurate(self, row: Floats, places: Floats, exact: Floats) -> bool:
        """Whether a polynomial, at some places, is close enough to what the function is there."""
        size = np.abs(exact)
        allowed = self.error * (size if self.relative else np.maximum(size, 1.0))
        found = row[-1]
        for coefficient in row[-2::-1]:
            found = found * places + coefficient
        return bool((np.abs(found - exact) <= allowed).all())

    def _integers(self, fitted: Floats, centre: float, half: float) -> tuple[int, ...]:
        """From powers of (u - centre) / half to powers of u."""
        scaled = [float(v) / half**j * 2.0**self.scale for j, v in enumerate(fitted)]
        return tuple(
            round(sum(v * math.comb(j, m) * (-centre) ** (j - m) for j, v in enumerate(scaled) if j >= m))
            for m in range(len(scaled))
        )
