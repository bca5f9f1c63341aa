"""A party's work: flows by request, the session it is in, and running deals and requests within it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from tacit.ir.cost import CLIENT, P1, P2, ROLES
from tacit.ir.errors import PartyError, ProtocolError, TacitError
from tacit.runtime.net.causes import Cause, Code, Fault, Stopped, cause_of, not_connected
from tacit.runtime.net.deployment import Limits
from tacit.runtime.net.flow import Book, Flow, FlowChannel, Payload, Replay, Send, books, budget
from tacit.runtime.net.frames import FrameError, Phase
from tacit.runtime.net.link import Link, mistake
from tacit.runtime.net.lobby import Visit
from tacit.runtime.net.metrics import Log, Metrics
from tacit.runtime.net.seats import Dealt, Seats, weight_values
from tacit.runtime.net.store import Model, SessionRecord, Store
from tacit.runtime.party import Awaited, steps

Tensor = torch.Tensor
_UNREAD = 1 << 17  # bytes that TCP takes in while nobody reads: half in the send buffer, half in the window
_REMEMBERED = 4096  # requests that have ended, whose late messages are dropped
_PREPARED = 1024  # batches whose material P2 keeps in memory; others it deals again for itself
_EXPANDED, _EXPANDED_BYTES = 16, 1 << 20  # P0 and P1 have that many batches of that size ready to use, in memory too


Answer = tuple[Phase, int, Sequence[Tensor]]  # a message to the client, and its depth


@dataclass
class Job:
    """One request of a client as a party sees it."""

    request: int
    batch_id: int
    batch: int
    stored: bool
    deadline: float
    seconds: float
    visit: Visit | None = None  # at P0 and P1: the client
    seed: bytes = b""  # at P0: the key that the client drew for this request
    begun: float = field(default_factory=time.monotonic)


class Session:
    """The session under way: a record, the model it is for, and the values of its lines."""

    def __init__(self, record: SessionRecord, model: Model, rank: int) -> None:
        self.nonce = record.nonce
        self.push = record.push
        self.plan = model.plan
        self.tag = tag_of(record.nonce)
        values = weight_values(model.plan, model.shares) | layouts(record.opened)
        self.seats = Seats(model.plan, rank, record.keys, values)
        self.book: Callable[[int], Book] = books(model.plan)

    def link_bytes(self, batch: int) -> int:
        """What one request sends over the busiest link online."""
        return max(self.book(batch)[Phase.ONLINE].values(), default=0)


class Relay:
    """A party program that goes on in whichever thread brings the message it waits for.

    Handing every message to a thread of the request's own would cost a switch in every round, as much as the rest of a
    small round. The thread is a link's reader, which reads nothing meanwhile: this is for requests of little work only.
    All of them that may be under way fit into what TCP takes in unread, so that no two readers wait for one another.
    """

    def __init__(self, program: Iterator[Awaited], flow: Flow) -> None:
        self._program = program
        self._flow = flow
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Start it, and wait until it has ended; raises what it raised, PartyError where it was too late."""
        self._go_on()
        if not self._ended.wait(max(0.0, self._flow.deadline - time.monotonic())):
            self._flow.late()
            self._ended.wait()
        if self._error is not None:
            raise self._error

    def _go_on(self) -> None:
        try:
            for awaited in self._program:
                if not self._flow.there(Phase.ONLINE, awaited, self._go_on):
                    return
        except BaseException as error:
            self._error = error
        self._ended.set()


