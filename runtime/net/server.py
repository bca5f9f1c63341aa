"""A party as a process: it listens, admits members for their roles, keeps its links, and hands frames to the engine."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2, ROLES
from tacit.ir.errors import DeploymentError, PartyError, RefusedError, TacitError
from tacit.runtime.channel import NETWORKS
from tacit.runtime.memory import keep_freed_buffers
from tacit.runtime.net.causes import Cause, Code, Declined, cause_of
from tacit.runtime.net.coordinator import Coordinator
from tacit.runtime.net.deployment import Deployment, Identity, Member
from tacit.runtime.net.engine import IDS, Engine, Job, Session
from tacit.runtime.net.frames import Fields, FrameError, Header
from tacit.runtime.net.handshake import Hello, Peer, admit, dial, permitted
from tacit.runtime.net.link import Link, Room, mistake
from tacit.runtime.net.lobby import Lobby
from tacit.runtime.net.metrics import Log, Metrics
from tacit.runtime.net.opening import Opener
from tacit.runtime.net.pushing import Receiver
from tacit.runtime.net.reception import Reception
from tacit.runtime.net.resuming import resume_answer
from tacit.runtime.net.seats import warm_up
from tacit.runtime.net.store import Store
from tacit.runtime.net.wire import Wire, context

_REDIAL = 0.2
_HANDSHAKES = 32  # side by side


class PartyServer:
    """P0, P1 or P2. `start` returns once it listens; `drain` and `stop` end it."""

    def __init__(self, deployment: Deployment, identity: Identity, folder: Path | None = None) -> None:
        """`folder` holds the party's state; by default `state` beside its key. Raises DeploymentError."""
        if identity.member.role not in (P0, P1, P2):
            raise DeploymentError(f"{identity.member.name} is {ROLES[identity.member.role]}, not one of the parties")
        keep_freed_buffers()
        torch.set_num_threads(1)
        self.deployment = deployment
        self.member = identity.member
        self.rank = identity.member.role
        self.limits = deployment.limits
        self.metrics = Metrics()
        self.log = Log(ROLES[self.rank])
        self.store = Store(folder or identity.folder / "state")
        self.engine = Engine(self.rank, self.limits, self.store, self.metrics, self.log)
        self.lobby = Lobby(self.limits)
        clients = sum(member.role == CLIENT for member in deployment.members)
        self.coordinator = (
            Coordinator(self.engine, self.limits, deployment.store, clients, self.lobby.leave)
            if self.rank == P0
            else None
        )
        self.reception = Reception(self.engine, self.lobby, self.coordinator, self._state, self._note_refusal)
        self.opener = self.coordinator.opener if self.coordinator else Opener(self.engine, self.limits.session_seconds)
        self.receiver = Receiver(self.engine, deployment.plan, self._activate)
        self._model = NETWORKS[deployment.network]
        self._server_tls = context(deployment, identity, server=True)
        self._client_tls = context(deployment, identity, server=False)
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._draining = False
        self._calls = ThreadPoolExecutor(16, thread_name_prefix="call")
        self._jobs = ThreadPoolExecutor(2 * self.limits.in_flight, thread_name_prefix="request")
        self._handshakes = threading.BoundedSemaphore(_HANDSHAKES)
        self._listener: socket.socket | None = None
        self._exposition: Any = None
        self._refused: dict[int, str] = {}

    # --- life ---

    def start(self) -> None:
        try:
            self._load()
        except BaseException:
            self.store.close()
            raise
        place = self.member.listen or self.member.address
        assert place is not None
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        try:
            self._listener = socket.create_server(place, family=family, backlog=128)
        except OSError as error:
            self.store.close()
            raise DeploymentError(
                f"{ROLES[self.rank]} cannot listen on {place[0]}:{place[1]}: {error.strerror}"
            ) from None
        if self.member.metrics is not None:
            self._exposition = self.metrics.serve(self.member.metrics)
        self._own = [
            threading.Thread(target=target, name=target.__name__, daemon=True) for target in (self._accept, self._beat)
        ]
        for thread in self._own:
            thread.start()
        for rank in range(self.rank):
            threading.Thread(target=self._dial, args=(rank,), name=f"to {ROLES[rank]}", daemon=True).start()
        if self.coordinator is not None:
            self.coordinator.begin()
        self.log("listening", address=f"{place[0]}:{place[1]}")

    def _load(self) -> None:
        """What the disk holds: a model, and the session that was under way."""
        model = self.store.load_model()
        if model is None:
            return
        warm_up(model.plan, self.rank)
        self.engine.model = model
        record = self.store.load_session()
        if record is not None and record.push == model.push:
            self.engine.enter(Session(record, model, self.rank))
        elif (self.store.folder / "session").exists():
            self.log("session dropped", reason="it is damaged, of another model, or the ledger has no line of it")

    def _activate(self) -> None:
        """A model was pushed. P0 then leads all into a session for it."""
        self.engine.enter(None)
        with self._lock:
            clients = [link for link in self._links if link.peer.hello.purpose == "client"]
        for link in clients:  # what they were told of the plan is out of date: they call again
            link.close("a new model was pushed")
        if self.coordinator is not None:
            self.coordinator.renew()

    def drain(self) -> None:
        """Serve what has been accepted, then stop: what SIGTERM asks for."""
        self.log("draining")
        self._draining = True
        if self.coordinator is not None:
            self.coordinator.drain(self.limits.drain_seconds)
        elif (leader := self.engine.links.get(P0)) is not None:
            with suppress(PartyError):
                leader.cast("draining")
        deadline = time.monotonic() + self.limits.drain_seconds
        while self._anybody_busy() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.stop()

    def _anybody_busy(self) -> bool:
        """Whether a request is under way here, or at another party that may still need this one."""
        if self.engine.busy:
            return True
        busy = False
        for link in list(self.engine.links.values()):
            with suppress(TacitError):
                busy |= link.call("busy", self.limits.handshake_seconds).integer("busy", 0, 1 << 31) > 0
        return busy

    def stop(self) -> None:
        self._stopping.set()
        if self.coordinator is not None:
            self.coordinator.close()
        if self._listener is not None:
            self._own[0].join()  # it holds the port
            self._listener.close()
        if self._exposition is not None:
            self._exposition.shutdown()
            self._exposition.server_close()
        with self._lock:
            links = list(self._links)
        for link in links:
            link.finish(f"{ROLES[self.rank]} is shutting down")
        deadline = time.monotonic() + 1.0
        for link in links:
            link.join(max(0.0, deadline - time.monotonic()))
            link.close("")
        for link in links:
            link.join(2.0)
        self._jobs.shutdown(wait=False, cancel_futures=True)
        self._calls.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        self.log("stopped")

    # --- connections ---

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        listener.settimeout(_REDIAL)
        while not self._stopping.is_set():
            try:
                sock, address = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._stopping.is_set():
                    return
                time.sleep(_REDIAL)  # out of file descriptors: wait for some to come back
                continue
            if len(self._links) >= self.limits.connections or not self._handshakes.acquire(blocking=False):
                self._note_refusal("connections", "too many connections", address[0])
                sock.close()
                continue
            threading.Thread(target=self._admit, args=(sock, address[0]), name="handshake", daemon=True).start()

    def _admit(self, sock: socket.socket, address: str) -> None:
        try:
            wire, peer = admit(self.deployment, self._server_tls, self.member, sock, self._hello, self._allowed)
        except TacitError as error:
            self._note_refusal("handshake", str(error), address)
            return
        finally:
            self._handshakes.release()
        self._connect(wire, peer, dialled=False)

    def _allowed(self, member: Member, purpose: str) -> str:
        with self._lock:
            if sum(link.peer.member == member for link in self._links) >= self.limits.per_member:
                return f"{member.name} has {self.limits.per_member} connections already"
        return permitted(self.rank, member, purpose)

    def _hello(self, purpose: str) -> Hello:
        model, session = self.engine.model, self.engine.session
        plan, push = (model.plan.digest, model.push) if model else ("", "")
        # The owner may bring another plan: its connection is about that one.
        return Hello(purpose, "" if purpose == "control" else plan, push, session.nonce if session else "")

    def _note_refusal(self, what: str, reason: str, who: str) -> None:
        self.metrics.refusals.labels(what).inc()
        self.log("refused", what=what, reason=reason, who=who)

    def _dial(self, rank: int) -> None:
        """Keep a link to a party of lower rank, for ever."""
        while not self._stopping.wait(_REDIAL):
            if rank in self.engine.links:
                continue
            try:
                wire, peer = dial(self.deployment, self._client_tls, self.member, rank, self._hello("link"))
            except RefusedError as error:
                if self._refused.get(rank) != str(error):
                    self._refused[rank] = str(error)
                    self._note_refusal("handshake", str(error), ROLES[rank])
                self._stopping.wait(5 * _REDIAL)
            except PartyError:
                continue  # not there yet, or not there any more
            else:
                self._refused.pop(rank, None)
                self._connect(wire, peer, dialled=True)

    def _connect(self, wire: Wire, peer: Peer, *, dialled: bool) -> None:
        link = Link(wire, peer, self, self.limits, self._model, dialled=dialled)
        with self._lock:
            if self._stopping.is_set():
                wire.close()
                return
            self._links.add(link)
            before = self.engine.links.get(peer.role) if peer.hello.purpose == "link" else None
            if peer.hello.purpose == "link":
                self.engine.links[peer.role] = link
        if before is not None:
            before.close("it connected anew")
            self._lost(peer.role, "it connected anew")
        if peer.hello.purpose == "link":
            self.metrics.connected.labels(peer.name).set(1)
            self.log("connected", party=peer.name)
        link.start()
        if self.rank == P1 and link is self.engine.links.get(P0):
            self.reception.say_again()
        if self.coordinator is not None:
            self.coordinator.wake()

    def _beat(self) -> None:
        """Heartbeats, so that silence means something; and what nobody came back for."""
        while not self._stopping.wait(self.limits.heartbeat_seconds):
            with self._lock:
                links = list(self._links)
            for link in links:
                link.ping()
            self.engine.expire()
            self.reception.expire()

    def closed(self, link: Link, reason: str) -> None:
        with self._lock:
            self._links.discard(link)
            current = self.engine.links.get(link.role) is link
            if current:
                del self.engine.links[link.role]
        self.reception.left(link)
        if reason.startswith("it sent "):
            self._note_refusal("frame", reason, link.peer.name)
        if not current:
            return
        self.metrics.connected.labels(link.peer.name).set(0)
        self._lost(link.role, reason)

    def _lost(self, rank: int, reason: str) -> None:
        """The link to a party is gone: what is under way cannot end well."""
        self.log("disconnected", party=ROLES[rank], reason=reason)
        text = f"{ROLES[rank]} disconnected: {reason}"
        if self.coordinator is not None:
            self.coordinator.lose(text)
        self.engine.fail_all(Cause(Code.LOST, rank), text)
        if self.coordinator is not None:
            self.coordinator.wake()

    def submit(self, work: Callable[[], None]) -> None:
        if not self._stopping.is_set():
            self._calls.submit(work)

    # --- frames: data ---

    def room(self, link: Link, header: Header) -> Room:
        purpose, size = link.peer.hello.purpose, header.length
        if purpose == "link":
            if (found := self.engine.room(link.role, header.request, header.phase, size)) is None:
                return None
            payload, flow = found
            return payload, lambda content: flow.put(link.role, header.phase, header.depth, content)
        if purpose == "client":
            return self.reception.room(link, header.request, size)
        return self.receiver.room(link, header)

    # --- frames: control ---

    def cast(self, link: Link, request: int, fields: Fields) -> None:
        what, purpose = fields.text("what", 32), link.peer.hello.purpose
        if purpose == "client" and what in ("request", "share", "cancel"):
            self.reception.cast(link, what, request, fields)
        elif purpose == "link" and what == "start" and link.role == P0:
            self._start(link, request, fields)
        elif purpose == "link" and what == "shared" and link.role == P1 and self.coordinator is not None:
            self.coordinator.shared(link, *_client(fields), fields.integer("batch", 1, self.limits.batch))
        elif purpose == "link" and what == "begin":
            self._begin(request, fields)
        elif purpose == "link" and what == "draining" and self.coordinator is not None:
            self.coordinator.lose(f"{link.peer.name} is shutting down")
        elif purpose == "link" and what == "abort":
            cause = Cause.read({key: value for key, value in fields.body.items() if key != "what"})
            self.engine.stop(request, cause, by=link.role)
        else:
            raise FrameError(f"'{what}', which {ROLES[link.role]} may not ask for")

    def _start(self, link: Link, request: int, fields: Fields) -> None:
        """P0 starts a request at P1 and P2."""
        batch = fields.integer("batch", 1, self.limits.batch)
        seconds = fields.number("seconds", 0.0, self.limits.longest)
        stored, deadline = fields.flag("stored"), time.monotonic() + seconds
        job = Job(request, request & IDS, batch, stored, deadline, seconds)
        whose = _client(fields) if self.rank == P1 else None
        try:
            flow = self.engine.start(job)
            if whose is not None:
                job.visit = self.lobby.claim(*whose, batch, flow)
        except TacitError as error:
            self.engine.end(request)
            self.engine.tell(request, cause_of(error, self.rank))
            self.log("request failed", request=job.batch_id, reason=str(error))
            return

        def work() -> None:
            try:
                self.engine.run(job, flow)
            finally:
                if job.visit is not None:
                    self.lobby.leave(job.visit)

        self._jobs.submit(work)

    def _begin(self, request: int, fields: Fields) -> None:
        """P1 or P2 is about to send messages of a request of which P0's word may still be on its way."""
        try:
            self.engine.flow(request, fields.integer("batch", 1, self.limits.batch), self.limits.request_seconds)
        except PartyError:
            self.engine.end(request)  # ended already: what follows is dropped

    def answer(self, link: Link, fields: Fields) -> dict[str, Any]:
        what, role = fields.text("what", 32), link.role
        if link.peer.hello.purpose == "link":
            try:
                return self._answer_party(link, what, fields)
            except Exception as error:  # told as a code: the text stays in the log of this party
                reason = str(error) if isinstance(error, TacitError) else mistake(error)
                self.log("call failed", what=what, who=link.peer.name, reason=reason)
                return {"error": cause_of(error, self.rank).body()}
        if what == "status":
            return self.status(role)
        if what == "plan" and self.engine.model is not None:
            return {"plan": str(self.engine.model.plan)}
        if what == "deal" and role != CLIENT:
            if self.coordinator is None:
                raise RefusedError("P0 leads the dealing: ask it")
            count, batch = fields.integer("count", 1, 1 << 20), fields.integer("batch", 1, self.limits.batch)
            return {"level": self.coordinator.deal(count, batch)}
        if what in ("offer", "commit") and role == OWNER:
            return self.receiver.answer(link, what, fields)
        self._note_refusal("call", f"{ROLES[role]} asked for '{what}'", link.peer.name)
        raise RefusedError(f"{ROLES[role]} may not ask for '{what}' here")

    def _answer_party(self, link: Link, what: str, fields: Fields) -> dict[str, Any]:
        role, session = link.role, self.engine.session
        if what == "query" and role == P0:
            model = self.engine.model
            return {
                "push": model.push if model else "",
                "session": session.nonce if session else "",
                "draining": self._draining,
                "linked": {P1: P2, P2: P1}[self.rank] in self.engine.links,
            }
        if what == "busy":
            return {"busy": self.engine.busy}
        if what == "open" and role == P0:
            return self.opener.answer_open(fields)
        if what == "key" and role == P1 and self.rank == P2:
            return self.opener.answer_key(fields)
        if what == "establish" and role == P0:
            return self.opener.answer_establish(fields)
        if what == "resume" and role == P0:
            return resume_answer(self.engine, fields)
        if what == "deal" and role == P0:
            request, batch = fields.integer("request", 1, (1 << 64) - 1), fields.integer("batch", 1, self.limits.batch)
            seconds = fields.number("seconds", 0.0, self.limits.longest)
            return {"bytes": self.engine.deal_ahead(request, batch, seconds)}
        raise Declined(Cause(Code.FORBIDDEN, self.rank), f"{ROLES[role]} may not ask for '{what}' here")

    # --- status ---

    def _state(self) -> str:
        if self.coordinator is not None:
            return self.coordinator.state
        if self.engine.model is None:
            return "waiting for a model"
        return "in a session" if self.engine.session is not None else "waiting for a session"

    def status(self, role: int) -> dict[str, Any]:
        """What `tacit status` shows; a client sees no more than whether it is served."""
        model, session = self.engine.model, self.engine.session
        found: dict[str, Any] = {
            "party": ROLES[self.rank],
            "state": self._state(),
            "plan": model.plan.digest if model else "",
            "session": session.nonce if session else "",
            "batch": self.limits.batch,
        }
        if role == CLIENT:
            return found
        stock = self.coordinator.stock if self.coordinator else None
        return found | {
            "connected": [ROLES[rank] for rank in sorted(self.engine.links)],
            "store": {str(k): v for k, v in stock.levels.items()} if stock else {},
            "frame_bytes": sum(link.frame_bytes for link in list(self._links)),
            "descriptors": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else -1,
            "threads": threading.active_count(),
            "figures": self.metrics.figures(),
        }


def _client(fields: Fields) -> tuple[str, int]:
    """Whose request P0 and P1 speak of: the client's fingerprint and the number that it drew."""
    return fields.hexadecimal("client", 32).hex(), fields.integer("number", 0, (1 << 64) - 1)
