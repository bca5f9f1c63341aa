"""`tacit run`: encrypted inference among virtual parties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tacit.cli_shared import (
    AsJson,
    Failure,
    answer_object,
    answer_text,
    clear_errors,
    read_array,
    save_answer,
    totals_text,
)
from tacit.secure import Secure, load


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command("run")(run)


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `tacit compile` wrote.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT.npy", help="One array for each input of the model.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File for the answer: .npy; .npz where there are several."),
    ] = None,
    targets: Annotated[Path | None, typer.Option(help="The classes (.npy) to count, for reveal=correct.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every line with the clear oracle, bit for bit.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what each party did when, for ui.perfetto.dev.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encrypted inference among three virtual parties in this process."""
    with clear_errors():
        secure = load(folder)
        arrays = [read_array(path) for path in [*inputs, *([targets] if targets else [])]]
        if check and trace is not None:
            raise Failure("--check and --trace are two runs: give one of them")
        if trace is not None:
            answer = secure.trace(*arrays, trace)
        else:
            answer = secure.check(*arrays) if check else secure(*arrays)
        if output is not None:
            save_answer(output, answer)
    _print_run(secure, answer, output, check, as_json)


def _print_run(secure: Secure, answer: Any, output: Path | None, checked: bool, as_json: bool) -> None:
    measured, session = secure.last_run, secure.session()
    assert measured is not None
    figures = {
        "batch": measured.batch,
        "rounds": measured.rounds,
        "online_bytes": measured.online_bytes,
        "offline_bytes": measured.offline_bytes,
        "session_bytes": session.weight_meter.bytes,
        "online_seconds": measured.online_seconds,
        "offline_seconds": measured.offline_seconds,
    }
    if as_json:
        told: dict[str, Any] = {"answer": answer_object(answer)} if output is None else {"output": str(output)}
        typer.echo(json.dumps(told | {"checked": checked} | figures))
        return
    typer.echo(f"written   {output}" if output else answer_text(answer))
    if checked:
        typer.echo("checked   every line equals the clear oracle, bit for bit")
    typer.echo(totals_text(figures))
    typer.echo(f"seconds   {measured.online_seconds:.4f} online, {measured.offline_seconds:.4f} offline")
