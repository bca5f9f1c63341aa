"""P0's part beside computing: whose turn it is, which batch of the store a request gets, and whether all are ready."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress

from tacit.ir.cost import P1, P2, ROLES
from tacit.ir.errors import PartyError, ProtocolError, RefusedError, TacitError
from tacit.runtime.net.causes import Cause, Stopped, not_connected
from tacit.runtime.net.deployment import Limits, StoreSettings
from tacit.runtime.net.engine import AHEAD, Engine, Job
from tacit.runtime.net.frames import Fields
from tacit.runtime.net.link import Link
from tacit.runtime.net.lobby import Visit
from tacit.runtime.net.opening import Opener
from tacit.runtime.net.resuming import MAX_STOCK, resume
from tacit.runtime.net.stock import Stock
from tacit.runtime.net.turns import Rate, Shares, Turns

_TICK = 0.5


class Coordinator:
    """Admits requests, starts them, keeps the store filled, and keeps the three parties in one session."""

    def __init__(
        self, engine: Engine, limits: Limits, settings: StoreSettings, clients: int, leave: Callable[[Visit], None]
    ) -> None:
        self.engine = engine
        self.stock: Stock | None = None
        self.opener = Opener(engine, limits.session_seconds)
        self.state = "waiting for a model"
        self._limits = limits
        self._settings = settings
        self._leave = leave
        # One client never has all slots where another one may come: a slot is always near.
        self._turns = Turns(limits.queue, limits.in_flight if clients == 1 else max(1, limits.in_flight - 1))
        self._shares = Shares(limits.per_client)
        self._rate = Rate(limits.requests_per_minute)
        self._recent: OrderedDict[int, None] = OrderedDict.fromkeys(settings.batches)
        self._draining = False
        self._lock = threading.RLock()
        self._dealing = threading.Lock()
        self._renewing = threading.Lock()
        self._wake = threading.Event()
        self._wake_refill = threading.Event()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(limits.in_flight, thread_name_prefix="request")
        self._calls = ThreadPoolExecutor(2, thread_name_prefix="dealing")
        self._notices = ThreadPoolExecutor(2, thread_name_prefix="notice")
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("keeper", self._keep), ("refill", self._refill))
        ]

    def begin(self) -> None:
        if self.engine.model is not None:
            self.state = "waiting for P1 and P2"
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        self._wake.set()

    @property
    def ready(self) -> bool:
        return self.stock is not None

    # --- requests ---

    def admit(self, visit: Visit, batch: int, seed: bytes, seconds: float) -> None:
        """A client asks, and waits for its share; raises RefusedError where it has to wait elsewhere."""
        with self._lock:
            if self._draining:
                raise RefusedError("P0 is shutting down")
            if not self.ready:
                raise RefusedError(f"P0 cannot serve now: {self.state}")
            self._rate.spend(visit.client, visit.link.peer.name)
            job = Job(0, 0, batch, False, time.monotonic() + seconds, seconds, visit, seed)
            there = self._shares.wait(visit.key, job, self.engine.links.get(P1))
        if there is not None:
            self._enter(job, visit, there)

    def shared(self, link: Link, client: str, number: int, batch: int) -> None:
        """P1 has the share of a request."""
        with self._lock:
            job = self._shares.came((client, number), batch, link)
        if job is not None and job.visit is not None:
            self._enter(job, job.visit, batch)

    def _enter(self, job: Job, visit: Visit, batch: int) -> None:
        """A request has all that it needs: it queues up for a slot."""
        try:
            with self._lock:
                if batch != job.batch:
                    raise RefusedError(f"P0 was told of a batch of {job.batch}, P1 of one of {batch}")
                self._turns.push(visit.client, job)
                self._recent[batch] = None
                self._recent.move_to_end(batch)
                while len(self._recent) > self._settings.sizes:
                    self._recent.popitem(last=False)
        except RefusedError as error:
            self._dismiss(visit, str(error))
            return
        self._next()

    def _dismiss(self, visit: Visit, reason: str, *, refused: bool = True) -> None:
        """From a thread of its own: a client that reads nothing must not hold up the link to a party."""
        self._leave(visit)
        with suppress(RuntimeError):  # of a pool that was shut down
            self._notices.submit(visit.tell, reason, refused=refused)

    def cancel(self, visit: Visit, cause: Cause) -> None:
        with self._lock:
            visit.unwanted = cause
            waits = self._shares.remove(visit) or self._turns.remove(visit)
        if waits:
            self._leave(visit)
        elif visit.request is not None:
            self.engine.stop(visit.request, cause)

    def expire(self, visit: Visit) -> None:
        """The time of a request is up before it was started."""
        with self._lock:
            unshared = self._shares.remove(visit)
            if not unshared and not self._turns.remove(visit):
                return
        self._dismiss(visit, "the share did not come to P1 in time" if unshared else "P0 had no time for the request")

    def _next(self) -> None:
        """Start what may start."""
        while True:
            with self._lock:
                self.engine.metrics.waiting.set(len(self._turns))
                if self._turns.running >= self._limits.in_flight or (job := self._turns.pop()) is None:
                    return
            self._pool.submit(self._work, job)

    def _work(self, job: Job) -> None:
        visit = job.visit
        assert visit is not None
        try:
            self._start(job, visit)
        except TacitError as error:
            visit.tell(str(error), refused=isinstance(error, RefusedError))
        finally:
            self._leave(visit)
            with self._lock:
                self._turns.done(visit.client)
            self._next()
            self._wake_refill.set()

    def _start(self, job: Job, visit: Visit) -> None:
        session, stock = self.engine.session, self.stock
        left = job.deadline - time.monotonic()
        if session is None or stock is None:
            raise RefusedError(f"P0 cannot serve now: {self.state}")
        if left <= 0:
            raise RefusedError(f"P0 had no time for the request within {job.seconds:g} s")
        if visit.unwanted is not None or not visit.link.open:
            return
        found = stock.take(job.batch)
        job.stored, job.batch_id = found is not None, found if found is not None else stock.new_id()
        job.request, job.seconds = session.tag | job.batch_id, left
        flow = self.engine.start(job)
        visit.flow, visit.request = flow, job.request
        try:
            if visit.unwanted is not None:  # since before there was a request to stop
                raise Stopped(visit.unwanted)
            # P2 has nothing to do with the client: it is not told who it is, nor the time that it gave itself.
            self._tell_start(P1, job, seconds=left, client=visit.client, number=visit.number)
            self._tell_start(P2, job, seconds=self._limits.request_seconds)
        except PartyError as error:
            flow.fail(error)
        self.engine.run(job, flow)

    def _tell_start(self, rank: int, job: Job, **fields: str | float) -> None:
        link = self.engine.links.get(rank)
        if link is None:
            raise not_connected(rank)
        link.cast("start", job.request, batch=job.batch, stored=job.stored, **fields)

    # --- the store ---

    def deal(self, count: int, batch: int) -> int:
        """Deal batches ahead; returns how many of that size are in the store then."""
        for _ in range(count):
            self._deal_one(batch)
        return self.stock.level(batch) if self.stock else 0

    def _deal_one(self, batch: int) -> None:
        with self._dealing:
            session, stock = self.engine.session, self.stock
            if session is None or stock is None:
                raise RefusedError(f"P0 cannot deal now: {self.state}")
            if stock.bytes >= self._settings.capacity_bytes or sum(stock.levels.values()) >= MAX_STOCK:
                raise RefusedError("the store is full")
            batch_id, seconds = stock.new_id(), self._limits.request_seconds
            request = session.tag | AHEAD | batch_id
            self.engine.flow(request, batch, seconds)
            links = {rank: self.engine.links.get(rank) for rank in (P1, P2)}
            asked = {}
            for rank, link in links.items():
                if link is None:
                    raise not_connected(rank)
                asked[rank] = self._call(link, seconds, request=request, batch=batch, seconds=seconds)
            self.engine.deal_ahead(request, batch, seconds)
            size = self._answer(asked[P1]).integer("bytes", 0, 1 << 62)
            self._answer(asked[P2])
            if self.stock is stock:
                stock.add(batch_id, batch, size)
                self.engine.metrics.dealt.inc()

    def _call(self, link: Link, limit: float, **fields: float) -> Future[Fields]:
        try:
            return self._calls.submit(link.call, "deal", limit, **fields)
        except RuntimeError:  # of a pool that was shut down
            raise RefusedError("P0 is shutting down") from None

    @staticmethod
    def _answer(asked: Future[Fields]) -> Fields:
        try:
            return asked.result()
        except CancelledError:
            raise RefusedError("P0 is shutting down") from None

    def _refill(self) -> None:
        """In the background: fill the store of the sizes asked for lately once it is below the low-water mark."""
        while not self._stop.is_set():
            self._wake_refill.wait(_TICK)
            self._wake_refill.clear()
            stock = self.stock
            if stock is None:
                continue
            for batch in list(self._recent):
                if stock.level(batch) >= self._settings.low_water:
                    continue
                try:
                    while stock.level(batch) < self._settings.target and not self._busy():
                        self._deal_one(batch)
                except TacitError:
                    break  # the next request says what is wrong

    def _busy(self) -> bool:
        return self._stop.is_set() or len(self._turns) > 0

    # --- readiness ---

    def renew(self) -> None:
        """Open a session for the model that was just pushed; raises PartyError or RefusedError.

        Parties that are about to connect are waited for, as long as a handshake may take.
        """
        deadline = time.monotonic() + self._limits.handshake_seconds
        with self._renewing:
            self.lose("a new model was pushed")
            while True:
                try:
                    return self._join(fresh=True)
                except PartyError:
                    if time.monotonic() > deadline:
                        raise
                time.sleep(_TICK / 5)

    def lose(self, reason: str) -> None:
        """Something that all requests need is gone."""
        with self._lock:
            self.stock, self.state = None, reason
            waiting = self._shares.clear()
        self.engine.metrics.ready.set(0)
        for visit in (job.visit for job in waiting if job.visit is not None):
            self._dismiss(visit, reason, refused=False)

    def _keep(self) -> None:
        """Whenever all links are there and no session is under way: resume the one on disk, or open one."""
        while not self._stop.is_set():
            self._wake.wait(_TICK)
            self._wake.clear()
            if self.ready or self.engine.model is None or not {P1, P2} <= self.engine.links.keys():
                continue
            with self._renewing:
                try:
                    if not self.ready:
                        self._join(fresh=False)
                except TacitError as error:
                    if self.state != str(error):
                        self.engine.log("not ready", reason=str(error))
                    self.state = str(error)

    def _join(self, *, fresh: bool) -> None:
        model = self.engine.model
        assert model is not None
        found = {}
        for rank in (P1, P2):
            link = self.engine.links.get(rank)
            if link is None:
                raise not_connected(rank)
            answer = link.call("query", self._limits.handshake_seconds)
            if answer.flag("draining"):
                raise PartyError(f"{ROLES[rank]} is shutting down")
            if not answer.flag("linked"):
                raise PartyError("P1 and P2 are not connected with one another")
            if answer.text("push", 64) != model.push:
                raise RefusedError(f"{ROLES[rank]} holds another model; the owner has to push it again")
            found[rank] = link, answer.text("session", 64)
        session = self.engine.session
        if not fresh and session is not None and all(nonce == session.nonce for _, nonce in found.values()):
            try:
                stock = resume(self.engine, session, {rank: link for rank, (link, _) in found.items()}, self._limits)
                return self._serve(stock)
            except ProtocolError as error:
                if isinstance(error, PartyError):
                    raise
                self.engine.log("session dropped", session=session.nonce[:8], reason=str(error))
        session = self.opener.lead()
        self._serve(Stock(self.engine, session))

    def _serve(self, stock: Stock) -> None:
        with self._lock:
            self.stock, self.state = stock, "serving"
        self.engine.metrics.ready.set(1)
        self._wake_refill.set()

    # --- the end ---

    def drain(self, seconds: float) -> None:
        """Take nothing new, finish what waits and runs."""
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + seconds
        while (self._turns.running or len(self._turns) or len(self._shares)) and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        self._wake_refill.set()
        for pool in (self._pool, self._calls, self._notices):
            pool.shutdown(wait=False, cancel_futures=True)
