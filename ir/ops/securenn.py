"""The textbook suite: SecureNN as published (Wagh, Gupta, Chandran, PETS 2019), a baseline to select.

Weight masks are opened again in every inference, convolutions use the triple of the unfolded matrix, all
64 bits are compared, max pool is a sequential chain that carries the index, and P2 sends shares to both
parties where the paper counts it so. One deviation, for correctness: truncation is the dealer's, because
the local one fails. The paper's corner cases at r = 2^64 - 1 are gone: the lowest position tests ">=" where
the others test ">" (`tacit.runtime.field`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.cost import COMMON, DEALT, ODD_RING, P0, P1, P2, PRF, RING, RING_BYTES, SENT, Cost, Randomness, links
from tacit.ir.digits import Digits
from tacit.ir.op import Level, Material, Program, Round, Sample, Spec, Subprotocol, expect
from tacit.ir.ops.comparison import blind, blinding_of, digits_of, find_zero
from tacit.ir.ops.linear import FixedConv2d, FixedLinear, FixedMul, Product
from tacit.ir.ops.nonlinear import FixedArgmax, FixedEqual, FixedMaxPool2d, FixedReLU
from tacit.ir.seen import COMPARED, FRESH_SHARES, OPENED, Seen, Sights, together
from tacit.ir.types import Batch, Shape, Type

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_N = Batch()
_BITS = 64
_DIGITS = Digits(_BITS, digit_bits=1)
_P = _DIGITS.p
# DReLU works on 2x, which must not wrap (and, being even, is never 2^64 - 1).
_CHAIN = 1 << 16  # values that are compared one after the other
_MAX_WIDTH = 62


@dataclass(frozen=True)
class Multiply(Subprotocol):
    """Algorithm 1: both factors are masked and opened; A, B and P0's share of A B come from streams."""

    op: Product
    x_shape: Shape
    w_shape: Shape
    out_shape: Shape

    def randomness(self) -> tuple[Randomness, ...]:
        return (
            Randomness("triple a", self.x_shape, RING, PRF),
            Randomness("triple b", self.w_shape, RING, PRF),
            Randomness("triple ab", self.out_shape, RING, DEALT),
        )

    def cost(self) -> Cost:
        size = RING_BYTES * (math.prod(self.x_shape) + math.prod(self.w_shape))
        return Cost(1, links(p0_p1=size, p1_p0=size))

    def seen(self) -> Sights:
        return OPENED

    def deal(self, party: Party) -> Material:
        a, b = party.mask("triple a", self.x_shape), party.mask("triple b", self.w_shape)
        known = self.op.product(party.ring, a, b) if party.rank == P2 else None
        ab = party.share("triple ab", self.out_shape, known)
        return {} if ab is None else {"a": a, "b": b, "ab": ab}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            yield from party.open(None)
            return None
        x, w = values
        e, f = yield from party.open(x - material["a"], w - material["b"])
        return self.op.product(party.ring, e, w) + self.op.product(party.ring, material["a"], f) + material["ab"]


class _Elementwise(FixedMul):
    """Element-wise product of two tensors of one shape."""


