"""Files are written whole or not at all: beside their place first, then renamed into it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

PathLike = str | os.PathLike[str]
PUBLIC, PRIVATE = 0o666, 0o600  # the first one before the umask


def write_whole(path: PathLike, content: bytes, *, private: bool = False) -> None:
    """Replace the file in one step, or leave it as it was; raises OSError with its name.

    A file that is there keeps its mode, a symbolic link stays one; of a private file the mode is 0600 at every moment.
    What is no file, as a pipe or a terminal, is written to directly.
    """
    place = Path(path)
    with named_errors(place):
        found = place.stat() if place.exists() else None
        if found is not None and not stat.S_ISREG(found.st_mode):
            place.write_bytes(content)
            return
        target = Path(os.path.realpath(place))
        fresh = target.with_name(f".{os.urandom(6).hex()}.new")
        write_new(fresh, content, PRIVATE if private else PUBLIC)
        try:
            if found is not None and not private:
                fresh.chmod(stat.S_IMODE(found.st_mode))
            os.replace(fresh, target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def write_new(path: Path, content: bytes, mode: int) -> None:
    """A new file in the place of whatever has that name, on disk when this returns; if it fails, there is none."""
    path.unlink(missing_ok=True)
    try:
        with open(path, "xb", opener=partial(os.open, mode=mode)) as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def require_place(path: PathLike) -> None:
    """Raises OSError where `write_whole` would, as far as can be told: before anything long is done for the content."""
    place = Path(path)
    with named_errors(place):
        if place.is_dir():
            raise _error(errno.EISDIR)
        if not place.exists() or place.is_file():
            _require_writable(Path(os.path.realpath(place)).parent)


def require_folder(path: PathLike) -> None:
    """As `require_place`, for a folder that may have to be made."""
    folder = Path(path)
    with named_errors(folder):
        _require_writable(next(place for place in (folder, *folder.absolute().parents) if place.exists()))


def _require_writable(folder: Path) -> None:
    if not folder.exists():
        raise _error(errno.ENOENT)
    if not folder.is_dir():
        raise _error(errno.ENOTDIR)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _error(errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def sync_folder(folder: Path) -> None:
    """The names in it, on disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """An OSError tells of the file that was asked for: not of the one beside it, or, as of a full disk, of none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from None
