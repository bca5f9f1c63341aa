"""Admission: who is there, in which role, with which protocol, plan and session. Refused on both sides with the reason.

After TLS the caller sends HELLO; the answer is HELLO or REFUSE; the caller then sends ACCEPT or REFUSE. Each side
compares what the other says with its own deployment: the certificate decides the role, and the role has to be the one
claimed and the one called.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tacit.ir.cost import P2, ROLES
from tacit.ir.errors import PartyError, RefusedError
from tacit.runtime.net.deployment import Deployment, Member
from tacit.runtime.net.frames import HEADER, VERSION, Fields, FrameError, Header, Kind, decode, encode
from tacit.runtime.net.wire import Wire

PURPOSES = ("link", "client", "control")  # between parties; for requests; for pushing, dealing and asking for status


@dataclass(frozen=True)
class Hello:
    """What a side says of itself. `plan`, `push` and `session` are empty where there is none yet."""

    purpose: str
    plan: str = ""
    push: str = ""
    session: str = ""

    def body(self, role: int, to: int) -> dict[str, object]:
        return {"version": VERSION, "role": ROLES[role], "to": ROLES[to]} | self.__dict__


@dataclass(frozen=True)
class Peer:
    """The other side of a connection, admitted."""

    member: Member
    hello: Hello

    @property
    def role(self) -> int:
        return self.member.role

    @property
    def name(self) -> str:
        return self.member.name


def dial(
    deployment: Deployment, tls: ssl.SSLContext, me: Member, rank: int, hello: Hello, seconds: float | None = None
) -> tuple[Wire, Peer]:
    """Connect to a party and be admitted; raises PartyError where it cannot be reached, RefusedError with a reason."""
    name, party = ROLES[rank], deployment.party(rank)
    assert party.address is not None
    deadline = time.monotonic() + (deployment.limits.handshake_seconds if seconds is None else seconds)
    try:
        sock = socket.create_connection(party.address, timeout=max(0.01, deadline - time.monotonic()))
    except OSError as error:
        raise PartyError(f"{name} cannot be reached at {party.address[0]}:{party.address[1]}: {_os(error)}") from None
    wire = None
    try:
        wire = Wire(sock, tls, server=False, deadline=deadline)
        found = deployment.pinned(wire.fingerprint())
        if found is None or found.role != rank:
            shown = "one that is not pinned" if found is None else f"that of {found.name}"
            reason = f"{name} was called, but the certificate shown is {shown}"
            _refuse(wire, 0, reason, deadline)
            raise RefusedError(reason)
        _send(wire, Kind.HELLO, 0, hello.body(me.role, rank), deadline)
        answer = _receive(wire, 0, rank, deadline)
        theirs = _check(answer, found, me.role, hello)
        if isinstance(theirs, str):
            _refuse(wire, 1, theirs, deadline)
            raise RefusedError(f"{name} does not fit: {theirs}")
        _send(wire, Kind.ACCEPT, 1, None, deadline)
        return wire, Peer(found, theirs)
    except PartyError as error:
        _close(wire)
        raise PartyError(f"{name}: {error}") from None
    except FrameError as error:
        _close(wire)
        raise PartyError(f"{name} sent {error}") from None
    except RefusedError as error:
        _close(wire)
        text = str(error)
        raise RefusedError(text if text.startswith(name) else f"{name} refused: {text}") from None


def admit(
    deployment: Deployment,
    tls: ssl.SSLContext,
    me: Member,
    sock: socket.socket,
    hello: Callable[[str], Hello],
    allowed: Callable[[Member, str], str],
) -> tuple[Wire, Peer]:
    """The listening side; `allowed` says why a member may not do what it came for, or nothing.

    Raises RefusedError with the reason that the other side was told, PartyError where it went away.
    """
    deadline = time.monotonic() + deployment.limits.handshake_seconds
    wire = Wire(sock, tls, server=True, deadline=deadline)
    try:
        found = deployment.pinned(wire.fingerprint())
        if found is None:
            raise RefusedError("the certificate is not pinned in the deployment")
        body = _receive(wire, 0, found.role, deadline)
        purpose = str(body.body.get("purpose", ""))
        mine = hello(purpose)
        theirs = _check(body, found, me.role, mine)
        if isinstance(theirs, str):
            raise RefusedError(theirs)
        if reason := allowed(found, purpose):
            raise RefusedError(reason)
        _send(wire, Kind.HELLO, 0, mine.body(me.role, found.role), deadline)
        _receive(wire, 1, found.role, deadline, Kind.ACCEPT)
        return wire, Peer(found, theirs)
    except (RefusedError, FrameError) as error:
        _refuse(wire, 0, str(error), deadline)
        _close(wire)
        raise RefusedError(str(error)) from None
    except PartyError:
        _close(wire)
        raise


def _check(fields: Fields, member: Member, me: int, mine: Hello) -> Hello | str:
    """The other side's HELLO, or why it does not fit."""
    version = fields.integer("version", 0, 1 << 31)
    if version != VERSION:
        return f"protocol version {version}, this is {VERSION}"
    role, to, purpose = (fields.text(key, 16) for key in ("role", "to", "purpose"))
    if role != ROLES[member.role]:
        return f"the certificate is that of {member.name}, whose role is {ROLES[member.role]}, not {role or 'nothing'}"
    if to != ROLES[me]:
        return f"this is {ROLES[me]}, not {to}"
    if purpose not in PURPOSES or purpose != mine.purpose:
        return f"unknown purpose '{purpose}'"
    plan, push, session = (fields.text(key, 64) for key in ("plan", "push", "session"))
    if plan and mine.plan and plan != mine.plan:
        return f"plan digest {plan[:16]}..., here it is {mine.plan[:16]}..."
    if purpose != "link" and session and mine.session and session != mine.session:
        return f"session {session[:16]}..., here it is {mine.session[:16]}..."
    return Hello(purpose, plan, push, session)


def permitted(me: int, member: Member, purpose: str) -> str:
    """Why a member may not open a connection of that purpose to party `me`, or nothing."""
    role = ROLES[member.role]
    if purpose == "link" and not (member.role <= P2 and member.role > me):
        return f"{role} may not speak as a party here"
    if purpose == "client" and (role != "client" or me == P2):
        return f"{role} may not send requests to {ROLES[me]}"
    return ""


def _send(wire: Wire, kind: Kind, serial: int, body: dict[str, object] | None, deadline: float) -> None:
    raw = b"" if body is None else encode(body)
    wire.write([Header(kind, serial, len(raw)).pack() + raw], deadline)


def _receive(wire: Wire, serial: int, role: int, deadline: float, kind: Kind = Kind.HELLO) -> Fields:
    raw = bytearray(HEADER.size)
    wire.read(memoryview(raw), deadline)
    header = Header.parse(raw, serial, role)
    if header.kind not in (kind, Kind.REFUSE):
        raise FrameError(f"a {header.kind.name} frame where {kind.name} is due")
    content = bytearray(header.length)
    wire.read(memoryview(content), deadline)
    fields = Fields(decode(content)) if content else Fields({})
    if header.kind is Kind.REFUSE:
        raise RefusedError(fields.text("reason"))
    return fields


def _refuse(wire: Wire, serial: int, reason: str, deadline: float) -> None:
    with suppress(PartyError):
        _send(wire, Kind.REFUSE, serial, {"reason": reason[:1000]}, deadline)


def _close(wire: Wire | None) -> None:
    if wire is not None:
        wire.close()


def _os(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