@dataclass(frozen=True)
class ShareConvert(Subprotocol):
    """Shares of a != 2^64 - 1 in Z_2^64 become shares of the same number in Z_{2^64 - 1}. Four rounds."""

    n: int

    def randomness(self) -> tuple[Randomness, ...]:
        n = (self.n,)
        return (
            Randomness("r", n, RING, COMMON),
            Randomness("r share", n, RING, COMMON),
            Randomness("refresh", n, ODD_RING, COMMON),
            *blinding_of(_DIGITS, self.n),
        )

    def cost(self) -> Cost:
        ring, bits = RING_BYTES * self.n, _BITS * self.n
        return Cost(4, links(p0_p2=ring + bits, p1_p2=ring + bits, p2_p0=bits + 2 * ring, p2_p1=bits + 2 * ring))

    def seen(self) -> Sights:
        hidden = Seen(
            "Shares of values plus a mask, of which it shares out bits and carries (ShareConvert).",
            "P0 and P1 draw the mask and its shares: what it is sent is uniform, and so is their sum.",
        )
        return together({P2: (hidden,)}, COMPARED, FRESH_SHARES)

    def deal(self, party: Party) -> Material:
        n = (self.n,)
        drawn = {
            "r": party.common("r", n, RING, lambda stream: stream.ring(n)),
            "r0": party.common("r share", n, RING, lambda stream: stream.ring(n)),
            "refresh": party.common("refresh", n, ODD_RING, lambda stream: stream.odd_ring(n)),
        }
        return {k: v for k, v in drawn.items() if v is not None} | party.common_blinding(_DIGITS, self.n)

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            return (yield from self._help(party))
        (a,) = values
        ring, r = party.ring, material["r"]
        r_share = material["r0"] if party.first else r - material["r0"]
        alpha = ring.carries(material["r0"], r - material["r0"])
        hidden, beta = a + r_share, ring.carries(a, r_share)
        ring_spec = Spec((self.n,), torch.int64)
        yield Round(send={P2: (hidden,)})
        got = yield Round(recv={P2: (Spec((_BITS, self.n), torch.uint8), ring_spec)})
        bits, delta = got[P2]
        # x >= r is not [x < r], and [x < r] = [~r < ~x]: the complement of a shared bit is local.
        complement = (int(party.first) + _P - bits.long()).remainder(_P).to(torch.uint8)
        flip = material["beta"]
        yield Round(send={P2: (blind(party, material | {"bits": complement}, ~r, 0, _DIGITS),)})
        got = yield Round(recv={P2: (ring_spec,)})
        # P2 learned [x < r] xor flip: eta = [x >= r] = eta' xor eta'' with eta'' = 1 xor flip.
        eta = _odd_xor(ring, got[P2][0], 1 - flip.long(), first=party.first)
        theta = ring.odd_add(ring.odd_add(beta, delta), eta)
        if party.first:
            theta = ring.odd_add(theta, ring.odd_negate(alpha + 1))
        converted = ring.odd_add(_to_odd(a), ring.odd_negate(theta))
        fresh = material["refresh"] if party.first else ring.odd_negate(material["refresh"])
        return ring.odd_add(converted, fresh)

    def _help(self, party: Party) -> Program:
        ring_spec = (Spec((self.n,), torch.int64),)
        got = yield Round(recv={P0: ring_spec, P1: ring_spec})
        x = got[P0][0] + got[P1][0]
        delta = party.split(party.ring.carries(got[P0][0], got[P1][0]), odd=True)
        bits0 = party.own().below(_P, (_BITS, self.n))
        bits1 = party.field.digit_corrections(x, 0, _DIGITS, bits0)
        yield Round(send={P0: (bits0, delta[0]), P1: (bits1, delta[1])})
        less = yield from find_zero(party, _DIGITS, self.n)
        eta = party.split(less.long(), odd=True)
        yield Round(send={P0: (eta[0],), P1: (eta[1],)})
        return None


def _to_odd(a: Tensor) -> Tensor:
    """A share in 0 .. 2^64 - 1 as a residue modulo 2^64 - 1."""
    return torch.where(a == -1, 0, a)


def _odd_xor(ring: Any, shared: Tensor, public: Tensor, *, first: bool) -> Tensor:
    """Shares in the odd ring of a shared bit xor a public one."""
    flipped = ring.odd_negate(shared)
    if first:
        flipped = ring.odd_add(flipped, torch.ones_like(shared))
    return torch.where(public == 1, flipped, shared)


@dataclass(frozen=True)
class ComputeMSB(Subprotocol):
    """The top bit of a shared number of Z_{2^64 - 1}, shared in Z_2^64: msb(a) = lsb(2a) in an odd ring."""

    n: int

    @property
    def _product(self) -> Multiply:
        return Multiply(_Elementwise(), (self.n,), (self.n,), (self.n,))

    def randomness(self) -> tuple[Randomness, ...]:
        n = (self.n,)
        return (
            Randomness("x", n, ODD_RING, SENT),
            digits_of(_DIGITS, self.n, SENT),
            Randomness("x lsb", n, RING, SENT),
            Randomness("refresh", n, RING, COMMON),
            *blinding_of(_DIGITS, self.n),
            *self._product.randomness(),
        )

    def cost(self) -> Cost:
        ring, blinded = RING_BYTES * self.n, _BITS * self.n
        own = Cost(3, links(p0_p1=ring, p1_p0=ring, p0_p2=blinded, p1_p2=blinded, p2_p0=ring, p2_p1=ring))
        return own + self._product.cost()

    def seen(self) -> Sights:
        return together(OPENED, COMPARED, FRESH_SHARES, self._product.seen())

    def deal(self, party: Party) -> Material:
        n, at_p2 = (self.n,), party.rank == P2
        x = party.own().odd_ring(n) if at_p2 else None
        share = party.send_shares("x", n, x, odd=True)
        bits = party.share_digits(x, 0, _DIGITS, self.n, source=SENT)
        lsb = party.send_shares("x lsb", n, None if x is None else x & 1)
        fresh = party.common("refresh", n, RING, lambda stream: stream.ring(n))
        blinding = party.common_blinding(_DIGITS, self.n)
        triple = self._product.deal(party)
        if share is None or bits is None or lsb is None or fresh is None:
            return {}
        return {"x": share, "bits": bits, "lsb": lsb, "refresh": fresh} | blinding | triple

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        ring = party.ring
        if party.rank == P2:
            yield Round()
            less = yield from find_zero(party, _DIGITS, self.n)
            beta = party.split(less.long())
            yield Round(send={P0: (beta[0],), P1: (beta[1],)})
            return (yield from self._product.run(party, material))
        (a,) = values
        share = ring.odd_add(ring.odd_add(a, a), material["x"])
        peer, spec = (P1 if party.first else P0), (Spec((self.n,), torch.int64),)
        got = yield Round(send={peer: (share,)}, recv={peer: spec})
        r = ring.odd_add(share, got[peer][0])
        yield Round(send={P2: (blind(party, material, r, 0, _DIGITS),)})
        got = yield Round(recv={P2: spec})
        # lsb(2a) = lsb(r) xor lsb(x) xor [r < x], because the modulus is odd.
        gamma = _xor(got[P2][0], material["beta"].long(), first=party.first)
        delta = _xor(material["lsb"], r & 1, first=party.first)
        both = yield from self._product.run(party, material, gamma, delta)
        fresh = material["refresh"] if party.first else -material["refresh"]
        return gamma + delta - 2 * both + fresh


