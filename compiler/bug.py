"""What a failure of the compiler itself leaves behind: a folder to send with a report, without weights or inputs."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tacit.ir.errors import CompilerBug, TacitError
from tacit.ir.plan import Plan

Keep = Callable[[int, str, Plan], None]
_PACKAGES = ("tacit", "torch", "numpy", "numba", "networkx", "cryptography", "safetensors")
_LONGEST = 300
# Text of an exception may hold values; numbers that could be weights, and whatever stands in brackets, are left out.
_VALUES = re.compile(
    r"tensor\([^)]*\)|\[.*\]|[-+]?\d*\.\d[\d.]*(?:[eE][-+]?\d+)?|[-+]?\d{4,}|\d+[eE][-+]?\d+", re.DOTALL
)


@contextmanager
def reported(options: Mapping[str, Any]) -> Iterator[Keep]:
    """Errors that the user can mend pass through; any other becomes CompilerBug, and leaves a folder.

    Yields the function that remembers a plan by number and the pass that made it.
    """
    stages: list[tuple[int, str, Plan]] = []
    try:
        yield lambda number, name, plan: stages.append((number, name, plan))
    except (TacitError, MemoryError):
        raise
    except Exception as error:
        folder = _write(error, stages, options)
        last = traceback.extract_tb(error.__traceback__)[-1]
        after = f" after {stages[-1][1]}" if stages else " before the first pass"
        raise CompilerBug(
            f"the compiler itself failed{after}: {type(error).__name__} in {Path(last.filename).name}:{last.lineno}."
            f" That is a mistake in Tacit, not in the model. {folder} holds the environment, the graph after every pass"
            " and the traceback, without weights or inputs: please attach it to a report. The graphs show the"
            " architecture, so look at them first."
        ) from error


def _write(error: Exception, stages: list[tuple[int, str, Plan]], options: Mapping[str, Any]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tacit-bug-"))  # mode 0700
    (folder / "environment.txt").write_text(_environment(options))
    (folder / "traceback.txt").write_text(_traceback(error))
    for number, name, plan in stages:
        (folder / f"{number:02}_{name}.txt").write_text(_text(plan))
    return folder


def _text(plan: Plan) -> str:
    try:
        return str(plan)
    except Exception as error:  # a plan that cannot be printed may be what is wrong
        return f"this plan of {len(plan.nodes)} lines cannot be printed: {type(error).__name__}\n"


def _environment(options: Mapping[str, Any]) -> str:
    lines = [f"python {platform.python_version()}", f"system {platform.platform()}", f"cores {os.cpu_count()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} not installed as a package")
    return "\n".join([*lines, *(f"option {key}={value!r}" for key, value in options.items()), ""])


def _traceback(error: BaseException) -> str:
    """Files, lines and source; of messages only what cannot be a value."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        told = _VALUES.sub("#", str(cause))[:_LONGEST]
        parts.append("".join([*traceback.format_tb(cause.__traceback__), f"{type(cause).__name__}: {told}\n"]))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\nraised while handling or because of:\n\n".join(parts)
