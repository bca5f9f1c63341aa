"""`tacit bench`: networks measured, and other systems beside Tacit."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tacit.cli_net import bench_processes
from tacit.cli_shared import MOST_BATCH, AsJson, clear_errors, table
from tacit.ir.errors import shortened
from tacit.peers import INTERPRETERS


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(bench_app, name="bench")


class _BenchGroup(TyperGroup):
    """`bench MODEL` is short for `bench model MODEL`, so that `bench peers` can be a command beside it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else ["model", *args])


bench_app = typer.Typer(
    cls=_BenchGroup,
    help="Measure a network (`tacit bench MODEL`), or other systems beside Tacit.",
    no_args_is_help=True,
)


@bench_app.command("model")
def bench_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="mlp, lenet, a, b, c, d, alexnet, vgg16, resnet18, ...")
    ],
    batch: Annotated[int, typer.Option("--batch", "-n", min=1, max=MOST_BATCH, help="Images in a batch.")] = 1,
    network: Annotated[
        str, typer.Option(help="virtual, lan (0.2 ms, 5 Gbit/s) or wan (40 ms, 350 Mbit/s).")
    ] = "virtual",
    protocol: Annotated[str, typer.Option(help="The protocol suite: fused or securenn.")] = "fused",
    reveal: Annotated[str, typer.Option(help="What the client learns: logits or argmax.")] = "argmax",
    runs: Annotated[int, typer.Option(min=1, help="Measured runs, after two to warm up.")] = 7,
    per_op: Annotated[
        bool, typer.Option("--per-op", help="Also the seconds of work by line, phase and party.")
    ] = False,
    processes: Annotated[
        bool, typer.Option("--processes", help="Three party processes over TLS, beside virtual parties.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw time against batch, 1 up to --batch, and against network (.png, .svg)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time and bytes of one network with random weights, beside plaintext PyTorch in the same run."""
    from tacit.bench import bench, text

    if plot is not None:
        with clear_errors():
            from tacit.plots import plot_bench, require_matplotlib, sweep

            require_matplotlib(plot)
            plot_bench(sweep(model, most=batch, protocol=protocol, reveal=reveal, runs=runs), plot)
        typer.echo(f"written   {plot}")
        return
    if processes:
        bench_processes(model, batch, network, runs, as_json)
        return
    with clear_errors():
        found = bench(model, batch=batch, network=network, protocol=protocol, reveal=reveal, runs=runs, per_op=per_op)
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else text(found))


@bench_app.command("peers")
def bench_peers_command(
    models: Annotated[str, typer.Option(help="Networks, with commas between: mlp, lenet, a, b.")] = "mlp,lenet",
    batch: Annotated[
        list[str] | None,
        typer.Option("--batch", "-n", metavar="N", help="Images in a batch; several with commas. Default: 1 and many."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Measured runs, after a warm-up.")] = 5,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that a peer has for one row.")] = 600,
    crypten: Annotated[
        Path, typer.Option(metavar="PYTHON", help="An interpreter that has CrypTen; `make peers` makes one.")
    ] = INTERPRETERS["crypten"],
    spu: Annotated[
        Path, typer.Option(metavar="PYTHON", help="An interpreter that has SPU; `make peers` makes one.")
    ] = INTERPRETERS["spu"],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw time against batch (.png, .svg).")] = None,
    as_json: AsJson = False,
) -> None:
    """CrypTen and SPU beside Tacit, where they are installed: the same networks, inputs and answers, in one run."""
    from tacit.peers.compare import HEADER, Row, cells, compare

    def report(row: Row) -> None:
        told = row.problem or f"{row.ms_per_image:.3f} ms/image"
        typer.echo(f"{row.model}, batch {row.batch}, {row.system}: {told}", err=True)

    batches = [_count(size) for text in batch or [] for size in text.split(",")]
    with clear_errors():
        if plot is not None:
            from tacit.plots import plot_peers, require_matplotlib

            require_matplotlib(plot)
        rows = compare(
            [name.strip() for name in models.split(",")],
            batches=batches,
            runs=runs,
            interpreters={"crypten": crypten, "spu": spu},
            deadline_s=deadline,
            report=report,
        )
        if plot is not None:
            plot_peers(rows, plot)
            typer.echo(f"written   {plot}", err=True)
    if as_json:
        typer.echo(json.dumps({"runs": runs, "cores": os.cpu_count(), "rows": [dataclasses.asdict(r) for r in rows]}))
        return
    cells_of = [[row.model, str(row.batch), *cells(row)] for row in rows]
    typer.echo(table(["model", "batch", *HEADER], cells_of, numbers=range(3, 10)))


def _count(text: str) -> int:
    digits = text.strip()
    if not (
        digits.isascii() and digits.isdigit() and len(digits) <= len(str(MOST_BATCH)) and 0 < int(digits) <= MOST_BATCH
    ):
        raise typer.BadParameter(
            f"'{shortened(text)}' is not a number of images, from 1 to {MOST_BATCH:,}", param_hint="--batch"
        )
    return int(digits)