def _xor(shared: Tensor, public: Tensor, *, first: bool) -> Tensor:
    """Shares in Z_2^64 of a shared bit xor a public one."""
    return (1 - 2 * public) * shared + (public if first else 0)


def drelu(n: int) -> tuple[Subprotocol, ...]:
    return ShareConvert(n), ComputeMSB(n)


def run_drelu(party: Party, x: Tensor | None) -> Program:
    """[x >= 0], flat: 1 - msb(2x as a number of Z_{2^64 - 1})."""
    if x is None:
        yield from party.part()
        yield from party.part()
        return None
    odd = yield from party.part(2 * x.reshape(-1))
    msb = yield from party.part(odd)
    return int(party.first) - msb


def select(n: int) -> Subprotocol:
    return Multiply(_Elementwise(), (n,), (n,), (n,))


@dataclass(frozen=True)
class TextbookLinear(FixedLinear):
    """Algorithm 1 with the weight masked anew in every inference."""

    name = "securenn.linear"
    suite = "securenn"
    levels = frozenset({Level.PROTOCOL})

    def parts(self, x: Type, w: Type) -> tuple[Subprotocol, ...]:
        return (Multiply(self, x.dims, w.dims, self.infer(x, w).dims),)


@dataclass(frozen=True)
class TextbookMul(FixedMul):
    """Algorithm 1, element by element."""

    name = "securenn.mul"
    suite = "securenn"
    levels = frozenset({Level.PROTOCOL})

    def parts(self, x: Type, w: Type) -> tuple[Subprotocol, ...]:
        return (Multiply(self, x.dims, w.dims, x.dims),)


@dataclass(frozen=True)
class _Unfolded(Product):
    """The product of unfolded patches (G, rows, K) and kernels (G, O / G, K), for one group after the other."""

    def product(self, ring: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([ring.linear(a, b) for a, b in zip(x, w, strict=True)])


@dataclass(frozen=True)
class TextbookConv2d(FixedConv2d):
    """Convolution as the product of the unfolded matrix, as SecureNN counts it."""

    name = "securenn.conv2d"
    suite = "securenn"
    levels = frozenset({Level.PROTOCOL})

    def parts(self, x: Type, w: Type) -> tuple[Subprotocol, ...]:
        n, o, oh, ow = self.infer(x, w).dims
        rows, inner = n * oh * ow, math.prod(w.dims[1:])
        return (
            Multiply(
                _Unfolded(),
                (self.groups, rows, inner),
                (self.groups, o // self.groups, inner),
                (self.groups, rows, o // self.groups),
            ),
        )

    def run(self, party: Party, *args: Any) -> Program:
        if party.rank == P2:
            return (yield from party.part())
        x, w = args
        patches = party.ring.unfold(x, tuple(w.shape[2:]), self.stride, self.padding, self.dilation)
        n, oh, ow = patches.shape[:3]
        inner = math.prod(w.shape[1:])
        left = patches.reshape(n * oh * ow, self.groups, inner).transpose(0, 1)
        out = yield from party.part(left, w.reshape(self.groups, -1, inner))
        return out.transpose(0, 1).reshape(n, oh, ow, -1).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class TextbookReLU(FixedReLU):
    """DReLU by ShareConvert and ComputeMSB, then a product with x: 10 rounds, 704 bytes in the paper."""

    name = "securenn.relu"
    suite = "securenn"
    levels = frozenset({Level.PROTOCOL})

    def infer(self, x: Type) -> Type:
        check_width(x)
        expect(self.truncate == 0, "the textbook suite truncates in an op of its own")
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        return (*drelu(x.numel), select(x.numel))

    def run(self, party: Party, *args: Any) -> Program:
        positive = yield from run_drelu(party, args[0])
        if positive is None:
            return (yield from party.part())
        out = yield from party.part(args[0].reshape(-1), positive)
        return out.view(args[0].shape)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Type("secret", (_N, 37), 28, 40),)),)


