"""How PrivateCompare cuts the numbers that it compares.

A secret r is cut into digits, and each digit is shared in thermometer code: T_k = [digit >= k] for
k = 1 .. base - 1. Against a public digit c, "greater", "equal" and "less" are then all linear in what is
shared: [r > c] = T_{c+1}, [r >= c] = T_c, [r = c] = T_c - T_{c+1}, where T_0 = 1 and T_base = 0. With
digits of one bit this is SecureNN's Algorithm 3; digits of two bits halve the positions that P0 and P1
blind and send, for half as many shares again offline.
"""

from __future__ import annotations

from dataclasses import dataclass

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67)


def prime_for(positions: int) -> int:
    """The smallest prime, from 5 on, that makes a comparison over that many positions free of false zeros.

    An entry is at most the number of positions before it is blinded, and must not be a multiple of p.
    """
    return next(p for p in _PRIMES if p > positions)


@dataclass(frozen=True)
class Digits:
    """Numbers of `bits` bits as digits of `digit_bits` (1 or 2) bits, the lowest first; the top one may be shorter."""

    bits: int
    digit_bits: int = 2

    @property
    def positions(self) -> int:
        """How many digits there are: elements of Z_p that P0 and P1 each send to P2."""
        return -(-self.bits // self.digit_bits)

    @property
    def rows(self) -> int:
        """How many elements of Z_p share one number: base - 1 for every digit."""
        whole, rest = divmod(self.bits, self.digit_bits)
        return whole * ((1 << self.digit_bits) - 1) + (1 << rest) - 1

    @property
    def p(self) -> int:
        return prime_for(self.positions)
