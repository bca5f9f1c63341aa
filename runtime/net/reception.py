"""Where clients are received, at P0 and P1: what they ask for, bring and take back, and P1's word to P0 of a share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from tacit.ir.cost import P0, ROLES
from tacit.ir.errors import PartyError, RefusedError
from tacit.runtime.net.causes import Cause, Code
from tacit.runtime.net.coordinator import Coordinator
from tacit.runtime.net.deployment import check_batch
from tacit.runtime.net.engine import Engine, Session, sharing_bytes
from tacit.runtime.net.flow import Payload
from tacit.runtime.net.frames import Fields, FrameError
from tacit.runtime.net.link import Link, Room
from tacit.runtime.net.lobby import Lobby, Visit
from tacit.runtime.prf import KEY_BYTES


class Reception:
    """`coordinator` at P0 alone; `state` says why there is no session, `refused` notes a refusal of whom."""

    def __init__(
        self,
        engine: Engine,
        lobby: Lobby,
        coordinator: Coordinator | None,
        state: Callable[[], str],
        refused: Callable[[str, str, str], None],
    ) -> None:
        self._engine = engine
        self._lobby = lobby
        self._coordinator = coordinator
        self._state = state
        self._refused = refused

    def cast(self, link: Link, what: str, number: int, fields: Fields) -> None:
        if what == "cancel":
            if (visit := self._lobby.find(link, number)) is not None:
                self._forget(visit, Cause(Code.CANCELLED))
            return
        if (what == "request") != (self._coordinator is not None):
            raise FrameError(f"'{what}', which is not for {ROLES[self._engine.rank]}")
        batch = fields.integer("batch", 1, 1 << 31)
        seconds = min(fields.number("seconds", 0.0, 1e6), self._engine.limits.request_seconds)
        session = self._engine.session
        try:
            check_batch(batch, self._engine.limits)
            if session is None:
                raise RefusedError(f"{ROLES[self._engine.rank]} cannot serve now: {self._state()}")
            if self._coordinator is None:
                self._expect(link, session, number, batch, seconds)
            else:
                self._ask(self._coordinator, link, number, batch, fields.hexadecimal("seed", KEY_BYTES), seconds)
        except RefusedError as error:
            self._refused("request", str(error), link.peer.name)
            link.cast("error", number, reason=str(error), refused=True)

    def _ask(self, coordinator: Coordinator, link: Link, number: int, batch: int, seed: bytes, seconds: float) -> None:
        """P0: a request, whose share is on its way to P1."""
        visit = self._lobby.arrive(link, number, batch, 0, seconds)
        try:
            coordinator.admit(visit, batch, seed, seconds)
        except RefusedError:
            self._lobby.leave(visit)
            raise

    def _expect(self, link: Link, session: Session, number: int, batch: int, seconds: float) -> None:
        """P1: a share is announced."""
        size = sharing_bytes(session, batch)
        try:
            self._lobby.arrive(link, number, batch, size, seconds + 5)
        except RefusedError:
            self._lobby.decline(link, number, size)  # it is on its way already
            raise

    def room(self, link: Link, number: int, size: int) -> Room:
        """Memory for a share that is due, and P1's word once it is there."""
        if (visit := self._lobby.expect(link, number, size)) is None:
            return None
        return np.empty(size, np.uint8), lambda content: self._bring(visit, content)

    def _bring(self, visit: Visit, content: Payload) -> None:
        """P1 has a share: only now may P0 start the request."""
        self._lobby.bring(visit, content)
        self._say_shared(visit)

    def _say_shared(self, visit: Visit) -> None:
        if (leader := self._engine.links.get(P0)) is not None:
            with suppress(PartyError):
                leader.cast("shared", client=visit.client, number=visit.number, batch=visit.batch)

    def say_again(self) -> None:
        """P1 has a new link to P0, which believes no word of an earlier one."""
        for visit in self._lobby.held():
            self._say_shared(visit)

    def _forget(self, visit: Visit, cause: Cause) -> None:
        """The client no longer wants it, or is gone."""
        if self._coordinator is not None:
            self._coordinator.cancel(visit, cause)
        elif visit.request is not None:
            self._engine.stop(visit.request, cause)
        else:
            self._lobby.leave(visit)

    def left(self, link: Link) -> None:
        """A client's connection has ended."""
        for visit in self._lobby.of(link):
            self._forget(visit, Cause(Code.GONE))

    def expire(self) -> None:
        """What nobody came back for."""
        for visit in self._lobby.expired():
            if self._coordinator is not None:
                self._coordinator.expire(visit)
            else:
                self._lobby.leave(visit)