@dataclass(frozen=True)
class _MaxOfTwo(Subprotocol):
    """Both selections of one step of the chain, value and index, in one product."""

    n: int

    @property
    def _product(self) -> Subprotocol:
        return select(2 * self.n)

    def randomness(self) -> tuple[Randomness, ...]:
        return self._product.randomness()

    def cost(self) -> Cost:
        return self._product.cost()

    def seen(self) -> Sights:
        return self._product.seen()

    def deal(self, party: Party) -> Material:
        return self._product.deal(party)

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            return (yield from self._product.run(party, material))
        bit, value, index = values
        both = yield from self._product.run(party, material, torch.cat([value, index]), torch.cat([bit, bit]))
        return both[: self.n], both[self.n :]


def _chain_parts(slots: int, n: int) -> tuple[Subprotocol, ...]:
    return (*drelu(n), _MaxOfTwo(n)) * (slots - 1)


def _run_chain(party: Party, slots: Tensor | None, steps: int) -> Program:
    """Algorithm 8, Maxpool: the running maximum and its index against each slot (slots, n) in turn."""
    if slots is None:
        for _ in range(steps):
            yield from run_drelu(party, None)
            yield from party.part()
        return None, None
    best, index = slots[0], torch.zeros_like(slots[0])
    for i in range(1, len(slots)):
        # Kept where best >= slot: the first of equals stays.
        keep = yield from run_drelu(party, best - slots[i])
        here = i * int(party.first)
        gain, back = yield from party.part(keep, best - slots[i], index - here)
        best, index = slots[i] + gain, here + back
    return best, index


@dataclass(frozen=True)
class TextbookMaxPool2d(FixedMaxPool2d):
    """A sequential chain of comparisons over each window; the index is computed as published, and dropped."""

    name = "securenn.max_pool2d"
    suite = "securenn"
    levels = frozenset({Level.PROTOCOL})

    def infer(self, x: Type) -> Type:
        check_width(x.with_(width=x.width + 1))
        expect(self.drop == 0, "the textbook suite compares all bits")
        expect(math.prod(self.kernel) <= _CHAIN, f"a chain compares at most {_CHAIN} values")
        return super().infer(x)

    @property
    def lowest(self) -> int:
        return -1 << (_MAX_WIDTH - 2)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 2, 5, 4), 28, 40)
        return Sample(cls((2, 2), (2, 2)), (x,)), Sample(cls((3, 2), (2, 2), (1, 1), (1, 1), True), (x,))

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        return _chain_parts(math.prod(self.kernel), self.infer(x).numel)

    def run(self, party: Party, *args: Any) -> Program:
        steps = math.prod(self.kernel) - 1
        if party.rank == P2:
            return (yield from _run_chain(party, None, steps))[0]
        slots = torch.stack(self.slots(args[0], self.lowest if party.first else 0))
        best, _ = yield from _run_chain(party, slots.flatten(1), steps)
        return best.view(slots.shape[1:])


@dataclass(frozen=True)
class TextbookArgmax(FixedArgmax):
    """The chain of Maxpool, of which only the index is kept."""

    name = "securenn.argmax"
    suite = "securenn"
    levels = frozenset({Level.PROTOCOL})

    def infer(self, x: Type) -> Type:
        check_width(x.with_(width=x.width + 1))
        expect(len(x.shape) == 2 and x.at(1).dims[1] <= _CHAIN, f"a chain compares at most {_CHAIN} values")
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        n, classes = x.dims
        return _chain_parts(classes, n)

    def run(self, party: Party, *args: Any) -> Program:
        steps = party.args[0].dims[1] - 1
        slots = None if party.rank == P2 else args[0].t().contiguous()
        return (yield from _run_chain(party, slots, steps))[1]


@dataclass(frozen=True)
class TextbookEqual(FixedEqual):
    """[x >= y] + [y >= x] - 1."""

    name = "securenn.equal"
    suite = "securenn"
    levels = frozenset({Level.PROTOCOL})

    def parts(self, x: Type, y: Type) -> tuple[Subprotocol, ...]:
        return drelu(2 * x.numel)

    def run(self, party: Party, *args: Any) -> Program:
        if party.rank == P2:
            return (yield from run_drelu(party, None))
        x, y = args
        bits = (yield from run_drelu(party, torch.stack([x - y, y - x]))).view(2, -1)
        return bits[0] + bits[1] - int(party.first)


def check_width(x: Type) -> None:
    expect(x.width <= _MAX_WIDTH, f"{x} is too wide: the textbook comparison doubles it, at most b{_MAX_WIDTH}")
