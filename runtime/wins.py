"""Wins of classes over Z_p: from the bits of comparisons to the class that beats all others."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.generic]


@njit(nogil=True, cache=True)
def _counted(rho: Array, known: Array, first: bool, p: int, out: Array) -> None:
    classes, n = out.shape
    one = 1 if first else 0  # P0 alone adds public constants
    for i in range(n):
        row = 0
        for a in range(classes):
            for b in range(a + 1, classes):
                bit = np.int32(rho[row, i])
                bit = one - bit if known[row * n + i] else bit
                out[a, i] += bit
                out[b, i] += one - bit
                row += 1
        for a in range(classes):
            out[a, i] %= p


def counted(rho: torch.Tensor, known: torch.Tensor, classes: int, p: int, *, first: bool) -> torch.Tensor:
    """A share over Z_p of how many classes each beats, (classes, n), as int32.

    [a beats b] = known xor rho, for all a < b in the order of a, then of b: shares of rho over Z_p, (pairs, n), and
    public bits, flat.
    """
    out = torch.zeros((classes, rho.shape[1]), dtype=torch.int32)
    _counted(rho.numpy(), known.numpy(), first, p, out.numpy())
    return out


@njit(nogil=True, cache=True)
def _hidden(wins: Array, s: Array, z: Array, turn: Array, missing: int, negate: bool, p: int, out: Array) -> None:
    classes, n = wins.shape
    for j in range(classes):
        for i in range(n):
            c = (j - np.int64(turn[i])) % classes
            value = (np.int64(wins[c, i]) - missing) * np.int64(s[c, i])
            out[j, i] = (value - z[c, i] if negate else value + z[c, i]) % p


def hidden(
    wins: torch.Tensor, s: torch.Tensor, z: torch.Tensor, turn: torch.Tensor, p: int, *, first: bool
) -> torch.Tensor:
    """This party's share of s (wins - (classes - 1)), refreshed, each row's classes turned: (classes, n), as uint8."""
    out = torch.empty_like(s)
    missing = len(wins) - 1 if first else 0
    _hidden(wins.numpy(), s.numpy(), z.numpy(), turn.numpy(), missing, not first, p, out.numpy())
    return out


@njit(nogil=True, cache=True)
def _zeros(a: Array, b: Array, mask: Array, p: int, out: Array) -> None:
    for j in range(out.shape[0]):
        for i in range(out.shape[1]):
            total = np.int64(a[j, i]) + np.int64(b[j, i])
            out[j, i] = (1 if total % p == 0 else 0) - mask[j, i]


def zeros(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor, p: int) -> torch.Tensor:
    """1 where a + b is 0 modulo p, else 0, minus the mask, in its ring."""
    out = torch.empty_like(mask)
    _zeros(a.numpy(), b.numpy(), mask.numpy(), p, out.numpy())
    return out


@njit(nogil=True, cache=True)
def _index(share: Array, turn: Array, out: Array) -> None:
    classes, n = share.shape
    for j in range(classes):
        for i in range(n):
            out[i] += share[j, i] * ((j - np.int64(turn[i])) % classes)


def index(share: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """A share of the class that stands where the one of a shared one-hot vector does, in a turned row: (n,)."""
    out = torch.zeros(share.shape[1], dtype=share.dtype)
    _index(share.numpy(), turn.numpy(), out.numpy())
    return out
