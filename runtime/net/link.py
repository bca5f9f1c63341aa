"""A link: an admitted connection, its frames in order, one thread that reads, heartbeats, and an emulated network."""

from __future__ import annotations

import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from tacit.ir.cost import OWNER, P2
from tacit.ir.errors import PartyError, RefusedError, TacitError
from tacit.runtime.channel import LinkModel
from tacit.runtime.net.causes import Cause, Code, Declined, Stopped, late
from tacit.runtime.net.deployment import Limits
from tacit.runtime.net.flow import Payload
from tacit.runtime.net.frames import (
    CONTROL_BYTES,
    HEADER,
    PLAN_BYTES,
    SERIALS,
    Fields,
    FrameError,
    Header,
    Kind,
    Phase,
    decode,
    encode,
    tensor_bytes,
)
from tacit.runtime.net.handshake import Peer
from tacit.runtime.net.wire import Closed, Late, Wire

Tensor = torch.Tensor
_CALLS = 16  # of one connection that wait for their answers
_UNANSWERED = 256  # calls of this side: beyond that the other side is taken for broken
_JOINED = 1 << 16  # messages up to this size go out in one piece
_DROPPED = 1 << 16  # bytes read at once of what nobody wants
Room = tuple[Payload, Callable[[Payload], None]] | None


@dataclass
class _Call:
    """A call of this side. One that nobody waits for any more stays: its reply may still come, once."""

    what: str
    reply: Future[Fields] = field(default_factory=Future)


class Handler(Protocol):
    """What a link's owner does with what arrives. All but `answer` run in the link's reader and must not wait."""

    def cast(self, link: Link, request: int, fields: Fields) -> None: ...

    def answer(self, link: Link, fields: Fields) -> dict[str, Any]:
        """Between parties it raises nothing: what failed is in its `error`."""
        ...

    def room(self, link: Link, header: Header) -> Room:
        """Memory for announced data, and where it goes once it is there; None to drop it. FrameError refuses it."""
        ...

    def closed(self, link: Link, reason: str) -> None: ...

    def submit(self, work: Callable[[], None]) -> None:
        """Run something elsewhere that may wait."""
        ...


