"""What the commands share: errors as one message, arrays from files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from tacit.diff import aligned
from tacit.ir.errors import TacitError
from tacit.ir.files import write_whole
from tacit.ir.plan import PlanCost
from tacit.structure import named_leaves

PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="The folder of a compiled model, or its plan.txt.")]
_PRINTED = 1000  # longer answers are abbreviated on the screen
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


def save_answer(path: Path, answer: Any) -> None:
    """A tensor as .npy, a structure of tensors as .npz with an array for each, named after its place."""
    arrays = {name: value.numpy() for name, value in named_leaves(answer).items()}
    out = io.BytesIO()
    if list(arrays) == [""]:
        np.save(out, arrays[""], allow_pickle=False)
    else:
        np.savez(out, **arrays)
    write_whole(path, out.getvalue())


def answer_text(answer: Any) -> str:
    """The numbers for people, abbreviated where they are many."""
    arrays = {name: value.numpy() for name, value in named_leaves(answer).items()}
    shown = {name: np.array2string(value, threshold=_PRINTED) for name, value in arrays.items()}
    return "\n".join(f"{name}:\n{text}" if name else text for name, text in shown.items())


def answer_object(answer: Any) -> Any:
    """The numbers for programs: a list, or one by each name."""
    lists = {name: value.tolist() for name, value in named_leaves(answer).items()}
    return lists[""] if list(lists) == [""] else lists


def totals(cost: PlanCost) -> dict[str, int]:
    return {
        "batch": cost.batch,
        "rounds": cost.rounds,
        "online_bytes": cost.online_bytes,
        "offline_bytes": cost.offline_bytes,
        "session_bytes": cost.session_bytes,
    }


def totals_text(totals: Mapping[str, Any]) -> str:
    return (
        f"rounds    {totals['rounds']}\n"
        f"bytes     {totals['online_bytes']:,} online, {totals['offline_bytes']:,} offline "
        f"for a batch of {totals['batch']}; {totals['session_bytes']:,} once per session"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: range) -> str:
    """Aligned columns, numbers to the right."""
    return "\n".join(aligned([header, *rows], numbers=numbers))


def measured_times(path: Path, batch: int) -> dict[str, float]:
    """Seconds from what `tacit run --json` or `tacit bench --json` printed, for a batch of that size."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["batch"] != batch or told.get("batches", 1) != 1:
            raise Failure(f"{path} was measured with another batch than {batch}: give the size of its one with --batch")
        return {phase: float(told.get(f"{phase}_seconds", told.get(f"{phase}_s"))) for phase in ("offline", "online")}
    except (ValueError, TypeError, AttributeError, KeyError):
        raise Failure(f"{path} is not what `tacit run --json` or `tacit bench --json` prints") from None
