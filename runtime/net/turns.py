"""Who is next, and how much is too much: P0's bounds on what clients may ask for.

A request whose share is not at P1 yet waits outside: it takes no place in the queue, no slot, and nothing of the store.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque

from tacit.ir.errors import RefusedError
from tacit.runtime.net.engine import Job
from tacit.runtime.net.link import Link
from tacit.runtime.net.lobby import Key, Visit


class Shares:
    """Requests and P1's word that their shares have come, in either order."""

    def __init__(self, per_client: int) -> None:
        self._per_client = per_client
        self._waiting: dict[Key, Job] = {}
        # Words that came first, by client: batch, and the link that brought it. P1 says all again on a new link.
        self._early: dict[str, OrderedDict[int, tuple[int, Link]]] = {}

    def wait(self, key: Key, job: Job, link: Link | None) -> int | None:
        """A client asks: the batch of its share if P1 has it, on the link of now; otherwise the request waits."""
        client, number = key
        words = self._early.get(client, OrderedDict())
        batch, source = words.pop(number, (0, None))
        if not words:
            self._early.pop(client, None)
        if source is not None and source is link:
            return batch
        self._waiting[key] = job
        return None

    def came(self, key: Key, batch: int, link: Link) -> Job | None:
        """P1 has a share: the request that waits for it, if that is here already."""
        if (job := self._waiting.pop(key, None)) is not None:
            return job
        client, number = key
        words = self._early.setdefault(client, OrderedDict())
        words[number] = batch, link
        while len(words) > self._per_client:  # P1 holds no more of one client: older ones are stale
            words.popitem(last=False)
        return None

    def remove(self, visit: Visit) -> bool:
        return self._waiting.pop(visit.key, None) is not None

    def clear(self) -> list[Job]:
        """Let go of all that wait."""
        jobs, self._waiting = list(self._waiting.values()), {}
        return jobs

    def __len__(self) -> int:
        return len(self._waiting)


class Turns:
    """Who is next: one queue for each client, served in turn, bounded in all; and who has the slots."""

    def __init__(self, limit: int, most: int) -> None:
        """`limit`: requests that wait. `most`: slots of one client at once."""
        self._limit = limit
        self._most = most
        self._running: Counter[str] = Counter()
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, client: str, job: Job) -> None:
        """Raises RefusedError where the queue is full."""
        if self._count >= self._limit:
            raise RefusedError(f"P0 is busy: {self._count} requests are waiting; try again later")
        self._queues.setdefault(client, deque()).append(job)
        self._count += 1

    def pop(self) -> Job | None:
        """The oldest request of the client that has waited longest for a turn, and has a slot left; `done` ends it."""
        client = next((client for client in self._queues if self._running[client] < self._most), None)
        if client is None:
            return None
        waiting = self._queues.pop(client)
        job = waiting.popleft()
        self._count -= 1
        self._running[client] += 1
        if waiting:
            self._queues[client] = waiting
        return job

    def done(self, client: str) -> None:
        """One slot of that client is free again."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]

    @property
    def running(self) -> int:
        return self._running.total()

    def remove(self, visit: Visit) -> bool:
        for client, waiting in self._queues.items():
            for job in waiting:
                if job.visit is visit:
                    waiting.remove(job)
                    self._count -= 1
                    if not waiting:
                        del self._queues[client]
                    return True
        return False


class Rate:
    """How many requests each client may still send this minute: a bucket that fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left: dict[str, tuple[float, float]] = {}

    def spend(self, client: str, name: str) -> None:
        """Raises RefusedError where nothing is left."""
        if not self._per_minute:
            return
        now = time.monotonic()
        left, since = self._left.get(client, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
        if left < 1:
            raise RefusedError(f"client {name} has used up its {self._per_minute} requests a minute")
        self._left[client] = left - 1, now
