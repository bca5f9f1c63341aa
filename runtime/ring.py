"""Z_2^64 and Z_2^32 on int64 and int32 tensors, which wrap: the arithmetic of shares.

The ring is that of the operands' dtype. Z_{2^64 - 1}, for the textbook suite, is at the end.

Everything that an op computes on shares goes through this module and `field`; nothing else in the
project assumes that tensors live on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray

from tacit.ir.types import Shape
from tacit.ir.windows import Span
from tacit.runtime.product import tiled

Array = NDArray[np.generic]
Tensor = torch.Tensor
HALF = -(1 << 63)  # 2^63, the weight of the most significant bit, as int64
# How shares in Z_2^w are held, by the bytes of a word.
WORDS = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}


def wrapped(value: int, bits: int = 64) -> int:
    """An integer reduced to the signed one that represents it in Z_2^bits."""
    half = 1 << (bits - 1)
    return (value + half) % (2 * half) - half


def bits_of(value: Tensor) -> int:
    """The bits of a word."""
    return 8 * value.element_size()


def encode(value: Tensor, frac: int) -> Tensor:
    """Reals as ring integers, rounded to the nearest multiple of 2^-frac."""
    return torch.round(value.double() * 2.0**frac).to(torch.int64)


def decode(value: Tensor, frac: int) -> Tensor:
    """Ring integers as reals, in float64."""
    return value.double() / 2.0**frac


def column_major(weight: Tensor) -> Tensor:
    """The layout in which the product with a transposed weight is fastest: strides, not values, change."""
    if weight.dim() != 2:
        return weight.contiguous()
    return weight.t().contiguous().t()


_FEW_ROWS, _COLUMN_BLOCK = 8, 1024
_LARGE = 1 << 20  # elements that are not copied for another layout


@njit(nogil=True, cache=True)
def _matmul(x: Array, w: Array, out: Array) -> None:
    """For few rows: w is read once, eight of its rows at a time."""
    rows, inner = x.shape
    whole = inner - inner % 8
    for begin in range(0, w.shape[1], _COLUMN_BLOCK):
        end = min(w.shape[1], begin + _COLUMN_BLOCK)
        out[:, begin:end] = 0
        for k in range(0, whole, 8):
            w0, w1, w2, w3 = w[k, begin:end], w[k + 1, begin:end], w[k + 2, begin:end], w[k + 3, begin:end]
            w4, w5, w6, w7 = w[k + 4, begin:end], w[k + 5, begin:end], w[k + 6, begin:end], w[k + 7, begin:end]
            for i in range(rows):
                x0, x1, x2, x3 = x[i, k], x[i, k + 1], x[i, k + 2], x[i, k + 3]
                x4, x5, x6, x7 = x[i, k + 4], x[i, k + 5], x[i, k + 6], x[i, k + 7]
                o = out[i, begin:end]
                for j in range(o.size):
                    o[j] += (
                        x0 * w0[j]
                        + x1 * w1[j]
                        + x2 * w2[j]
                        + x3 * w3[j]
                        + x4 * w4[j]
                        + x5 * w5[j]
                        + x6 * w6[j]
                        + x7 * w7[j]
                    )
        for k in range(whole, inner):
            row = w[k, begin:end]
            for i in range(rows):
                factor, o = x[i, k], out[i, begin:end]
                for j in range(o.size):
                    o[j] += factor * row[j]


def matmul(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x (M, K) times w (K, N). On one core, without the GIL. A large w is read as it lies, by rows or by columns."""
    if out is None and w.numel() > max(x.numel(), _LARGE) and w.t().is_contiguous():
        return matmul(w.t(), x.t().contiguous()).t().contiguous()
    left, right = np.ascontiguousarray(x.numpy()), np.ascontiguousarray(w.numpy())
    out = torch.from_numpy(np.empty((len(left), right.shape[1]), left.dtype)) if out is None else out
    (_matmul if len(left) < _FEW_ROWS else tiled)(left, right, out.numpy())
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) times the transpose of weight (O, I)."""
    if x.dim() == 2:
        return matmul(x, weight.t())
    return matmul(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], len(weight))


def unfold(x: Tensor, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Tensor:
    """The patches of x (N, C, H, W) as (N, OH, OW, C, KH, KW): a view where there is no padding."""
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    x = x.contiguous()
    n, c, h, w = x.shape
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip((h, w), kernel, stride, dilation, strict=True)]
    sn, sc, sh, sw = x.stride()
    return x.as_strided(
        (n, out[0], out[1], c, kernel[0], kernel[1]),
        (sn, sh * stride[0], sw * stride[1], sc, sh * dilation[0], sw * dilation[1]),
    )


def conv2d(x: Tensor, weight: Tensor, stride: Shape, padding: Shape, dilation: Shape, groups: int) -> Tensor:
    """Cross-correlation of x (N, C, H, W) with weight (O, C / groups, KH, KW), as kernels times patches."""
    o, per_group, kh, kw = weight.shape
    patches = unfold(x, (kh, kw), stride, padding, dilation)
    n, oh, ow = patches.shape[:3]
    columns = patches.permute(3, 4, 5, 0, 1, 2).reshape(groups, per_group * kh * kw, n * oh * ow)
    kernels = weight.reshape(groups, o // groups, per_group * kh * kw)
    out = torch.empty((groups, o // groups, n * oh * ow), dtype=x.dtype)
    for g in range(groups):
        matmul(kernels[g], columns[g], out[g])
    return out.view(o, n, oh, ow).transpose(0, 1).contiguous()


def window_sums(x: Tensor, rows: Sequence[Span], columns: Sequence[Span]) -> Tensor:
    """Sums of x (N, C, H, W) over rectangles: rows x columns of half-open spans. Exact in the ring."""
    total = F.pad(x, (1, 0, 1, 0)).cumsum(2).cumsum(3)
    top, bottom = ([span[i] for span in rows] for i in (0, 1))
    left, right = ([span[i] for span in columns] for i in (0, 1))
    high, low = total[:, :, bottom], total[:, :, top]
    return high[..., right] - high[..., left] - low[..., right] + low[..., left]


# Kernels compute in the words of their output; `word` makes constants of that type, because numba would widen them.


@njit(nogil=True, cache=True)
def _truncate(c: Array, shifted_r: Array, msb_r: Array, bits: int, first: bool, out: Array) -> None:
    word: Any = out.dtype.type
    source: Any = c.dtype.type
    ring = 8 * c.itemsize
    shift, top, one = source(bits), source(ring - 1), source(1)
    wrap = word(1 << (ring - bits)) if ring - bits < 8 * out.itemsize else word(0)
    offset = word(one << source(ring - 2 - bits))
    for e in range(out.size):
        gate = word(0) - word((c[e] >> top) ^ one)  # all ones where msb(c) = 0
        value = word(word(msb_r[e]) * wrap) & gate
        if first:
            value += word(c[e] >> shift) - offset
        out[e] = value - shifted_r[e]


def truncate(c: Tensor, shifted_r: Tensor, msb_r: Tensor, bits: int, *, first: bool) -> Tensor:
    """A share of (c >> f) - (r >> f) + msb(r) (1 - msb(c)) 2^(k-f) - 2^(k-2-f); `first` is P0's.

    c is of Z_2^k; the share is in the ring of `shifted_r`.
    """
    out = torch.empty_like(shifted_r)
    _truncate(_words(c), _words(shifted_r), msb_r.numpy().reshape(-1), bits, first, _words(out))
    return out


@njit(nogil=True, cache=True)
def _select(
    public: Array, own: Array, masked: Array, gate: Array, rho: Array, flip: Array, e0: Array, first: bool, out: Array
) -> None:
    word: Any = out.dtype.type
    zero = word(0)
    for i in range(out.size):
        w = zero - word(flip[i])  # a mask: all ones where the opened bit is 1
        v_mask = (masked[i] ^ w) - w  # (1 - 2w) [rho m]
        v_mask += own[i] & w  # + w [m] = [v m]
        v_bit = (rho[i] ^ w) - w
        if first:
            v_bit += w & word(1)  # [v] = w + (1 - 2w) [rho]
        v_value = public[i] * v_bit - v_mask  # [v (c - m)]
        e = zero - word(e0[i])
        out[i] = (gate[i] & e) + ((v_value ^ e) - e)  # e [x] + (1 - 2e) [v x]


def select(
    public: Tensor, mask: Tensor, masked: Tensor, value: Tensor, rho: Tensor, flip: Tensor, e: Tensor, *, first: bool
) -> Tensor:
    """A share of (e xor v) x for x = public - mask, where v = flip xor rho, and `masked` shares rho mask.

    `value` is this party's share of x itself. Linear in what was dealt: no message is needed.
    """
    out = torch.empty_like(value)
    left, right = (_words(public), _words(mask), _words(masked)), (_words(value), _words(rho))
    _select(*left, *right, flip.numpy(), e.numpy(), first, _words(out))
    return out


@njit(nogil=True, cache=True)
def _relu_truncate(
    c: Array,
    shifted_r: Array,
    msb_r: Array,
    rho: Array,
    rho_r: Array,
    rho_msb: Array,
    flip: Array,
    e0: Array,
    bits: int,
    first: bool,
    out: Array,
) -> None:
    word: Any = out.dtype.type
    source: Any = c.dtype.type
    ring = 8 * c.itemsize
    shift, top, one = source(bits), source(ring - 1), source(1)
    wrap = word(1 << (ring - bits)) if ring - bits < 8 * out.itemsize else word(0)
    zero = word(0)
    for i in range(out.size):
        w = zero - word(flip[i])
        gate = zero - word((c[i] >> top) ^ one)  # all ones where msb(c) = 0
        known = word(c[i] >> shift)
        m, rho_m = (word(msb_r[i]) * wrap) & gate, (word(rho_msb[i]) * wrap) & gate
        mask, masked = shifted_r[i] - m, rho_r[i] - rho_m  # y = known - mask
        v_mask = ((masked ^ w) - w) + (mask & w)
        v_bit = (rho[i] ^ w) - w
        y = zero - mask
        if first:
            v_bit += w & word(1)
            y += known
        v_y = known * v_bit - v_mask
        e = zero - word(e0[i])
        out[i] = (y & e) + ((v_y ^ e) - e)


def relu_truncate(
    c: Tensor,
    shifted_r: Tensor,
    msb_r: Tensor,
    rho: Tensor,
    rho_r: Tensor,
    rho_msb: Tensor,
    flip: Tensor,
    e: Tensor,
    bits: int,
    *,
    first: bool,
) -> Tensor:
    """A share of (e xor v) y, y the truncation of x, in the ring of what was dealt; c = x + r of Z_2^k.

    No offset is added to x, as in `truncate`: where x is kept, it is not negative, and then
    y = (c >> f) - (r >> f) + msb(r) (1 - msb(c)) 2^(k-f) for every x of the ring (see `comparison.Select`).
    """
    out = torch.empty_like(shifted_r)
    _relu_truncate(
        _words(c),
        _words(shifted_r),
        msb_r.numpy().reshape(-1),
        _words(rho),
        _words(rho_r),
        rho_msb.numpy().reshape(-1),
        flip.numpy(),
        e.numpy(),
        bits,
        first,
        _words(out),
    )
    return out


@njit(nogil=True, cache=True)
def _bit_share(rho: Array, flip: Array, e: Array, first: bool, out: Array) -> None:
    word: Any = out.dtype.type
    zero, one = word(0), word(1) if first else word(0)
    for i in range(out.size):
        w = zero - word(flip[i] ^ e[i])  # a mask: all ones where the public bit is 1
        out[i] = ((rho[i] ^ w) - w) + (w & one)


def bit_share(rho: Tensor, flip: Tensor, e: Tensor, *, first: bool) -> Tensor:
    """A share of e xor flip xor rho, in the ring of `rho`; `flip` and `e` are known to both."""
    out = torch.empty_like(rho)
    _bit_share(_words(rho), flip.numpy(), e.numpy(), first, _words(out))
    return out


@njit(nogil=True, cache=True)
def _pair_differences(value: Array, out: Array) -> None:
    n, classes = value.shape
    row = 0
    for a in range(classes):
        for b in range(a + 1, classes):
            for i in range(n):
                out[row, i] = value[i, a] - value[i, b]
            row += 1


def pair_differences(value: Tensor) -> Tensor:
    """value[:, a] - value[:, b] of (n, classes) for all a < b, in the order of a, then of b: (pairs, n)."""
    n, classes = value.shape
    out = torch.empty((classes * (classes - 1) // 2, n), dtype=value.dtype)
    _pair_differences(value.numpy(), out.numpy())
    return out


@njit(nogil=True, cache=True)
def _bit(value: Array, position: int, out: Array) -> None:
    word: Any = value.dtype.type
    shift, one = word(position), word(1)
    for i in range(out.size):
        out[i] = np.uint8((value[i] >> shift) & one)


def bit(value: Tensor, position: int) -> Tensor:
    """One bit of every element, flat, as uint8."""
    out = torch.empty(value.numel(), dtype=torch.uint8)
    _bit(_words(value), position, out.numpy())
    return out


@njit(nogil=True, cache=True)
def _shift_right(value: Array, bits: int, out: Array) -> None:
    shift = value.dtype.type(bits)
    for i in range(out.size):
        out[i] = value[i] >> shift


def shift_right(value: Tensor, bits: int) -> Tensor:
    """The unsigned value divided by 2^bits, rounded down."""
    out = torch.empty_like(value)
    _shift_right(_words(value), bits, _words(out))
    return out


@njit(nogil=True, cache=True)
def _gate(bits: Array, value: Array, out: Array) -> None:
    word: Any = value.dtype.type
    for i in range(out.size):
        out[i] = value[i] & (word(0) - word(bits[i]))


def gate(bits: Tensor, value: Tensor) -> Tensor:
    """The value where the bit is 1, else 0; the bits are flat, as uint8."""
    out = torch.empty_like(value)
    _gate(bits.numpy().reshape(-1), _words(value), _words(out))
    return out


def correction(value: Tensor, share0: Tensor) -> Tensor:
    """value - share0 in the ring of the share's dtype; the share is overwritten."""
    taken = share0.numpy()
    np.subtract(value.numpy(), taken, out=taken, casting="unsafe", dtype=taken.dtype)
    return share0


