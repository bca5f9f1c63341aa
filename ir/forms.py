"""Affine forms: bounds that remember what a value was computed from, so that errors of one origin cancel.

An interval forgets that x and -x belong together. An affine form (Comba and Stolfi, 1993; of ReLU networks, Singh et
al., "Fast and Effective Robustness Certification", NeurIPS 2018) writes each element as centre + sum over k of
e_k * terms[k] +- radius, where the unknowns e_k lie in [-1, 1] and are the same ones in all forms of a network. Affine
functions map such forms to such forms, and lose nothing; the kink of a ReLU is covered by a radius of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tacit.ir.ranges import Interval
from tacit.ir.windows import Span

Tensor = torch.Tensor
_SLACK = 2.0**-32  # as that of intervals: for the rounding of sums in float64


@dataclass(frozen=True)
class Form:
    """centre and radius have the shape of the value without the batch; terms (k, *shape): float64, ring integers.

    known: what is known of the value otherwise.
    """

    centre: Tensor
    terms: Tensor
    radius: Tensor
    known: Interval | None = None

    @staticmethod
    def box(interval: Interval) -> Form:
        """Nothing is known but the interval."""
        centre = interval.centre.contiguous()
        return Form(centre, centre.new_zeros(0, *centre.shape), interval.radius.contiguous(), interval)

    @property
    def interval(self) -> Interval:
        reach = self.terms.abs().sum(0) + self.radius
        found = Interval.around(self.centre, reach, self.centre.abs() + reach)
        return found if self.known is None else found.meet(self.known)

    def within(self, interval: Interval) -> Form:
        return replace(self, known=self.interval.meet(interval))

    def named(self, first: int) -> Form:
        """The radius of each element as an unknown of its own, the first of which has this number."""
        own = torch.diag(self.radius.flatten()).reshape(-1, *self.radius.shape)
        return replace(self, terms=torch.cat([self._padded(first), own]), radius=torch.zeros_like(self.radius))

    def relaxed(self, slope: Tensor | float, offset: Tensor | float, radius: Tensor | float) -> Form:
        """Of a function that is within `radius` of slope * x + offset, element by element, wherever x may be."""
        reach = self.terms.abs().sum(0) + self.radius
        rounding = _SLACK * (self.centre.abs() + reach) * slope
        more = torch.as_tensor(radius, dtype=torch.float64)
        return Form(self.centre * slope + offset, self.terms * slope, self.radius * slope + rounding + more)

    def rows(self, count: int) -> Tensor:
        """Zero, the centre, and as many terms, one below the other: like the inputs of a batch."""
        return torch.cat([torch.zeros_like(self.centre)[None], self.centre[None], self._padded(count)])

    def _padded(self, count: int) -> Tensor:
        return torch.cat([self.terms, self.terms.new_zeros(count - len(self.terms), *self.centre.shape)])

    @property
    def error(self) -> Interval:
        """+- radius, and what arithmetic on centre and terms is off."""
        size = self.radius + _SLACK * (self.centre.abs() + self.terms.abs().sum(0) + self.radius)
        return Interval(-size, size)


def mapped(
    function: Callable[..., Tensor], bound: Callable[..., Interval], operands: Sequence[Form | Tensor]
) -> Form | None:
    """The form of an affine function of forms and constants; None where no operand is a form.

    function: on float64 tensors with rows in the place of the batch. bound: of it, on intervals.
    """
    counts = [len(x.terms) for x in operands if isinstance(x, Form)]
    if not counts:
        return None
    rows = function(*(x.rows(max(counts)) if isinstance(x, Form) else x for x in operands))
    error = bound(*(x.error if isinstance(x, Form) else Interval.exactly(x) for x in operands))
    # A constant brings a dimension of one element for the batch.
    radius = (error.radius + _SLACK * error.magnitude).expand(1, *rows.shape[1:])[0]
    return Form(rows[1], rows[2:] - rows[0], radius)


def itself(x: Form | Tensor) -> Form | None:
    """Of an op that gives its first operand on, of which more is known."""
    return replace(x, known=None) if isinstance(x, Form) else None


class _Reals:
    """In the place of `runtime.ring`, for linear functions of float64: nothing wraps."""

    @property
    def ring(self) -> _Reals:
        return self

    @staticmethod
    def wrapped(value: int, bits: int = 0) -> int:
        return value

    @staticmethod
    def bits_of(x: Tensor) -> int:
        return 0

    @staticmethod
    def window_sums(x: Tensor, rows: Sequence[Span], columns: Sequence[Span]) -> Tensor:
        """Term by term: a difference of running sums would be off by more than the rounding of its own terms."""
        return torch.stack([torch.stack([x[:, :, a:b, c:d].sum((2, 3)) for c, d in columns], -1) for a, b in rows], -2)


REALS: Any = _Reals()
