"""Why a request or a call failed, as parties tell one another: a code of a closed list, never a text.

A text could say who asks, and P2 must not learn that. What a code leaves out (a client's name, what an error said) is
written where it happened: into the log of that party, and to the client by the parties that talk to it. The codes hold
no word by which a client could be known.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, TypeVar

from tacit.ir.cost import P2, ROLES
from tacit.ir.errors import PartyError, RefusedError, TacitError
from tacit.runtime.net.frames import Fields, FrameError


class Code(StrEnum):
    GONE = "gone"  # whoever asked went away, or what it brought is no longer there
    CANCELLED = "cancelled"
    MIXED = "mixed"  # two parties were told different things
    LATE = "late"
    LOST = "lost"  # the link to a party
    RENEWED = "renewed"
    ENDED = "ended"
    NO_SESSION = "no session"
    NO_MODEL = "no model"
    OTHER_MODEL = "other model"
    FULL = "full"
    FORBIDDEN = "forbidden"
    REFUSED = "refused"  # a frame
    FAILED = "failed"


class Fault(StrEnum):
    """What kind of error made a party fail."""

    FRAME = "frame"
    PROTOCOL = "protocol"
    DISK = "disk"
    INTERNAL = "internal"


_TEXTS = {
    Code.GONE: "the one who asked is gone",
    Code.CANCELLED: "the request was cancelled",
    Code.MIXED: "P0 and P1 were told different things",
    Code.LATE: "{role} did not answer in time",
    Code.LOST: "{role} disconnected",
    Code.RENEWED: "the session was renewed",
    Code.ENDED: "that request has ended",
    Code.NO_SESSION: "{role} is not in that session",
    Code.NO_MODEL: "{role} has no model yet; `tacit owner push` brings one",
    Code.OTHER_MODEL: "{role} holds another model; the owner has to push it again",
    Code.FULL: "{role} has too many requests under way",
    Code.FORBIDDEN: "{role} does not allow that call",
    Code.REFUSED: "it refused a frame",
    Code.FAILED: "{role} failed ({fault} error; its log says more)",
}
_ABOUT = {code for code, text in _TEXTS.items() if "{role}" in text}


class Cause(NamedTuple):
    """`role` is the party it is about, where it is about one; `fault` goes with FAILED alone."""

    code: Code
    role: int | None = None
    fault: Fault | None = None

    def body(self) -> dict[str, str]:
        """The fields of a control frame; `read` takes them."""
        found = {"code": str(self.code)}
        if self.role is not None:
            found["party"] = ROLES[self.role]
        if self.fault is not None:
            found["fault"] = str(self.fault)
        return found

    @staticmethod
    def read(body: object) -> Cause:
        """Raises FrameError for whatever is not on the list."""
        if not isinstance(body, dict):
            raise FrameError("a failure that is not an object")
        fields = Fields(body)
        code = _listed(Code, fields.text("code", 16))
        role = _party(fields.text("party", 2)) if code in _ABOUT else None
        fault = _listed(Fault, fields.text("fault", 16)) if code is Code.FAILED else None
        found = Cause(code, role, fault)
        if found.body() != body:
            raise FrameError("a failure that says more than its code")
        return found

    def __str__(self) -> str:
        role = "this party" if self.role is None else ROLES[self.role]
        return _TEXTS[self.code].format(role=role, fault=self.fault)


class Stopped(PartyError):
    """A request that cannot end well. Its text stays at this party and its client; others are told the cause."""

    def __init__(self, cause: Cause, text: str = "") -> None:
        super().__init__(text or str(cause))
        self.cause = cause


class Declined(RefusedError):
    """A party would not answer a call of another party."""

    def __init__(self, cause: Cause, text: str = "") -> None:
        super().__init__(text or str(cause))
        self.cause = cause


def cause_of(error: Exception, rank: int) -> Cause:
    """What party `rank` tells the other parties of an error, whose text stays here."""
    if isinstance(error, Stopped | Declined):
        code, role, _ = error.cause
        if role is not None and role > P2:  # a client, an owner: no other party's business which
            return Cause(Code.GONE)
        return error.cause._replace(role=rank) if code in _ABOUT and role is None else error.cause
    if isinstance(error, FrameError):
        return Cause(Code.FAILED, rank, Fault.FRAME)
    if isinstance(error, TacitError):
        return Cause(Code.FAILED, rank, Fault.PROTOCOL)
    return Cause(Code.FAILED, rank, Fault.DISK if isinstance(error, OSError) else Fault.INTERNAL)


def late(role: int, seconds: float) -> Stopped:
    return Stopped(Cause(Code.LATE, role), f"{ROLES[role]} did not answer within {seconds:g} s")


def not_connected(role: int) -> Stopped:
    return Stopped(Cause(Code.LOST, role), f"{ROLES[role]} is not connected")


_Listed = TypeVar("_Listed", bound=StrEnum)


def _listed(kind: type[_Listed], text: str) -> _Listed:
    try:
        return kind(text)
    except ValueError:
        raise FrameError(f"an unknown {kind.__name__.lower()} of a failure") from None


def _party(text: str) -> int:
    if text not in ROLES[: P2 + 1]:
        raise FrameError("'party' has to be P0, P1 or P2")
    return ROLES.index(text)
