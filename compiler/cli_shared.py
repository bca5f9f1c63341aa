"""What the commands share: errors as one message, arrays from files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from tacit.ir.errors import TacitError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Failure(Exception):
    """What a command says before it exits with code 1."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """One message on stderr and exit code 1 for everything a user can run into."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (TacitError, Failure) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return
    typer.echo(f"tacit: {message}", err=True)
    raise typer.Exit(1)


def read_array(path: Path) -> torch.Tensor:
    """A plain .npy array as a tensor; nothing in the file is ever executed."""
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise ValueError
    except (ValueError, EOFError, MemoryError):
        raise Failure(f"{path} is not a .npy file with an array of numbers") from None
    native = array.astype(np.int64) if array.dtype.kind in "iu" else array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
