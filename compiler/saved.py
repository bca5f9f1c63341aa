"""A saved model: the public plan and the owner's weights, two files that belong together at every moment.

The weights name their plan by its digest. Both are written beside their places and renamed, the weights first: from
that moment on the new model is there, as its plan is found under either of its names. Whoever comes to the folder after
a save that was killed finds the old model or the new one, and puts its plan in place.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tacit.ir.errors import PlanError
from tacit.ir.files import PRIVATE, PUBLIC, named_errors, sync_folder, write_new
from tacit.ir.plan import Plan

PLAN_FILE, WEIGHTS_FILE = "plan.txt", "weights.safetensors"
_LENGTH, _LONGEST_HEADER = 8, 100_000_000  # of a safetensors file, in bytes
_POLL = 0.05  # seconds


def save_model(folder: Path, plan: str, weights: bytes) -> None:
    """Both files, in place of what is there. Raises OSError with the name of a file, the old model then untouched."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        _settle(folder)
        try:
            _exchange(folder, plan.encode(), weights)
        except BaseException:
            _settle(folder)
            raise


def _exchange(folder: Path, plan: bytes, weights: bytes) -> None:
    files = [(folder / WEIGHTS_FILE, weights, PRIVATE), (folder / PLAN_FILE, plan, PUBLIC)]
    for path, content, mode in files:
        with named_errors(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            write_new(_beside(path), content, mode)
    sync_folder(folder)
    for path, _, _ in files:
        with named_errors(path):
            os.replace(_beside(path), path)
        sync_folder(folder)


def _settle(folder: Path) -> None:
    """Finish an exchange that was begun, if the weights are in their place already; else remove what is left of it.

    For whoever is alone in the folder.
    """
    plan, weights = folder / PLAN_FILE, folder / WEIGHTS_FILE
    _beside(weights).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        if _digest(_beside(plan).read_bytes()) == _plan_named_in(weights):
            os.replace(_beside(plan), plan)
        else:
            _beside(plan).unlink()


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file, or in the folder of a saved model; raises PlanError, or OSError."""
    place = Path(path)
    if not place.is_dir():
        return _parsed(place, place.read_bytes())
    return _plan(place, _plan_named_in(place / WEIGHTS_FILE))


def read_model(folder: Path) -> tuple[Plan, bytes]:
    """The plan and the bytes of the weights of one save, also while another one goes on. Raises PlanError, or OSError.

    Whether they belong together is for the caller to see.
    """
    path = folder / WEIGHTS_FILE
    while True:
        if not path.exists():
            read_plan(folder / PLAN_FILE)  # if all is missing, that is the plan too
        with path.open("rb") as opened:
            content = opened.read()
            wanted = metadata(content).get("plan", "")
            plan = _plan(folder, wanted)
            # Where others were put in the place of these weights meanwhile, that was their plan.
            if plan.digest == wanted or os.path.samestat(os.fstat(opened.fileno()), path.stat()):
                return plan, content


def metadata(weights: bytes) -> dict[str, str]:
    """What a weights file says of itself; nothing where it is damaged."""
    size = int.from_bytes(weights[:_LENGTH], "little")
    try:
        found = json.loads(weights[_LENGTH : _LENGTH + size])["__metadata__"]
        return {str(key): str(value) for key, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _plan(folder: Path, wanted: str) -> Plan:
    """The plan of that digest, under the one name or the other; or else what lies where a plan belongs.

    The name that it has first is looked up first: a plan may be renamed in between.
    """
    place = folder / PLAN_FILE
    with suppress(FileNotFoundError):
        raw = _beside(place).read_bytes()
        if _digest(raw) == wanted:
            with suppress(OSError), _alone_in(folder, patience=0):  # of a save that was killed, if nobody is at it
                _settle(folder)
            return _parsed(place, raw)
    return _parsed(place, place.read_bytes())


def _parsed(path: Path, raw: bytes) -> Plan:
    try:
        return Plan.parse(raw.decode())
    except UnicodeDecodeError:
        raise PlanError(f"{path} is not a plan: it is not a text file") from None


def _plan_named_in(weights: Path) -> str:
    """The digest of the plan that these weights belong to; "" where that cannot be told."""
    try:
        with weights.open("rb") as opened:
            head = opened.read(_LENGTH)
            size = min(int.from_bytes(head, "little"), _LONGEST_HEADER)
            return metadata(head + opened.read(size)).get("plan", "")
    except OSError:
        return ""


def _digest(plan: bytes) -> str:
    return hashlib.sha256(plan).hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".new")


@contextmanager
def _alone_in(folder: Path, *, patience: float = 60.0) -> Iterator[None]:
    """No other save goes on in this folder; raises TimeoutError after `patience` seconds.

    The lock ends with the process that holds it. Where a file system has none, nobody waits.
    """
    opened, until = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), time.monotonic() + patience
    try:
        while not _locked(opened):
            if time.monotonic() >= until:
                raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked", str(folder))
            time.sleep(_POLL)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_UN)  # closing is not enough: a process that was forked meanwhile has it, too
        os.close(opened)


def _locked(opened: int) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
