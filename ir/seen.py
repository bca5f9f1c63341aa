"""What messages tell those who receive them: subprotocols state it, and the leakage statement is made of that.

Statements that several subprotocols have in common stand here; a subprotocol writes its own beside its protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tacit.ir.cost import DEALT, P0, P1, P2, SENT, Randomness


@dataclass(frozen=True)
class Seen:
    """What a role is sent, and why that tells it nothing, or no more than it may know."""

    what: str
    why: str


# By the rank of who is sent something.
Sights = Mapping[int, tuple[Seen, ...]]


def together(*given: Sights) -> Sights:
    """All of them, each statement once."""
    out: dict[int, dict[Seen, None]] = {}
    for sights in given:
        for rank, statements in sights.items():
            out.setdefault(rank, {}).update(dict.fromkeys(statements))
    return {rank: tuple(found) for rank, found in out.items()}


def to_both(seen: Seen) -> Sights:
    """The same for P0 and P1."""
    return {P0: (seen,), P1: (seen,)}


OPENED = to_both(
    Seen(
        "Values that P0 and P1 open to one another: each is a secret plus a mask that P2 drew for this value alone.",
        "A mask is uniform in the whole ring and used once, so the opened sum is uniform whatever the secret is.",
    )
)
ROUNDED = to_both(
    Seen(
        "The low bits of such a sum, which decide whether a truncation rounds up or down.",
        "They are uniform and independent of the secret: the two servers might as well have drawn them.",
    )
)
_BLINDED = (
    "P0 and P1 refresh the shares that P2 dealt, multiply every entry by a fresh uniform factor, rotate by a fresh "
)
COMPARED: Sights = {
    P2: (
        Seen(
            "Blinded comparison vectors: for each comparison, one zero or none at some place, the rest uniform.",
            _BLINDED
            + "uniform shift and flip the question by a fresh fair bit: P2 learns one fair bit, independent of "
            "the value.",
        ),
    )
}
ANSWERED = to_both(
    Seen(
        "From P2, the bits with which comparisons end.",
        "Each of these bits is hidden by a random bit that P2 dealt and neither server knows.",
    )
)
FRESH_SHARES = to_both(
    Seen("From P2, shares of what it found or drew.", "P2 draws them anew: one of the two alone is uniform.")
)
CORRECTED: Sights = {
    P1: (
        Seen(
            "Corrections from P2, which make dealt shares fit together.",
            "A correction is a value minus a stream that only P0 and P2 have: uniform.",
        ),
    )
}
_SOURCES: Mapping[str, Sights] = {DEALT: CORRECTED, SENT: FRESH_SHARES}


def of_randomness(items: Iterable[Randomness]) -> Sights:
    """What is sent to deal these."""
    return together(*(_SOURCES[item.source] for item in items if item.source in _SOURCES))
