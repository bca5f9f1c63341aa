"""Z_2^64 on int64 tensors, which wrap: the arithmetic of shares, and Z_{2^64 - 1} for the textbook suite.

Everything that an op computes on shares goes through this module and `field`; nothing else in the
project assumes that tensors live on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

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
SMALL_DTYPES = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}


def wrapped(value: int) -> int:
    """An integer reduced to the int64 that represents it in Z_2^64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


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
    """x (M, K) times w (K, N). On one core, without the GIL."""
    left, right = x.contiguous().numpy(), w.contiguous().numpy()
    out = torch.empty((len(x), w.shape[1]), dtype=torch.int64) if out is None else out
    (_matmul if len(x) < _FEW_ROWS else tiled)(left, right, out.numpy())
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) times the transpose of weight (O, I)."""
    out = matmul(x.reshape(-1, x.shape[-1]), weight.t())
    return out.view(*x.shape[:-1], len(weight))


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
    out = torch.empty((groups, o // groups, n * oh * ow), dtype=torch.int64)
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


@njit(nogil=True, cache=True)
def _truncate(c: Array, shifted_r: Array, msb_r: Array, bits: int, first: bool, out: Array) -> None:
    shift, up = np.uint64(bits), np.uint64(64 - bits)
    offset = np.uint64(1) << np.uint64(62 - bits)
    for e in range(out.size):
        value = np.uint64(0) - shifted_r[e]
        if (c[e] >> np.uint64(63)) == 0:
            value += np.uint64(msb_r[e]) << up
        if first:
            value += (c[e] >> shift) - offset
        out[e] = value


def truncate(c: Tensor, shifted_r: Tensor, msb_r: Tensor, bits: int, *, first: bool) -> Tensor:
    """A share of (c >> f) - (r >> f) + msb(r) (1 - msb(c)) 2^(64-f) - 2^(62-f); `first` is P0's."""
    out = torch.empty_like(shifted_r)
    _truncate(_u64(c), _u64(shifted_r), msb_r.reshape(-1).numpy(), bits, first, _u64(out))
    return out


@njit(nogil=True, cache=True)
def _select(
    public: Array, own: Array, masked: Array, gate: Array, rho: Array, flip: Array, e0: Array, first: bool, out: Array
) -> None:
    zero = np.uint64(0)
    for i in range(out.size):
        w = zero - np.uint64(flip[i])  # a mask: all ones where the opened bit is 1
        v_mask = (masked[i] ^ w) - w  # (1 - 2w) [rho m]
        v_mask += own[i] & w  # + w [m] = [v m]
        v_bit = (rho[i] ^ w) - w
        if first:
            v_bit += w & np.uint64(1)  # [v] = w + (1 - 2w) [rho]
        v_value = public[i] * v_bit - v_mask  # [v (c - m)]
        e = zero - np.uint64(e0[i])
        out[i] = (gate[i] & e) + ((v_value ^ e) - e)  # e [x] + (1 - 2e) [v x]


def select(
    public: Tensor, mask: Tensor, masked: Tensor, value: Tensor, rho: Tensor, flip: Tensor, e: Tensor, *, first: bool
) -> Tensor:
    """A share of (e xor v) x for x = public - mask, where v = flip xor rho, and `masked` shares rho mask.

    `value` is this party's share of x itself. Linear in what was dealt: no message is needed.
    """
    out = torch.empty_like(value)
    _select(_u64(public), _u64(mask), _u64(masked), _u64(value), _u64(rho), flip.numpy(), e.numpy(), first, _u64(out))
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
    shift, up = np.uint64(bits), np.uint64(64 - bits)
    offset = np.uint64(1) << np.uint64(62 - bits)
    zero = np.uint64(0)
    for i in range(out.size):
        w = zero - np.uint64(flip[i])
        gate = zero - ((c[i] >> np.uint64(63)) ^ np.uint64(1))  # all ones where msb(c) = 0
        known = (c[i] >> shift) - offset
        m, rho_m = (np.uint64(msb_r[i]) << up) & gate, (np.uint64(rho_msb[i]) << up) & gate
        mask, masked = shifted_r[i] - m, rho_r[i] - rho_m  # y = known - mask
        v_mask = ((masked ^ w) - w) + (mask & w)
        v_bit = (rho[i] ^ w) - w
        y = zero - mask
        if first:
            v_bit += w & np.uint64(1)
            y += known
        v_y = known * v_bit - v_mask
        e = zero - np.uint64(e0[i])
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
    """`truncate` and `select` in one pass: a share of (e xor v) y, y the truncation of x."""
    out = torch.empty_like(shifted_r)
    _relu_truncate(
        _u64(c),
        _u64(shifted_r),
        msb_r.reshape(-1).numpy(),
        _u64(rho),
        _u64(rho_r),
        rho_msb.reshape(-1).numpy(),
        flip.numpy(),
        e.numpy(),
        bits,
        first,
        _u64(out),
    )
    return out


def bit_share(rho: Tensor, flip: Tensor, e: Tensor, *, first: bool) -> Tensor:
    """A share of e xor flip xor rho, in Z_2^64; `flip` and `e` are known to both."""
    public = (flip ^ e).to(torch.int64).view(rho.shape)
    return (1 - 2 * public) * rho + (public if first else 0)


@njit(nogil=True, cache=True)
def _bit(value: Array, position: int, out: Array) -> None:
    shift = np.uint64(position)
    for i in range(out.size):
        out[i] = np.uint8((value[i] >> shift) & np.uint64(1))


def bit(value: Tensor, position: int) -> Tensor:
    """One bit of every element, flat, as uint8."""
    out = torch.empty(value.numel(), dtype=torch.uint8)
    _bit(_u64(value), position, out.numpy())
    return out


@njit(nogil=True, cache=True)
def _shift_right(value: Array, bits: int, out: Array) -> None:
    shift = np.uint64(bits)
    for i in range(out.size):
        out[i] = value[i] >> shift


def shift_right(value: Tensor, bits: int) -> Tensor:
    """The unsigned value divided by 2^bits, rounded down."""
    out = torch.empty_like(value)
    _shift_right(_u64(value), bits, _u64(out))
    return out


@njit(nogil=True, cache=True)
def _gate(bits: Array, value: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = value[i] & (np.uint64(0) - np.uint64(bits[i]))


def gate(bits: Tensor, value: Tensor) -> Tensor:
    """The value where the bit is 1, else 0; the bits are flat, as uint8."""
    out = torch.empty_like(value)
    _gate(bits.reshape(-1).numpy(), _u64(value), _u64(out))
    return out


def correction(value: Tensor, share0: Tensor) -> Tensor:
    """value - share0 in the ring of the share's dtype; the share is overwritten."""
    taken = share0.numpy()
    np.subtract(value.numpy(), taken, out=taken, casting="unsafe", dtype=taken.dtype)
    return share0


def low_bits(value: Tensor, bits: int) -> Tensor:
    return value & wrapped((1 << bits) - 1)


def _u64(value: Tensor) -> Array:
    return value.reshape(-1).numpy().view(np.uint64)


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
    _odd_add(_u64(a), _u64(b), _u64(out))
    return out


def odd_negate(a: Tensor) -> Tensor:
    """-a mod 2^64 - 1."""
    return torch.where(a == 0, a, ~a)


def carries(a: Tensor, b: Tensor) -> Tensor:
    """1 where the unsigned a + b is 2^64 or more (`wrap` in SecureNN), as int64 of a's shape."""
    return ((a + b) ^ HALF).lt(a ^ HALF).to(torch.int64)