class Link:
    """One connection with one member. Not usable before `start`."""

    def __init__(
        self, wire: Wire, peer: Peer, handler: Handler, limits: Limits, model: LinkModel | None, *, dialled: bool
    ) -> None:
        self.peer = peer
        self.role = peer.role
        self.frame_bytes = 0  # headers and control sent: beside the payload that the plan accounts for
        self._wire = wire
        self._handler = handler
        self._limits = limits
        self._sent = 2 if dialled else 1  # the frames of the handshake
        self._received = 1 if dialled else 2
        self._calls: dict[int, _Call] = {}  # by number, until their replies are there
        self._ids = itertools.count(1)
        self._between = peer.hello.purpose == "link"  # parties tell one another codes, never texts
        self._answering = 0
        self._counting = threading.Lock()
        self._writing = threading.Lock()
        self._reason: str | None = None
        self._ended = threading.Lock()
        self._delayed = None if model is None else _Delay(model, self._write)
        self._thread = threading.Thread(target=self._read, name=f"from {peer.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def open(self) -> bool:
        return self._reason is None

    # --- sending ---

    def cast(self, what: str, request: int = 0, /, **fields: Any) -> None:
        """Tell the other side something; raises PartyError where the connection has ended."""
        self._send(Kind.CAST, [encode({"what": what} | fields)], request)

    def call(self, what: str, seconds: float, /, **fields: Any) -> Fields:
        """Ask the other side; raises RefusedError with its reason, PartyError where no answer comes in time."""
        if len(self._calls) >= _UNANSWERED:
            self.close(f"it left {_UNANSWERED} calls without an answer")
        number, call = next(self._ids), _Call(what)
        self._calls[number] = call
        try:
            self._send(Kind.CALL, [encode({"what": what} | fields)], number)
            answer = call.reply.result(seconds)
        except FutureTimeout:
            raise late(self.role, seconds) from None
        if "error" in answer.body and self._between:
            cause = Cause.read(answer.body["error"])
            raise Declined(cause, f"{self.peer.name}: {cause}")
        if "error" in answer.body:
            raise RefusedError(f"{self.peer.name}: {answer.text('error')}")
        return answer

    def send(self, request: int, phase: Phase, depth: int, message: Sequence[Tensor]) -> None:
        """One message of a party program."""
        self._send(Kind.DATA, tensor_bytes(message), request, phase, depth)

    def ping(self) -> None:
        with suppress(PartyError):
            self._send(Kind.PING, [])

    def _send(
        self,
        kind: Kind,
        parts: Sequence[bytes | memoryview],
        request: int = 0,
        phase: Phase = Phase.OFFLINE,
        depth: int = 0,
    ) -> None:
        length = sum(len(part) for part in parts)
        with self._writing:
            if self._reason is not None:
                raise self._lost(f"is not connected: {self._reason}")
            header = Header(kind, self._sent, length, request, phase, depth).pack()
            self._sent = (self._sent + 1) % SERIALS
            self.frame_bytes += HEADER.size + (0 if kind is Kind.DATA else length)
            if self._delayed is not None:
                self._delayed.put(b"".join([header, *parts]))
            else:
                joined = length <= _JOINED
                self._write([b"".join([header, *parts])] if joined else [header, *parts])

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        size = sum(len(part) for part in parts)
        try:
            self._wire.write(parts, time.monotonic() + self._frame_seconds(size))
        except PartyError as error:
            reason = "it takes no more data" if isinstance(error, Late) else str(error)
            self.close(reason)
            raise self._lost(f"is not connected: {reason}") from None

    def _lost(self, how: str) -> Stopped:
        """That the other side is not there. Which client or owner it was, no other party is told."""
        cause = Cause(Code.LOST, self.role) if self.role <= P2 else Cause(Code.GONE)
        return Stopped(cause, f"{self.peer.name} {how}")

    def _frame_seconds(self, size: int) -> float:
        return self._limits.frame_seconds + size / max(1.0, self._limits.least_rate)

    # --- receiving ---

    def _read(self) -> None:
        try:
            while True:
                self._read_frame()
        except FrameError as error:
            self._refuse(f"{error}")
            self.close(f"it sent {error}")
        except Late:
            self.close("it did not finish a frame in time")
        except PartyError as error:
            self.close(str(error))
        except Exception as error:  # a mistake of ours must not leave the others waiting
            self.close(mistake(error))
        finally:
            for call in list(self._calls.values()):
                call.reply.set_exception(self._lost(f"disconnected: {self._reason}"))
            self._wire.close()
            if self._delayed is not None:
                self._delayed.stop()
            self._handler.closed(self, self._reason or "")

    def _read_frame(self) -> None:
        raw = bytearray(HEADER.size)
        try:
            self._wire.wait(time.monotonic() + self._limits.silence_seconds)
        except Late:
            raise Closed(f"it was silent for {self._limits.silence_seconds:g} s") from None
        self._wire.read(memoryview(raw), time.monotonic() + self._limits.frame_seconds)
        header = Header.parse(raw, self._received, self.role)
        self._received = (self._received + 1) % SERIALS
        deadline = time.monotonic() + self._frame_seconds(header.length)
        if header.kind is Kind.DATA:
            self._data(self._handler.room(self, header), header.length, deadline)
            return
        self._bound(header)
        content = bytearray(header.length)
        self._wire.read(memoryview(content), deadline)
        if header.kind is not Kind.PING:
            self._control(header, Fields(decode(content)))

    def _bound(self, header: Header) -> None:
        """What is long: the plan where this side asked for it, and where an owner comes to push one."""
        long = False
        if header.kind is Kind.REPLY:
            if (call := self._calls.get(header.request)) is None:
                raise FrameError(f"a reply to call {header.request}, which waits for none")
            long = call.what == "plan"
        elif header.kind is Kind.CALL:
            long = self.role == OWNER and self.peer.hello.purpose == "control"
        if header.length > CONTROL_BYTES and not long:
            raise FrameError(f"a {header.kind.name} frame of {header.length} bytes, {CONTROL_BYTES} are allowed")

    def _data(self, room: Room, size: int, deadline: float) -> None:
        if room is not None:
            payload, deliver = room
            self._wire.read(payload.data, deadline)
            deliver(payload)
            return
        scratch = memoryview(bytearray(min(size, _DROPPED)))
        while size > 0:
            part = scratch[: min(size, _DROPPED)]
            self._wire.read(part, deadline)
            size -= len(part)

    def _control(self, header: Header, fields: Fields) -> None:
        if header.kind is Kind.CAST:
            self._handler.cast(self, header.request, fields)
        elif header.kind is Kind.CALL:
            if header.length > CONTROL_BYTES and fields.text("what", 32) != "offer":
                raise FrameError(f"a call of {header.length} bytes that offers no plan")
            with self._counting:  # the reader counts up, whoever answers counts down
                self._answering += 1
                if self._answering > _CALLS:
                    raise FrameError(f"more than {_CALLS} calls at once")
            self._handler.submit(lambda: self._answer(header.request, fields))
        elif header.kind is Kind.REPLY:
            if self._between and "error" in fields.body:
                Cause.read(fields.body["error"])
            self._calls.pop(header.request).reply.set_result(fields)
        elif header.kind is Kind.REFUSE:
            raise Closed(str(Cause.read(fields.body)) if self._between else f"it refused: {fields.text('reason')}")
        else:
            raise FrameError(f"a {header.kind.name} frame after the handshake")

    def _answer(self, number: int, fields: Fields) -> None:
        try:
            body = self._handler.answer(self, fields)
        except TacitError as error:
            body = {"error": str(error)[:1000]}
        except Exception as error:
            body = {"error": mistake(error)}
        reply = encode(body)
        if len(reply) > (PLAN_BYTES if fields.body.get("what") == "plan" else CONTROL_BYTES):
            told = f"the answer has {len(reply)} bytes, more than a reply may have"
            reply = encode({"error": Cause(Code.REFUSED).body() if self._between else told})
        with self._counting:
            self._answering -= 1
        with suppress(PartyError):
            self._send(Kind.REPLY, [reply], number)

    def _refuse(self, reason: str) -> None:
        body = Cause(Code.REFUSED).body() if self._between else {"reason": reason[:1000]}
        with suppress(PartyError):
            self._send(Kind.REFUSE, [encode(body)])

    def close(self, reason: str) -> None:
        """End the connection; the first reason counts."""
        with self._ended:
            if self._reason is None:
                self._reason = reason
        self._wire.stop()

    def finish(self, reason: str) -> None:
        """End the connection once the other side has everything that was sent."""
        with self._ended:
            if self._reason is None:
                self._reason = reason
        if self._delayed is not None:
            self._delayed.wait()
        self._wire.finish()

    def leave(self) -> None:
        """In a forked process: let go of the connection, which goes on in the other one and notices nothing."""
        self._wire.leave()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)


