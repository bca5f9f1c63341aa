"""Channels: the only place that moves bytes between parties, and the only place that counts them."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tacit.ir.cost import ROLES, Link
from tacit.ir.errors import ProtocolError
from tacit.ir.op import Spec
from tacit.runtime.timeline import Timeline

Tensor = torch.Tensor
_Sent = tuple[int, float, Sequence[Tensor]]  # depth, arrival, message


@dataclass(frozen=True)
class LinkModel:
    """An emulated network: every directed link has this latency (one way) and this rate."""

    latency_seconds: float
    bytes_per_second: float


# Round trips of 0.2 ms and 40 ms; 5 Gbit/s and 350 Mbit/s.
NETWORKS: dict[str, LinkModel | None] = {
    "virtual": None,
    "lan": LinkModel(0.1e-3, 5e9 / 8),
    "wan": LinkModel(20e-3, 350e6 / 8),
}


class Meter:
    """Bytes by link and the depth of the longest chain of messages: what one phase really took.

    A message's depth is one more than that of the deepest message its sender had received before.
    The largest depth is the number of rounds, whatever the schedule claims.
    """

    def __init__(self) -> None:
        self.traffic: Counter[Link] = Counter()
        self.rounds = 0
        self._depth: Counter[int] = Counter()
        self._lock = threading.Lock()

    def sent(self, source: int, target: int, size: int) -> int:
        """Book a message; returns its depth."""
        with self._lock:
            self.traffic[source, target] += size
            depth = self._depth[source] + 1
            self.rounds = max(self.rounds, depth)
            return depth

    def received(self, target: int, depth: int) -> None:
        with self._lock:
            self._depth[target] = max(self._depth[target], depth)

    @property
    def bytes(self) -> int:
        return sum(self.traffic.values())


class Network:
    """What all runs of a session have in common: the links that are emulated, and where tests record messages."""

    def __init__(self, model: LinkModel | None = None) -> None:
        self.model = model
        self.transcript: list[tuple[Link, tuple[Tensor, ...]]] | None = None
        self._free_at: dict[Link, float] = {}  # when each emulated link has sent what it was given
        self._lock = threading.Lock()

    def arrival(self, link: Link, size: int) -> float:
        """When a message sent now arrives: after those before it on its link, its own bytes, and the latency."""
        if self.model is None:
            return 0.0
        with self._lock:
            sent = max(time.perf_counter(), self._free_at.get(link, 0.0)) + size / self.model.bytes_per_second
            self._free_at[link] = sent
        return sent + self.model.latency_seconds

    def record(self, link: Link, message: Sequence[Tensor]) -> None:
        if self.transcript is not None:
            self.transcript.append((link, tuple(t.clone() for t in message)))


class Exchange:
    """The messages of one phase of one run between parties of a process: no other run's can get among them."""

    def __init__(self, network: Network, ahead: Network | None = None, timeline: Timeline | None = None) -> None:
        """`ahead`: what is dealt ahead has emulated links of its own. `timeline`: a trace collects sends and waits."""
        self.timeline = timeline
        self.meter = Meter()
        self._network = network
        self._links = ahead or network
        self._queues: dict[Link, queue.SimpleQueue[_Sent | None]] = {
            (a, b): queue.SimpleQueue() for a in range(len(ROLES)) for b in range(len(ROLES)) if a != b
        }
        self._failed: str | None = None

    def fail(self, reason: str) -> None:
        """Wake every party that waits, and stop those that send: one of them cannot go on."""
        self._failed = self._failed or reason
        for waiting in self._queues.values():
            waiting.put(None)

    def channel(self, rank: int) -> Channel:
        return Channel(self, rank)

    def put(self, source: int, target: int, message: Sequence[Tensor]) -> None:
        self.require_going()
        begin, size = time.perf_counter(), sum([t.nbytes for t in message])
        depth = self.meter.sent(source, target, size)
        self._network.record((source, target), message)
        self._queues[source, target].put((depth, self._links.arrival((source, target), size), message))
        if self.timeline is not None:
            self.timeline.message("send", (source, target), size, begin)

    def get(self, source: int, target: int) -> Sequence[Tensor]:
        begin = time.perf_counter()
        sent = self._queues[source, target].get()
        self.require_going()
        assert sent is not None
        depth, arrival, message = sent
        if arrival:
            time.sleep(max(0.0, arrival - time.perf_counter()))
        self.meter.received(target, depth)
        if self.timeline is not None:
            self.timeline.message("wait", (source, target), sum(t.nbytes for t in message), begin)
        return message

    def require_going(self) -> None:
        """Raises ProtocolError once `fail` was called."""
        if self._failed is not None:
            raise ProtocolError(self._failed)


class Channel:
    """One party's end: `send` and `recv` of tensors whose number, shapes and dtypes the plan fixes."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self._exchange = exchange
        self.rank = rank

    def send(self, target: int, message: Sequence[Tensor]) -> None:
        self._exchange.put(self.rank, target, message)

    def recv(self, source: int, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
        """The next message of `source`; raises ProtocolError where it is not what the plan provides for."""
        message = self._exchange.get(source, self.rank)
        fits = len(message) == len(specs)
        for t, spec in zip(message, specs, strict=False):
            fits = fits and t.dtype is spec.dtype and t.shape == spec.shape
        if not fits:
            found = [Spec(tuple(t.shape), t.dtype) for t in message]
            raise ProtocolError(f"{ROLES[source]} sent {found} to {ROLES[self.rank]}, which expects {list(specs)}")
        return tuple(message)
