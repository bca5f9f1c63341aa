"""Piecewise polynomials in Z_2^64: the share of one, from an opened value and dealt products.

A polynomial in x = c - r is one in r whose coefficients are known where c is: sum_j a_j (c - r)^j has the coefficient
(-1)^m sum_j a_j C(j, m) c^(j - m) of r^m.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.generic]
Tensor = torch.Tensor
_BLOCK = 512


def table(rows: list[list[int]]) -> Array:
    """Coefficients of powers of x, (segments, degree + 1), modulo 2^64."""
    return np.array([[value % (1 << 64) for value in row] for row in rows], dtype=np.uint64)


@njit(nogil=True, cache=True, inline="always")
def _about(a: Array, c: Array, m: int, degree: int, out: Array) -> None:
    """out = the coefficient of r^m of sum_j a[j] (c - r)^j, for a degree up to 3; a has one row for each power."""
    n = out.size
    three, two = np.uint64(3), np.uint64(2)
    zero = np.uint64(0)
    if m == 0:
        for e in range(n):
            out[e] = a[degree, e]
        for j in range(degree - 1, -1, -1):
            for e in range(n):
                out[e] = out[e] * c[e] + a[j, e]
    elif m == 1:
        if degree == 1:
            for e in range(n):
                out[e] = zero - a[1, e]
        elif degree == 2:
            for e in range(n):
                out[e] = zero - (a[1, e] + two * c[e] * a[2, e])
        else:
            for e in range(n):
                out[e] = zero - (a[1, e] + c[e] * (two * a[2, e] + three * c[e] * a[3, e]))
    elif m == 2:
        if degree == 2:
            for e in range(n):
                out[e] = a[2, e]
        else:
            for e in range(n):
                out[e] = a[2, e] + three * c[e] * a[3, e]
    else:
        for e in range(n):
            out[e] = zero - a[3, e]


@njit(nogil=True, cache=True)
def _share(c: Array, bits: Array, powers: Array, gated: Array, rows: Array, first: bool, out: Array) -> None:
    knots, n = bits.shape
    degree = rows.shape[1] - 1
    zero = np.uint64(0)
    known, step = np.empty((degree + 1, _BLOCK), np.uint64), np.empty((degree + 1, _BLOCK), np.uint64)
    term = np.empty(_BLOCK, np.uint64)
    for begin in range(0, n, _BLOCK):
        end = min(n, begin + _BLOCK)
        m = end - begin
        here, total = c[begin:end], out[begin:end]
        for e in range(m):
            total[e] = zero
        for j in range(degree + 1):
            for e in range(m):
                known[j, e] = rows[0, j]
        for i in range(knots):
            flip = bits[i, begin:end]
            for j in range(degree + 1):
                gain = rows[i + 1, j] - rows[i, j]
                for e in range(m):
                    step[j, e] = gain
                    known[j, e] += gain & (zero - np.uint64(flip[e]))
            for j in range(degree + 1):
                _about(step, here, j, degree, term[:m])
                product = gated[i, j, begin:end]
                for e in range(m):
                    w = zero - np.uint64(flip[e])  # all ones where the public bit is 1: minus the product then
                    total[e] += ((term[e] * product[e]) ^ w) - w
        for j in range(degree + 1):
            _about(known, here, j, degree, term[:m])
            if j == 0:
                if first:
                    for e in range(m):
                        total[e] += term[e]
            else:
                power = powers[j - 1, begin:end]
                for e in range(m):
                    total[e] += term[e] * power[e]


def share(c: Tensor, bits: Tensor, powers: Tensor, gated: Tensor, rows: list[list[int]], *, first: bool) -> Tensor:
    """A share of the piecewise polynomial at x = c - r.

    bits (K, n) public, so that [x >= knot i] = bits[i] xor rho_i; powers (degree, n): shares of r, r^2, ...; gated
    (K, degree + 1, n): shares of rho_i r^j; rows: coefficients of powers of x for each of the K + 1 segments.
    """
    out = torch.empty_like(c)
    flat = out.view(-1).numpy().view(np.uint64)
    u64 = [t.numpy().view(np.uint64) for t in (c.reshape(-1), powers, gated)]
    _share(u64[0], bits.numpy(), u64[1], u64[2], table(rows), first, flat)
    return out
