"""A party: its keys, its channel, and the executor that runs a plan's nodes round by round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from tacit.ir.cost import (
    BIT,
    BYTE,
    COMMON,
    DEALT,
    ODD_RING,
    P0,
    P1,
    P2,
    PRF,
    RING,
    SENT,
    Element,
    prime_field,
    small_ring,
)
from tacit.ir.digits import Digits
from tacit.ir.op import Material, Program, Received, Round, Spec
from tacit.ir.plan import Node, Plan, Schedule, SizedNode
from tacit.ir.types import RING_BITS, Shape, Type
from tacit.runtime import field as zp
from tacit.runtime import piecewise, wins
from tacit.runtime import ring as z64
from tacit.runtime.channel import Channel
from tacit.runtime.prf import Stream, Streams
from tacit.runtime.timeline import Profile

Tensor = torch.Tensor
Values = dict[str, Any]
Inventory = tuple[str, Shape, Element, str]
_ONLINE = 1 << 31  # marks the node of an online stream


@dataclass
class Party:
    """What the code of an op sees while it handles one node of one batch at one party.

    `rank` says who this is; `args` and `type` are the operand and result types with the batch as a
    number. `inventory` collects the randomness that dealing produced, for comparison with what the op
    declares: the fields of `Randomness`, which are made where somebody looks.
    """

    rank: int
    channel: Channel
    streams: Streams
    sized: SizedNode
    batch_id: int
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the session's values, by line
    material: list[Material] = dataclasses.field(default_factory=list)
    value: Tensor | None = None  # what the role that owns this node brings: input or weight
    offsets: list[Tensor] | None = None  # where the truncation offsets are recorded, at P0
    inventory: list[Inventory] = dataclasses.field(default_factory=list)
    ring: ModuleType = z64
    field: ModuleType = zp
    piecewise: ModuleType = piecewise
    wins: ModuleType = wins
    online: bool = False  # dealing and running have streams of their own: nothing is drawn twice
    _opened: dict[int, Stream] = dataclasses.field(default_factory=dict)

    @property
    def args(self) -> tuple[Type, ...]:
        return self.sized.args

    @property
    def type(self) -> Type:
        return self.sized.type

    @property
    def operands(self) -> tuple[Any, ...]:
        """The operands that belong to the session, None for others: for dealing. A mask may have to be drawn anew."""
        found = (self.shared.get(arg) for arg in self.sized.node.args)
        return tuple(value() if callable(value) else value for value in found)

    @property
    def first(self) -> bool:
        """P0 adds public constants, P1 does not."""
        return self.rank == P0

    def prf(self, peer: int) -> Stream:
        """The stream that this party and `peer` have in common for this node and batch."""
        stream = self._opened.get(peer)
        if stream is None:
            place = self.sized.index | (_ONLINE if self.online else 0)
            stream = self._opened[peer] = self.streams.open(peer, self.batch_id, place)
        return stream

    def close(self) -> None:
        """This party draws nothing more for its node."""
        for stream in self._opened.values():
            stream.close()

    def own(self) -> Stream:
        """P2's private stream for this node and batch."""
        return self.prf(P2)

    # --- offline ---

    def mask(self, kind: str, shape: Shape, *, bits: int = RING_BITS) -> Tensor:
        """A uniform value of Z_2^64 or Z_2^32 that P2 knows and P0, P1 share, all from the streams."""
        element = small_ring(bits)
        self._note(kind, shape, element, PRF)
        dtype = self.ring.WORDS[element.word_bytes]
        if self.rank != P2:
            return self.prf(P2).words(shape, dtype)
        found, other = self.prf(P0).words(shape, dtype), self.prf(P1)
        if found.numel() <= _AT_ONCE:
            return found + other.words(shape, dtype)
        for part in torch.split(found.view(-1), _AT_ONCE):
            part.add_(other.words(tuple(part.shape), dtype))
        return found

    def share(self, kind: str, shape: Shape, value: Tensor | None, *, bits: int = RING_BITS) -> Tensor | None:
        """P2 shares a value in Z_2^bits: P0 derives its share, P1 is sent the correction."""
        element = small_ring(bits)
        self._note(kind, shape, element, DEALT)
        dtype = self.ring.WORDS[element.word_bytes]
        if self.rank == P1:
            return self.channel.recv(P2, [Spec(shape, dtype)])[0]
        share0 = (self.prf(P2) if self.rank == P0 else self.prf(P0)).words(shape, dtype)
        if self.rank == P0:
            return share0
        assert value is not None
        self.channel.send(P1, [self.ring.correction(value, share0)])
        return None

    def share_digits(self, r: Tensor | None, low: int, digits: Digits, n: int, *, source: str = DEALT) -> Tensor | None:
        """P2 shares bits low, low + 1, ... of r over Z_p, digit by digit in thermometer code: (rows, n)."""
        rows, p = digits.rows, digits.p
        self._note("bits", (rows, n), prime_field(p), source)
        spec = Spec(*self.field.packed_shape(rows, n, p))
        if self.rank == P1 or (self.rank == P0 and source == SENT):
            received: Tensor = self.field.unpack(self.channel.recv(P2, [spec])[0], rows, p)
            return received
        if self.rank == P0:
            return self.prf(P2).below(p, (rows, n))
        assert r is not None
        share0 = (self.own() if source == SENT else self.prf(P0)).below(p, (rows, n))
        if source == SENT:
            self.channel.send(P0, [self.field.pack(share0, p)])
        self.channel.send(P1, [self.field.pack(self.field.digit_corrections(r, low, digits, share0), p)])
        return None

    def share_residues(self, kind: str, shape: Shape, value: Tensor | None, p: int) -> Tensor | None:
        """P2 shares elements of Z_p, (rows, n): P0 derives its share, P1 is sent the correction."""
        self._note(kind, shape, prime_field(p), DEALT)
        if self.rank == P1:
            spec = Spec(*self.field.packed_shape(*shape, p))
            received: Tensor = self.field.unpack(self.channel.recv(P2, [spec])[0], shape[0], p)
            return received
        share0 = (self.prf(P2) if self.rank == P0 else self.prf(P0)).below(p, shape)
        if self.rank == P0:
            return share0
        assert value is not None
        self.channel.send(P1, [self.field.pack(self.field.minus(value, share0, p), p)])
        return None

    def send_shares(self, kind: str, shape: Shape, value: Tensor | None, *, odd: bool = False) -> Tensor | None:
        """P2 sends both parties their shares in Z_2^64 or Z_{2^64 - 1}, as SecureNN counts it."""
        self._note(kind, shape, ODD_RING if odd else RING, SENT)
        if self.rank != P2:
            return self.channel.recv(P2, [Spec(shape, torch.int64)])[0]
        assert value is not None
        for target, share in zip((P0, P1), self.split(value, odd=odd), strict=True):
            self.channel.send(target, [share])
        return None

    def split(self, value: Tensor, *, odd: bool = False) -> tuple[Tensor, Tensor]:
        """Fresh additive shares of a value that P2 knows."""
        stream = self.own()
        share0 = stream.odd_ring(value.shape) if odd else stream.ring(value.shape)
        if odd:
            return share0, self.ring.odd_add(value, self.ring.odd_negate(share0))
        return share0, value - share0

    def common(self, kind: str, shape: Shape, element: Element, draw: Callable[[Stream], Tensor]) -> Tensor | None:
        """A value that P0 and P1 draw alike and P2 does not know."""
        self._note(kind, shape, element, COMMON)
        return None if self.rank == P2 else draw(self._common_stream())

    def common_blinding(self, digits: Digits, n: int) -> Material:
        """What P0 and P1 draw alike for a PrivateCompare of n elements, fresh for every position and element."""
        factors = self.common_factors(digits.p, (digits.positions, n))
        beta = self.common("beta", (n,), BIT, lambda stream: stream.bits((n,)))
        shift = self.common("shift", (n,), BYTE, lambda stream: stream.below(digits.positions, (n,)))
        if beta is None or shift is None:
            return {}
        return {**factors, "beta": beta, "shift": shift}

    def common_factors(self, p: int, shape: Shape) -> Material:
        """What hides elements of Z_p from P2, drawn alike by P0 and P1: factors that are not 0, and shares of zero."""
        for kind in ("s", "z"):
            self._note(kind, shape, prime_field(p), COMMON)
        if self.rank == P2:
            return {}
        s, z = self._common_stream().blinding(p, shape)
        return {"s": s, "z": z}

    def _common_stream(self) -> Stream:
        return self.prf(P1 if self.rank == P0 else P0)

    def common_bits(self, kind: str, n: int) -> Tensor | None:
        return self.common(kind, (n,), BIT, lambda stream: stream.bits((n,)))

    def _note(self, kind: str, shape: Shape, element: Element, source: str) -> None:
        self.inventory.append((kind, shape, element, source))

    # --- online ---

    def part(self, *values: Any) -> Program:
        """Run the next subprotocol of this node on `values`, consuming its material."""
        part = self.sized.parts[self._done]
        self._done += 1
        # The client and the owner hold no material; a party's is gone once it is taken.
        material = self.material.pop(0) if self.rank <= P2 else {}
        return (yield from part.run(self, material, *values))

    _done: int = 0

    def open(self, *shares: Any) -> Program:
        """P0 and P1 exchange shares and both learn the sums. P2 only sees the round pass."""
        if self.rank == P2:
            yield Round()
            return tuple(None for _ in shares)
        peer = P1 if self.rank == P0 else P0
        specs = tuple(Spec(tuple(s.shape), s.dtype) for s in shares)
        got = yield Round(send={peer: shares}, recv={peer: specs})
        return tuple(mine + theirs for mine, theirs in zip(shares, got[peer], strict=True))

    def note_offset(self, c: Tensor, bits: int) -> None:
        """Record t = 2^bits - 1 - (c mod 2^bits), the public offset of a truncation, if anybody asked."""
        if self.rank == P0 and self.offsets is not None:
            self.offsets.append((1 << bits) - 1 - self.ring.low_bits(c, bits))


