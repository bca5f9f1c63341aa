"""`tacit cost`: rounds, bytes and randomness before anything runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tacit.cli_shared import AsJson, PlanPath, clear_errors, table, totals, totals_text
from tacit.compare import compare_plans, comparison_text, prediction_text
from tacit.ir.plan import NodeCost, Plan, PlanCost
from tacit.saved import read_plan


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command("cost")(cost)


def cost(
    plan: PlanPath,
    batch: Annotated[int, typer.Option(min=1, help="Elements in the batch.")] = 1,
    requirements: Annotated[bool, typer.Option("--requirements", help="List the randomness consumed.")] = False,
    network: Annotated[
        str | None, typer.Option(help="Predict the time on virtual, lan, wan, or as in rtt=40ms,rate=350Mbit.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="What PLAN costs more or less than OTHER, layer by layer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rounds and bytes of a plan, per op and per party, as they will be counted on the wire."""
    with clear_errors():
        found = read_plan(plan)
        other = None if compare is None else read_plan(compare)
        total = found.cost(batch=batch, network=network)
    if other is not None:
        difference = compare_plans(other, found, batch=batch, network=network)
        typer.echo(json.dumps(dataclasses.asdict(difference)) if as_json else comparison_text(difference))
        return
    if as_json:
        typer.echo(json.dumps(_cost_object(found, total) | (_needs_object(found, batch) if requirements else {})))
        return
    rows = [
        [f"%{r.name}", r.op, _rounds_text(r.start, r.cost.rounds, r.session), *_phases(r), r.path] for r in total.per_op
    ]
    typer.echo(table(["line", "op", "rounds", "online", "offline", "session", "module"], rows, numbers=range(2, 6)))
    typer.echo("")
    parties = [
        [party, *(f"{sent[k]:,}" for k in ("online", "offline", "session"))] for party, sent in total.per_party.items()
    ]
    typer.echo(table(["bytes sent by", "online", "offline", "session"], parties, numbers=range(1, 4)))
    if requirements:
        typer.echo("")
        needs = [
            [
                f"%{r.node}",
                r.kind,
                r.item.element.name,
                "x".join(map(str, r.shape)),
                f"{r.count:,}",
                *(f"{b:,}" for b in r.bytes_per_party.values()),
            ]
            for r in found.requirements(batch=batch)
        ]
        header = ["line", "randomness", "of", "shape", "count", "bytes at P0", "at P1", "at P2"]
        typer.echo(table(header, needs, numbers=range(4, 8)))
    typer.echo("")
    typer.echo(totals_text(totals(total)))
    if total.prediction is not None:
        typer.echo(prediction_text(total.prediction))


def _rounds_text(start: int, rounds: int, session: bool) -> str:
    if session or not rounds:
        return ""
    return str(start + 1) if rounds == 1 else f"{start + 1}-{start + rounds}"


def _phases(row: NodeCost) -> list[str]:
    """Bytes online, offline and per session; nothing where there are none."""
    spent = row.cost
    figures = (0, 0, row.total_bytes) if row.session else (spent.online_bytes, spent.offline_bytes, 0)
    return [f"{size:,}" if size else "" for size in figures]


def _cost_object(plan: Plan, total: PlanCost) -> dict[str, Any]:
    per_op = [
        {
            "line": r.name,
            "op": r.op,
            "path": r.path,
            "session": r.session,
            "start": r.start,
            "rounds": r.cost.rounds,
            "online_bytes": r.cost.online_bytes,
            "offline_bytes": r.cost.offline_bytes,
        }
        for r in total.per_op
    ]
    return {
        "name": plan.name,
        "digest": plan.digest,
        **totals(total),
        "per_op": per_op,
        "per_party": total.per_party,
    } | ({} if total.prediction is None else {"prediction": dataclasses.asdict(total.prediction)})


def _needs_object(plan: Plan, batch: int) -> dict[str, Any]:
    return {
        "requirements": [
            {
                "line": r.node,
                "kind": r.kind,
                "element": r.item.element.name,
                "shape": list(r.shape),
                "count": r.count,
                "bytes_per_party": r.bytes_per_party,
            }
            for r in plan.requirements(batch=batch)
        ]
    }