def layouts(opened: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from tacit.runtime.ring import column_major

    return {name: column_major(value) for name, value in opened.items()}


# A request's number: 31 bits for the session, one for dealing ahead (the same batch is used later), 32 of the batch id.
IDS, AHEAD = (1 << 32) - 1, 1 << 32


def tag_of(nonce: str) -> int:
    """The session's part of its request numbers: those of two sessions are not confused."""
    return session_of(int.from_bytes(hashlib.sha256(nonce.encode()).digest()[:8], "big"))


def session_of(request: int) -> int:
    return request & ~(IDS | AHEAD)


class Engine:
    """What P0, P1 and P2 have in common. `links` are the parties connected now, by rank."""

    def __init__(self, rank: int, limits: Limits, store: Store, metrics: Metrics, log: Log) -> None:
        self.rank = rank
        self.limits = limits
        self.store = store
        self.metrics = metrics
        self.log = log
        self.links: dict[int, Link] = {}
        self.model: Model | None = None
        self.session: Session | None = None
        self._flows: dict[int, Flow] = {}
        self._jobs: dict[int, Job] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._prepared: OrderedDict[int, Dealt] = OrderedDict()
        self._lock = threading.RLock()

    # --- flows ---

    def flow(self, request: int, batch: int, seconds: float) -> Flow:
        """The flow of a request, which either its start or another party's first message makes."""
        with self._lock:
            if (found := self._flows.get(request)) is not None:
                if found.batch != batch:
                    raise FrameError(f"batch {batch} for a request of batch {found.batch}")
                return found
            session = self.session
            if session is None or session_of(request) != session.tag:
                raise Stopped(Cause(Code.NO_SESSION, self.rank))
            if request in self._ended:
                raise Stopped(Cause(Code.ENDED))
            if len(self._flows) > 8 * self.limits.in_flight + 64:
                raise Stopped(Cause(Code.FULL, self.rank))
            flow = Flow(request, batch, budget(session.book(batch), self.rank), time.monotonic() + seconds, seconds)
            self._flows[request] = flow
            return flow

    def adopt(self, flow: Flow) -> None:
        """A flow that is not a request's: the opening of a session."""
        with self._lock:
            self._flows[flow.request] = flow

    def room(self, source: int, request: int, phase: Phase, size: int) -> tuple[Payload, Flow] | None:
        """Memory for a message that another party announces; None where it came too late to be of use."""
        with self._lock:
            flow, ended = self._flows.get(request), request in self._ended
        if flow is not None:
            return flow.room(source, phase, size), flow
        if not ended:
            raise FrameError(f"a message for request {request & IDS}, which is not under way")
        session = self.session
        most = 0 if session is None else max(budget(session.book(self.limits.batch), self.rank).values(), default=0)
        if size > most:
            raise FrameError(f"a message of {size} bytes for a request that has ended")
        return None

    def end(self, request: int) -> None:
        with self._lock:
            flow = self._flows.pop(request, None)
            self._jobs.pop(request, None)
            self._ended[request] = None
            while len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)
        if flow is not None:
            flow.finish()

    def fail_all(self, cause: Cause, text: str) -> None:
        with self._lock:
            flows = list(self._flows.values())
        for flow in flows:
            flow.fail(Stopped(cause, text))

    def expire(self) -> None:
        """Drop flows that another party opened and nobody here ever worked on."""
        now = time.monotonic()
        with self._lock:
            late = [f.request for f in self._flows.values() if f.deadline + 5 < now and f.request not in self._jobs]
        for request in late:
            self.end(request)

    def stop(self, request: int, cause: Cause, *, by: int | None = None) -> None:
        """A request cannot end well: another party says so, or its client is gone."""
        with self._lock:
            flow = self._flows.get(request)
            if flow is None or request not in self._jobs:
                self.end(request)
        if flow is not None:
            flow.fail(Stopped(cause, f"{cause}" if by is None else f"{ROLES[by]}: {cause}"))

    def tell(self, request: int, cause: Cause) -> None:
        """The other parties, among them P2: the cause, and no word of whose request it was."""
        for link in list(self.links.values()):
            with suppress(PartyError):
                link.cast("abort", request, **cause.body())

    @property
    def busy(self) -> int:
        return len(self._jobs)

    # --- sessions ---

    def enter(self, session: Session | None) -> None:
        """Make a session the current one; whatever ran in the one before ends."""
        with self._lock:
            before, self.session = self.session, session
            self._prepared.clear()
        if before is not None and before is not session:
            self.fail_all(Cause(Code.RENEWED), "the session was renewed")

    # --- deals ---

    def send_to(self, flow: Flow, answers: list[Answer] | None = None) -> Send:
        """Where the messages of a flow go. What is for the client is collected in `answers`."""

        def send(target: int, phase: Phase, depth: int, message: Sequence[Tensor]) -> None:
            if target == CLIENT:
                assert answers is not None
                answers.append((phase, depth, message))
            elif (link := self.links.get(target)) is None:
                raise not_connected(target)
            else:
                link.send(flow.request, phase, depth, message)

        return send

    def announce(self, flow: Flow) -> None:
        """Between P1 and P2, whom P0's word may reach at different times: the size goes ahead of the messages."""
        if (other := {P1: P2, P2: P1}.get(self.rank)) is not None and (link := self.links.get(other)) is not None:
            # Without the time that is left: a client chooses how long it waits, and could be known by that.
            link.cast("begin", flow.request, batch=flow.batch)

    def deal_ahead(self, request: int, batch: int, seconds: float) -> int:
        """One batch for the store; returns the bytes on disk. At P2: deal, at P0 and P1: keep what it sends."""
        session, batch_id = self._in_session(request), request & IDS
        flow = self.flow(request, batch, seconds)
        try:
            if self.rank == P2:
                self.announce(flow)
                channel = FlowChannel(flow, self.rank, Phase.OFFLINE, self.send_to(flow))
                self._keep(session, batch_id, session.seats.deal(channel, batch_id, batch))
                channel.flush()
                self.metrics.sent(Phase.OFFLINE, channel.meter)
                return 0
            due = session.book(batch)[Phase.OFFLINE][P2, self.rank]
            messages: list[Payload] = []
            while due > 0:
                _, payload = flow.take(P2, Phase.OFFLINE)
                messages.append(payload)
                due -= payload.size
            if self.session is not session:
                raise Stopped(Cause(Code.RENEWED))
            size = self.store.put_material(session.nonce, batch_id, batch, {P2: messages})
            if size <= _EXPANDED_BYTES and len(self._prepared) < _EXPANDED:
                self._keep(session, batch_id, session.seats.deal(Replay(self.rank, {P2: messages}), batch_id, batch))
            return size
        finally:
            self.end(request)

    def _keep(self, session: Session, batch_id: int, material: Dealt) -> None:
        with self._lock:
            if self.session is not session:
                return  # batch ids start anew with every session
            self._prepared[batch_id] = material
            while len(self._prepared) > _PREPARED:
                self._prepared.popitem(last=False)

    def _in_session(self, request: int) -> Session:
        session = self.session
        if session is None or session_of(request) != session.tag:
            raise Stopped(Cause(Code.NO_SESSION, self.rank))
        return session

    # --- requests ---

    def start(self, job: Job) -> Flow:
        """Register a request, in the order in which they were started; `run` then does the work."""
        with self._lock:
            flow = self.flow(job.request, job.batch, job.seconds)
            flow.deadline, flow.seconds = job.deadline, job.seconds  # the flow may have been made for a message
            self._jobs[job.request] = job
            return flow

    def run(self, job: Job, flow: Flow) -> str:
        """One request from its first message to its last; returns how it ended, never raises."""
        self.metrics.in_flight.inc()
        reason, cause = "internal error", Cause(Code.FAILED, self.rank, Fault.INTERNAL)
        try:
            self._run(job, flow)
            reason = ""
        except TacitError as error:
            reason, cause = str(error), cause_of(error, self.rank)
        except Exception as error:
            reason, cause = f"{ROLES[self.rank]} failed: {mistake(error)}", cause_of(error, self.rank)
        finally:
            self.end(job.request)
            self.metrics.in_flight.dec()
            self.metrics.requests.labels("failed" if reason else "answered").inc()
            self.metrics.seconds.observe(time.monotonic() - job.begun)
        if reason:
            self.tell(job.request, cause)
            whose = {} if job.visit is None else {"client": job.visit.link.peer.name}
            self.log("request failed", request=job.batch_id, reason=reason, **whose)
            if job.visit is not None:
                job.visit.tell(reason)
        return reason

    def _run(self, job: Job, flow: Flow) -> None:
        session = self._in_session(job.request)
        try:
            self._run_in(session, job, flow)
        finally:
            self.store.drop_material(session.nonce, job.batch_id, job.batch)

    def _run_in(self, session: Session, job: Job, flow: Flow) -> None:
        # From here on the batch is spent, whatever happens: nothing of it has been used so far.
        self.store.ledger.consume(session.nonce, job.batch_id, f"{job.batch}")
        self.announce(flow)
        answers: list[Answer] = []
        send = self.send_to(flow, answers)
        material = self._material(job, flow, session, send)
        channel = FlowChannel(flow, self.rank, Phase.ONLINE, send)
        seat = session.seats.seat(channel, job.batch_id, job.batch, material=material, outside=job.seed)
        plan, values = session.plan, dict(session.seats.shared)
        program = steps(plan, plan.schedule, channel, seat, values, keep=False)
        if session.link_bytes(job.batch) * self.limits.in_flight <= _UNREAD:
            Relay(program, flow).run()
        else:
            for _ in program:
                pass
        # Sent from here: a client that takes nothing keeps nobody waiting but its own request.
        for answer in answers:
            assert job.visit is not None
            job.visit.link.send(job.visit.number, *answer)
        self.metrics.sent(Phase.ONLINE, channel.meter)

    def _material(self, job: Job, flow: Flow, session: Session, send: Send) -> Dealt:
        if not job.stored:
            channel = FlowChannel(flow, self.rank, Phase.OFFLINE, send)
            material = session.seats.deal(channel, job.batch_id, job.batch)
            channel.flush()
            self.metrics.sent(Phase.OFFLINE, channel.meter)
            return material
        with self._lock:
            kept = self._prepared.pop(job.batch_id, None)
        if kept is not None:
            return kept  # the file is dropped when the request has ended: it counts as consumed already
        # P2 after a restart: the same keys give the same material, and nothing is sent again.
        messages = self.store.take_material(session.nonce, job.batch_id, job.batch) if self.rank != P2 else {}
        return session.seats.deal(Replay(self.rank, messages), job.batch_id, job.batch)


def sharing_bytes(session: Session, batch: int) -> int:
    """What a client sends P1 for a batch."""
    size = session.book(batch)[Phase.ONLINE][CLIENT, P1]
    if not size:
        raise ProtocolError("this plan takes no input")
    return size