def mistake(error: Exception) -> str:
    """What is said of an error of ours: its kind and place. Its text could hold values."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"internal error ({type(error).__name__}{where})"


class Caller:
    """The handler of a side that only asks: an owner's push, a question for the status."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def beat(self, links: Mapping[int, Link], seconds: float) -> None:
        while not self.done.wait(seconds):
            for link in list(links.values()):
                link.ping()

    def cast(self, link: Link, request: int, fields: Fields) -> None:
        raise FrameError("control that nobody has asked for")

    def answer(self, link: Link, fields: Fields) -> dict[str, Any]:
        raise RefusedError("this side takes no calls")

    def room(self, link: Link, header: Header) -> tuple[Payload, Callable[[Payload], None]]:
        raise FrameError("data that nobody has asked for")

    def closed(self, link: Link, reason: str) -> None:
        return None

    def submit(self, work: Callable[[], None]) -> None:
        work()


class _Delay:
    """An emulated link: frames leave in order, after those before them, their own bytes and the latency."""

    def __init__(self, model: LinkModel, write: Callable[[Sequence[bytes | memoryview]], None]) -> None:
        self._model = model
        self._write = write
        self._free_at = 0.0
        self._left = 0  # frames that wait
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[float, bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="emulated link", daemon=True).start()

    def put(self, frame: bytes) -> None:
        """One caller at a time."""
        self._free_at = max(time.monotonic(), self._free_at) + len(frame) / self._model.bytes_per_second
        with self._lock:
            self._left += 1
        self._queue.put((self._free_at + self._model.latency_seconds, frame))

    def stop(self) -> None:
        self._queue.put(None)

    def wait(self) -> None:
        """Until everything is on its way."""
        while self._left and time.monotonic() < self._free_at + self._model.latency_seconds + 1.0:
            time.sleep(0.005)

    def _run(self) -> None:
        while (found := self._queue.get()) is not None:
            due, frame = found
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                self._write([frame])
            except PartyError:
                return
            with self._lock:
                self._left -= 1
