"""The commands that start from a model: compile, diff, zoo."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tacit.cli_model import advice_of_indices, as_arguments, examples_of, load_model, parse_example
from tacit.cli_shared import AsJson, Failure, clear_errors, read_array, totals, totals_text
from tacit.diff import TOLERANCE
from tacit.diff import diff as compare_layers
from tacit.diff import text as diff_text
from tacit.driver import compile as compile_model
from tacit.ir.errors import CompileError
from tacit.ir.files import require_folder
from tacit.ir.ops.roles import Input
from tacit.options import MARGIN
from tacit.saved import PLAN_FILE, WEIGHTS_FILE
from tacit.secure import Secure

Tensor = torch.Tensor
FracBits = Annotated[int | None, typer.Option(help="Fractional bits of activations; default: chosen.")]
MaxError = Annotated[
    float | None,
    typer.Option(metavar="X", help="How far polynomials may be from the functions they stand for; default: chosen."),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("compile")(compile_command)
    app.command("diff")(diff_command)
    app.command("zoo")(zoo_command)


def compile_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A .pt2 file, module:attribute, or path/to/file.py:attribute. Loading it runs its code.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for plan.txt and weights.safetensors.")],
    example: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="Shape of an input, as in 1x1x28x28, the batch first, or a .npy file; once for each input.",
        ),
    ] = None,
    reveal: Annotated[str, typer.Option(help="What the client learns: logits, argmax or correct.")] = "logits",
    protocol: Annotated[str, typer.Option(help="The protocol suite: fused or securenn.")] = "fused",
    input_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW HIGH", help="The range of the inputs; clients refuse others."),
    ] = None,
    frac_bits: FracBits = None,
    max_error: MaxError = None,
    ranges: Annotated[
        str,
        typer.Option(help="How large values can be: auto (proved where that fits, else measured), proved, measured."),
    ] = "auto",
    margin: Annotated[
        int | None,
        typer.Option(help="How many times what was seen fits a measured range; default: 4, and 16 where cheap."),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Inputs (.npy) on which value ranges are measured; once for each input."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the plan is called; default: the class of the model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL; write the public plan and the owner's weights."""
    given = [parse_example(text) for text in example or []]
    with clear_errors():
        require_folder(output)
        loaded = load_model(model)
        measured = tuple(read_array(path) for path in calibration or [])
        examples = measured if measured and not given else examples_of(loaded, given, input_range)
        if measured:
            _require_same_shapes(examples, measured)
        try:
            secure = compile_model(
                loaded,
                as_arguments(loaded, measured or examples),
                reveal=reveal,
                protocol=protocol,
                ranges=ranges,
                margin=MARGIN if margin is None else margin,
                calibration=as_arguments(loaded, measured) or None,
                input_range=input_range,
                frac_bits=frac_bits,
                max_error=max_error,
                name=name,
            )
        except CompileError as error:
            raise Failure(f"{error}{advice_of_indices(loaded, given, str(error))}") from None
        secure.save(output)
    _print_summary(secure, output, as_json)


def _require_same_shapes(examples: Sequence[Tensor], calibration: Sequence[Tensor]) -> None:
    """They have to agree, the batch aside."""
    if [x.shape[1:] for x in examples] != [x.shape[1:] for x in calibration]:
        raise Failure("--example and the calibration data differ in shape")


def _print_summary(secure: Secure, folder: Path, as_json: bool) -> None:
    plan, cost = secure.plan, secure.plan.cost()
    inputs = {n.op.label: str(n.type) for n in plan.find(Input) if isinstance(n.op, Input)}
    summary: dict[str, Any] = {
        "name": plan.name,
        "protocol": plan.protocol,
        "reveal": plan.reveal,
        "ranges": plan.ranges,
        "inputs": inputs,
        "result": str(plan.node(plan.result).type),
        "digest": plan.digest,
        **totals(cost),
        "folder": str(folder),
    }
    if as_json:
        typer.echo(json.dumps(summary))
        return
    typer.echo(f"plan {plan.name}: {plan.protocol} protocol, reveals {plan.reveal}, ranges {plan.ranges}")
    for label, declared in inputs.items():
        typer.echo(f"input     {label} : {declared}")
    typer.echo(f"result    {summary['result']}")
    typer.echo(totals_text(summary))
    typer.echo(f"digest    {plan.digest}")
    typer.echo(f"written   {folder / PLAN_FILE} (public), {folder / WEIGHTS_FILE} (the owner's alone)")


def diff_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `tacit compile`. Loading it runs its code.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT.npy", help="One array for each input of the model.")],
    input_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW HIGH", help="The range of the inputs."),
    ] = None,
    frac_bits: FracBits = None,
    max_error: MaxError = None,
    ranges: Annotated[str, typer.Option(help="auto, proved or measured, as for compile; on these inputs.")] = "auto",
    tolerance: Annotated[float, typer.Option(min=0, help="The largest error that is not marked.")] = TOLERANCE,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the errors as a heat strip (.png, .svg).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Float against fixed point, layer by layer: errors, ranges, headroom; the first layer over the tolerance."""
    with clear_errors():
        if plot is not None:
            from tacit.plots import plot_diff, require_matplotlib

            require_matplotlib(plot)
        arrays = [read_array(path) for path in inputs]
        found = compare_layers(
            load_model(model),
            *arrays,
            tolerance=tolerance,
            input_range=input_range,
            frac_bits=frac_bits,
            max_error=max_error,
            ranges=ranges,
        )
        if plot is not None:
            plot_diff(found, plot)
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else diff_text(found))


def zoo_command(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Names as torchvision has them; default: all 80.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compile torchvision's classification models at full image size; print what each takes and costs."""
    from tacit import zoo

    with clear_errors():
        known = zoo.names()
        if unknown := sorted(set(models or ()) - set(known)):
            raise Failure(f"torchvision has no classification model {', '.join(unknown)}")
        if not as_json:
            typer.echo(zoo.table([]))
        for name in models or known:
            row, _ = zoo.compile_one(name)
            typer.echo(json.dumps(dataclasses.asdict(row)) if as_json else zoo.line(row))
