"""A flow: one request, deal or opening at one participant, and the channel that its party program runs over."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from tacit.ir.cost import ROLES
from tacit.ir.cost import Link as Edge
from tacit.ir.errors import ProtocolError, TacitError
from tacit.ir.op import Spec
from tacit.ir.plan import Plan
from tacit.runtime.channel import Channel, Meter
from tacit.runtime.net.causes import Cause, Code, Stopped, late
from tacit.runtime.net.frames import FrameError, Phase, spec_bytes, tensors
from tacit.runtime.party import Awaited

Tensor = torch.Tensor
Payload = NDArray[np.uint8]
Budget = dict[tuple[Phase, int], int]
Book = dict[Phase, Counter[Edge]]
_HELD = 1 << 20  # bytes of offline messages that are joined at most
_EMPTY = np.empty(0, np.uint8)
Send = Callable[[int, Phase, int, Sequence[Tensor]], None]


def traffic(plan: Plan, batch: int, *, session: bool = False, only: Callable[[str], bool] = lambda op: True) -> Book:
    """The bytes that the plan provides for, by phase and link: for one batch, or once per session."""
    out: Book = {phase: Counter() for phase in Phase}
    for row in plan.cost(batch=batch).per_op:
        if row.session == session and only(row.op):
            out[Phase.ONLINE] += row.cost.online
            out[Phase.OFFLINE] += row.cost.offline
    return out


def books(plan: Plan) -> Callable[[int], Book]:
    """`traffic` of one batch, the last few sizes remembered."""
    return lru_cache(64)(partial(traffic, plan))


def budget(book: Book, rank: int) -> Budget:
    """What of it arrives at one participant, by phase and sender."""
    return {(phase, a): size for phase, links in book.items() for (a, b), size in links.items() if b == rank}


class Flow:
    """What has arrived for one request. Memory is bounded: a sender cannot go beyond what the plan provides for."""

    def __init__(self, request: int, batch: int, allowed: Budget, deadline: float, seconds: float) -> None:
        self.request = request
        self.batch = batch
        self.deadline = deadline
        self.seconds = seconds
        self.finished = False
        self._left = dict(allowed)
        self._arrived: dict[tuple[Phase, int], deque[tuple[int, Payload]]] = {}
        self._wanted: dict[tuple[Phase, int], int] = {}
        self._failure: TacitError | None = None
        self._waiter: tuple[Phase, list[int], Callable[[], None]] | None = None
        self._changed = threading.Condition()

    def room(self, source: int, phase: Phase, size: int) -> Payload:
        """Memory for a message that has been announced; raises FrameError where the plan has no place for it."""
        key = (phase, source)
        with self._changed:
            wanted = None if self._arrived.get(key) else self._wanted.get(key)
            left = self._left.get(key, 0)
            if size > left or size == 0:
                raise FrameError(f"a message of {size} bytes where the plan provides for {left} more")
            if wanted is not None and size != wanted:
                raise FrameError(f"a message of {size} bytes where the plan provides for {wanted}")
            self._left[key] = left - size
        return np.empty(size, np.uint8)

    def put(self, source: int, phase: Phase, depth: int, payload: Payload) -> None:
        with self._changed:
            if not self.finished:
                self._arrived.setdefault((phase, source), deque()).append((depth, payload))
            self._changed.notify_all()
            resume = self._due()
        if resume is not None:
            resume()

    def take(self, source: int, phase: Phase, size: int | None = None) -> tuple[int, Payload]:
        """The next message and its depth; raises PartyError once it is too late, or as soon as the flow has failed."""
        key = (phase, source)
        with self._changed:
            if size is not None:
                self._wanted[key] = size
            while not (queue := self._arrived.get(key)):
                if self._failure is not None:
                    raise self._failure
                if (left := self.deadline - time.monotonic()) <= 0:
                    raise late(source, self.seconds)
                self._changed.wait(left)
            self._wanted.pop(key, None)
            depth, payload = queue.popleft()
        if size is not None and payload.size != size:
            raise ProtocolError(f"{ROLES[source]} sent {payload.size} bytes where the plan provides for {size}")
        return depth, payload

    def there(self, phase: Phase, awaited: Awaited, resume: Callable[[], None]) -> bool:
        """Whether one message of each sender is there, or the flow has failed: `take` does not wait.

        If not, `resume` is called once it is so, by the thread that brings the last of them.
        """
        with self._changed:
            sizes = {source: size for source, specs in awaited.items() if (size := spec_bytes(specs))}
            for source, size in sizes.items():
                self._wanted[phase, source] = size
            self._waiter = phase, list(sizes), resume
            return self._due() is not None

    def _due(self) -> Callable[[], None] | None:
        """Called with the lock: who goes on now."""
        if self._waiter is None:
            return None
        phase, sources, resume = self._waiter
        if self._failure is None and not all(self._arrived.get((phase, source)) for source in sources):
            return None
        self._waiter = None
        return resume

    def late(self) -> None:
        """The deadline has passed: fail, naming a party that is waited for."""
        with self._changed:
            phase, sources, _ = self._waiter or (Phase.ONLINE, [], None)
            missing = [s for s in sources if not self._arrived.get((phase, s))]
        own = Stopped(Cause(Code.LATE), f"this party did not answer within {self.seconds:g} s")
        self.fail(late(missing[0], self.seconds) if missing else own)

    def fail(self, error: TacitError) -> None:
        """Wake whoever waits; the first reason counts."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
            resume = self._due()
        if resume is not None:
            resume()

    @property
    def failure(self) -> TacitError | None:
        return self._failure

    def finish(self) -> None:
        """Let go of what has arrived and was not taken."""
        with self._changed:
            self.finished = True
            self._arrived.clear()


