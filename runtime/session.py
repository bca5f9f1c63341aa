"""A session: three virtual parties and the two roles outside, in one process.

The parties are threads over an in-memory channel, or take turns in one; client and owner act over the same channel.
A session owns what outlives a run: keys, shares of the weights, opened masks, the number of the next batch. A run
owns its threads, its messages and its batch, so that any number of them may go on at once, and none can disturb
another.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn, TypeVar

import torch

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2, ROLES, Link, Randomness
from tacit.ir.errors import ProtocolError
from tacit.ir.op import Material
from tacit.ir.ops.roles import Input, Mask, Weight
from tacit.ir.plan import Node, Plan, Schedule
from tacit.runtime import prf
from tacit.runtime.channel import Exchange, LinkModel, Meter, Network
from tacit.runtime.cores import on_one_core
from tacit.runtime.crew import PARTIES, Crew, require_process
from tacit.runtime.memory import keep_freed_buffers, keep_little
from tacit.runtime.party import Awaited, Inventory, Party, Values, deal, steps
from tacit.runtime.timeline import Profile, Timeline

Tensor = torch.Tensor
_T = TypeVar("_T")
_DEALING = (P2, P0, P1)  # it goes one way, from P2: P0 and P1 never keep it waiting, so it may also be done in turn
_EVERYONE = tuple(range(len(ROLES)))
_MAX_BATCHES = 1 << 32
# Elements of weights that are shared at once; and from how many on P2 derives their masks anew instead of holding them.
_PORTION, _MANY = 1 << 22, 1 << 25


@dataclass(frozen=True)
class Run:
    """What one inference of a batch measured. Bytes and rounds are counted in the channel."""

    batch: int
    rounds: int
    online_bytes: int
    offline_bytes: int
    online_seconds: float
    offline_seconds: float
    online_links: Mapping[Link, int] = field(default_factory=Counter, repr=False)
    offline_links: Mapping[Link, int] = field(default_factory=Counter, repr=False)


@dataclass
class Dealt:
    """The material of one inference: used once, then gone. `session` names the one that dealt it."""

    session: bytes
    batch_id: int
    batch: int
    material: dict[int, dict[str, list[Material]]]
    meter: Meter
    seconds: float
    _inventory: dict[int, list[Inventory]]

    @property
    def inventory(self) -> dict[int, list[Randomness]]:
        """What each party drew, received or sent, in plan order."""
        return {rank: [Randomness(*item) for item in items] for rank, items in self._inventory.items()}


@dataclass
class Trace:
    """A secure run laid open for `check`: the sum of both shares of every line, and the public offsets."""

    values: dict[str, Tensor]
    offsets: dict[str, list[Tensor]]


class Session:
    """Open once, then deal and infer as often as wanted, also in several threads at once.

    It belongs to the process that opened it, and cannot be copied: two owners of its keys and its batch numbers
    would use the same masks. In a forked process every method raises ProtocolError.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], *, keys: prf.Keys | None = None, link: LinkModel | None = None
    ) -> None:
        keep_freed_buffers()
        self.plan = plan.verify().require_answer()
        self.pid = os.getpid()
        self.network = Network(link)
        self.profile: Profile | None = None  # benchmarks collect seconds by phase and line here
        self._ahead = Network(link)  # the emulated links of what is dealt ahead
        self._nonce = os.urandom(16)
        self._lock = threading.Lock()
        self._idle: list[Crew] = []
        self._turns: dict[int, bool] = {}  # by batch
        keys = keys or prf.fresh_keys()
        self._streams = {rank: prf.Streams(prf.keys_of(rank, keys)) for rank in _EVERYONE}
        self._weights = weights
        self._large = sum(node.type.numel for node in self.plan.find(Weight)) >= _MANY
        self._shared: dict[int, Values] = {rank: {} for rank in _EVERYONE}
        self._next_batch = 1  # batch 0 is the session's own part
        self._unused: set[int] = set()  # batches dealt and not yet used
        self.weight_meter = self._run(self._open)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session cannot be copied: its masks are used once; copy the compiled model instead")

    def close(self) -> None:
        """End the threads that wait for work; runs that are under way come to their end."""
        with self._lock:
            idle, self._idle = self._idle, []
        for crew in idle:
            crew.close()

    @contextmanager
    def _crew(self) -> Iterator[Crew]:
        """Threads for one run; those of runs that have ended are used again. An interrupted run is not waited for."""
        require_process(self.pid, "this session")
        with self._lock:
            crew = self._idle.pop() if self._idle else Crew()
        try:
            yield crew
        except BaseException as error:
            if not isinstance(error, Exception) and os.getpid() == self.pid:
                crew.abandon()
            raise
        finally:
            self._return(crew)

    def _return(self, crew: Crew) -> None:
        if os.getpid() != self.pid:
            return  # a stream that was begun before a fork: its threads, and their locks, are in the other process
        if not crew.usable:
            crew.close()
            return
        with self._lock:
            self._idle.append(crew)

    def _run(self, work: Callable[[Crew], _T]) -> _T:
        with self._crew() as crew, on_one_core():
            return work(crew)

    def _open(self, crew: Crew) -> Meter:
        """Share the weights and open their masks: paid once; large ones one after the other, to hold little at once."""
        exchange = Exchange(self.network)
        for nodes in self._portions():
            material: dict[int, dict[str, list[Material]]] = {rank: {} for rank in _EVERYONE}
            jobs: Mapping[int, Callable[[], object]] = {
                rank: self._dealing(exchange, nodes, rank, 0, 1, material[rank]) for rank in _DEALING
            }
            crew.together(exchange, jobs)
            schedule, played = self.plan.session_schedule.part({node.name for node in nodes}), {}
            for rank in (*PARTIES, OWNER):
                seat = self._seat(exchange, rank, 0, 1, material[rank])
                played[rank] = self._job(exchange, rank, schedule, seat, self._shared[rank])
            crew.play(exchange, played)
            self._condense(nodes)
            if self._large:
                keep_little()
        return exchange.meter

    def _portions(self) -> Iterator[list[Node]]:
        """The lines of the session, weights with their masks, so many elements at a time."""
        masks: dict[str, list[Node]] = {}
        for node in self.plan.find(Mask):
            masks.setdefault(node.args[0], []).append(node)
        portion: list[Node] = []
        size = 0
        for node in self.plan.find(Weight):
            if portion and size + node.type.numel > _PORTION:
                yield portion
                portion, size = [], 0
            portion += [node, *masks.get(node.name, ())]
            size += node.type.numel
        yield portion

    def _condense(self, nodes: list[Node]) -> None:
        """What need not be held twice, or at all.

        P0 and P1 have opened the same W - B, and hold it once between them in this process. P2 derived B from two
        streams of the session that belong to this line: where weights are large, it does so again whenever it deals,
        which is the same mask for the same weight.
        """
        for node in nodes:
            if isinstance(node.op, Mask):
                self._shared[P1][node.name] = self._shared[P0][node.name]
                if self._large:
                    seat = self._seat(Exchange(self.network), P2, 0, 1)
                    self._shared[P2][node.name] = partial(_mask_again, seat, node)

    def _dealing(
        self,
        exchange: Exchange,
        nodes: list[Node],
        rank: int,
        batch_id: int,
        batch: int,
        material: dict[str, list[Material]],
        profile: Profile | None = None,
    ) -> Callable[[], list[Inventory]]:
        found = self.profile if profile is None else profile
        return lambda: deal(nodes, self._seat(exchange, rank, batch_id, batch), material, found)

    def deal(self, batch: int) -> Dealt:
        """Offline: deal exactly what one inference of `batch` elements consumes."""
        return self._run(lambda crew: self._deal(crew, batch))

    def _number(self) -> int:
        """The next batch number: it separates the streams of one batch from those of all others."""
        require_process(self.pid, "this session")
        with self._lock:
            if self._next_batch >= _MAX_BATCHES:
                raise ProtocolError("this session has used up its batches; open a new one")
            found, self._next_batch = self._next_batch, self._next_batch + 1
            self._unused.add(found)
            return found

    def _deal(self, crew: Crew, batch: int, *, ahead: bool = False, timeline: Timeline | None = None) -> Dealt:
        batch_id = self._number()
        nodes = [n for n in self.plan.nodes if not n.op.session]
        material: dict[int, dict[str, list[Material]]] = {rank: {} for rank in _EVERYONE}
        exchange, begin = Exchange(self.network, self._ahead if ahead else None, timeline), time.perf_counter()
        jobs = {
            rank: self._dealing(exchange, nodes, rank, batch_id, batch, material[rank], timeline) for rank in _DEALING
        }
        found = crew.together(exchange, jobs, in_turn=ahead or self._little(batch))
        seconds = time.perf_counter() - begin
        if timeline is not None:
            timeline.phases["offline"] = begin, begin + seconds
        return Dealt(self._nonce, batch_id, batch, material, exchange.meter, seconds, found)

    def infer(
        self, dealt: Dealt, inputs: Mapping[str, Tensor], *, trace: bool = False
    ) -> tuple[Tensor, Run, Trace | None]:
        """Online: one inference on ring-encoded inputs (by label); consumes `dealt`."""
        return self._run(lambda crew: self._infer(crew, dealt, inputs, trace=trace))

    def request(
        self, inputs: Mapping[str, Tensor], *, trace: bool = False, timeline: Timeline | None = None
    ) -> tuple[Tensor, Run, Trace | None]:
        """`deal` and `infer` in one go. `timeline` is told what each party does when."""

        def work(crew: Crew) -> tuple[Tensor, Run, Trace | None]:
            dealt = self._deal(crew, len(next(iter(inputs.values()))), timeline=timeline)
            return self._infer(crew, dealt, inputs, trace=trace, timeline=timeline)

        return self._run(work)

    def _material(self, dealt: Dealt) -> dict[int, dict[str, list[Material]]]:
        """Take what was dealt: nobody else can, whatever copies there are of `dealt`."""
        require_process(self.pid, "this session")
        if dealt.session != self._nonce:
            raise ProtocolError("this material was dealt in another session")
        with self._lock:
            if dealt.batch_id not in self._unused:
                raise ProtocolError("this material was used before; deal again")
            self._unused.remove(dealt.batch_id)
            material, dealt.material = dealt.material, {}
        return material

    def _infer(
        self,
        crew: Crew,
        dealt: Dealt,
        inputs: Mapping[str, Tensor],
        *,
        trace: bool = False,
        timeline: Timeline | None = None,
    ) -> tuple[Tensor, Run, Trace | None]:
        material = self._material(dealt)
        offsets: dict[str, list[Tensor]] = {}
        values: dict[int, Values] = {rank: dict(self._shared[rank]) for rank in _EVERYONE}
        exchange, begin = Exchange(self.network, timeline=timeline), time.perf_counter()
        jobs = {}
        for rank in (*PARTIES, CLIENT):
            seat = self._seat(
                exchange, rank, dealt.batch_id, dealt.batch, material[rank], inputs, offsets if trace else None
            )
            jobs[rank] = self._job(exchange, rank, self.plan.schedule, seat, values[rank], keep=trace, profile=timeline)
        crew.play(exchange, jobs, in_turn=self._little(dealt.batch))
        run = _measured(dealt, exchange.meter, time.perf_counter() - begin)
        if timeline is not None:
            timeline.phases["online"] = begin, begin + run.online_seconds
        answer = values[CLIENT][self.plan.result]
        return answer, run, Trace(self._opened(values), offsets) if trace else None

    def stream(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, Run]]:
        """`deal` and `infer` for one batch after another, each dealt while the one before it is online.

        Where there is little to do and no network to wait for, each is dealt just before it goes online instead.
        Reads one batch ahead of the answers and keeps material for no more than two. The dealing parties take turns in
        one thread, beside those online, and have links of their own: under an emulated network, dealing takes nothing
        away from the messages online.
        """
        waiting: list[tuple[Mapping[str, Tensor], Callable[[], Dealt]]] = []
        source = iter(batches)
        with self._crew() as ahead:
            while True:
                try:
                    inputs = next(source)
                    waiting.append((inputs, self._dealt_ahead(ahead, len(next(iter(inputs.values()))))))
                except Exception as end:
                    # What came before is still answered, also where the next one is unfit.
                    for item in waiting:
                        yield self._finished(*item)
                    if isinstance(end, StopIteration):
                        return
                    raise
                if len(waiting) == 2:
                    yield self._finished(*waiting.pop(0))

    def _dealt_ahead(self, ahead: Crew, batch: int) -> Callable[[], Dealt]:
        require_process(self.pid, "this session")
        if self.network.model is None and self._little(batch):
            return partial(self.deal, batch)
        return ahead.submit(lambda: self._deal(ahead, batch, ahead=True)).result

    def _finished(self, inputs: Mapping[str, Tensor], dealt: Callable[[], Dealt]) -> tuple[Tensor, Run]:
        require_process(self.pid, "this session")
        answer, run, _ = self.infer(dealt(), inputs)
        return answer, run

    def _opened(self, values: Mapping[int, Values]) -> dict[str, Tensor]:
        out = {}
        for node in self.plan.nodes:
            if node.type.kind == "secret":
                out[node.name] = values[P0][node.name] + values[P1][node.name]
            elif node.type.kind == "masked":
                mask = values[P2][node.name]
                out[node.name] = values[P0][node.name] + (mask() if callable(mask) else mask)
            else:
                out[node.name] = values[CLIENT][node.name]
        return out

    def _little(self, batch: int) -> bool:
        """Whether the parties take turns in one thread."""
        if batch not in self._turns:
            self._turns[batch] = self.plan.cost(batch=batch).little
        return self._turns[batch]

    def _job(
        self,
        exchange: Exchange,
        rank: int,
        schedule: Schedule,
        seat: Callable[[Node], Party],
        values: Values,
        *,
        keep: bool = True,
        profile: Profile | None = None,
    ) -> Callable[[], Iterator[Awaited]]:
        found = self.profile if profile is None else profile
        return lambda: steps(self.plan, schedule, exchange.channel(rank), seat, values, keep=keep, profile=found)

    def _seat(
        self,
        exchange: Exchange,
        rank: int,
        batch_id: int,
        batch: int,
        material: Mapping[str, list[Material]] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        offsets: dict[str, list[Tensor]] | None = None,
    ) -> Callable[[Node], Party]:
        channel, streams = exchange.channel(rank), self._streams[rank]
        shared, sized = self._shared[rank], self.plan.at(batch)

        def seat(node: Node) -> Party:
            party = Party(rank, channel, streams, sized[node.name], batch_id, shared)
            if material is not None:
                party.material = material.get(node.name, [])
            if isinstance(node.op, Weight) and rank == OWNER:
                party.value = self._weights[node.op.label]
            if isinstance(node.op, Input) and rank == CLIENT and inputs is not None:
                party.value = inputs[node.op.label]
            if offsets is not None and rank == P0:
                party.offsets = offsets.setdefault(node.name, [])
            return party

        return seat


def _mask_again(seat: Callable[[Node], Party], node: Node) -> Tensor:
    """The mask that P2 drew for a weight."""
    party = seat(node)
    found: Tensor = party.sized.parts[0].deal(party)["b"]
    party.close()
    return found


def _measured(dealt: Dealt, online: Meter, seconds: float) -> Run:
    return Run(
        dealt.batch,
        online.rounds,
        online.bytes,
        dealt.meter.bytes,
        seconds,
        dealt.seconds,
        online.traffic,
        dealt.meter.traffic,
    )
