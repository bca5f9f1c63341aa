"""The identities behind the protocols, enumerated on small rings, and the kernels against plain integers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tacit.ir.cost import P0, P1, P2
from tacit.ir.digits import _PRIMES, Digits, prime_for
from tacit.runtime import field, prf, ring
from tacit.runtime.prf import Stream, Streams

int64s = st.integers(-(2**63), 2**63 - 1)


def stream(seed: int = 0, node: int = 0) -> Stream:
    return Stream(seed.to_bytes(16, "big"), 1, node)


# --- identities on a ring of 8 bits: every value, every mask ---

N = 8
RING = range(1 << N)


def signed(v: int, bits: int = N) -> int:
    v %= 1 << bits
    return v - (1 << bits) if v >> (bits - 1) else v


@pytest.mark.parametrize("f", [1, 2, 3])
def test_truncation_formula_is_floor_of_x_plus_t_for_every_mask(f: int) -> None:
    quarter = 1 << (N - 2)
    for x, r in itertools.product(range(-quarter, quarter), RING):
        c = (x + quarter + r) % (1 << N)
        msb = ((r >> (N - 1)) & 1) * (1 - (c >> (N - 1)))
        y = (c >> f) - (r >> f) + (msb << (N - f)) - (1 << (N - 2 - f))
        t = (1 << f) - 1 - c % (1 << f)
        assert signed(y) == (x + t) >> f


def test_truncation_formula_breaks_outside_its_range() -> None:
    """The range is a condition, not caution: just outside, some mask gives garbage."""
    f, x = 2, (1 << (N - 2)) + 1
    wrong = 0
    for r in RING:
        c = (x + (1 << (N - 2)) + r) % (1 << N)
        msb = ((r >> (N - 1)) & 1) * (1 - (c >> (N - 1)))
        y = (c >> f) - (r >> f) + (msb << (N - f)) - (1 << (N - 2 - f))
        wrong += abs(signed(y) - (x >> f)) > 1
    assert wrong > 0


@pytest.mark.parametrize("drop", [0, 1, 2, 3])
@pytest.mark.parametrize("window", [6, 7, 8])
def test_sign_from_dropped_bits_is_the_sign_of_the_truncation(window: int, drop: int) -> None:
    half = 1 << (window - 1)
    for x, r in itertools.product(range(-half, half - (1 << drop) + (drop == 0)), RING):
        c = (x + r) % (1 << N)
        low = (1 << (window - 1)) - (1 << drop)
        less = (c & low) < (r & low)
        sign = (c >> (window - 1)) & 1 ^ (r >> (window - 1)) & 1 ^ less
        t = (1 << drop) - 1 - c % (1 << drop)
        assert sign == ((x + t) >> drop < 0), (x, r)


def test_share_conversion_and_msb_identities_on_a_small_odd_ring() -> None:
    size = 1 << N
    for a0, a1 in itertools.product(RING, RING):
        a = (a0 + a1) % size
        if a != size - 1:
            assert (a0 + a1 - (a0 + a1 >= size)) % (size - 1) == a
            assert (2 * a) % (size - 1) & 1 == a >> (N - 1)


# --- kernels ---


@pytest.mark.parametrize("digit_bits", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 19, 27, 28, 29, 40, 63, 64])
def test_private_compare_is_exact(bits: int, digit_bits: int) -> None:
    """All pairs for up to five bits, else random ones with equal and neighbouring values among them."""
    digits, s = Digits(bits, digit_bits), stream(bits)
    if bits <= 5:
        pairs = torch.tensor(list(itertools.product(range(1 << bits), repeat=2)))
        c, r = pairs[:, 0].repeat(8), pairs[:, 1].repeat(8)
    else:
        c, r = s.ring((4000,)), s.ring((4000,))
        r[:1000] = c[:1000] + torch.randint(-1, 2, (1000,), generator=torch.Generator().manual_seed(0))
    n, low = len(c), 3 if bits <= 40 else 0
    c, r = (c << low, r << low) if bits <= 5 else (c, r)
    share0 = s.below(digits.p, (digits.rows, n))
    share1 = field.digit_corrections(r, low, digits, share0)
    common = (*s.blinding(digits.p, (digits.positions, n)), s.bits((n,)), s.below(digits.positions, (n,)))
    d0 = field.blind(c, low, digits, share0, *common, 0)
    d1 = field.blind(c, low, digits, share1, *common, 1)
    mask = np.uint64((1 << bits) - 1)
    left, right = ((v.numpy().view(np.uint64) >> np.uint64(low)) & mask for v in (c, r))
    zeros = ((d0.int() + d1.int()) % digits.p == 0).sum(0)
    assert int(zeros.max()) <= 1
    found = field.has_zero(field.pack(d0, digits.p), field.pack(d1, digits.p), digits.positions, digits.p)
    assert np.array_equal(found.numpy(), (left < right) ^ common[2].numpy().astype(bool))


@pytest.mark.parametrize("digit_bits", [1, 2])
def test_a_shared_digit_is_its_thermometer_code(digit_bits: int) -> None:
    digits, base = Digits(6, digit_bits), 1 << digit_bits
    r = torch.arange(64)
    code = field.digit_corrections(r, 0, digits, torch.zeros(digits.rows, 64, dtype=torch.uint8))
    for row, ones in enumerate(code.tolist()):
        position, level = divmod(row, base - 1)
        assert ones == [int((v >> digit_bits * position) % base > level) for v in range(64)]


def test_primes_leave_no_false_zero() -> None:
    """Every entry before blinding is 0 .. positions: 1 from its own digit, 1 from each above it."""
    for bits, digit_bits in itertools.product(range(1, 65), (1, 2)):
        digits = Digits(bits, digit_bits)
        p = digits.p
        assert p == prime_for(digits.positions) > digits.positions and all(p % d for d in range(2, p))
        assert not any(digits.positions < q < p for q in _PRIMES)
        assert digits.positions == math.ceil(bits / digit_bits)
    assert [Digits(b, 1).p for b in (64, 20)] == [67, 23] and [Digits(b).p for b in (64, 36, 20)] == [37, 19, 11]


def test_reduction_modulo_p_is_exact_for_every_product() -> None:
    for p in _PRIMES:
        a = np.arange(p, dtype=np.uint8)
        d, s = (v.reshape(-1).copy() for v in np.meshgrid(a, a))
        for z in (0, p - 1):
            fresh, out = np.full_like(d, z), np.empty_like(d)
            field._hide(d, s, fresh, p, False, out)
            assert np.array_equal(out, (d.astype(int) * s + z) % p)


@pytest.mark.parametrize("p", _PRIMES)
def test_field_packing_round_trip_and_size(p: int) -> None:
    for positions in (1, 2, 3, 7, 20):
        values = stream(p).below(p, (positions, 301))
        packed = field.pack(values, p)
        assert torch.equal(field.unpack(packed, positions, p), values)
        shape, dtype = field.packed_shape(positions, 301, p)
        assert (tuple(packed.shape), packed.dtype) == (shape, dtype)
        words = {2: -(-positions // 2), 3: -(-positions // 3) * 2, 1: positions}
        assert packed.nbytes == words[2 if p < 16 else 3 if p < 32 else 1] * 301


def test_bit_packing_takes_a_bit_for_a_bit() -> None:
    for n in (1, 7, 8, 9, 1000):
        bits = stream(n).bits((n,))
        assert field.pack_bits(bits).nbytes == -(-n // 8)
        assert torch.equal(field.unpack_bits(field.pack_bits(bits), n), bits)


@given(st.lists(int64s, min_size=1, max_size=20), st.integers(1, 62), st.integers(0, 2**64 - 1))
@settings(max_examples=200)
def test_truncation_kernel_at_the_edges(values: list[int], bits: int, r: int) -> None:
    x = torch.tensor(values).clamp(-(2**62), 2**62 - 1)
    mask = torch.full_like(x, ring.wrapped(r))
    c = x + (1 << 62) + mask
    shifted, msb = ring.shift_right(mask, bits), ring.bit(mask, 63).view(x.shape).long()
    share = stream().ring(x.shape)
    y = ring.truncate(c, share, msb, bits, first=True) + ring.truncate(
        c, shifted - share, torch.zeros_like(msb), bits, first=False
    )
    for got, value, opened in zip(y.tolist(), x.tolist(), c.tolist(), strict=True):
        assert got == (value + (1 << bits) - 1 - opened % (1 << bits)) >> bits


@given(st.lists(st.tuples(int64s, int64s), min_size=1, max_size=20))
@settings(max_examples=200)
def test_odd_ring_arithmetic(pairs: list[tuple[int, int]]) -> None:
    modulus = 2**64 - 1
    a, b = (torch.tensor([v if v != -1 else 0 for v in column]) for column in zip(*pairs, strict=True))
    for x, y, total, negative, carry in zip(
        a.tolist(),
        b.tolist(),
        ring.odd_add(a, b).tolist(),
        ring.odd_negate(a).tolist(),
        ring.carries(a, b).tolist(),
        strict=True,
    ):
        assert total % 2**64 == (x % 2**64 + y % 2**64) % modulus
        assert negative % 2**64 == -(x % 2**64) % modulus
        assert carry == ((x % 2**64) + (y % 2**64) >= 2**64)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 64, 67])
@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 100, 1025])
def test_ring_product_wraps_and_is_exact(rows: int, columns: int) -> None:
    for inner in (1, 2, 7, 8, 9, 50):
        x, w = stream(rows).ring((rows, inner)), stream(columns, node=inner).ring((inner, columns))
        assert torch.equal(ring.matmul(x, w), x @ w)
        assert torch.equal(ring.linear(x, ring.column_major(w.t())), x @ w)


def test_integer_convolution_and_pooling_agree_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1000, 1000, (2, 4, 9, 8), generator=generator)
    for groups, stride, padding, dilation in [
        (1, (1, 1), (0, 0), (1, 1)),
        (2, (2, 1), (1, 2), (1, 2)),
        (4, (1, 2), (2, 0), (2, 1)),
    ]:
        w = torch.randint(-1000, 1000, (8, 4 // groups, 3, 2), generator=generator)
        expected = torch.nn.functional.conv2d(x.double(), w.double(), None, stride, padding, dilation, groups)
        assert torch.equal(ring.conv2d(x, w, stride, padding, dilation, groups), expected.long())
    spans = [(0, 3), (2, 7), (5, 9)]
    expected = torch.stack(
        [torch.stack([x[:, :, a:b, c:d].sum((2, 3)) for c, d in [(0, 8), (3, 4)]], -1) for a, b in spans], -2
    )
    assert torch.equal(ring.window_sums(x, spans, [(0, 8), (3, 4)]), expected)


# --- streams ---


def test_streams_agree_at_both_ends_and_never_overlap() -> None:
    keys = prf.fresh_keys()
    key = prf.keys_of(P0, keys)[P1]
    assert key == prf.keys_of(P1, keys)[P0] and key not in prf.keys_of(P2, keys).values()
    blocks = set()
    for batch, node in itertools.product((0, 1, 2**31), (0, 1, 500)):
        drawn = Stream(key, batch, node).ring((64, 2))
        assert torch.equal(drawn, Stream(key, batch, node).ring((64, 2)))
        blocks |= {tuple(row) for row in drawn.tolist()}
    assert len(blocks) == 9 * 64


def test_every_key_is_fresh_in_every_session() -> None:
    assert len({key for _ in range(50) for key in prf.fresh_keys().values()}) == 50 * len(prf.PAIRS)


def test_a_cipher_that_serves_again_starts_its_stream_from_the_beginning() -> None:
    key, streams = bytes(range(16)), Streams({P1: bytes(range(16))})
    for left_over in (1, 15, 16, 40):  # bytes that a stream draws before it is closed
        used = streams.open(P1, 7, left_over)
        used.words((left_over,), torch.uint8)
        used.close()
        with pytest.raises(AttributeError):
            used.bits((1,))
        again, beside = streams.open(P1, 8, 9), streams.open(P1, 7, left_over)
        assert again._cipher is not beside._cipher
        for stream, place in ((again, (8, 9)), (beside, (7, left_over))):
            assert torch.equal(stream.ring((5, 3)), Stream(key, *place).ring((5, 3)))


def test_draws_do_not_depend_on_how_they_are_cut() -> None:
    whole, cut = stream().ring((3 << 18,)), stream()
    assert torch.equal(whole, torch.cat([cut.ring((1 << 18,)) for _ in range(3)]))


@pytest.mark.parametrize("bound", [5, 22, 23, 28, 29, 66, 67, 255])
def test_bounded_draws_are_uniform(bound: int) -> None:
    counts = torch.bincount(stream(bound).below(bound, (200_000,)).long(), minlength=bound)
    assert len(counts) == bound
    assert chisquare(counts).pvalue > 1e-6


def test_spare_draws_stand_in_for_rejected_ones_in_order() -> None:
    """Every number comes from a draw of its own that was accepted; where spare draws run out, the place is named."""
    bounds, limit = (10, 11), 65536 - 65536 % 110
    first, spare = [7, 65535, 109, limit, limit - 1, 65534], [65533, 5 + 10 * 3, limit, 9 + 10 * 10]
    out = np.full((2, len(first)), 255, np.uint8)
    left = field.split_draws(np.array(first + spare, np.uint16), np.array(bounds, np.uint16), limit, out)
    assert left.tolist() == [5]
    kept = [7, 35, 109, 109, limit - 1]
    assert out[:, :5].tolist() == [[v % 10 for v in kept], [v // 10 % 11 for v in kept]]


@pytest.mark.parametrize(
    "bounds", [(2,), (3,), (66,), (67,), (200,), (256,), (11, 11, 11), (10, 11), (36, 37), (66, 67)]
)
def test_rejected_draws_are_drawn_again(bounds: tuple[int, ...]) -> None:
    """`draw mod bound` without rejection would favour small values; at 2^16 mod 66 that is visible in the draws."""
    draws = np.arange(65536, dtype=np.uint16)
    product = math.prod(bounds)
    limit, out = 65536 - 65536 % product, np.empty((len(bounds), 65536), np.uint8)
    rejected = field.split_draws(draws.copy(), np.array(bounds, np.uint16), limit, out)
    assert rejected.tolist() == list(range(limit, 65536))
    rest = draws.astype(int)
    for row, bound in zip(out, bounds, strict=True):
        assert np.array_equal(row, rest % bound)
        rest = rest // bound


@pytest.mark.parametrize("p", [5, 11, 13, 23, 37, 67])
def test_multipliers_are_never_zero_and_independent_of_the_zero_shares(p: int) -> None:
    s, z = (v.long() for v in stream(p).blinding(p, (2, 200_000)))
    joint = torch.bincount(((s - 1) * p + z).reshape(-1), minlength=p * (p - 1))
    assert int(s.min()) == 1 and len(joint) == p * (p - 1)
    assert chisquare(joint).pvalue > 1e-6
