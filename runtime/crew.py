"""The parties of one process at work: a thread for each, and the links between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import ProtocolError
from tacit.runtime.channel import LinkModel, Network

PARTIES = (P0, P1, P2)


class Crew:
    """Three threads with a core each, and a network; the roles outside act in the caller's thread."""

    def __init__(self, name: str, link: LinkModel | None = None) -> None:
        self.network = Network(link)
        self._pool = ThreadPoolExecutor(
            len(PARTIES), thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,)
        )
        self._broken: str | None = None

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def taking_turns(self, jobs: Mapping[int, Iterator[Any]]) -> None:
        """Run the jobs of all parties in the caller's thread, each as far as its next yield and then the next one's."""
        self._usable()
        ended = dict.fromkeys(jobs, time.perf_counter())
        with _one_core():
            while jobs:
                jobs = {rank: job for rank, job in jobs.items() if self._turn(rank, job, ended)}

    def _turn(self, rank: int, job: Iterator[Any], ended: dict[int, float]) -> bool:
        """One turn of a party; whether it wants another. `ended`: when each had its last one."""
        if self.network.timeline is not None:
            self.network.timeline.others(rank, ended[rank])
        try:
            return next(job, self) is not self
        except BaseException:
            self._broken = f"{ROLES[rank]} failed"
            raise
        finally:
            ended[rank] = time.perf_counter()

    def _usable(self) -> None:
        if self._broken:
            raise ProtocolError(f"this session ended with an error before ({self._broken}); open a new one")

    def together(self, jobs: Mapping[int, Callable[[], Any]], *, in_turn: bool = False) -> dict[int, Any]:
        """Run the jobs of all parties at once, or in turn; the first failure wakes and ends the others.

        Raises that failure, and ProtocolError whenever it is called after one.
        """
        self._usable()
        failures: list[tuple[int, BaseException]] = []
        lock = threading.Lock()

        def guarded(rank: int) -> Any:
            try:
                return jobs[rank]()
            except BaseException as error:
                with lock:
                    failures.append((rank, error))
                self.network.fail(f"{ROLES[rank]} failed")
                return None

        threads = () if in_turn else PARTIES
        pending = {rank: self._pool.submit(guarded, rank) for rank in jobs if rank in threads}
        with _one_core():
            results = {rank: guarded(rank) for rank in jobs if rank not in threads}
        results |= {rank: future.result() for rank, future in pending.items()}
        if failures:
            rank, error = failures[0]
            self._broken = f"{ROLES[rank]} failed"
            raise error
        return results


@contextmanager
def _one_core() -> Iterator[None]:
    """The roles that act in the caller's thread have one core too, whatever torch was told to use there.

    torch's own threads spin while they wait for one another: beside the parties they cost milliseconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
