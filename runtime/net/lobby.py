"""Clients at P0 and P1: what each has asked for and not yet been answered.

A client draws a number for each request and tells it to P0 and P1, to P1 with its share. P1 tells P0 when it has the
share; P0 names client and number when it starts the request, and P1 joins them with the share that the same certificate
brought under the same number. Both send their shares of the answer down the connection on which the request came, so
that no other client can get it. P2 hears of no client and of no number.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

from tacit.ir.cost import CLIENT
from tacit.ir.errors import PartyError, RefusedError
from tacit.runtime.net.causes import Cause, Code, Stopped
from tacit.runtime.net.deployment import Limits
from tacit.runtime.net.flow import Flow, Payload
from tacit.runtime.net.frames import FrameError, Phase
from tacit.runtime.net.link import Link

_DECLINED = 1024
Key = tuple[str, int]


@dataclass
class Visit:
    """A client's request: at P0 what it asked for, at P1 what it brought."""

    client: str
    number: int
    link: Link
    batch: int
    deadline: float
    size: int = 0  # bytes of the share: what the visit holds at P1, from its announcement to its end
    expected: int = -1  # of them, as long as they are still to come
    reading: bool = False
    payload: Payload | None = None
    flow: Flow | None = None
    request: int | None = None
    unwanted: Cause | None = None  # why nobody waits for it any more

    @property
    def key(self) -> Key:
        return self.client, self.number

    def tell(self, reason: str, *, refused: bool = False) -> None:
        with suppress(PartyError):
            self.link.cast("error", self.number, reason=reason, refused=refused)


class Lobby:
    """The visits at one party, by client and number."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._visits: dict[Key, Visit] = {}
        self._declined: OrderedDict[Key, int] = OrderedDict()
        self._lock = threading.Lock()

    def arrive(self, link: Link, number: int, batch: int, share_bytes: int, seconds: float) -> Visit:
        """A client announces a request, at P1 with the bytes of its share; raises RefusedError beyond its quota."""
        key, name = (link.peer.member.sha256, number), link.peer.name
        with self._lock:
            if key in self._visits:
                raise RefusedError(f"request {number} is under way already")
            mine = [v for v in self._visits.values() if v.client == key[0]]
            if len(mine) >= self._limits.per_client:
                raise RefusedError(f"client {name} has {self._limits.per_client} requests under way, its quota")
            held, most = sum(v.size for v in mine), self._limits.client_bytes
            if held + share_bytes > most:
                has = f"client {name} has shares of {held} bytes under way"
                raise RefusedError(f"{has}, {share_bytes} more are beyond client_bytes, {most}")
            visit = Visit(*key, link, batch, time.monotonic() + seconds, share_bytes, share_bytes or -1)
            self._visits[key] = visit
            return visit

    def claim(self, client: str, number: int, batch: int, flow: Flow) -> Visit:
        """P0 starts a request whose share it was told of; raises Stopped where that is not here (any more)."""
        with self._lock:
            visit = self._visits.get((client, number))
            if visit is None or (payload := visit.payload) is None:
                raise Stopped(Cause(Code.GONE), "the client took its share back, or is gone")
            if visit.batch != batch or visit.flow is not None:
                raise Stopped(Cause(Code.MIXED), "the client told P0 and P1 different things")
            visit.flow, visit.request, visit.payload = flow, flow.request, None
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
            visit.expected, visit.reading = -1, True
            return visit

    def bring(self, visit: Visit, payload: Payload) -> None:
        """The share is here."""
        with self._lock:
            visit.payload, visit.reading = payload, False

    def held(self) -> list[Visit]:
        """The visits whose share is here and that P0 has not started."""
        with self._lock:
            return [v for v in self._visits.values() if v.payload is not None]

    def leave(self, visit: Visit) -> None:
        if visit.expected >= 0:
            self.decline(visit.link, visit.number, visit.expected)
        with self._lock:
            if self._visits.get(visit.key) is visit:
                del self._visits[visit.key]
            visit.payload = None

    def find(self, link: Link, number: int) -> Visit | None:
        with self._lock:
            visit = self._visits.get((link.peer.member.sha256, number))
            return visit if visit is not None and visit.link is link else None

    def of(self, link: Link) -> list[Visit]:
        with self._lock:
            return [v for v in self._visits.values() if v.link is link]

    def expired(self) -> list[Visit]:
        """Visits that nobody works on and whose time is up. A share that is being read counts until its frame's end."""
        now = time.monotonic()
        with self._lock:
            return [v for v in self._visits.values() if v.deadline < now and v.flow is None and not v.reading]

    def __len__(self) -> int:
        return len(self._visits)
