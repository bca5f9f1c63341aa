"""Clients at P0 and P1: what each has asked for and not yet been answered.

A client draws a number for each request and tells it to P0 and P1. P0 names client and number when it starts the
request; P1 joins them with the share that the same certificate brought under the same number, and both send their
shares of the answer down the connection on which the request came, so that no other client can get it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

from tacit.ir.cost import CLIENT
from tacit.ir.errors import PartyError, RefusedError
from tacit.runtime.net.flow import Flow, Payload
from tacit.runtime.net.frames import FrameError, Phase
from tacit.runtime.net.link import Link

_DECLINED = 1024
Key = tuple[str, int]


@dataclass
class Visit:
    """A client's request. At P1 the share, and P0's word that it starts, come in either order."""

    client: str
    number: int
    deadline: float
    link: Link | None = None
    batch: int = 0
    expected: int = -1  # bytes of the share that is still to come
    payload: Payload | None = None
    flow: Flow | None = None
    request: int | None = None

    def tell(self, reason: str, *, refused: bool = False) -> None:
        if self.link is not None:
            with suppress(PartyError):
                self.link.cast("error", self.number, reason=reason, refused=refused)


class Lobby:
    """The visits at one party, by client and number."""

    def __init__(self, per_client: int) -> None:
        self._per_client = per_client
        self._visits: dict[Key, Visit] = {}
        self._declined: OrderedDict[Key, int] = OrderedDict()
        self._lock = threading.Lock()

    def arrive(self, link: Link, number: int, batch: int, share_bytes: int, seconds: float) -> Visit:
        """A client announces a request; raises RefusedError beyond its quota."""
        key = (link.peer.member.sha256, number)
        with self._lock:
            visit = self._visits.get(key)
            if visit is not None and visit.link is not None:
                raise RefusedError(f"request {number} is under way already")
            if sum(v.client == key[0] and v.link is not None for v in self._visits.values()) >= self._per_client:
                raise RefusedError(f"client {link.peer.name} has {self._per_client} requests under way, its quota")
            if visit is None:
                visit = self._visits[key] = Visit(*key, time.monotonic() + seconds)
            elif visit.batch != batch:
                raise RefusedError(f"P0 was told another batch size than {batch}")
            visit.link, visit.batch, visit.expected = link, batch, share_bytes
            return visit

    def claim(self, client: str, number: int, batch: int, flow: Flow, seconds: float) -> Visit:
        """P0 starts a request; raises PartyError where the client told P1 something else."""
        with self._lock:
            visit = self._visits.get((client, number))
            if visit is None:
                visit = self._visits[client, number] = Visit(client, number, time.monotonic() + seconds, batch=batch)
            if visit.batch != batch or visit.flow is not None:
                raise PartyError("the client told P0 and P1 different things")
            visit.flow, visit.request, payload = flow, flow.request, visit.payload
        if payload is not None:
            flow.put(CLIENT, Phase.ONLINE, 1, payload)
        return visit

    def decline(self, link: Link, number: int, share_bytes: int) -> None:
        """A refused request, whose share may be on its way: that much is let in, and dropped."""
        with self._lock:
            self._declined[link.peer.member.sha256, number] = share_bytes
            while len(self._declined) > _DECLINED:
                self._declined.popitem(last=False)

    def expect(self, link: Link, number: int, size: int) -> Visit | None:
        """Data of a client is announced; raises FrameError unless it is the share that is due."""
        with self._lock:
            if self._declined.get((link.peer.member.sha256, number)) == size:
                del self._declined[link.peer.member.sha256, number]
                return None
            visit = self._visits.get((link.peer.member.sha256, number))
            if visit is None or visit.link is not link or visit.expected < 0:
                raise FrameError(f"data for request {number}, which is not under way")
            if size != visit.expected:
                raise FrameError(f"a share of {size} bytes where the plan provides for {visit.expected}")
            visit.expected = -1
            return visit

    def bring(self, visit: Visit, payload: Payload) -> None:
        with self._lock:
            visit.payload, flow = payload, visit.flow
        if flow is not None:
            flow.put(CLIENT, Phase.ONLINE, 1, payload)

    def leave(self, visit: Visit) -> None:
        if visit.link is not None and visit.expected >= 0:
            self.decline(visit.link, visit.number, visit.expected)
        with self._lock:
            self._visits.pop((visit.client, visit.number), None)

    def find(self, link: Link, number: int) -> Visit | None:
        with self._lock:
            visit = self._visits.get((link.peer.member.sha256, number))
            return visit if visit is not None and visit.link is link else None

    def of(self, link: Link) -> list[Visit]:
        with self._lock:
            return [v for v in self._visits.values() if v.link is link]

    def expired(self) -> list[Visit]:
        """Visits that nobody works on and whose time is up."""
        now = time.monotonic()
        with self._lock:
            return [v for v in self._visits.values() if v.deadline < now and v.flow is None]

    def __len__(self) -> int:
        return len(self._visits)
