"""`tacit show`: a plan on the screen, with colours where that is a terminal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.text import Text
from rich.theme import Theme

from tacit.accuracy import Accuracy
from tacit.cli_shared import AsJson, Failure, PlanPath, clear_errors, measured_times
from tacit.diff import ranges_text
from tacit.ir.files import require_place, write_whole
from tacit.ir.plan import Plan
from tacit.ir.view.page import page
from tacit.saved import read_plan


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command("show")(show)


class _PlanHighlighter(RegexHighlighter):
    base_style = "plan."
    highlights = [
        r"(?P<name>%\w+)",
        r"(?P<type>\w+<[^>]*>)",
        r" = (?P<op>[\w.]+)",
        r"(?P<path>@\S*)",
        r"(?P<figures>#.*)",
        r"^(?P<keyword>plan|seal)\b",
        r"^  (?P<keyword>return)\b",
    ]


_THEME = Theme(
    {
        "plan.name": "cyan",
        "plan.type": "green",
        "plan.op": "bold",
        "plan.path": "magenta",
        "plan.figures": "dim",
        "plan.keyword": "bold blue",
    }
)


def show(
    plan: PlanPath,
    ranges: Annotated[bool, typer.Option("--ranges", help="The range of every line, and the bits left above.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report, one page that needs no network.")
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the errors of its approximated functions (.png, .svg)."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --html: elements in the batch.")] = 1,
    network: Annotated[str, typer.Option(help="With --html: predict times on virtual, lan, wan or rtt=..,rate=..")] = (
        "virtual"
    ),
    measured: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --html: what `tacit run --json` or `bench --json` printed."),
    ] = None,
    accuracy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --html: what `tacit accuracy --json` printed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a plan, after checking every line of it; or write its report, or draw the errors of its functions."""
    with clear_errors():
        for place in filter(None, (html, errors)):
            require_place(place)
        found = read_plan(plan)
        times = None if measured is None else measured_times(measured, batch)
        seen = [] if accuracy is None else _read_accuracy(accuracy)
        if errors is not None:
            _draw_errors(found, errors)
            typer.echo(f"written   {errors}")
        if html is not None:
            prediction = found.predict(batch, network)
            write_whole(html, page(found, batch=batch, prediction=prediction, measured=times, accuracy=seen).encode())
            typer.echo(f"written   {html}")
        if html is not None or errors is not None:
            return
    if ranges:
        typer.echo(ranges_text(found))
        return
    console = Console(theme=_THEME, highlight=False)
    if as_json:
        typer.echo(json.dumps(_plan_object(found)))
    elif console.is_terminal:
        text = Text(str(found), end="", no_wrap=True)
        _PlanHighlighter().highlight(text)
        console.print(text, soft_wrap=True, end="")
    else:
        typer.echo(str(found), nl=False)


def _read_accuracy(path: Path) -> list[tuple[str, str]]:
    try:
        return Accuracy.read(json.loads(path.read_text(encoding="utf-8"))).lines()
    except (ValueError, TypeError, AttributeError, KeyError):
        raise Failure(f"{path} is not what `tacit accuracy --json` prints") from None


def _draw_errors(plan: Plan, file: Path) -> None:
    from tacit.approximation import curves, unknown_functions
    from tacit.plots import plot_errors, require_matplotlib

    require_matplotlib(file)
    found, unknown = list(curves(plan)), unknown_functions(plan)
    if not found:
        raise Failure("no function that is known here is approximated in this plan: there is nothing to draw")
    plot_errors(found, file)
    for name in unknown:
        typer.echo(f"left out  {name}: no function of that name is registered here")


def _plan_object(plan: Plan) -> dict[str, Any]:
    lines = [
        {
            "name": n.name,
            "type": str(n.type),
            "margin": n.margin,
            "op": n.op.name,
            "args": list(n.args),
            "attributes": {f.name: getattr(n.op, f.name) for f in dataclasses.fields(n.op)},  # type: ignore[arg-type]
            "session": n.op.session,
            "path": n.path,
        }
        for n in plan.nodes
    ]
    return {
        "name": plan.name,
        "level": plan.level.value,
        "protocol": plan.protocol,
        "reveal": plan.reveal,
        "ranges": plan.ranges,
        "lines": lines,
        "result": plan.result,
        "digest": plan.digest,
    }
