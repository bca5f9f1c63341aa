"""The parties of one run in one process: a thread for each, or turns in one where there is little to do."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import ProtocolError
from tacit.runtime.channel import Exchange
from tacit.runtime.cores import take_one_core
from tacit.runtime.leaving import in_call

PARTIES = (P0, P1, P2)
_ABANDONED = "nobody waits for this run any more"
_T = TypeVar("_T")


class Crew:
    """A thread with a core for each party, for one run at a time; the roles outside act in the caller's thread.

    The threads are daemons, started when they are first needed: the interpreter does not wait for them when it ends,
    and until then they serve whoever still calls, as exit handlers do. Where the system gives no threads any more,
    there is a crew without, whose parties take turns.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] | None = None
        self._exchange: Exchange | None = None
        self._abandoned = False
        self._lock = threading.Lock()
        weakref.finalize(self, _dismiss, self._jobs).atexit = False

    def close(self) -> None:
        """The threads end as soon as they have done what they are at."""
        _dismiss(self._jobs)

    @property
    def has_threads(self) -> bool:
        if self._threads is None:
            try:
                self._threads = [_started(self._jobs, ROLES[rank]) for rank in PARTIES]
            except RuntimeError:
                self._threads = []
                _dismiss(self._jobs)  # those that did start
        return bool(self._threads)

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Have a thread do it; without threads it is done here and now."""
        future: Future[_T] = Future()
        job = partial(_fulfil, future, work)
        if self.has_threads:
            self._jobs.put(job)
        else:
            job()
        return future

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

    def play(
        self, exchange: Exchange, programs: Mapping[int, Callable[[], Iterator[Any]]], *, in_turn: bool = False
    ) -> None:
        """Run the programs of all parties to their end: each in its thread, or by turns in this one."""
        if in_turn or not self.has_threads:
            self._take_turns(exchange, {rank: program() for rank, program in programs.items()})
        else:
            self.together(exchange, {rank: partial(_exhaust, program) for rank, program in programs.items()})

    def _take_turns(self, exchange: Exchange, jobs: Mapping[int, Iterator[Any]]) -> None:
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

        In turn, a job is run to its end before the next one begins: none may wait for a later one.
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
            except BaseException:
                exchange.fail(_ABANDONED)
                raise

        threads = PARTIES if not in_turn and self.has_threads else ()
        pending = {rank: self.submit(lambda rank=rank: guarded(rank)) for rank in jobs if rank in threads}  # type: ignore[misc]
        results = {rank: guarded(rank) for rank in jobs if rank not in threads}
        results |= {rank: future.result() for rank, future in pending.items()}
        if failures:
            raise failures[0]
        return results


def _dismiss(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    for _ in PARTIES:
        jobs.put(None)


def _started(jobs: queue.SimpleQueue[Callable[[], None] | None], name: str) -> threading.Thread:
    thread = threading.Thread(target=_serve, args=(jobs,), name=f"party {name}", daemon=True)
    thread.start()
    return thread


def _serve(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """A party's thread; it knows the queue alone, so that a crew that is dropped ends its threads."""
    take_one_core()
    while (job := jobs.get()) is not None:
        with in_call(caller=False):
            job()
        del job  # what it was about is not kept until the next one


def _exhaust(program: Callable[[], Iterator[Any]]) -> None:
    for _ in program():
        pass


def _fulfil(future: Future[_T], work: Callable[[], _T]) -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def require_process(pid: int, what: str) -> None:
    """Raises ProtocolError in another process than the one that made it: a fork copies keys, counters and material."""
    if os.getpid() != pid:
        raise ProtocolError(f"{what} belongs to the process that opened it: in two, masks would be used twice")
