"""The command line: compile a model, show a plan, tell its cost, run it, serve it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import typer

from tacit import cli_bench, cli_compile, cli_cost, cli_net, cli_run, cli_show
from tacit.cli_shared import INTERRUPTED, TERMINATED, Terminated

app = typer.Typer(
    help="Compile PyTorch models into plans for secure three-party inference, look at them, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (cli_compile, cli_show, cli_cost, cli_run, cli_bench, cli_net):
    group.register(app)


def main() -> None:
    """The console script `tacit`. SIGTERM ends a command as Ctrl-C does, which undoes what was begun."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            _leave(end.code)
        raise
    except OSError as error:  # stdout cannot be written to, and would not be when the interpreter ends, either
        typer.echo(f"tacit: {error}", err=True)
        _leave(1)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _leave(code: int) -> NoReturn:
    """At once: threads that are in the middle of a computation are not waited for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there may be none, or nobody who reads it
            stream.flush()
    os._exit(code)