def low_bits(value: Tensor, bits: int) -> Tensor:
    """The lowest bits as integers, in int64."""
    return value.to(torch.int64) & wrapped((1 << bits) - 1)


def _words(value: Tensor) -> Array:
    """The elements, flat and unsigned."""
    flat = value.numpy().reshape(-1)
    return flat.view(np.uint32 if flat.itemsize == 4 else np.uint64)


# --- Z_{2^64 - 1}: residues 0 .. 2^64 - 2, held as int64 (SecureNN's odd ring) ---


@njit(nogil=True, cache=True)
def _odd_add(a: Array, b: Array, out: Array) -> None:
    for i in range(out.size):
        total = a[i] + b[i]
        total += np.uint64(1) if total < a[i] else np.uint64(0)  # 2^64 = 1
        out[i] = np.uint64(0) if total == ~np.uint64(0) else total


def odd_add(a: Tensor, b: Tensor) -> Tensor:
    """a + b mod 2^64 - 1."""
    out = torch.empty_like(a)
    _odd_add(_words(a), _words(b), _words(out))
    return out


def odd_negate(a: Tensor) -> Tensor:
    """-a mod 2^64 - 1."""
    return torch.where(a == 0, a, ~a)


def carries(a: Tensor, b: Tensor) -> Tensor:
    """1 where the unsigned a + b is 2^64 or more (`wrap` in SecureNN), as int64 of a's shape."""
    return ((a + b) ^ HALF).lt(a ^ HALF).to(torch.int64)
