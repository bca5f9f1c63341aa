"""Z_p for small primes: thermometer sharing of digits, PrivateCompare, and the packing of elements on the wire.

Tensors of Z_p elements are uint8, laid out position-major: shape (positions, elements), so that the
inner loops run over elements and vectorise. The kernels are compiled by numba without the GIL, work on
blocks that stay in the first-level cache, and are cached on disk.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from tacit.ir.digits import Digits

Array = NDArray[np.generic]
_BLOCK = 1024


# --- sampling ---


@njit(nogil=True, cache=True)
def split_draws(draws: Array, bounds: Array, limit: int, out: Array) -> Array:
    """out[0, i], out[1, i], ... = the digits of the i-th 16-bit draw in the mixed radix `bounds`, the lowest first.

    Uniform and independent for draws that are uniform below `limit`, a multiple of the bounds' product. A draw at or
    above it is replaced by the next of those beyond out's columns that is below. Returns the positions for which there
    was none: they are to be drawn again.
    """
    n, spare = out.shape[1], out.shape[1]
    rest = np.empty(_BLOCK, np.uint16)
    last = np.uint16(limit - 1)
    found = [0 for _ in range(0)]
    for begin in range(0, n, _BLOCK):
        block = draws[begin : min(n, begin + _BLOCK)]
        m = block.size
        over = np.uint8(0)
        for e in range(m):
            rest[e] = block[e]
            over |= np.uint8(block[e] > last)
        if over != 0:
            for e in range(m):
                if block[e] > last:
                    found.append(begin + e)
        for k in range(bounds.size):
            target = out[k, begin : begin + m]
            _divide(rest[:m], bounds[k], target)
    left = [0 for _ in range(0)]
    for e in found:
        while spare < draws.size and draws[spare] > last:
            spare += 1
        if spare == draws.size:
            left.append(e)
            continue
        value = np.uint32(draws[spare])
        spare += 1
        for k in range(bounds.size):
            out[k, e] = np.uint8(value % np.uint32(bounds[k]))
            value //= np.uint32(bounds[k])
    return np.array(left, dtype=np.int64)


@njit(nogil=True, cache=True, inline="always")
def _divide(values: Array, bound: np.uint16, remainder: Array) -> None:
    """values, remainder = divmod(values, bound), for a bound from 2 to 256."""
    inverse, b = np.uint16(65536 // np.uint32(bound)), np.uint16(bound)
    for e in range(values.size):
        a = values[e]
        q = np.uint16(np.uint32(np.uint32(a) * np.uint32(inverse)) >> np.uint32(16))  # the quotient, or one less
        r = np.uint16(a - np.uint16(q * b))
        more = r >= b
        values[e] = np.uint16(q + np.uint16(1)) if more else q
        remainder[e] = np.uint8(np.uint16(r - b) if more else r)


# --- the wire: two elements to a byte for p < 16, three to a 16-bit word for p < 32, else a byte each ---


def packed_shape(positions: int, n: int, p: int) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of `pack`'s result for (positions, n) elements of Z_p."""
    if p < 16:
        return (-(-positions // 2), n), torch.uint8
    return ((-(-positions // 3), n), torch.uint16) if p < 32 else ((positions, n), torch.uint8)


@njit(nogil=True, cache=True)
def _pack(values: Array, per_word: int, bits: int, out: Array) -> None:
    positions, n = values.shape
    for begin in range(0, n, _BLOCK):
        end = min(n, begin + _BLOCK)
        for word in range(out.shape[0]):
            _put(values, per_word * word, min(per_word, positions - per_word * word), bits, begin, end, out[word])


@njit(nogil=True, cache=True, inline="always")
def _put(values: Array, first: int, count: int, bits: int, begin: int, end: int, row: Array) -> None:
    target, v0 = row[begin:end], values[first, begin:end]
    for e in range(target.size):
        target[e] = v0[e]
    for k in range(1, count):
        v, shift = values[first + k, begin:end], np.uint16(bits * k)
        for e in range(target.size):
            target[e] |= np.uint16(np.uint16(v[e]) << shift)


@njit(nogil=True, cache=True)
def _unpack(words: Array, per_word: int, bits: int, out: Array) -> None:
    positions, n = out.shape
    mask = np.uint16((1 << bits) - 1)
    for i in range(positions):
        source, target, shift = words[i // per_word], out[i], np.uint16(bits * (i % per_word))
        for e in range(n):
            target[e] = np.uint8((np.uint16(source[e]) >> shift) & mask)


def pack(values: torch.Tensor, p: int) -> torch.Tensor:
    """(positions, n) elements of Z_p as they cross the wire."""
    if p >= 32:
        return values
    positions, n = values.shape
    shape, dtype = packed_shape(positions, n, p)
    out = torch.empty(shape, dtype=dtype)
    if p < 16:
        _pack(values.numpy(), 2, 4, out.numpy())
    else:
        _pack(values.numpy(), 3, 5, out.numpy())
    return out


def unpack(words: torch.Tensor, positions: int, p: int) -> torch.Tensor:
    """The inverse of `pack`."""
    if p >= 32:
        return words
    out = torch.empty((positions, words.shape[1]), dtype=torch.uint8)
    if p < 16:
        _unpack(words.numpy(), 2, 4, out.numpy())
    else:
        _unpack(words.numpy(), 3, 5, out.numpy())
    return out


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """n bits, one to a byte, as ceil(n / 8) bytes."""
    return torch.from_numpy(np.packbits(bits.numpy().reshape(-1)))


def unpack_bits(packed: torch.Tensor, n: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=n))


# --- dealing digits ---


@njit(nogil=True, cache=True, inline="always")
def _digit(words: Array, position: int, digit_bits: int, out: Array) -> None:
    shift, mask = np.uint64(position * digit_bits), np.uint64((1 << digit_bits) - 1)
    for e in range(out.size):
        out[e] = np.uint8((words[e] >> shift) & mask)


@njit(nogil=True, cache=True)
def _digit_corrections(r: Array, low: int, bits: int, digit_bits: int, share0: Array, p: int, out: Array) -> None:
    rows, n = share0.shape
    prime, levels = np.uint8(p), (1 << digit_bits) - 1
    word, digit = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint8)
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    for begin in range(0, n, _BLOCK):
        end = min(n, begin + _BLOCK)
        m = end - begin
        for e in range(m):
            word[e] = (np.uint64(r[begin + e]) >> np.uint64(low)) & mask
        for row in range(rows):
            if row % levels == 0:
                _digit(word[:m], row // levels, digit_bits, digit[:m])
            level, share, target = np.uint8(row % levels + 1), share0[row, begin:end], out[row, begin:end]
            for e in range(m):
                d = np.uint8(np.uint8(digit[e] >= level) + prime - share[e])
                target[e] = np.uint8(d - prime) if d >= prime else d


def digit_corrections(r: torch.Tensor, low: int, digits: Digits, share0: torch.Tensor) -> torch.Tensor:
    """P1's shares of the thermometer code of bits low .. low + digits.bits - 1 of r, given P0's: (rows, n) of Z_p."""
    out = torch.empty_like(share0)
    _digit_corrections(_words(r), low, digits.bits, digits.digit_bits, share0.numpy(), digits.p, out.numpy())
    return out


def minus(a: torch.Tensor, b: torch.Tensor, p: int) -> torch.Tensor:
    """a - b modulo p."""
    return torch.where(a < b, a + (p - b), a - b)


# --- PrivateCompare ---
# The loops below touch few arrays each: LLVM vectorises a loop only where it can check that its arrays
# do not overlap, and gives up beyond a handful of pairs.


@njit(nogil=True, cache=True, inline="always")
def _thermometer(shares: Array, begin: int, digit: Array, levels: int, one: np.uint8, g: Array, h: Array) -> None:
    """h = [T_c] and g = [T_{c+1}] for the public digits c."""
    m = digit.size
    for e in range(m):
        h[e] = one & (np.uint8(0) - np.uint8(digit[e] == 0))
        g[e] = np.uint8(0)
    for k in range(levels):
        share, below, at = shares[k, begin : begin + m], np.uint8(k), np.uint8(k + 1)
        for e in range(m):
            g[e] |= share[e] & (np.uint8(0) - np.uint8(digit[e] == below))
        for e in range(m):
            h[e] |= share[e] & (np.uint8(0) - np.uint8(digit[e] == at))


@njit(nogil=True, cache=True, inline="always")
def _entries(g: Array, h: Array, flip: Array, above: Array, one: np.uint8, p: int, out: Array) -> None:
    """out = above + (1 - g where flip is 0, h where it is all ones), in a time that does not depend on flip."""
    prime = np.uint8(p)
    for e in range(out.size):
        strict = np.uint8(one - g[e])
        strict = min(strict, np.uint8(strict + prime))  # one - g is at least -p
        d = np.uint8(above[e] + (strict ^ ((strict ^ h[e]) & flip[e])))
        out[e] = min(d, np.uint8(d - prime))


@njit(nogil=True, cache=True, inline="always")
def _accumulate(g: Array, h: Array, one: np.uint8, p: int, above: Array) -> None:
    """above += [r != c] = 1 - h + g."""
    prime = np.uint8(p)
    for e in range(above.size):
        differ = np.uint8(one - h[e])
        differ = min(differ, np.uint8(differ + prime))
        total = np.uint8(above[e] + differ)
        total = np.uint8(min(total, np.uint8(total - prime)) + g[e])
        above[e] = min(total, np.uint8(total - prime))


@njit(nogil=True, cache=True, inline="always")
def _hide(d: Array, s: Array, z: Array, p: int, negate: bool, out: Array) -> None:
    """out = s d + z, or s d - z; p at most 67."""
    prime, wide, inverse = np.uint8(p), np.uint16(p), np.uint16(65536 // p)
    for e in range(out.size):
        product = np.uint16(np.uint16(d[e]) * np.uint16(s[e]))
        q = np.uint16(np.uint32(np.uint32(product) * np.uint32(inverse)) >> np.uint32(16))  # the quotient, or one less
        blinded = np.uint8(product - np.uint16(q * wide))
        blinded = min(blinded, np.uint8(blinded - prime))
        total = np.uint8(blinded + (np.uint8(prime - z[e]) if negate else z[e]))
        out[e] = min(total, np.uint8(total - prime))


@njit(nogil=True, cache=True, inline="always")
def _turn(here: Array, there: Array, take: Array, out: Array) -> None:
    """out = there where take is all ones, here where it is zero."""
    for e in range(out.size):
        out[e] = here[e] ^ ((here[e] ^ there[e]) & take[e])


@njit(nogil=True, cache=True)
def _blind(
    c: Array,
    low: int,
    bits: int,
    digit_bits: int,
    share: Array,
    s: Array,
    z: Array,
    beta: Array,
    shift: Array,
    rank: int,
    p: int,
    out: Array,
) -> None:
    positions, n = s.shape
    levels = (1 << digit_bits) - 1
    one = np.uint8(1) if rank == 0 else np.uint8(0)  # P0 alone adds public constants
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    rows = np.empty((2, positions, _BLOCK), np.uint8)
    word = np.empty(_BLOCK, np.uint64)
    above, d, digit = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)
    g, h, flip = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)
    for begin in range(0, n, _BLOCK):
        end = min(n, begin + _BLOCK)
        m = end - begin
        for e in range(m):
            flip[e] = np.uint8(0) - np.uint8(beta[begin + e] != 0)
            word[e] = (np.uint64(c[begin + e]) >> np.uint64(low)) & mask
            above[e] = np.uint8(0)
        for i in range(positions - 1, -1, -1):
            _digit(word[:m], i, digit_bits, digit[:m])
            first = i * levels
            _thermometer(share[first:], begin, digit[:m], min(levels, len(share) - first), one, g, h)
            # Where digits are equal down to the lowest, c >= r holds and r > c does not: the two tests are
            # complements of one another, and nothing has to be known about equality.
            _entries(g[:m], h[:m] if i > 0 else g[:m], flip[:m], above[:m], one, p, d[:m])
            _accumulate(g[:m], h[:m], one, p, above[:m])
            _hide(d[:m], s[i, begin:end], z[i, begin:end], p, rank != 0, rows[0, i, :m])
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
            target, source = out[i, begin:end], rows[current, i]
            for e in range(m):
                target[e] = source[e]


def blind(
    c: torch.Tensor,
    low: int,
    digits: Digits,
    share: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor,
    beta: torch.Tensor,
    shift: torch.Tensor,
    rank: int,
) -> torch.Tensor:
    """PrivateCompare, the side of P0 and P1 (SecureNN, Algorithm 3): what this party sends to P2.

    Compares bits low .. low + digits.bits - 1 of the public c with a secret r whose thermometer code is
    shared in `share` (rows, n). Entry i is s_i d_i +- z_i, rotated: d_i = 0 at one position if and only if
    r > c (beta = 0) or c >= r (beta = 1). The multipliers s hide all nonzero entries; the zero-sharing z
    refreshes what P2 dealt; the shift hides the position.
    """
    out = torch.empty((digits.positions, share.shape[1]), dtype=torch.uint8)
    _blind(
        _words(c),
        low,
        digits.bits,
        digits.digit_bits,
        share.numpy(),
        s.numpy(),
        z.numpy(),
        beta.numpy(),
        shift.numpy(),
        rank,
        digits.p,
        out.numpy(),
    )
    return out


@njit(nogil=True, cache=True)
def _has_zero(d0: Array, d1: Array, positions: int, per_word: int, bits: int, p: int, out: Array) -> None:
    prime, n = np.uint16(p), d0.shape[1]
    mask = np.uint16((1 << bits) - 1)
    for begin in range(0, n, _BLOCK):
        end = min(n, begin + _BLOCK)
        hit = out[begin:end]
        for i in range(positions):
            left, right, shift = (
                d0[i // per_word, begin:end],
                d1[i // per_word, begin:end],
                np.uint16(bits * (i % per_word)),
            )
            for e in range(hit.size):
                a, b = np.uint16(np.uint16(left[e]) >> shift) & mask, np.uint16(np.uint16(right[e]) >> shift) & mask
                total = np.uint16(a + b)
                hit[e] |= np.uint8((total == 0) | (total == prime))


def has_zero(d0: torch.Tensor, d1: torch.Tensor, positions: int, p: int) -> torch.Tensor:
    """PrivateCompare, the side of P2: for each column, whether some entry of d0 + d1 (both packed) is 0 mod p."""
    out = torch.zeros(d0.shape[1], dtype=torch.uint8)
    per_word, bits = (2, 4) if p < 16 else (3, 5) if p < 32 else (1, 8)
    _has_zero(d0.numpy(), d1.numpy(), positions, per_word, bits, p, out.numpy())
    return out


def _words(value: torch.Tensor) -> Array:
    """The elements, flat and unsigned."""
    flat = value.numpy().reshape(-1)
    return flat.view(np.uint32 if flat.itemsize == 4 else np.uint64)
