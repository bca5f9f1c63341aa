"""What the commands share: errors as one message, arrays from files."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from tacit.ir.errors import TacitError, shortened
from tacit.ir.files import write_whole
from tacit.ir.plan import PlanCost
from tacit.structure import named_leaves
from tacit.tables import aligned

PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="The folder of a compiled model, or its plan.txt.")]
MOST_BATCH = 1 << 30
_OUT_OF_MEMORY = "can't allocate memory: "  # how PyTorch puts it, in a RuntimeError
_PRINTED = 1000  # longer answers are abbreviated on the screen
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


INTERRUPTED, TERMINATED = 130, 143  # exit codes, as shells have them


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as an interrupt does."""


class Failure(Exception):
    """What a command says before it exits with code 1."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """One message on stderr and exit code 1 for everything a user can run into; 130 or 143 for an interrupt."""
    code = 1
    try:
        yield
    except BrokenPipeError:
        raise
    except (TacitError, Failure) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and _OUT_OF_MEMORY not in str(error):
            raise
        message = f"there is not enough memory: {str(error).partition(_OUT_OF_MEMORY)[2] or error}"
    except KeyboardInterrupt as error:
        message, code = "interrupted", TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    except SystemExit as error:  # of the user's code: commands raise typer.Exit
        message = f"the model's code called sys.exit({'' if error.code is None else shortened(repr(error.code))})"
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        message = f"the model's code raised {type(error).__name__}: {shortened(str(error))}"
    else:
        return
    typer.echo(f"tacit: {message}", err=True)
    raise typer.Exit(code)


def read_array(path: Path) -> torch.Tensor:
    """A plain .npy array as a tensor: int64, bool, float32 or float64, the one that holds what the file does.

    Nothing in the file is ever executed.
    """
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, zipfile.BadZipFile):
        raise Failure(f"{path} is not a .npy file with an array of numbers, or a damaged one") from None
    if not isinstance(array, np.ndarray):
        raise Failure(f"{path} is not a .npy file with an array of numbers but an archive: give each array by itself")
    if array.dtype.kind not in "fiub":
        raise Failure(
            f"{path} is not a .npy file with an array of real numbers: it holds {shortened(str(array.dtype))}"
        )
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise Failure(f"{path} holds integers of 2^63 and more")
    widest = {"b": np.bool_, "f": np.float32 if array.dtype.itemsize <= 4 else np.float64}
    native = array.astype(widest.get(array.dtype.kind, np.int64))
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
