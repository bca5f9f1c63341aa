"""Private files: of this user alone, never behind a symbolic link, on disk when a call returns."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tacit.ir.errors import DeploymentError
from tacit.ir.files import sync_folder

# Whoever may write where a file is expected could have us read, truncate or lock another one through a link, or wait
# at a pipe for ever.
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def open_folder(folder: Path) -> None:
    """Make it, and see to it that it is this user's alone; raises DeploymentError."""
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(folder.parent)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _SAFE)
    except OSError as error:
        raise _refused(folder, error, "a folder") from None
    try:
        _own(opened, folder, 0o700)
    finally:
        os.close(opened)


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a private file, its mode set to 0600; raises DeploymentError, FileNotFoundError."""
    try:
        opened = os.open(path, flags | _SAFE, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refused(path, error, "a file") from None
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise DeploymentError(f"{path} is not a file")
        _own(opened, path, 0o600)
    except BaseException:
        os.close(opened)
        raise
    return opened


def read_file(path: Path) -> bytes:
    """Raises DeploymentError, FileNotFoundError."""
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as opened:
        return opened.read()


def write_file(path: Path, raw: bytes) -> None:
    """In one step, on disk when it returns, for nobody but the owner of the process to read."""
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as out:
        try:
            out.write(raw)
            out.flush()
            os.fdatasync(out.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    os.replace(temporary, path)
    sync_folder(path.parent)


def _own(opened: int, path: Path, mode: int) -> None:
    found = os.fstat(opened)
    if found.st_uid != os.geteuid():
        raise DeploymentError(f"{path} belongs to user {found.st_uid}, not to the one who runs this party")
    if stat.S_IMODE(found.st_mode) != mode:
        os.fchmod(opened, mode)


def _refused(path: Path, error: OSError, what: str) -> DeploymentError:
    if path.is_symlink():
        return DeploymentError(f"{path} is a symbolic link, where {what} of this party's own has to be")
    return DeploymentError(f"{path} cannot be opened: {error.strerror}")
