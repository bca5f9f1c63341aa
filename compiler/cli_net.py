"""The commands of networked parties: deploy, party, owner, client, deal, status."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tacit.cli_shared import (
    MOST_BATCH,
    AsJson,
    Failure,
    answer_object,
    answer_text,
    clear_errors,
    read_array,
    save_answer,
)
from tacit.ir.cost import P0, ROLES
from tacit.ir.files import require_folder, require_place
from tacit.progress import track, waiting

if TYPE_CHECKING:
    from tacit.runtime.net.deployment import Deployment, Identity

DeploymentFile = Annotated[Path, typer.Option("--deployment", metavar="FILE", help="deployment.toml.")]
IdentityFolder = Annotated[Path, typer.Option("--identity", metavar="DIR", help="Folder with cert.pem and key.pem.")]

_STEPS = 20  # of a progress bar: each is a connection of its own

deploy = typer.Typer(help="Make the files of a deployment.", no_args_is_help=True)
owner = typer.Typer(help="What the model owner does.", no_args_is_help=True)
client = typer.Typer(help="What a client does.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(deploy, name="deploy")
    app.add_typer(owner, name="owner")
    app.add_typer(client, name="client")
    app.command("party")(party_command)
    app.command("deal")(deal_command)
    app.command("status")(status_command)


def _read(deployment: Path, identity: Path) -> tuple[Deployment, Identity]:
    from tacit.runtime.net.deployment import load_deployment, load_identity

    found = load_deployment(deployment)
    return found, load_identity(found, identity)


@deploy.command("init")
def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where deployment.toml and identities go.")],
    address: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Where P0, P1 and P2 are reached; give it three times."),
    ] = None,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65533, help="Loopback port of P0's metrics, P1 and P2 the next two; 0: none.")
    ] = 0,
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="How many client identities.")] = 1,
    network: Annotated[str, typer.Option(help="Emulate between processes: virtual (nothing), lan or wan.")] = "virtual",
    plan: Annotated[Path | None, typer.Option(help="Pin this plan.txt: no other may be pushed.")] = None,
) -> None:
    """Write a deployment for trying out: a private authority and one certificate for each member."""
    from tacit.runtime.net.certificates import init_deployment
    from tacit.runtime.net.deployment import parse_place
    from tacit.saved import read_plan

    with clear_errors():
        require_folder(folder)
        places = [parse_place(text) for text in address or ["127.0.0.1:7600", "127.0.0.1:7601", "127.0.0.1:7602"]]
        if len(places) != 3:
            raise Failure(f"--address is given once for each of P0, P1 and P2, not {len(places)} times")
        ports = [("127.0.0.1", metrics_port + i) if metrics_port else None for i in range(3)]
        digest = ""
        if plan is not None:
            digest = read_plan(plan).digest
        made = init_deployment(folder, places, metrics=ports, clients=clients, network=network, plan=digest)
    for member in made.members:
        where = f"{member.address[0]}:{member.address[1]}" if member.address else ""
        typer.echo(f"{member.name:<8} {ROLES[member.role]:<7} {folder / member.name}  {where}".rstrip())


def party_command(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="P0, P1 or P2.")],
    deployment: DeploymentFile,
    identity: IdentityFolder,
    state: Annotated[Path | None, typer.Option(help="Folder for the party's state; default: beside the key.")] = None,
) -> None:
    """Run a party until SIGTERM or SIGINT; the log goes to stderr, one JSON object a line."""
    from tacit.runtime.memory import keep_memory_private
    from tacit.runtime.net.server import PartyServer

    with clear_errors():
        found, who = _read(deployment, identity)
        if ROLES[who.member.role] != role:
            raise Failure(f"{identity} is the identity of {who.member.name}, not of {role}")
        keep_memory_private()
        server = PartyServer(found, who, state)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        server.start()
        while not stop.wait(0.2):
            pass  # awake now and then: a signal that another thread took is handled by this one
        server.drain()
    if sys.stderr is not None:
        sys.stderr.flush()
    os._exit(0)  # a worker whose deadline has yet to pass does not hold up the end


@owner.command("push")
def push_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="What `tacit compile` wrote.")],
    deployment: DeploymentFile,
    identity: IdentityFolder,
) -> None:
    """Share a saved model's weights between P0 and P1, once; returns when requests are served."""
    from tacit.remote import push

    with clear_errors(), waiting("sharing the weights"):
        sent = push(deployment, identity, model)
    typer.echo(f"pushed    {model}: {sent:,} bytes of shares; the parties serve it")


