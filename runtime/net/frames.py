"""Frames: a header of 24 bytes, then as many bytes as it says. Control is JSON, data is the tensors' own bytes.

    kind u8 | phase u8 | depth u16 | serial u32 | request u64 | length u64        (big endian)

`serial` counts the frames of a connection: one that is replayed, dropped or out of order is noticed. `phase`
and `depth` (the causal round, see `Meter`) belong to data. Nothing is ever unpickled, no length is believed: control
is bounded by the kind and by who sends it, data by the bytes that the plan still provides for.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch

from tacit.ir.cost import OWNER
from tacit.ir.errors import ProtocolError
from tacit.ir.op import Spec

Tensor = torch.Tensor
VERSION = 2
HEADER = struct.Struct("!BBHIQQ")
SERIALS = 1 << 32
CONTROL_BYTES, PLAN_BYTES = 1 << 16, 1 << 24  # a plan's text travels from the owner, and to clients that ask for it


class FrameError(ProtocolError):
    """The other side sent what no frame looks like; says what, and quotes no content."""


class Kind(IntEnum):
    """CAST wants no answer, CALL wants a REPLY under the same number."""

    HELLO = 1
    ACCEPT = 2
    REFUSE = 3
    CAST = 4
    CALL = 5
    REPLY = 6
    DATA = 7
    PING = 8


class Phase(IntEnum):
    OFFLINE = 0
    ONLINE = 1


_KINDS, _PHASES = {int(kind): kind for kind in Kind}, {int(phase): phase for phase in Phase}


class Header(NamedTuple):
    kind: Kind
    serial: int
    length: int
    request: int = 0
    phase: Phase = Phase.OFFLINE
    depth: int = 0

    def pack(self) -> bytes:
        return HEADER.pack(self.kind, self.phase, self.depth, self.serial, self.request, self.length)

    @staticmethod
    def parse(raw: bytes | bytearray | memoryview, serial: int, role: int) -> Header:
        """The header, if it is the next one and its length is bounded; `role` is the sender's. Raises FrameError."""
        kind, phase, depth, found, request, length = HEADER.unpack(raw)
        if kind not in _KINDS:
            raise FrameError(f"a frame of unknown kind {kind}")
        if phase not in _PHASES:
            raise FrameError(f"a frame of unknown phase {phase}")
        if found != serial:
            raise FrameError(f"frame {found} where {serial} is due: replayed, lost or out of order")
        header = Header(_KINDS[kind], found, length, request, _PHASES[phase], depth)
        if header.kind is not Kind.DATA and length > header.bound(role):
            raise FrameError(f"a {header.kind.name} frame of {length} bytes, {header.bound(role)} are allowed")
        return header

    def bound(self, role: int) -> int:
        """The most bytes that a control frame of a sender in that role may have."""
        if self.kind in (Kind.PING, Kind.ACCEPT):
            return 0
        # Only what this side asked for (a plan), and what the owner pushes, is long.
        return PLAN_BYTES if self.kind is Kind.REPLY or (self.kind is Kind.CALL and role == OWNER) else CONTROL_BYTES


def encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def decode(raw: bytes | bytearray | memoryview) -> dict[str, Any]:
    """A control frame's object; raises FrameError."""
    try:
        body = json.loads(bytes(raw).decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise FrameError("a control frame that is not JSON") from None
    if not isinstance(body, dict):
        raise FrameError("a control frame that is not an object")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


class Fields:
    """Reads the fields of a control frame; every one is checked, raising FrameError that names it."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.body.get(key)
        if type(value) is not int or not low <= value <= high:
            raise FrameError(f"'{key}' has to be a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self.body.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise FrameError(f"'{key}' has to be a number from {low:g} to {high:g}")
        return float(value)

    def text(self, key: str, most: int = 1000) -> str:
        value = self.body.get(key)
        if not isinstance(value, str) or len(value) > most:
            raise FrameError(f"'{key}' has to be a text of at most {most} characters")
        return value

    def hexadecimal(self, key: str, size: int) -> bytes:
        """`size` bytes in hexadecimal."""
        try:
            value = bytes.fromhex(self.text(key, 2 * size))
        except ValueError:
            value = b""
        if len(value) != size:
            raise FrameError(f"'{key}' has to be {size} bytes in hexadecimal")
        return value

    def flag(self, key: str) -> bool:
        value = self.body.get(key)
        if not isinstance(value, bool):
            raise FrameError(f"'{key}' has to be true or false")
        return value

    def integers(self, key: str, low: int, high: int, most: int = 1 << 16) -> list[int]:
        value = self.body.get(key)
        if not isinstance(value, list) or len(value) > most or any(type(v) is not int for v in value):
            raise FrameError(f"'{key}' has to be a list of at most {most} whole numbers")
        if any(not low <= v <= high for v in value):
            raise FrameError(f"'{key}' has to hold numbers from {low} to {high}")
        return value


def tensor_bytes(message: Sequence[Tensor]) -> list[memoryview]:
    """The bytes of tensors, without a copy where they are contiguous."""
    return [t.contiguous().view(-1).numpy().data.cast("B") for t in message if t.numel()]


_NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}


def spec_bytes(specs: Sequence[Spec]) -> int:
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def tensors(payload: np.ndarray[Any, np.dtype[np.uint8]], specs: Sequence[Spec]) -> tuple[Tensor, ...]:
    """The payload, whose size is that of the specs, as tensors that share its memory wherever it is aligned."""
    out, offset = [], 0
    for spec in specs:
        size = spec_bytes([spec])
        part = payload[offset : offset + size]
        if offset % spec.dtype.itemsize:
            part = part.copy()
        out.append(torch.from_numpy(part.view(_NUMPY[spec.dtype]).reshape(spec.shape)))
        offset += size
    return tuple(out)
