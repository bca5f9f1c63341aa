"""Argmax by ranks: every pair compared at once, then P2 finds the first rank in an order it does not know.

A tournament needs three rounds a level, this five in all. Each class's rank is the number of classes that it beats:
a sum of comparison bits, and the ranks are the numbers 0 to classes - 1 in some order. P0 and P1 send their shares of
the ranks in an order that they drew in common, masked afresh; P2 sees a uniformly random order of 0 to classes - 1
and two shares of which one is uniform, whatever the inputs are. It shares the one-hot vector of the largest with them:
P0's share was derived before, P1 is sent the rest. Each then adds up its shares, times the indices they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.cost import BYTE, COMMON, P0, P1, P2, PRF, RING, Cost, Randomness, links, ring_bytes, small_ring
from tacit.ir.op import Level, Material, Program, Round, Spec, Subprotocol, expect
from tacit.ir.ops.comparison import Select, check_window
from tacit.ir.ops.nonlinear import FixedArgmax
from tacit.ir.seen import Seen, Sights
from tacit.ir.types import DTYPES, RING_BITS, Type

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
# A rank travels as one byte.
MOST_CLASSES = 256


@dataclass(frozen=True)
class LargestRank(Subprotocol):
    """For each of n rows, where the largest of the ranks 0 to classes - 1 stands; two rounds.

    The order of a row sorts 64-bit words: two of them are equal with probability below classes^2 / 2^65, and that
    is how far the order is from uniform.
    """

    n: int
    classes: int
    ring: int = RING_BITS

    def randomness(self) -> tuple[Randomness, ...]:
        shape = (self.n, self.classes)
        return (
            Randomness("order", shape, RING, COMMON),
            Randomness("refresh", shape, BYTE, COMMON),
            Randomness("largest", shape, small_ring(self.ring), PRF),
        )

    def cost(self) -> Cost:
        ranks = self.n * self.classes
        return Cost(2, links(p0_p2=ranks, p1_p2=ranks, p2_p1=ring_bytes(self.ring, (ranks,))))

    def seen(self) -> Sights:
        ranks = Seen(
            "The ranks of the classes of an argmax, in an order that P0 and P1 drew.",
            "Ranks are the numbers from 0 on, each once, and their order is uniform: it says nothing of the classes.",
        )
        largest = Seen(
            "From P2, its share of where the largest rank stands in that order.",
            "P0's share is a stream that only P0 and P2 have; P1 is sent the rest, which is uniform.",
        )
        return {P2: (ranks,), P1: (largest,)}

    def deal(self, party: Party) -> Material:
        shape = (self.n, self.classes)
        words = party.common("order", shape, RING, lambda stream: stream.ring(shape))
        refresh = party.common("refresh", shape, BYTE, lambda stream: stream.words(shape, torch.uint8))
        mask = party.mask("largest", shape, bits=self.ring)
        if words is None or refresh is None:
            return {"mask": mask}
        return {"mask": mask, "order": torch.from_numpy(words.numpy().argsort(1)), "refresh": refresh}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        """`values`: shares of the ranks, (n, classes); returns shares of the index of the largest, (n,)."""
        if party.rank == P2:
            return (yield from self._help(material))
        order, share = material["order"], material["mask"]
        ranks = values[0].gather(1, order).to(torch.uint8)
        refreshed = ranks + material["refresh"] if party.first else ranks - material["refresh"]
        yield Round(send={P2: (refreshed,)})
        if party.first:
            yield Round()
        else:
            got = yield Round(recv={P2: (Spec((self.n, self.classes), DTYPES[self.ring]),)})
            share = share + got[P2][0]
        return (share * order).sum(1).to(share.dtype)

    def _help(self, material: Material) -> Program:
        spec = (Spec((self.n, self.classes), torch.uint8),)
        got = yield Round(recv={P0: spec, P1: spec})
        largest = got[P0][0] + got[P1][0] == self.classes - 1
        yield Round(send={P1: (largest.to(DTYPES[self.ring]) - material["mask"],)})


@dataclass(frozen=True)
class ArgmaxByRank(FixedArgmax):
    """All pairs compared in three rounds, the largest rank found in two more."""

    name = "argmax_by_rank"
    levels = frozenset({Level.PROTOCOL})
    rings = tuple(DTYPES)

    window: int = RING_BITS

    def infer(self, x: Type) -> Type:
        check_window(x.with_(width=min(x.width + 1, x.ring)), self.window, 0)
        expect(x.width < x.ring, f"{x} leaves no room for a difference")
        expect(1 < x.at(1).dims[-1] <= MOST_CLASSES, f"{x}: ranks are for 2 to {MOST_CLASSES} classes")
        return super().infer(x)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        n, classes = x.dims
        pairs = classes * (classes - 1) // 2
        return (
            Select((pairs, n), self.window, relu=False, bit=True, ring=x.ring, target=x.ring),
            LargestRank(n, classes, x.ring),
        )

    def run(self, party: Party, *args: Any) -> Program:
        if party.rank == P2:
            yield from party.part()
            yield from party.part()
            return None
        # A class beats a later one where it is at least as large, so the first of equals ranks highest.
        (bits,) = yield from party.part(party.ring.pair_differences(args[0]))
        return (yield from party.part(party.ring.wins(bits, args[0].shape[1], first=party.first)))