_AT_ONCE = 1 << 23  # words of a second stream that are added to those of a first
Seat = Callable[[Node], Party]
Awaited = Mapping[int, Sequence[Spec]]
_Active = tuple[Node, Program, Round]  # a program and the round it is in


def deal(
    nodes: Sequence[Node], seat: Seat, material: dict[str, list[Material]], profile: Profile | None = None
) -> list[Inventory]:
    """Offline: the material of every node, in plan order. Returns what was dealt."""
    inventory: list[Inventory] = []
    for node in nodes:
        begin, party = time.perf_counter(), seat(node)
        material[node.name] = [part.deal(party) for part in party.sized.parts]
        inventory += party.inventory
        party.close()
        if profile is not None:
            profile.work("offline", node.name, party.rank, begin)
    return inventory


class _Running:
    """The programs under way at one party, and the values they leave behind."""

    def __init__(self, plan: Plan, values: Values, *, rank: int, keep: bool, profile: Profile | None) -> None:
        self.rank = rank
        self.profile = profile
        self.values = values
        self.programs: list[_Active] = []
        # How many lines still need a value; dropped at zero, unless everything is kept.
        self._uses = None if keep else dict(plan.uses)

    def advance(self, node: Node, program: Program, received: Received | None) -> None:
        """Run a program to its next round, or to its end."""
        begin = time.perf_counter()
        try:
            wanted = next(program) if received is None else program.send(received)
            self.programs.append((node, program, wanted))
        except StopIteration as stop:
            self.values[node.name] = stop.value
            if self._uses is not None:
                self._drop_used(node, self._uses)
        if self.profile is not None:
            self.profile.work("online", node.name, self.rank, begin)

    def _drop_used(self, node: Node, uses: dict[str, int]) -> None:
        for arg in node.args:
            if arg in uses:
                uses[arg] -= 1
                if uses[arg] == 0:
                    self.values.pop(arg, None)


