"""Z_p for small primes: bit sharing, PrivateCompare, and the packing of elements on the wire.

Tensors of Z_p elements are uint8, laid out position-major: shape (positions, elements), so that the
inner loops run over elements and vectorise. The kernels are compiled by numba without the GIL, work on
blocks that stay in the first-level cache, and are cached on disk.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.generic]
_BLOCK = 512


def _barrett(p: int) -> int:
    """M with (a * M) >> 20 == a // p for all a < p^2 <= 67^2: the error a / 2^20 stays below 1 / p."""
    return (1 << 20) // p + 1


@njit(nogil=True, cache=True)
def reduce_draws(draws: Array, bound: int, limit: int, out: Array) -> Array:
    """out = draws mod bound (16-bit draws, bound <= 256); returns the positions of the draws to reject."""
    n = draws.size
    b, inverse = np.uint32(bound), np.uint32(65536 // bound)
    for i in range(n):
        a = np.uint32(draws[i])
        q = np.uint32(np.uint32(a * inverse) >> np.uint32(16))  # the quotient, or one less
        r = np.uint32(a - np.uint32(q * b))
        out[i] = np.uint8(r - b if r >= b else r)
    found = [0 for _ in range(0)]
    if limit < 65536:
        last = np.uint16(limit - 1)
        for begin in range(0, n, _BLOCK):
            block = draws[begin : min(n, begin + _BLOCK)]
            over = np.uint8(0)
            for e in range(block.size):
                over |= np.uint8(block[e] > last)
            if over != 0:
                for e in range(block.size):
                    if block[e] > last:
                        found.append(begin + e)
    return np.array(found, dtype=np.int64)


@njit(nogil=True, cache=True)
def _pack3(values: Array, out: Array) -> None:
    positions, n = values.shape
    for word in range(out.shape[0]):
        first = 3 * word
        for e in range(n):
            out[word, e] = values[first, e]
        if first + 1 < positions:
            for e in range(n):
                out[word, e] |= np.uint16(np.uint16(values[first + 1, e]) << np.uint16(5))
        if first + 2 < positions:
            for e in range(n):
                out[word, e] |= np.uint16(np.uint16(values[first + 2, e]) << np.uint16(10))


@njit(nogil=True, cache=True)
def _unpack3(words: Array, out: Array) -> None:
    positions, n = out.shape
    for i in range(positions):
        shift = np.uint16(5 * (i % 3))
        for e in range(n):
            out[i, e] = np.uint8((words[i // 3, e] >> shift) & np.uint16(31))


def pack(values: torch.Tensor, p: int) -> torch.Tensor:
    """(positions, n) elements of Z_p as they cross the wire: three to a 16-bit word for p < 32, else a byte each."""
    if p >= 32:
        return values
    out = torch.empty(((values.shape[0] + 2) // 3, values.shape[1]), dtype=torch.uint16)
    _pack3(values.numpy(), out.numpy())
    return out


def unpack(words: torch.Tensor, positions: int, p: int) -> torch.Tensor:
    """The inverse of `pack`."""
    if p >= 32:
        return words
    out = torch.empty((positions, words.shape[1]), dtype=torch.uint8)
    _unpack3(words.numpy(), out.numpy())
    return out


def packed_shape(positions: int, n: int, p: int) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of `pack`'s result."""
    return (((positions + 2) // 3, n), torch.uint16) if p < 32 else ((positions, n), torch.uint8)


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """n bits, one to a byte, as ceil(n / 8) bytes."""
    return torch.from_numpy(np.packbits(bits.numpy().reshape(-1)))


def unpack_bits(packed: torch.Tensor, n: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=n))


@njit(nogil=True, cache=True)
def _bit_corrections(r: Array, low: int, share0: Array, p: int, out: Array) -> None:
    bits, n = share0.shape
    prime = np.uint8(p)
    for i in range(bits):
        shift = np.uint64(low + i)
        for e in range(n):
            bit = np.uint8((r[e] >> shift) & np.uint64(1))
            d = np.uint8(bit + prime - share0[i, e])
            out[i, e] = d - prime if d >= prime else d


def bit_corrections(r: torch.Tensor, low: int, share0: torch.Tensor, p: int) -> torch.Tensor:
    """P1's shares of bits low, low + 1, ... of r, given P0's: (bits, n) elements of Z_p."""
    out = torch.empty_like(share0)
    _bit_corrections(r.view(-1).numpy().view(np.uint64), low, share0.numpy(), p, out.numpy())
    return out


# The loops below touch few arrays each: LLVM vectorises a loop only where it can check that its arrays
# do not overlap, and gives up beyond a handful of pairs.


@njit(nogil=True, cache=True, inline="always")
def _entries(x: Array, cb: Array, flip: Array, above: Array, one: np.uint8, p: int, out: Array) -> None:
    """out = d at this position. beta = 0 tests x > c: c - x + 1 + above; beta = 1 tests c > x: x - c + 1 + above."""
    prime = np.uint8(p)
    for e in range(out.size):
        negative = np.uint8(prime - x[e]) if x[e] != 0 else np.uint8(0)
        d = np.uint8(above[e] + (x[e] if flip[e] != 0 else negative))
        d = np.uint8(d - prime) if d >= prime else d
        d = np.uint8(d + (one & np.uint8(np.uint8(1) + (np.uint8(0) - cb[e] if flip[e] != 0 else cb[e]))))
        out[e] = np.uint8(d - prime) if d >= prime else d


@njit(nogil=True, cache=True, inline="always")
def _accumulate(x: Array, cb: Array, one: np.uint8, p: int, above: Array) -> None:
    """above += x xor c."""
    prime = np.uint8(p)
    for e in range(above.size):
        negative = np.uint8(prime - x[e]) if x[e] != 0 else np.uint8(0)
        w = np.uint8((one & np.uint8(1)) + negative) if cb[e] != 0 else x[e]
        w = np.uint8(w - prime) if w >= prime else w
        a = np.uint8(above[e] + w)
        above[e] = np.uint8(a - prime) if a >= prime else a


@njit(nogil=True, cache=True, inline="always")
def _hide(d: Array, s: Array, z: Array, p: int, factor: int, negate: bool, out: Array) -> None:
    """out = s d + z, or s d - z."""
    prime, wide, mul = np.uint8(p), np.uint32(p), np.uint32(factor)
    for e in range(out.size):
        product = np.uint32(np.uint32(d[e]) * np.uint32(s[e]))
        q = np.uint32(np.uint32(product * mul) >> np.uint32(20))
        blinded = np.uint8(product - np.uint32(q * wide))
        total = np.uint8(blinded + (np.uint8(prime - z[e]) if negate else z[e]))
        out[e] = np.uint8(total - prime) if total >= prime else total


@njit(nogil=True, cache=True, inline="always")
def _turn(here: Array, there: Array, take: Array, out: Array) -> None:
    """out = there where take is all ones, here where it is zero."""
    for e in range(out.size):
        out[e] = here[e] ^ ((here[e] ^ there[e]) & take[e])


@njit(nogil=True, cache=True)
def _blind(
    c: Array,
    low: int,
    share: Array,
    s: Array,
    z: Array,
    beta: Array,
    shift: Array,
    rank: int,
    p: int,
    factor: int,
    out: Array,
) -> None:
    bits, n = share.shape
    positions = bits + 1
    one = np.uint8(255) if rank == 0 else np.uint8(0)  # a mask: P0 alone adds public constants
    rows = np.empty((2, positions, _BLOCK), np.uint8)
    above, d, cb = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)
    nothing = np.zeros(_BLOCK, np.uint8)
    for begin in range(0, n, _BLOCK):
        end = min(n, begin + _BLOCK)
        m = end - begin
        word, flip = c[begin:end], beta[begin:end]
        for e in range(m):
            above[e] = np.uint8(0)
        for i in range(bits, -1, -1):  # row i holds the position of bit i - 1; row 0 the appended one
            if i > 0:
                position = np.uint64(low + i - 1)
                for e in range(m):
                    cb[e] = np.uint8((word[e] >> position) & np.uint64(1))
                x = share[i - 1, begin:end]
            else:
                for e in range(m):
                    cb[e] = np.uint8(1)
                x = nothing[:m]
            _entries(x, cb[:m], flip, above[:m], one, p, d[:m])
            _accumulate(x, cb[:m], one, p, above[:m])
            _hide(d[:m], s[i, begin:end], z[i, begin:end], p, factor, rank != 0, rows[0, i, :m])
        # Rotate every column by its own shift: one stage for each bit of the shift.
        step, current, turn = 1, 0, shift[begin:end]
        while step < positions:
            stage = np.uint8(step)
            for e in range(m):
                d[e] = np.uint8(255) if (turn[e] & stage) != 0 else np.uint8(0)
            for i in range(positions):
                _turn(rows[current, i, :m], rows[current, (i - step) % positions, :m], d[:m], rows[1 - current, i, :m])
            current = 1 - current
            step *= 2
        for i in range(positions):
            out[i, begin:end] = rows[current, i, :m]


def blind(
    c: torch.Tensor,
    low: int,
    share: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor,
    beta: torch.Tensor,
    shift: torch.Tensor,
    rank: int,
    p: int,
) -> torch.Tensor:
    """PrivateCompare, the side of P0 and P1 (SecureNN, Algorithm 3): what this party sends to P2.

    Compares bits low .. low + bits - 1 of the public c with a secret x whose bits are shared in `share`
    (bits, n), as 2c + 1 against 2x: the appended position, whose secret bit is 0, removes the case of
    equality. Entry i is s_i d_i +- z_i, rotated: d_i = 0 at one position if and only if x > c (beta = 0)
    or c >= x (beta = 1). The multipliers s hide all nonzero entries; the zero-sharing z refreshes what
    P2 dealt; the shift hides the position.
    """
    n = share.shape[1]
    out = torch.empty((share.shape[0] + 1, n), dtype=torch.uint8)
    _blind(
        c.reshape(-1).numpy().view(np.uint64),
        low,
        share.numpy(),
        s.numpy(),
        z.numpy(),
        beta.numpy(),
        shift.numpy(),
        rank,
        p,
        _barrett(p),
        out.numpy(),
    )
    return out


@njit(nogil=True, cache=True)
def _has_zero(d0: Array, d1: Array, p: int, out: Array) -> None:
    positions, n = d0.shape
    prime = np.uint8(p)
    for i in range(positions):
        for e in range(n):
            total = np.uint8(d0[i, e] + d1[i, e])
            hit = (total == 0) | (total == prime)
            out[e] |= np.uint8(1) if hit else np.uint8(0)


def has_zero(d0: torch.Tensor, d1: torch.Tensor, p: int) -> torch.Tensor:
    """PrivateCompare, the side of P2: for each column, whether some entry of d0 + d1 is 0 mod p."""
    out = torch.zeros(d0.shape[1], dtype=torch.uint8)
    _has_zero(d0.numpy(), d1.numpy(), p, out.numpy())
    return out
