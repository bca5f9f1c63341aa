"""Everything that a party holds while a plan runs: what it drew, what it was sent, what it computes from the two.

The joint view is recorded where it enters a party: at its streams, at its messages, and at the kernels through which it
combines them. `Recorder` does so for all three at once; `Rows` lays a view out as one row of bits for each element of
the batch; `Relations` finds what is constant, or linear over GF(2), in such rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from harness import fixed_keys
from numba import njit

from tacit.ir.cost import P0, P1, P2
from tacit.ir.op import Program, Round, Subprotocol
from tacit.ir.plan import Plan
from tacit.runtime import field as zp
from tacit.runtime import party as parties
from tacit.runtime.prf import Keys
from tacit.runtime.session import Session

Tensor = torch.Tensor
PARTIES = (P0, P1, P2)


@dataclass
class Part:
    """One subprotocol as one party ran it."""

    node: str
    part: Subprotocol
    material: dict[str, Tensor]
    sent: list[tuple[int, Tensor]] = field(default_factory=list)
    got: list[tuple[int, Tensor]] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)  # of what was exchanged, or came from both others
    computed: list[tuple[str, Tensor]] = field(default_factory=list)  # by kernels
    result: Any = None

    def kernel(self, name: str) -> list[Tensor]:
        return [value for key, value in self.computed if key == name]


class Recorder:
    """The parts and the draws of every party, in order; `feed` replaces the operands of a kind of part."""

    def __init__(self, feed: dict[type[Subprotocol], dict[int, Tensor]]) -> None:
        self.parts: dict[int, list[Part]] = {rank: [] for rank in PARTIES}
        self.draws: dict[int, list[tuple[str, Tensor]]] = {rank: [] for rank in PARTIES}  # with their lines
        self.feed = feed
        self._lock = threading.Lock()

    def of(self, rank: int, kind: type[Subprotocol]) -> list[Part]:
        return [part for part in self.parts[rank] if isinstance(part.part, kind)]

    def drawn(self, party: parties.Party, found: Any) -> None:
        line = party.sized.node.name
        with self._lock:
            self.draws[party.rank] += [(line, t.clone()) for t in (found if isinstance(found, tuple) else (found,))]

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        with pytest.MonkeyPatch.context() as patch:
            plain_prf, recorder = parties.Party.prf, self

            def prf(self: parties.Party, peer: int) -> Any:
                stream = plain_prf(self, peer)
                return _Tapped(stream, lambda _, found: recorder.drawn(self, found)) if self.rank <= P2 else stream

            def run(self: parties.Party, *values: Any) -> Program:
                return recorder._run(self, values)

            patch.setattr(parties.Party, "prf", prf)
            patch.setattr(parties.Party, "part", run)
            yield self

    def _run(self, party: parties.Party, values: tuple[Any, ...]) -> Program:
        """`Party.part`, with everything noted on its way."""
        part, party._done = party.sized.parts[party._done], party._done + 1
        material = party.material.pop(0) if party.rank <= P2 else {}
        if party.rank > P2:
            return (yield from part.run(party, material, *values))
        if type(part) in self.feed:
            values = (self.feed[type(part)][party.rank],) if party.rank in (P0, P1) else ()
        note = Part(party.sized.node.name, part, {key: value.clone() for key, value in material.items()})
        self.parts[party.rank].append(note)
        party.ring = _Tapped(party.ring, lambda name, found: _noted(note, name, found))
        party.field = _Field(party.field, lambda name, found: _noted(note, name, found))
        note.result = yield from _followed(part.run(party, material, *values), note)
        return note.result


def _followed(program: Program, note: Part) -> Program:
    received = None
    while True:
        try:
            wanted: Round = next(program) if received is None else program.send(received)
        except StopIteration as stop:
            return stop.value
        note.sent += [(peer, t.clone()) for peer, message in wanted.send.items() for t in message]
        received = yield wanted
        note.got += [(peer, t.clone()) for peer, message in received.items() for t in message]
        both = [received.get(rank) or wanted.send.get(rank, ()) for rank in PARTIES]
        exchanged = [(wanted.send[p], received[p]) for p in received if p in wanted.send]
        for ours, theirs in [*exchanged, (both[P0], both[P1])] if len(received) == 2 else exchanged:
            note.sums += [a + b for a, b in zip(ours, theirs, strict=True) if a.dtype in (torch.int32, torch.int64)]


def _noted(note: Part, name: str, found: Any) -> None:
    if isinstance(found, Tensor):
        note.computed.append((name, found.clone()))


class _Tapped:
    """A module or a stream whose results are noted."""

    def __init__(self, target: Any, note: Any) -> None:
        self._target, self._note = (target._target if isinstance(target, _Tapped) else target), note

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            out = found(*args, **kwargs)
            self._note(name, out)
            return out

        return call


class _Field(_Tapped):
    """Z_p, with what P2 can add up of two blinded vectors: the residues, and which of them are zero."""

    def has_zero(self, d0: Tensor, d1: Tensor, positions: int, p: int) -> Tensor:
        ours, theirs = zp.unpack(d0, positions, p), zp.unpack(d1, positions, p)
        total = ((ours.int() + theirs.int()) % p).to(torch.uint8)
        out: Tensor = self._target.has_zero(d0, d1, positions, p)
        for name, value in (("d0", ours), ("d1", theirs), ("total", total), ("zero", (total == 0).byte())):
            self._note(name, value)
        self._note("has_zero", out)
        return out

    def blind(self, *args: Any) -> Tensor:
        return self._target.blind(*args)  # what P2 is sent: a function of what is noted

    def pack(self, *args: Any) -> Tensor:
        return self._target.pack(*args)


def record(
    plan: Plan,
    batch: int,
    inputs: dict[str, Tensor],
    *,
    keys: Keys | None = None,
    feed: dict[type[Subprotocol], dict[int, Tensor]] | None = None,
) -> Recorder:
    """One inference, dealt and run; `feed` replaces the operands of a kind of part."""
    return record_several(plan, batch, inputs, 1, keys=keys, feed=feed)[0]


def record_several(plan: Plan, batch: int, inputs: dict[str, Tensor], count: int, **options: Any) -> list[Recorder]:
    """So many inferences of one session; weights are small constants."""
    weights = {n.op.label: torch.full(n.type.dims, 3) for n in plan.nodes if n.op.name == "weight"}  # type: ignore[attr-defined]
    session = Session(plan, weights, keys=options.get("keys") or fixed_keys(31))
    recorders = [Recorder(options.get("feed") or {}) for _ in range(count)]
    try:
        for recorder in recorders:
            with recorder.recording():
                session.infer(session.deal(batch), inputs)
    finally:
        session.close()
    return recorders


def constant(plan: Plan, batch: int, value: int) -> dict[str, Tensor]:
    return {n.op.label: torch.full(n.type.at(batch).dims, value) for n in plan.nodes if n.op.name == "input"}  # type: ignore[attr-defined]


def anywhere(plan: Plan, batch: int, width: int, seed: int = 5) -> dict[str, Tensor]:
    """Inputs of that width, each of its own."""
    generator, reach = torch.Generator().manual_seed(seed), 2 ** (width - 1)
    return {
        n.op.label: torch.randint(-reach, reach, n.type.at(batch).dims, generator=generator)  # type: ignore[attr-defined]
        for n in plan.nodes
        if n.op.name == "input"
    }


# --- rows of bits ---

MOST = 2  # positions of a digit vector, pairs of a tree, knots: so many of each


@dataclass
class Rows:
    """Bits of a view, one row for each element of the batch, which is a prime that no other dimension is a multiple of.

    Of a dimension outside the batch, the first few indices are looked at, of those inside it `width`: neighbours.
    """

    batch: int
    width: int
    columns: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def add(self, value: Tensor, elements: int) -> None:
        """`elements`: how many results the node has, by which flat dimensions are cut: leading copies come first."""
        axis = next((i for i, d in enumerate(value.shape) if d and d % self.batch == 0), None)
        if axis is None:
            return  # bits packed across elements, or a weight: the same in every row
        size, before = value.shape[axis], math.prod(value.shape[:axis])
        copies = size // elements if size % elements == 0 else 1
        cut = value.reshape(before, copies, self.batch, -1)
        after = cut.shape[3]
        cut = cut[:MOST, :MOST, :, : self.width] if after > 1 else cut[:MOST, :MOST]
        flat = cut.permute(2, 0, 1, 3).reshape(self.batch, -1).contiguous()
        self.columns.append(np.unpackbits(flat.numpy().view(np.uint8).reshape(self.batch, -1), axis=1))

    def bits(self) -> np.ndarray[Any, Any]:
        return np.concatenate([np.empty((self.batch, 0), np.uint8), *self.columns], axis=1)


def rows_of(recorder: Recorder, rank: int, plan: Plan, batch: int, width: int, parts: slice) -> np.ndarray[Any, Any]:
    """The view of a party as bits: of some of its parts, and of all that it drew where those are all parts."""
    out, elements, looked_at = Rows(batch, width), plan.at(batch)["out"].type.numel, recorder.parts[rank][parts]
    if len(looked_at) == len(recorder.parts[rank]):
        for _, value in recorder.draws[rank]:
            out.add(value, elements)
    for part in looked_at:
        for value in (*part.material.values(), *(t for _, t in part.got), *part.sums):
            out.add(value, elements)
        for _, value in part.computed:
            out.add(value if value.dtype == torch.uint8 else _ends(value), elements)
    return out.bits()


def _ends(value: Tensor) -> Tensor:
    """The two lowest and the two highest bits: of what is computed from what is in the view already."""
    top = (value >> (8 * value.element_size() - 2)) & 3
    return ((top << 2) | (value & 3)).to(torch.uint8)


# --- relations ---


class Relations:
    """The affine relations over GF(2) between the columns of some rows: as a basis of what the rows span."""

    def __init__(self, rows: np.ndarray[Any, Any]) -> None:
        self._basis = np.zeros((rows.shape[1] + 1, _words(rows.shape[1] + 1)), np.uint64)
        self._there = np.zeros(rows.shape[1] + 1, np.bool_)
        self.rank = int(_absorb(self._basis, self._there, _with_ones(rows)))

    def broken(self, rows: np.ndarray[Any, Any]) -> int:
        """How many of the rows break a relation."""
        return int(_outside(self._basis, self._there, _with_ones(rows)))


def _words(bits: int) -> int:
    return -(-bits // 64)


def _with_ones(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Packed, with a column of ones for the constant of a relation."""
    n, bits = rows.shape
    wide = np.zeros((n, _words(bits + 1) * 64), np.uint8)
    wide[:, :bits], wide[:, bits] = rows, 1
    return np.packbits(wide, axis=1, bitorder="little").view(np.uint64)


@njit(cache=True)
def _reduce(basis: np.ndarray[Any, Any], there: np.ndarray[Any, Any], row: np.ndarray[Any, Any]) -> int:
    """The row without what the basis spans; its first bit that is left, or -1."""
    for word in range(row.size):
        while row[word]:
            bit, left = 0, row[word]
            while left & np.uint64(1) == 0:
                left >>= np.uint64(1)
                bit += 1
            place = word * 64 + bit
            if not there[place]:
                return place
            for k in range(word, row.size):
                row[k] ^= basis[place, k]
    return -1


@njit(cache=True)
def _absorb(basis: np.ndarray[Any, Any], there: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> int:
    found = 0
    for i in range(len(rows)):
        row = rows[i].copy()
        place = _reduce(basis, there, row)
        if place >= 0:
            basis[place], there[place], found = row, True, found + 1
    return found


@njit(cache=True)
def _outside(basis: np.ndarray[Any, Any], there: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> int:
    found = 0
    for i in range(len(rows)):
        found += _reduce(basis, there, rows[i].copy()) >= 0
    return found