class FlowChannel(Channel):
    """The channel of one phase of a flow: the same `send` and `recv` as in memory, over links."""

    def __init__(self, flow: Flow, rank: int, phase: Phase, send: Send) -> None:
        self.rank = rank
        self.meter = Meter()
        self.deepest = 0  # of the messages that arrived
        self._flow = flow
        self._phase = phase
        self._send = send
        self._held: dict[int, list[Tensor]] = {}  # offline, by target
        self._held_bytes = 0
        self._stream = _Stream(lambda source: flow.take(source, phase)[1])

    def send(self, target: int, message: Sequence[Tensor]) -> None:
        size = sum(t.nbytes for t in message)
        if not size:
            return
        if self._flow.failure is not None:
            raise self._flow.failure
        depth = self.meter.sent(self.rank, target, size)
        if self._phase is Phase.ONLINE:
            self._send(target, self._phase, depth, message)
            return
        self._held.setdefault(target, []).extend(message)
        self._held_bytes += size
        if self._held_bytes >= _HELD:
            self.flush()

    def flush(self) -> None:
        """Offline, many short messages go one way: they are held back, and travel joined."""
        held, self._held, self._held_bytes = self._held, {}, 0
        for target, message in held.items():
            self._send(target, self._phase, 0, message)

    def recv(self, source: int, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
        size = spec_bytes(specs)
        if not size:
            return tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)
        if self._phase is Phase.OFFLINE:
            return tensors(self._stream.read(source, size), specs)
        depth, payload = self._flow.take(source, self._phase, size)
        self.meter.received(self.rank, depth)
        self.deepest = max(self.deepest, depth)
        return tensors(payload, specs)


class _Stream:
    """Offline messages as they are joined: bytes by sender, cut where the reader wants them."""

    def __init__(self, more: Callable[[int], Payload]) -> None:
        self._more = more
        self._left: dict[int, Payload] = {}

    def read(self, source: int, size: int) -> Payload:
        found = self._left.get(source, _EMPTY)
        while found.size < size:
            more = self._more(source)
            if not more.size:
                raise ProtocolError("the stored material does not fit the plan")
            found = np.concatenate([found, more]) if found.size else more
        self._left[source] = found[size:]
        # A copy of its own where it is not aligned for the widest of elements.
        return found[:size] if found.ctypes.data % 8 == 0 else found[:size].copy()


class Replay(Channel):
    """Offline messages that were received before, in their order; what is sent goes nowhere."""

    def __init__(self, rank: int, messages: dict[int, list[Payload]]) -> None:
        self.rank = rank
        left = {source: iter(found) for source, found in messages.items()}
        self._stream = _Stream(lambda source: next(left.get(source, iter(())), _EMPTY))

    def send(self, target: int, message: Sequence[Tensor]) -> None:
        return None

    def recv(self, source: int, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
        return tensors(self._stream.read(source, spec_bytes(specs)), specs)


class Blank(Channel):
    """Every message is zeros and goes nowhere: for compiling the kernels before anybody waits for them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def send(self, target: int, message: Sequence[Tensor]) -> None:
        return None

    def recv(self, source: int, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs)
