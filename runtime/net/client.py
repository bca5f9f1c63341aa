"""A client: it shares inputs with P0 and P1, and alone puts the shares of the answers together."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from tacit.ir.cost import CLIENT, P0, P1, ROLES
from tacit.ir.errors import PartyError, ProtocolError, RefusedError, TacitError
from tacit.ir.plan import Plan
from tacit.runtime.channel import NETWORKS
from tacit.runtime.forks import in_child
from tacit.runtime.net.deployment import Deployment, Identity, check_batch
from tacit.runtime.net.flow import Flow, FlowChannel, Payload, books, budget
from tacit.runtime.net.frames import PLAN_BYTES, Fields, FrameError, Header, Phase
from tacit.runtime.net.handshake import Hello, dial
from tacit.runtime.net.link import Caller, Link
from tacit.runtime.net.pushing import read_plan, text_digest
from tacit.runtime.net.seats import Seats
from tacit.runtime.net.wire import context
from tacit.runtime.party import Values, execute
from tacit.runtime.prf import KEY_BYTES

Tensor = torch.Tensor
_REMEMBERED = 256


@dataclass(frozen=True)
class Served:
    """What one request measured at the client: causal rounds of the whole plan, payload bytes it sent, seconds."""

    batch: int
    rounds: int
    sent_bytes: int
    seconds: float


class Client:
    """Connections to P0 and P1, opened when needed and again after a failure; for several threads at once."""

    def __init__(self, deployment: Deployment, identity: Identity, plan: Plan | None = None) -> None:
        """`plan` pins what the parties run; without it (and none in the deployment) their own is taken."""
        if identity.member.role != CLIENT:
            raise RefusedError(f"{identity.member.name} may not send requests: it is {ROLES[identity.member.role]}")
        self.deployment = deployment
        self._identity = identity
        self._tls = context(deployment, identity, server=False)
        self._digest = plan.digest if plan else deployment.plan
        self._take(plan)
        self._links: dict[int, Link] = {}
        self._disconnected()
        in_child(self._forked)

    def _disconnected(self) -> None:
        """The state of a client that nothing connects with anybody yet."""
        self._links = {}
        self._flows: dict[int, tuple[Flow, dict[int, Link]]] = {}
        self._gone: OrderedDict[int, tuple[Flow, dict[int, Link]]] = OrderedDict()
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._closed = threading.Event()
        self._beating = False

    def _forked(self) -> None:
        """A forked process opens connections of its own: two that write on one would use TLS keys and nonces twice."""
        for link in self._links.values():
            link.leave()
        closed = self._closed.is_set()
        self._disconnected()
        if closed:
            self._closed.set()

    def close(self) -> None:
        self._closed.set()
        links = list(self._links.values())
        for link in links:
            link.close("the client is done")
        for link in links:
            link.join(2.0)

    def _take(self, plan: Plan | None) -> None:
        self._plan = plan
        if plan is not None:
            self._book, self._seats = books(plan), Seats(plan, CLIENT, {}, {})

    @property
    def plan(self) -> Plan:
        """The plan that P0 and P1 both run; raises PartyError or RefusedError."""
        self._connected()
        assert self._plan is not None
        return self._plan

    def infer(self, inputs: Mapping[str, Tensor], seconds: float | None = None) -> tuple[Tensor, Served]:
        """One request on ring-encoded inputs (by label), answered as ring integers.

        Raises PartyError naming the party at fault, RefusedError with the reason a party gave; within `seconds`.
        """
        limit = self.deployment.limits.request_seconds
        seconds = limit if seconds is None else min(seconds, limit)
        begin = time.monotonic()
        links, plan = self._connected()
        batch = len(next(iter(inputs.values())))
        check_batch(batch, self.deployment.limits)
        # Fresh for this request: P0's share follows from it, and is no use to anybody else.
        number, seed = int.from_bytes(os.urandom(8), "big"), os.urandom(KEY_BYTES)
        flow = Flow(number, batch, budget(self._book(batch), CLIENT), begin + seconds, seconds)
        with self._lock:
            self._flows[number] = flow, links
        try:
            links[P0].cast("request", number, batch=batch, seed=seed.hex(), seconds=seconds)
            links[P1].cast("share", number, batch=batch, seconds=seconds)
            answer, served = self._run(plan, flow, links, seed, inputs)
            return answer, replace(served, seconds=time.monotonic() - begin)
        except BaseException:
            self._cancel(number, links)
            raise
        finally:
            with self._lock:
                self._gone[number] = self._flows.pop(number)
                while len(self._gone) > _REMEMBERED:
                    self._gone.popitem(last=False)
            flow.finish()

    def _run(
        self, plan: Plan, flow: Flow, links: Mapping[int, Link], seed: bytes, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Served]:
        channel = FlowChannel(
            flow,
            CLIENT,
            Phase.ONLINE,
            lambda to, phase, depth, message: links[to].send(flow.request, phase, depth, message),
        )
        values: Values = {}
        seat = self._seats.seat(channel, 0, flow.batch, brought=inputs, outside=seed)
        execute(plan, plan.schedule, channel, seat, values)
        answer: Tensor = values[plan.result]
        return answer, Served(flow.batch, max(channel.deepest, channel.meter.rounds), channel.meter.bytes, 0.0)

    @staticmethod
    def _cancel(number: int, links: Mapping[int, Link]) -> None:
        for link in links.values():
            with suppress(PartyError):
                link.cast("cancel", number)

    # --- connections ---

    def _connected(self) -> tuple[dict[int, Link], Plan]:
        with self._connecting:
            if self._closed.is_set():
                raise PartyError("this client was closed")
            if not self._beating:
                threading.Thread(target=self._beat, args=(self._closed,), name="heartbeat", daemon=True).start()
                self._beating = True
            for rank in (P0, P1):
                link = self._links.get(rank)
                if link is None or not link.open:
                    self._links[rank] = self._dial(rank)
            hellos = [self._links[rank].peer.hello for rank in (P0, P1)]
            if hellos[0].plan != hellos[1].plan or not hellos[0].plan:
                self._hang_up()
                raise RefusedError(
                    "P0 and P1 run different plans" if hellos[0].plan != hellos[1].plan else "no model was pushed yet"
                )
            if self._plan is None or self._plan.digest != hellos[0].plan:
                self._take(self._fetch(hellos[0].plan))
            assert self._plan is not None
            return dict(self._links), self._plan

    def _dial(self, rank: int) -> Link:
        hello = Hello("client", self._digest)
        wire, peer = dial(self.deployment, self._tls, self._identity.member, rank, hello)
        link = Link(wire, peer, self, self.deployment.limits, NETWORKS[self.deployment.network], dialled=True)
        link.start()
        return link

    def _fetch(self, digest: str) -> Plan:
        """The text of the plan, from P0; its digest is what P1 says too."""
        answer = self._links[P0].call("plan", self.deployment.limits.handshake_seconds)
        text = answer.text("plan", PLAN_BYTES)
        if text_digest(text) != digest:
            raise ProtocolError("P0 sent another plan than the one it announced")
        return read_plan(text, self.deployment.limits)

    def _hang_up(self) -> None:
        for link in self._links.values():
            link.close("the client calls again")
        self._links.clear()

    def _beat(self, closed: threading.Event) -> None:
        while not closed.wait(self.deployment.limits.heartbeat_seconds):
            for link in list(self._links.values()):
                if link.open:
                    link.ping()

    # --- what arrives ---

    def cast(self, link: Link, request: int, fields: Fields) -> None:
        if fields.text("what", 32) != "error":
            raise FrameError("control that nobody has asked for")
        with self._lock:
            found = self._flows.get(request)
        if found is not None and found[1].get(link.role) is link:
            reason = fields.text("reason")
            kind: type[TacitError] = RefusedError if fields.flag("refused") else PartyError
            found[0].fail(kind(f"{reason}"))

    def answer(self, link: Link, fields: Fields) -> dict[str, Any]:
        raise RefusedError("a client takes no calls")

    def room(self, link: Link, header: Header) -> tuple[Payload, Callable[[Payload], None]]:
        with self._lock:
            # What was given up may still be answered: that much is let in, and dropped.
            found = self._flows.get(header.request) or self._gone.get(header.request)
        if found is None or found[1].get(link.role) is not link:
            raise FrameError("an answer that nobody waits for")
        flow = found[0]
        payload = flow.room(link.role, header.phase, header.length)
        return payload, lambda content: flow.put(link.role, header.phase, header.depth, content)

    def closed(self, link: Link, reason: str) -> None:
        with self._lock:
            flows = [flow for flow, links in self._flows.values() if links.get(link.role) is link]
        for flow in flows:
            flow.fail(PartyError(f"{link.peer.name} disconnected: {reason}"))

    def submit(self, work: Callable[[], None]) -> None:
        work()


def ask(deployment: Deployment, identity: Identity, rank: int, what: str, seconds: float, **fields: Any) -> Fields:
    """One call on a connection of its own: status, dealing ahead."""
    tls, handler = context(deployment, identity, server=False), Caller()
    wire, peer = dial(deployment, tls, identity.member, rank, Hello("control"))
    link = Link(wire, peer, handler, deployment.limits, NETWORKS[deployment.network], dialled=True)
    link.start()
    threading.Thread(target=handler.beat, args=({rank: link}, deployment.limits.heartbeat_seconds), daemon=True).start()
    try:
        return link.call(what, seconds, **fields)
    finally:
        handler.done.set()
        link.close("done")
        link.join(2.0)


def everywhere(deployment: Deployment, identity: Identity, what: str, seconds: float) -> dict[int, Fields | TacitError]:
    """The same call to all three parties; an error in the place of an answer that did not come."""

    def one(rank: int) -> Fields | TacitError:
        try:
            return ask(deployment, identity, rank, what, seconds)
        except TacitError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        return dict(enumerate(pool.map(one, range(3))))
