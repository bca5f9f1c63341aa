"""A session: three virtual parties and the two roles outside, in one process.

The parties are threads over an in-memory channel; client and owner act in the caller's thread, over the
same channel. A session owns all its state: keys, shares of the weights, opened masks, undealt batches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2, ROLES, Link, Randomness
from tacit.ir.errors import ProtocolError
from tacit.ir.op import Material
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan, Schedule
from tacit.runtime import prf
from tacit.runtime.channel import LinkModel, Meter, Network
from tacit.runtime.crew import PARTIES, Crew
from tacit.runtime.memory import keep_freed_buffers
from tacit.runtime.party import Awaited, Inventory, Party, Values, deal, steps
from tacit.runtime.timeline import Profile

Tensor = torch.Tensor
_EVERYONE = tuple(range(len(ROLES)))
_MAX_BATCHES = 1 << 32


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
    """The material of one inference: used once, then gone."""

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
    """Open once, then deal and infer as often as wanted; not for use by several threads at once."""

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], *, keys: prf.Keys | None = None, link: LinkModel | None = None
    ) -> None:
        keep_freed_buffers()
        self.plan = plan.verify()
        self._link = link
        self._crew = Crew("party", link)
        self._turns: dict[int, bool] = {}  # by batch
        self.profile: Profile | None = None  # benchmarks collect seconds by phase and line here
        keys = keys or prf.fresh_keys()
        self._streams = {rank: prf.Streams(prf.keys_of(rank, keys)) for rank in _EVERYONE}
        self._weights = weights
        self._shared: dict[int, Values] = {rank: {} for rank in _EVERYONE}
        self._next_batch = 1  # batch 0 is the session's own part
        self.weight_meter = self._open()

    @property
    def network(self) -> Network:
        return self._crew.network

    def close(self) -> None:
        self._crew.close()

    def _open(self) -> Meter:
        """Share the weights and open their masks: paid once."""
        nodes = [n for n in self.plan.nodes if n.op.session]
        material: dict[int, dict[str, list[Material]]] = {rank: {} for rank in _EVERYONE}
        meter = self.network.start_phase()
        self._crew.together({rank: self._dealing(self._crew, nodes, rank, 0, 1, material[rank]) for rank in PARTIES})
        jobs = {}
        for rank in (*PARTIES, OWNER):
            seat = self._seat(self._crew, rank, 0, 1, material[rank])
            job = self._job(rank, self.plan.session_schedule, seat, self._shared[rank])
            jobs[rank] = partial(_exhaust, job)
        self._crew.together(jobs)
        return meter

    def _dealing(
        self, crew: Crew, nodes: list[Node], rank: int, batch_id: int, batch: int, material: dict[str, list[Material]]
    ) -> Callable[[], list[Inventory]]:
        return lambda: deal(nodes, self._seat(crew, rank, batch_id, batch), material, self.profile)

    def deal(self, batch: int) -> Dealt:
        """Offline: deal exactly what one inference of `batch` elements consumes."""
        return self._deal(self._crew, batch)

    def _deal(self, crew: Crew, batch: int, *, in_turn: bool = False) -> Dealt:
        if self._next_batch >= _MAX_BATCHES:
            raise ProtocolError("this session has used up its batches; open a new one")
        batch_id, self._next_batch = self._next_batch, self._next_batch + 1
        nodes = [n for n in self.plan.nodes if not n.op.session]
        material: dict[int, dict[str, list[Material]]] = {rank: {} for rank in _EVERYONE}
        meter, begin = crew.network.start_phase(), time.perf_counter()
        # Dealing goes one way, from P2: P0 and P1 never keep it waiting, so the parties may also take turns.
        jobs = {rank: self._dealing(crew, nodes, rank, batch_id, batch, material[rank]) for rank in (P2, P0, P1)}
        found = crew.together(jobs, in_turn=in_turn or self._little(batch))
        return Dealt(batch_id, batch, material, meter, time.perf_counter() - begin, found)

    def infer(
        self, dealt: Dealt, inputs: Mapping[str, Tensor], *, trace: bool = False
    ) -> tuple[Tensor, Run, Trace | None]:
        """Online: one inference on ring-encoded inputs (by label); consumes `dealt`."""
        material, dealt.material = dealt.material, {}
        if not material:
            raise ProtocolError("this material was used before; deal again")
        offsets: dict[str, list[Tensor]] = {}
        values: dict[int, Values] = {rank: dict(self._shared[rank]) for rank in _EVERYONE}
        meter, begin = self.network.start_phase(), time.perf_counter()
        jobs = {}
        for rank in (*PARTIES, CLIENT):
            seat = self._seat(
                self._crew, rank, dealt.batch_id, dealt.batch, material[rank], inputs, offsets if trace else None
            )
            jobs[rank] = self._job(rank, self.plan.schedule, seat, values[rank], keep=trace)
        if self._little(dealt.batch):
            self._crew.taking_turns({rank: job() for rank, job in jobs.items()})
        else:
            self._crew.together({rank: partial(_exhaust, job) for rank, job in jobs.items()})
        seconds = time.perf_counter() - begin
        run = Run(
            dealt.batch,
            meter.rounds,
            meter.bytes,
            dealt.meter.bytes,
            seconds,
            dealt.seconds,
            meter.traffic,
            dealt.meter.traffic,
        )
        answer = values[CLIENT][self.plan.result]
        return answer, run, Trace(self._opened(values), offsets) if trace else None

    def stream(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, Run]]:
        """`deal` and `infer` for one batch after another, each dealt while the one before it is online.

        Where there is little to do and no network to wait for, each is dealt just before it goes online instead.
        Reads one batch ahead of the answers and keeps material for no more than two. The dealing parties take turns in
        one thread, beside those online, and have links of their own: under an emulated network, dealing takes nothing
        away from the messages online.
        """
        crew, ahead = Crew("dealing", self._link), ThreadPoolExecutor(1, thread_name_prefix="ahead")
        waiting: list[tuple[Mapping[str, Tensor], Callable[[], Dealt]]] = []
        source = iter(batches)
        try:
            while True:
                try:
                    inputs = next(source)
                    batch = len(next(iter(inputs.values())))
                    if self._link is None and self._little(batch):
                        waiting.append((inputs, partial(self.deal, batch)))
                    else:
                        waiting.append((inputs, ahead.submit(self._deal, crew, batch, in_turn=True).result))
                except BaseException as end:
                    # What came before is still answered, also where the next one is unfit.
                    for item in waiting:
                        yield self._finished(*item)
                    if isinstance(end, StopIteration):
                        return
                    raise
                if len(waiting) == 2:
                    yield self._finished(*waiting.pop(0))
        finally:
            ahead.shutdown(wait=True, cancel_futures=True)
            crew.close()

    def _finished(self, inputs: Mapping[str, Tensor], dealt: Callable[[], Dealt]) -> tuple[Tensor, Run]:
        answer, run, _ = self.infer(dealt(), inputs)
        return answer, run

    def _opened(self, values: Mapping[int, Values]) -> dict[str, Tensor]:
        out = {}
        for node in self.plan.nodes:
            if node.type.kind == "secret":
                out[node.name] = values[P0][node.name] + values[P1][node.name]
            elif node.type.kind == "masked":
                out[node.name] = values[P0][node.name] + values[P2][node.name]
            else:
                out[node.name] = values[CLIENT][node.name]
        return out

    def _little(self, batch: int) -> bool:
        """Whether the parties take turns in one thread."""
        if batch not in self._turns:
            self._turns[batch] = self.plan.cost(batch=batch).little
        return self._turns[batch]

    def _job(
        self, rank: int, schedule: Schedule, seat: Callable[[Node], Party], values: Values, *, keep: bool = True
    ) -> Callable[[], Iterator[Awaited]]:
        return lambda: steps(
            self.plan, schedule, self.network.channel(rank), seat, values, keep=keep, profile=self.profile
        )

    def _seat(
        self,
        crew: Crew,
        rank: int,
        batch_id: int,
        batch: int,
        material: Mapping[str, list[Material]] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        offsets: dict[str, list[Tensor]] | None = None,
    ) -> Callable[[Node], Party]:
        channel, streams = crew.network.channel(rank), self._streams[rank]
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


def _exhaust(job: Callable[[], Iterator[Awaited]]) -> None:
    for _ in job():
        pass
