"""The parties of one run in one process: a thread for each, or turns in one where there is little to do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import ProtocolError
from tacit.runtime.channel import Exchange
from tacit.runtime.cores import take_one_core

PARTIES = (P0, P1, P2)
_ABANDONED = "nobody waits for this run any more"
_T = TypeVar("_T")


class Crew:
    """A thread with a core for each party, for one run at a time; the roles outside act in the caller's thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(len(PARTIES), thread_name_prefix="party", initializer=take_one_core)
        self._exchange: Exchange | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """The threads end as soon as they have done what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        return self._pool.submit(work)

    def abandon(self) -> None:
        """Nobody waits for the run any more: its parties stop at their next message."""
        with self._lock:
            self._abandoned = True
            if self._exchange is not None:
                self._exchange.fail(_ABANDONED)

    @property
    def usable(self) -> bool:
        return not self._abandoned

    def _begin(self, exchange: Exchange) -> None:
        with self._lock:
            self._exchange = exchange
            if self._abandoned:
                exchange.fail(_ABANDONED)

    def taking_turns(self, exchange: Exchange, jobs: Mapping[int, Iterator[Any]]) -> None:
        """Run the jobs of all parties in this thread, each as far as its next yield and then the next one's."""
        self._begin(exchange)
        ended = dict.fromkeys(jobs, time.perf_counter())
        while jobs:
            exchange.require_going()
            jobs = {rank: job for rank, job in jobs.items() if self._turn(exchange, rank, job, ended)}

    def _turn(self, exchange: Exchange, rank: int, job: Iterator[Any], ended: dict[int, float]) -> bool:
        """One turn of a party; whether it wants another. `ended`: when each had its last one."""
        if exchange.timeline is not None:
            exchange.timeline.others(rank, ended[rank])
        try:
            return next(job, self) is not self
        finally:
            ended[rank] = time.perf_counter()

    def together(
        self, exchange: Exchange, jobs: Mapping[int, Callable[[], Any]], *, in_turn: bool = False
    ) -> dict[int, Any]:
        """Run the jobs of all parties at once, those of the roles outside in this thread; or all of them in turn here.

        The first failure wakes and ends the others, and is raised. An interrupt is raised at once.
        """
        self._begin(exchange)
        failures: list[BaseException] = []

        def guarded(rank: int) -> Any:
            try:
                return jobs[rank]()
            except Exception as error:
                failures.append(error)
                exchange.fail(f"{ROLES[rank]} failed")
                return None

        threads = () if in_turn else PARTIES
        pending = {rank: self.submit(lambda rank=rank: guarded(rank)) for rank in jobs if rank in threads}  # type: ignore[misc]
        results = {rank: guarded(rank) for rank in jobs if rank not in threads}
        results |= {rank: future.result() for rank, future in pending.items()}
        if failures:
            raise failures[0]
        return results


def require_process(pid: int, what: str) -> None:
    """Raises ProtocolError in another process than the one that made it: a fork copies keys, counters and material."""
    if os.getpid() != pid:
        raise ProtocolError(f"{what} belongs to the process that opened it: in two, masks would be used twice")
