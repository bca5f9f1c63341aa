"""Truncation, DReLU, ReLU, selection: one opening, one PrivateCompare, one bit.

With r dealt by P2 and c = x + r opened to P0 and P1, the sign of x is
msb(x) = msb(c) xor msb(r) xor [c' < r'], c' and r' the bits below (the identity of MP-SPDZ's LtzRingRaw,
ePrint 2019/131). The comparison is SecureNN's PrivateCompare with c public to P0 and P1 and the bits of
r shared over Z_p. P2 learns u = beta xor [c' < r'] for a bit beta common to P0 and P1, and opens
u xor msb(r) xor rho for a bit rho it dealt: uniform for everyone. What was dealt as products with rho makes
the selection local.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.cost import (
    BIT,
    BYTE,
    COMMON,
    DEALT,
    P0,
    P1,
    P2,
    PRF,
    Cost,
    Randomness,
    links,
    packed_bits,
    prime_field,
    ring_bytes,
    small_ring,
)
from tacit.ir.digits import Digits
from tacit.ir.op import Material, Program, Round, Spec, Subprotocol, expect
from tacit.ir.seen import ANSWERED, COMPARED, OPENED, ROUNDED, Sights, together
from tacit.ir.types import RING_BITS, Shape, Type

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
# Truncation holds for -2^62 <= x < 2^62: a signed width of 63 bits; in Z_2^32, of 31.
TRUNCATION_WIDTH = RING_BITS - 1


@dataclass(frozen=True)
class Truncate(Subprotocol):
    """floor((x + t) / 2^bits) for -2^(k-2) <= x < 2^(k-2), x in Z_2^k, t = 2^bits - 1 - (c mod 2^bits).

    c = x + 2^(k-2) + r is opened. As integers x + 2^(k-2) = c - r + 2^k [c < r], and the wrap is local:
    [c < r] = msb(r) (1 - msb(c)). So the result may live in any ring (`target`): r >> bits and msb(r) are dealt in it.
    t is uniform and known to P0 and P1, who could have drawn it themselves: that is the functionality,
    and it is perfectly simulated. No element ever fails, unlike in local (SecureML) truncation.
    """

    shape: Shape
    bits: int
    ring: int = RING_BITS  # k
    target: int = RING_BITS

    def randomness(self) -> tuple[Randomness, ...]:
        return (
            Randomness("r", self.shape, small_ring(self.ring), PRF),
            Randomness("r shifted", self.shape, small_ring(self.target), DEALT),
            Randomness("r msb", self.shape, small_ring(wrap_bits(self.bits, self.ring, self.target)), DEALT),
        )

    def cost(self) -> Cost:
        size = ring_bytes(self.ring, self.shape)
        return Cost(1, links(p0_p1=size, p1_p0=size))

    def seen(self) -> Sights:
        return together(OPENED, ROUNDED)

    def deal(self, party: Party) -> Material:
        r = party.mask("r", self.shape, bits=self.ring)
        return _share_truncation(party, r, self.shape, self.bits, self.target)

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            yield from party.open(None)
            return None
        offset = 1 << (self.ring - 2)
        (c,) = yield from party.open(values[0] + material["r"] + (offset if party.first else 0))
        party.note_offset(c, self.bits)
        return party.ring.truncate(c, material["r shifted"], material["r msb"], self.bits, first=party.first)


def wrap_bits(bits: int, ring: int, target: int) -> int:
    """msb(r) is dealt modulo 2^this: it is only used times 2^(ring - bits), modulo 2^target."""
    return max(1, target - (ring - bits))


def _share_truncation(party: Party, r: Tensor, shape: Shape, bits: int, target: int) -> Material:
    """[r >> bits] in the ring of the result, and [msb(r)]."""
    at_p2, ring = party.rank == P2, party.ring.bits_of(r)
    above = party.ring.shift_right(r, bits) if at_p2 else None
    if above is not None and not bits and ring < target:
        above = above.to(torch.int64) & (1 << ring) - 1  # r is unsigned
    shifted = party.share("r shifted", shape, above, bits=target)
    top = party.ring.bit(r, ring - 1).view(shape) if at_p2 else None
    msb = party.share("r msb", shape, top, bits=wrap_bits(bits, ring, target))
    return {} if shifted is None or msb is None else {"r": r, "r shifted": shifted, "r msb": msb}


@dataclass(frozen=True)
class Select(Subprotocol):
    """[x >= 0] times x, times payloads, or alone; x may be truncated on the way. Three rounds.

    window: a signed width that holds x; drop: the low bits that the comparison leaves out, so that the
    sign is that of floor((x + t) / 2^drop), t as in `Truncate`; truncate: bits by which the selected x is
    truncated (then drop is the same); outputs: "relu" for the selected x, "bit" for DReLU(x); payloads: how
    many other values are selected by the same bit, each behind a mask of its own.

    Range: -2^(window-1) <= x < 2^(window-1) - 2^drop. Outside it the sign is random: a compile-time fact.

    x is in Z_2^ring; a truncated x may come out in another ring, `target`: with C = c >> drop and R = r >> drop,
    the sign is the top bit of C - R mod 2^(ring-drop). Where it is 0, C - R + 2^(ring-drop) [C < R] is the truncated
    x, and [C < R] = msb(R) (1 - msb(C)), because C - R is then closer to 0 than half the ring: no offset, and no bit
    of the ring is lost.

    p: DReLU(x) alone is wanted, over Z_p: as shares of rho and the public bit that DReLU(x) xor rho is. The shape has
    two dimensions then.
    """

    shape: Shape
    window: int
    drop: int = 0
    truncate: int = 0
    relu: bool = True
    bit: bool = False
    payloads: int = 0
    ring: int = RING_BITS
    target: int = RING_BITS
    p: int = 0

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def digits(self) -> Digits:
        """What is compared."""
        return Digits(self.window - 1 - self.drop)

    def randomness(self) -> tuple[Randomness, ...]:
        source, target = small_ring(self.ring), small_ring(self.target)
        items = [Randomness("r", self.shape, source, PRF)]
        if self.relu and self.truncate:
            small = small_ring(self._wrap_bits)
            items += [Randomness("r shifted", self.shape, target, DEALT), Randomness("r msb", self.shape, small, DEALT)]
        rho = prime_field(self.p) if self.p else target
        items += [digits_of(self.digits, self.n), Randomness("rho", self.shape, rho, DEALT)]
        if self.relu:
            items.append(Randomness("rho r", self.shape, target, DEALT))
        if self.relu and self.truncate:
            items.append(Randomness("rho msb", self.shape, small, DEALT))
        for _ in range(self.payloads):
            items += [
                Randomness("payload r", self.shape, target, PRF),
                Randomness("rho payload r", self.shape, target, DEALT),
            ]
        return (*items, *blinding_of(self.digits, self.n))

    @property
    def _wrap_bits(self) -> int:
        return wrap_bits(self.truncate, self.ring, self.target)

    def cost(self) -> Cost:
        opened = ring_bytes(self.ring, self.shape) + self.payloads * ring_bytes(self.target, self.shape)
        blinded = prime_field(self.digits.p).wire_bytes((self.digits.positions, self.n))
        answer = packed_bits(self.n)
        return Cost(3, links(p0_p1=opened, p1_p0=opened, p0_p2=blinded, p1_p2=blinded, p2_p0=answer, p2_p1=answer))

    def seen(self) -> Sights:
        return together(OPENED, ROUNDED if self.drop else {}, COMPARED, ANSWERED)

    def deal(self, party: Party) -> Material:
        at_p2, shape, target = party.rank == P2, self.shape, self.target
        r = party.mask("r", shape, bits=self.ring)
        material: Material = {"r": r}
        if self.relu and self.truncate:
            material |= _share_truncation(party, r, shape, self.truncate, target)
        shared = {"bits": party.share_digits(r if at_p2 else None, self.drop, self.digits, self.n)}
        rho = party.own().bits(shape) if at_p2 else torch.empty(0)
        if self.p:
            shared["rho"] = party.share_residues("rho", shape, rho if at_p2 else None, self.p)
        else:
            shared["rho"] = party.share("rho", shape, rho if at_p2 else None, bits=target)
        if self.relu:
            masked = party.ring.shift_right(r, self.truncate) if self.truncate and at_p2 else r
            gated = party.ring.gate(rho, masked) if at_p2 else None
            shared["rho r"] = party.share("rho r", shape, gated, bits=target)
        if self.relu and self.truncate:
            msb = rho & party.ring.bit(r, self.ring - 1).view(shape) if at_p2 else None
            shared["rho msb"] = party.share("rho msb", shape, msb, bits=self._wrap_bits)
        for i in range(self.payloads):
            mask = party.mask("payload r", shape, bits=target)
            material[f"payload r {i}"] = mask
            gated = party.ring.gate(rho, mask) if at_p2 else None
            shared[f"rho payload r {i}"] = party.share("rho payload r", shape, gated, bits=target)
        blinding = party.common_blinding(self.digits, self.n)
        if at_p2:
            return {"flip": party.ring.bit(r, self.window - 1) ^ rho.reshape(-1)}
        return material | {k: v for k, v in shared.items() if v is not None} | blinding

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            return (yield from self._help(party, material))
        x, *payloads = values
        masked = [x + material["r"]]
        masked += [value + material[f"payload r {i}"] for i, value in enumerate(payloads)]
        c, *opened = yield from party.open(*masked)
        if self.drop:
            party.note_offset(c, self.drop)
        blinded = blind(party, material, c, self.drop, self.digits)
        yield Round(send={P2: (blinded,)})
        got = yield Round(recv={P2: (Spec((packed_bits(self.n),), torch.uint8),)})
        flip = party.field.unpack_bits(got[P2][0], self.n)
        # DReLU = e xor v, where v = flip xor rho.
        e = party.ring.bit(c, self.window - 1) ^ material["beta"] ^ 1
        return self._outputs(party, material, x, c, payloads, opened, flip, e)

    def _help(self, party: Party, material: Material) -> Program:
        """P2: the openings pass it by; it sees blinded vectors and answers with masked bits."""
        yield Round()
        zero = yield from find_zero(party, self.digits, self.n)
        answer = party.field.pack_bits(zero ^ material["flip"])
        yield Round(send={P0: (answer,), P1: (answer,)})
        return (None,) * (self.relu + self.bit + self.payloads)

    def _outputs(
        self,
        party: Party,
        m: Material,
        x: Tensor,
        c: Tensor,
        payloads: list[Tensor],
        opened: list[Tensor],
        flip: Tensor,
        e: Tensor,
    ) -> tuple[Tensor, ...]:
        ring, first, out = party.ring, party.first, []
        if self.relu and self.truncate:
            out.append(
                ring.relu_truncate(
                    c,
                    m["r shifted"],
                    m["r msb"],
                    m["rho"],
                    m["rho r"],
                    m["rho msb"],
                    flip,
                    e,
                    self.truncate,
                    first=first,
                )
            )
        elif self.relu:
            out.append(ring.select(c, m["r"], m["rho r"], x, m["rho"], flip, e, first=first))
        if self.bit and self.p:
            out.append((m["rho"], flip ^ e))
        elif self.bit:
            out.append(ring.bit_share(m["rho"], flip, e, first=first))
        for i, (value, public) in enumerate(zip(payloads, opened, strict=True)):
            out.append(
                ring.select(public, m[f"payload r {i}"], m[f"rho payload r {i}"], value, m["rho"], flip, e, first=first)
            )
        return tuple(out)


def digits_of(digits: Digits, n: int, source: str = DEALT) -> Randomness:
    """The shared digits of n masks."""
    return Randomness("bits", (digits.rows, n), prime_field(digits.p), source)


def blinding_of(digits: Digits, n: int) -> tuple[Randomness, ...]:
    """What `Party.common_blinding` draws."""
    shape, field = (digits.positions, n), prime_field(digits.p)
    return (
        Randomness("s", shape, field, COMMON),
        Randomness("z", shape, field, COMMON),
        Randomness("beta", (n,), BIT, COMMON),
        Randomness("shift", (n,), BYTE, COMMON),
    )


def blind(party: Party, material: Material, c: Tensor, low: int, digits: Digits) -> Tensor:
    """PrivateCompare at P0 or P1: the packed vectors for P2."""
    entries = party.field.blind(
        c, low, digits, material["bits"], material["s"], material["z"], material["beta"], material["shift"], party.rank
    )
    packed: Tensor = party.field.pack(entries, digits.p)
    return packed


def find_zero(party: Party, digits: Digits, n: int) -> Program:
    """PrivateCompare at P2: receive both vectors; beta xor [c < r], one bit to a byte."""
    spec = (Spec(*party.field.packed_shape(digits.positions, n, digits.p)),)
    got = yield Round(recv={P0: spec, P1: spec})
    return party.field.has_zero(got[P0][0], got[P1][0], digits.positions, digits.p)


# How many bits a comparison must look at where it leaves out low ones: rounding up by 2^drop then stays
# within the sixteenth of the range that widths leave free.
ROOM_BITS = 4


def check_window(x: Type, window: int, drop: int) -> None:
    """The condition under which a comparison of `window` bits gives the sign."""
    expect(x.width <= window <= x.ring, f"a window of {window} bits does not hold {x}")
    expect(
        drop == 0 or (drop > 0 and window - 1 - drop >= ROOM_BITS),
        f"dropping {drop} of {window} bits leaves too little to compare",
    )
