"""`tacit run`: encrypted inference among virtual parties."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tacit.arguments import in_order, slots_of
from tacit.cli_model import load_model
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
from tacit.ir.files import require_place
from tacit.runtime.session import Run
from tacit.secure import Secure, check_inputs, load
from tacit.structure import together


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command("run")(run)
    app.command("accuracy")(accuracy)


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
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", "-n", min=1, help="Run in batches of this size, each dealt while the one before is online."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encrypted inference among three virtual parties in this process."""
    with clear_errors():
        if sum((check, trace is not None, batch is not None)) > 1:
            raise Failure("--check, --trace and --batch are runs of their own: give one of them")
        for place in filter(None, (output, trace)):
            require_place(place)
        secure = load(folder)
        arrays = [read_array(path) for path in [*inputs, *([targets] if targets else [])]]
        arguments = in_order(slots_of(secure.plan), arrays)
        if batch is not None:
            answer, runs = _in_batches(secure, arrays, batch)
        elif trace is not None:
            answer, runs = secure.trace(*arguments, trace), [secure.last_run]
        else:
            answer, runs = secure.check(*arguments) if check else secure(*arguments), [secure.last_run]
        if output is not None:
            save_answer(output, answer)
    _print_run(secure, answer, [run for run in runs if run is not None], output, check, as_json)


def accuracy(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `tacit compile` wrote.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `tacit compile`. Loading it runs its code.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT.npy", help="One array for each input of the model.")],
    targets: Annotated[Path | None, typer.Option(help="The true classes (.npy).")] = None,
    as_json: AsJson = False,
) -> None:
    """How a plan does on a data set, beside the float model, in the clear: what to run before going live."""
    with clear_errors():
        secure = load(folder)
        arrays = [read_array(path) for path in inputs]
        slots = slots_of(secure.plan)
        arguments = in_order(slots[:-1] if secure.plan.reveal == "correct" else slots, arrays)
        classes = None if targets is None else read_array(targets)
        x = arguments[0] if len(arguments) == 1 else arguments
        found = secure.accuracy(x, classes, model=load_model(model))
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else str(found))


def _in_batches(secure: Secure, arrays: Sequence[torch.Tensor], size: int) -> tuple[Any, list[Run | None]]:
    """All answers as one, and what every batch measured; inputs that do not fit are refused before the first."""
    slots = slots_of(secure.plan)
    check_inputs(secure.plan, in_order(slots, arrays))
    answers, runs = [], []
    batches = zip(*(torch.split(x, size) for x in arrays), strict=True)
    for answer in secure.stream([in_order(slots, batch) for batch in batches]):
        answers.append(answer)
        runs.append(secure.last_run)
    join = sum if secure.plan.reveal == "correct" else torch.cat
    return together(answers, join), runs


def _print_run(
    secure: Secure, answer: Any, runs: Sequence[Run], output: Path | None, checked: bool, as_json: bool
) -> None:
    added = ("batch", "rounds", "online_bytes", "offline_bytes", "online_seconds", "offline_seconds")
    figures = {key: sum(getattr(run, key) for run in runs) for key in added}
    figures["batches"] = len(runs)
    figures["session_bytes"] = secure.session().weight_meter.bytes
    if as_json:
        told: dict[str, Any] = {"answer": answer_object(answer)} if output is None else {"output": str(output)}
        typer.echo(json.dumps(told | {"checked": checked} | figures))
        return
    typer.echo(f"written   {output}" if output else answer_text(answer))
    if checked:
        typer.echo("checked   every line equals the clear oracle, bit for bit")
    typer.echo(totals_text(figures))
    several = f", the sums of {len(runs)} batches" if len(runs) > 1 else ""
    typer.echo(f"seconds   {figures['online_seconds']:.4f} online, {figures['offline_seconds']:.4f} offline{several}")
