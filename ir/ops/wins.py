"""Argmax by wins: every pair of classes compared at once, then P2 finds the class that beats all others.

A tournament needs three rounds a level, this six in all. P0 and P1 hold the bits [a beats b], and with them the number
of wins of each class, as shares over Z_p. They send P2 the shares of s (wins - (classes - 1)), each times a fresh
uniform factor s, refreshed, and the classes turned by a fresh uniform shift. No two classes beat all others, so P2 sees
at most one zero, at a uniform place, among uniform other entries. It shares the one-hot vector of that place with
them: P0's share was derived before, P1 is sent the rest. Each adds up its shares, times the classes they stand for.

**There has to be a zero, whatever the logits are.** Three classes that beat one another in a circle would leave none,
and P2 would learn something of the logits. So the comparisons have to be those of a total order for *any* value, also
one beyond its range, measured or proved. Logits x in Z_2^k are therefore brought into [-2^(j-1), 2^j) first, up to a
constant: x 2^(k-j) is truncated by k - j bits, which gives x itself where x has a width of j - 1 bits, and something in
that interval in any case, as c >> (k-j) and r >> (k-j) are below 2^j and the wrap that is made good is 2^j. Differences
of such values lie within 1.5 * 2^j, and a window of j + 2 bits compares them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.cost import BYTE, COMMON, P0, P1, P2, PRF, Cost, Randomness, links, prime_field, ring_bytes, small_ring
from tacit.ir.digits import prime_for
from tacit.ir.op import Level, Material, Op, Program, Round, Sample, Spec, Subprotocol, expect
from tacit.ir.ops.comparison import Select, Truncate
from tacit.ir.ops.nonlinear import FixedArgmax
from tacit.ir.seen import Seen, Sights
from tacit.ir.types import DTYPES, RING_BITS, SMALL_RING_BITS, Batch, Type

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
# The largest prime that comparisons know is 67.
MOST_CLASSES = 66
# Bits by which the window is wider than the logits: j is one more than their width, the window two more than j.
SLACK = 3


@dataclass(frozen=True)
class Winner(Subprotocol):
    """For each of n rows, the class that beats all others, from shares over Z_p of how many each beats; two rounds."""

    n: int
    classes: int
    p: int
    ring: int = RING_BITS

    def randomness(self) -> tuple[Randomness, ...]:
        shape, field = (self.classes, self.n), prime_field(self.p)
        return (
            Randomness("s", shape, field, COMMON),
            Randomness("z", shape, field, COMMON),
            Randomness("turn", (self.n,), BYTE, COMMON),
            Randomness("winner", shape, small_ring(self.ring), PRF),
        )

    def cost(self) -> Cost:
        shape = (self.classes, self.n)
        wins = prime_field(self.p).wire_bytes(shape)
        return Cost(2, links(p0_p2=wins, p1_p2=wins, p2_p1=ring_bytes(self.ring, shape)))

    def seen(self) -> Sights:
        wins = Seen(
            "For each row of an argmax, a blinded vector with an entry for each class: exactly one is zero.",
            "Which class beats all others is the zero, whatever the values are; its place is turned by a fresh uniform "
            "shift, the other entries are multiplied by fresh uniform factors, and the shares are refreshed: P2 could "
            "have drawn it all itself.",
        )
        winner = Seen(
            "From P2, its share of where that zero stands.",
            "P0's share is a stream that only P0 and P2 have; P1 is sent the rest, which is uniform.",
        )
        return {P2: (wins,), P1: (winner,)}

    def deal(self, party: Party) -> Material:
        shape = (self.classes, self.n)
        factors = party.common_factors(self.p, shape)
        turn = party.common("turn", (self.n,), BYTE, lambda stream: stream.below(self.classes, (self.n,)))
        mask = party.mask("winner", shape, bits=self.ring)
        if turn is None:
            return {"mask": mask}
        return {"mask": mask, "turn": turn, **factors}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        """`values`: shares over Z_p of the wins, (classes, n); returns shares of the index of the winner, (n,)."""
        if party.rank == P2:
            return (yield from self._help(party, material))
        share, turn = material["mask"], material["turn"]
        blinded = party.wins.hidden(values[0], material["s"], material["z"], turn, self.p, first=party.first)
        yield Round(send={P2: (party.field.pack(blinded, self.p),)})
        if party.first:
            yield Round()
        else:
            got = yield Round(recv={P2: (Spec((self.classes, self.n), DTYPES[self.ring]),)})
            share = share + got[P2][0]
        return party.wins.index(share, turn)

    def _help(self, party: Party, material: Material) -> Program:
        spec = (Spec(*party.field.packed_shape(self.classes, self.n, self.p)),)
        got = yield Round(recv={P0: spec, P1: spec})
        entries = [party.field.unpack(got[rank][0], self.classes, self.p) for rank in (P0, P1)]
        yield Round(send={P1: (party.wins.zeros(*entries, material["mask"], self.p),)})


@dataclass(frozen=True)
class ArgmaxByWins(FixedArgmax):
    """Logits made comparable in one round, all pairs compared in three more, the winner found in two."""

    name = "argmax_by_wins"
    suite = "fused"
    levels = frozenset({Level.PROTOCOL})
    rings = tuple(DTYPES)

    window: int = RING_BITS

    @property
    def modulus_bits(self) -> int:
        """j: the logits are taken modulo 2^j."""
        return self.window - 2

    @property
    def compared_in(self) -> int:
        """The ring of the comparisons, which has to hold the window."""
        return SMALL_RING_BITS if self.window <= SMALL_RING_BITS else RING_BITS

    def least_ring(self, *args: Type) -> int:
        return self.modulus_bits

    def infer(self, x: Type) -> Type:
        expect(
            SLACK < self.window <= RING_BITS, f"a window of {self.window} bits: it is from {SLACK + 1} to {RING_BITS}"
        )
        expect(x.width + SLACK <= self.window, f"a window of {self.window} bits does not hold {x}")
        expect(self.modulus_bits <= x.ring, f"a window of {self.window} bits is for a larger ring than that of {x}")
        found = super().infer(x)
        expect(1 < x.at(1).dims[-1] <= MOST_CLASSES, f"{x}: wins are counted of 2 to {MOST_CLASSES} classes")
        return found

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        n, classes = x.dims
        pairs, p, ring = classes * (classes - 1) // 2, prime_for(classes), self.compared_in
        return (
            Truncate(x.dims, x.ring - self.modulus_bits, x.ring, ring),
            Select((pairs, n), self.window, relu=False, bit=True, ring=ring, target=ring, p=p),
            Winner(n, classes, p, x.ring),
        )

    def run(self, party: Party, *args: Any) -> Program:
        if party.rank == P2:
            for _ in party.sized.parts:
                yield from party.part()
            return None
        (x,) = args
        p, classes = prime_for(x.shape[1]), x.shape[1]
        comparable = yield from party.part(x << (party.args[0].ring - self.modulus_bits))
        # A class beats a later one where it is at least as large, so the first of equals wins.
        ((rho, known),) = yield from party.part(party.ring.pair_differences(comparable))
        return (yield from party.part(party.wins.counted(rho, known, classes, p, first=party.first)))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        def sample(classes: int, width: int, ring: int) -> Sample:
            return Sample(cls(width + SLACK), (Type("secret", (Batch(), classes), 8, width, ring),))

        wide, narrow = RING_BITS, SMALL_RING_BITS
        return (sample(2, 40, wide), sample(7, 61, wide), sample(10, 29, narrow), sample(20, 31, narrow))

    @classmethod
    def misfits(cls) -> tuple[Sample, ...]:
        x = Type("secret", (Batch(), 10), 8, 29, SMALL_RING_BITS)
        windows = (0, SLACK, 29 + SLACK - 1, SMALL_RING_BITS + SLACK, RING_BITS + 1)
        return (
            *(Sample(cls(window), (x,)) for window in windows),
            *(Sample(cls(32), (x.with_(shape=(Batch(), classes)),)) for classes in (1, MOST_CLASSES + 1)),
        )


Op.retired["argmax_by_rank"] = (
    "argmax_by_rank shows P2 the ranks of the classes, which depend on the input where a range is left; compile again"
)
