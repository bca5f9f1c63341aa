"""What an op costs: rounds, bytes on each link, and the randomness it consumes."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, reduce

from tacit.ir.types import Shape

P0, P1, P2, CLIENT, OWNER = range(5)
ROLES = ("P0", "P1", "P2", "client", "owner")
Link = tuple[int, int]
RING_BYTES = 8


def links(**bytes_on: int) -> Counter[Link]:
    """`links(p0_p1=8, client_p1=16)`: bytes by directed link."""
    names = {role.lower(): rank for rank, role in enumerate(ROLES)}
    out: Counter[Link] = Counter()
    for key, count in bytes_on.items():
        source, target = key.split("_")
        out[names[source], names[target]] += count
    return out


@dataclass(frozen=True)
class Cost:
    """Rounds, and bytes by directed link: `online` per inference, `offline` for its material."""

    rounds: int = 0
    online: Counter[Link] = field(default_factory=Counter)
    offline: Counter[Link] = field(default_factory=Counter)

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other."""
        return Cost(self.rounds + other.rounds, self.online + other.online, self.offline + other.offline)

    @property
    def online_bytes(self) -> int:
        return sum(self.online.values())

    @property
    def offline_bytes(self) -> int:
        return sum(self.offline.values())


def in_sequence(costs: Iterable[Cost]) -> Cost:
    return reduce(Cost.__add__, costs, Cost())


# How a piece of randomness reaches its holders.
PRF = "prf"  # P0 and P1 derive their shares from keys they have in common with P2: no traffic
DEALT = "dealt"  # P0's share is derived, P1 receives the correction from P2
SENT = "sent"  # P2 sends both shares, as SecureNN publishes it
COMMON = "common"  # P0 and P1 derive the same value from their common key: no traffic, unknown to P2


@dataclass(frozen=True)
class Element:
    """What a tensor of randomness is made of: name, bytes on the wire for a tensor of that shape."""

    name: str
    per_word: int = 1  # elements packed in one word along the first dimension
    word_bytes: int = RING_BYTES

    def wire_bytes(self, shape: Shape) -> int:
        if self.per_word == 1:
            return math.prod(shape) * self.word_bytes
        return math.ceil(shape[0] / self.per_word) * math.prod(shape[1:]) * self.word_bytes


RING = Element("Z_2^64")
ODD_RING = Element("Z_2^64-1")
BIT = Element("bit", per_word=1, word_bytes=1)
BYTE = Element("byte", per_word=1, word_bytes=1)


def ring_bytes(bits: int, shape: Shape) -> int:
    """Bytes of a tensor of shares in Z_2^bits."""
    return bits // 8 * math.prod(shape)


@cache
def small_ring(bits: int) -> Element:
    """Z_2^bits, in the smallest of 1, 2, 4 or 8 bytes."""
    return Element(f"Z_2^{bits}", word_bytes=next(size for size in (1, 2, 4, 8) if 8 * size >= bits))


@cache
def prime_field(p: int) -> Element:
    """Z_p: two elements to a byte for p < 16, three to a 16-bit word for p < 32, else a byte each."""
    if p < 16:
        return Element(f"Z_{p}", per_word=2, word_bytes=1)
    return Element(f"Z_{p}", per_word=3, word_bytes=2) if p < 32 else Element(f"Z_{p}", word_bytes=1)


def packed_bits(count: int) -> int:
    """Bytes of that many bits."""
    return (count + 7) // 8


@dataclass(frozen=True)
class Randomness:
    """One tensor of correlated or common randomness, consumed by one inference and never again."""

    kind: str
    shape: Shape
    element: Element
    source: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def offline(self) -> Counter[Link]:
        size = self.element.wire_bytes(self.shape)
        if self.source == DEALT:
            return links(p2_p1=size)
        if self.source == SENT:
            return links(p2_p0=size, p2_p1=size)
        return Counter()

    @property
    def holders(self) -> tuple[int, ...]:
        return (P0, P1) if self.source == COMMON else (P0, P1, P2)

    def bytes_of(self, party: int) -> int:
        """Bytes of this material at a party, in the form in which it crosses the wire."""
        return self.element.wire_bytes(self.shape) if party in self.holders else 0