@client.command("predict")
def predict_command(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT.npy", help="One array for each input of the model.")],
    deployment: DeploymentFile,
    identity: IdentityFolder,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File for the answer: .npy; .npz where there are several."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="The plan.txt that the parties have to run.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds; default: the deployment's limit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send shares of an input, and put the shares of the answer together."""
    from tacit.arguments import in_order, slots_of
    from tacit.remote import connect
    from tacit.saved import read_plan

    with clear_errors():
        if output is not None:
            require_place(output)
        pinned = None if plan is None else read_plan(plan)
        arrays = [read_array(path) for path in inputs]
        with connect(deployment, identity, plan=pinned) as remote, waiting("encrypted inference"):
            answer = remote.predict(*in_order(slots_of(remote.plan), arrays), timeout=timeout)
            measured = remote.last_run
        if output is not None:
            save_answer(output, answer)
    assert measured is not None
    if as_json:
        told: dict[str, Any] = {"answer": answer_object(answer)} if output is None else {"output": str(output)}
        typer.echo(json.dumps(told | measured.__dict__))
        return
    typer.echo(f"written   {output}" if output else answer_text(answer))
    typer.echo(f"rounds    {measured.rounds}")
    typer.echo(f"seconds   {measured.seconds:.4f}")


def deal_command(
    deployment: DeploymentFile,
    identity: IdentityFolder,
    count: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="How many batches.")] = 1,
    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Elements in each.")] = 1,
) -> None:
    """Have P2 deal material ahead of time, as a party or the owner."""
    from tacit.runtime.net.client import ask

    with clear_errors():
        found, who = _read(deployment, identity)
        each = -(-count // _STEPS)
        sizes = [min(each, count - done) for done in range(0, count, each)]
        for size in track(sizes, f"dealing {count} of batch {batch}"):
            answer = ask(found, who, P0, "deal", found.limits.request_seconds * size, count=size, batch=batch)
            level = answer.integer("level", 0, 1 << 62)
    typer.echo(f"dealt     {count} of batch {batch}; {level} in the store")


def status_command(deployment: DeploymentFile, identity: IdentityFolder, as_json: AsJson = False) -> None:
    """What each party says of itself; exit code 1 if one is not there."""
    from tacit.ir.errors import TacitError
    from tacit.runtime.net.client import everywhere

    with clear_errors():
        found, who = _read(deployment, identity)
        answers = everywhere(found, who, "status", found.limits.handshake_seconds)
    if as_json:
        told = {ROLES[r]: {"error": str(a)} if isinstance(a, TacitError) else a.body for r, a in answers.items()}
        typer.echo(json.dumps(told))
    else:
        for rank, answer in answers.items():
            typer.echo(_status_text(ROLES[rank], answer if isinstance(answer, TacitError) else answer.body))
    if any(isinstance(answer, TacitError) for answer in answers.values()):
        raise typer.Exit(1)


def _status_text(role: str, answer: Exception | dict[str, Any]) -> str:
    if isinstance(answer, Exception):
        return f"{role}  {answer}"
    figures = answer.get("figures", {})
    ended = {k.split("=")[1][:-1]: int(v) for k, v in figures.items() if k.startswith("tacit_requests_total{")}
    parts = [f"{role}  {answer['state']}", f"plan {answer['plan'][:12] or 'none'}"]
    parts += [f"session {answer['session'][:8] or 'none'}"]
    if "connected" in answer:
        parts += [f"connected to {', '.join(answer['connected']) or 'nobody'}"]
        parts += [f"{count} {outcome}" for outcome, count in ended.items()]
        parts += (
            [f"store {', '.join(f'{n} of batch {b}' for b, n in answer['store'].items())}"] if answer["store"] else []
        )
    return "; ".join(parts)


def bench_processes(model: str, batch: int, network: str, runs: int, as_json: bool) -> None:
    """`tacit bench --processes`."""
    from tacit.bench_net import bench_net, text

    with clear_errors():
        found = bench_net(model, batch=batch, network=network, runs=runs)
    typer.echo(json.dumps(found.__dict__) if as_json else text(found))