def execute(
    plan: Plan,
    schedule: Schedule,
    channel: Channel,
    seat: Seat,
    values: Values,
    *,
    keep: bool = True,
    profile: Profile | None = None,
) -> None:
    """Online: run the scheduled nodes; all messages of one round to one peer travel as one."""
    for _ in steps(plan, schedule, channel, seat, values, keep=keep, profile=profile):
        pass


def steps(
    plan: Plan,
    schedule: Schedule,
    channel: Channel,
    seat: Seat,
    values: Values,
    *,
    keep: bool = True,
    profile: Profile | None = None,
) -> Iterator[Awaited]:
    """`execute` step by step: yields when the messages of a round were sent, and before those of the peers are awaited.

    Yields what is awaited, by sender. Parties that take turns at every yield never wait for one another.
    """
    running = _Running(plan, values, rank=channel.rank, keep=keep, profile=profile)
    for step in range(schedule.rounds + 1):
        start = time.perf_counter()
        for name in schedule.at(step):
            node = plan.node(name)
            if channel.rank in node.op.roles:
                party = seat(node)
                party.online = True
                running.advance(node, node.op.run(party, *(values.get(arg) for arg in node.args)), None)
        active, running.programs = running.programs, []
        for target, tensors in _outgoing(active):
            channel.send(target, tensors)
        awaited = _awaited(active)
        yield awaited
        for (node, program, _), received in zip(active, _incoming(channel, active, awaited), strict=True):
            running.advance(node, program, received)
        if profile is not None:
            profile.round(step, channel.rank, start)


def _outgoing(active: Sequence[_Active]) -> Sequence[tuple[int, Sequence[Tensor]]]:
    if not active:
        return ()
    if len(active) == 1:  # as nearly always
        return sorted(active[0][2].send.items())
    targets = sorted({target for _, _, wanted in active for target in wanted.send})
    return [(target, [t for _, _, wanted in active for t in wanted.send.get(target, ())]) for target in targets]


def _awaited(active: Sequence[_Active]) -> Awaited:
    if not active:
        return {}
    if len(active) == 1:
        return active[0][2].recv
    sources = sorted({source for _, _, wanted in active for source in wanted.recv})
    return {s: [spec for _, _, wanted in active for spec in wanted.recv.get(s, ())] for s in sources}


def _incoming(channel: Channel, active: Sequence[_Active], awaited: Awaited) -> list[Received]:
    if not active:
        return []
    arrived = {source: channel.recv(source, specs) for source, specs in sorted(awaited.items())}
    if len(active) == 1:
        return [arrived]
    parts, inbox = {source: iter(found) for source, found in arrived.items()}, []
    for _, _, wanted in active:
        inbox.append({source: tuple(next(parts[source]) for _ in specs) for source, specs in wanted.recv.items()})
    return inbox
