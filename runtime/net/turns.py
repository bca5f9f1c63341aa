"""Who is next, and how much is too much: P0's bounds on what clients may ask for."""

from __future__ import annotations

import time
from collections import OrderedDict, deque

from tacit.ir.errors import RefusedError
from tacit.runtime.net.engine import Job
from tacit.runtime.net.lobby import Visit


class Turns:
    """Who is next: one queue for each client, served in turn, bounded in all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
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
        """The oldest request of the client that has waited longest for a turn."""
        if not self._queues:
            return None
        client, waiting = self._queues.popitem(last=False)
        job = waiting.popleft()
        self._count -= 1
        if waiting:
            self._queues[client] = waiting
        return job

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
