"""Pairwise pseudorandom streams: AES-128 in counter mode, keyed from os.urandom.

Every pair of parties has a key. A stream is bound to (key, batch, node), each with its own range of
2^64 counter values, so that no two streams of a session ever overlap and nothing is drawn twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2
from tacit.runtime import field

KEY_BYTES = 16
_ZEROS = memoryview(bytes(1 << 20))
_WORDS: dict[torch.dtype, type[np.generic]] = {
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
# Who shares a key with whom; P2 also has one of its own. It holds neither k01 nor a key of the roles outside.
PAIRS = (*combinations((P0, P1, P2), 2), (P2, P2), (P0, CLIENT), (P0, OWNER))

Keys = dict[tuple[int, int], bytes]
_MOST_REJECTED = 0.02
_SPARE_SHIFT, _SPARE = 6, 8  # draws beyond what is needed: one in 64, and eight


@cache
def _per_draw(bound: int) -> int:
    """How many numbers below the bound to take from one 16-bit draw: few draws, and few of them rejected."""
    return next(k for k in (3, 2, 1) if k == 1 or (65536 % bound**k <= _MOST_REJECTED * 65536 and bound**k <= 65536))


@cache
def _radix(bounds: tuple[int, ...]) -> tuple[NDArray[Any], int]:
    """The bounds of the digits of a 16-bit draw, and the least draw to be rejected."""
    return np.array(bounds, np.uint16), 65536 - 65536 % math.prod(bounds)


def fresh_keys() -> Keys:
    """New keys for all pairs, as the parties of one session agree on them."""
    return {pair: os.urandom(KEY_BYTES) for pair in PAIRS}


def keys_of(party: int, keys: Keys) -> dict[int, bytes]:
    """The keys that one party holds, by peer."""
    return {a if b == party else b: key for (a, b), key in keys.items() if party in (a, b)}


class Streams:
    """One party's keys by peer, and the streams under them."""

    def __init__(self, keys: Mapping[int, bytes]) -> None:
        self._keys = dict(keys)
        self._free: dict[int, list[CipherContext]] = {peer: [] for peer in keys}

    def open(self, peer: int, batch: int, node: int) -> Stream:
        """The stream in common with a peer for a batch and a node, from its beginning."""
        return Stream(self._keys[peer], batch, node, self._free[peer])


class Stream:
    """One stream; both holders of its key draw the same values in the same order."""

    def __init__(self, key: bytes, batch: int, node: int, free: list[CipherContext] | None = None) -> None:
        """`free`: ciphers under this key which no stream uses; making one takes longer than a draw."""
        nonce = batch.to_bytes(4, "big") + node.to_bytes(4, "big") + bytes(8)
        self._free = [] if free is None else free
        try:
            self._cipher = self._free.pop()
            self._cipher.reset_nonce(nonce)
        except IndexError:
            self._cipher = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()

    def close(self) -> None:
        """Nothing more can be drawn; the cipher is free for another stream."""
        self._free.append(self._cipher)
        del self._cipher

    def _draw(self, shape: Iterable[int], dtype: type[np.generic]) -> NDArray[Any]:
        """Uniform words of a numpy type. numpy rather than torch: at batch 1 the calls are what costs."""
        out = np.empty(tuple(shape), dtype)
        if out.size == 0:
            return out
        view = out.reshape(-1).data.cast("B")
        for begin in range(0, len(view), len(_ZEROS)):
            part = view[begin : begin + len(_ZEROS)]
            self._cipher.update_into(_ZEROS[: len(part)] if len(part) < len(_ZEROS) else _ZEROS, part)
        return out

    def ring(self, shape: Iterable[int]) -> torch.Tensor:
        """Uniform on Z_2^64, as int64."""
        return torch.from_numpy(self._draw(shape, np.int64))

    def words(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """Uniform on Z_2^8, Z_2^16, Z_2^32 or Z_2^64, after the dtype: uint8, uint16, int32 or int64."""
        return torch.from_numpy(self._draw(shape, _WORDS[dtype]))

    def bits(self, shape: Iterable[int]) -> torch.Tensor:
        """Uniform bits, one to a byte."""
        drawn = self._draw(shape, np.uint8)
        np.bitwise_and(drawn, 1, out=drawn)
        return torch.from_numpy(drawn)

    def below(self, bound: int, shape: Iterable[int]) -> torch.Tensor:
        """Uniform on {0, ..., bound - 1} for a bound up to 256, as uint8: exact, by rejection."""
        shape = tuple(shape)
        count, size = _per_draw(bound), math.prod(shape)
        drawn = self._residues((bound,) * count, -(-size // count))
        return torch.from_numpy(drawn.reshape(-1)[:size].reshape(shape))

    def blinding(self, p: int, shape: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A multiplier, uniform on {1, ..., p - 1}, and a share of zero, uniform on Z_p, from every draw; uint8."""
        shape = tuple(shape)
        drawn = self._residues((p - 1, p), math.prod(shape)).reshape(2, *shape)
        multiplier = drawn[0]
        np.add(multiplier, 1, out=multiplier)
        return torch.from_numpy(multiplier), torch.from_numpy(drawn[1])

    def _residues(self, bounds: tuple[int, ...], count: int) -> NDArray[Any]:
        """(len(bounds), count): row k uniform below bounds[k], all from one 16-bit draw each, by rejection."""
        # A few more draws than numbers, instead of those that are rejected: one pass is nearly always enough.
        draws = self._draw((count + (count >> _SPARE_SHIFT) + _SPARE,), np.uint16)
        out = np.empty((len(bounds), count), np.uint8)
        rejected = field.split_draws(draws, *_radix(bounds), out)
        if len(rejected):
            out[:, rejected] = self._residues(bounds, len(rejected))
        return out

    def odd_ring(self, shape: Iterable[int]) -> torch.Tensor:
        """Uniform on {0, ..., 2^64 - 2}: -1 as int64 is redrawn."""
        out = self.ring(shape)
        while bool((wrong := out == -1).any()):
            out[wrong] = self.ring((int(wrong.sum()),))
        return out
