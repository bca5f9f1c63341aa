"""The command line: compile a model, show a plan, tell its cost, run it, serve it."""

from __future__ import annotations

import typer

from tacit import cli_bench, cli_compile, cli_cost, cli_net, cli_run, cli_show

app = typer.Typer(
    help="Compile PyTorch models into plans for secure three-party inference, look at them, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (cli_compile, cli_show, cli_cost, cli_run, cli_bench, cli_net):
    group.register(app)


def main() -> None:
    """The console script `tacit`."""
    app()
