"""The commands that start from a model: compile, diff, zoo."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from torch.export import ExportedProgram

from tacit.cli_shared import AsJson, Failure, clear_errors, read_array, totals, totals_text
from tacit.diff import TOLERANCE
from tacit.diff import diff as compare_layers
from tacit.diff import text as diff_text
from tacit.driver import compile as compile_model
from tacit.ir.ops.roles import Input
from tacit.secure import PLAN_FILE, WEIGHTS_FILE, Secure
from tacit.vision import with_torchvision

Tensor = torch.Tensor
Model = torch.nn.Module | ExportedProgram
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
        typer.Option(metavar="SHAPE", help="Shape of an input, as in 1x1x28x28, the batch first; once for each input."),
    ] = None,
    reveal: Annotated[str, typer.Option(help="What the client learns: logits, argmax or correct.")] = "logits",
    protocol: Annotated[str, typer.Option(help="The protocol suite: fused or securenn.")] = "fused",
    input_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW HIGH", help="The range of the inputs; clients refuse others."),
    ] = None,
    frac_bits: FracBits = None,
    max_error: MaxError = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Inputs (.npy) on which value ranges are measured; once for each input."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the plan is called; default: the class of the model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL; write the public plan and the owner's weights."""
    shapes = [_shape(text) for text in example or []]
    with clear_errors():
        loaded = load_model(model)
        measured = tuple(read_array(path) for path in calibration or [])
        examples = measured or _examples(loaded, shapes, input_range)
        _require_same_shapes(examples, shapes)
        secure = compile_model(
            loaded,
            examples,
            reveal=reveal,
            protocol=protocol,
            calibration=measured or None,
            input_range=input_range,
            frac_bits=frac_bits,
            max_error=max_error,
            name=name,
        )
        secure.save(output)
    _print_summary(secure, output, as_json)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if len(sizes) < 2 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"'{text}' is not a shape with the batch first, as in 1x1x28x28", param_hint="--example"
        )
    return tuple(int(size) for size in sizes)


def load_model(target: str) -> Model:
    """The model that MODEL names: an exported program, a module, or what a function of no arguments returns."""
    if target.endswith(".pt2"):
        return _load_program(Path(target))
    place, colon, attribute = target.rpartition(":")
    if not colon or not attribute.isidentifier():
        raise Failure(f"'{target}' is neither a .pt2 file nor module:attribute nor path/to/file.py:attribute")
    module = _guarded(f"importing {place}", lambda: _import(place))
    if not hasattr(module, attribute):
        raise Failure(f"{place} has no attribute '{attribute}'")
    found = getattr(module, attribute)
    if not isinstance(found, torch.nn.Module) and callable(found):
        found = _guarded(f"calling {target}", found)
    if not isinstance(found, (torch.nn.Module, ExportedProgram)):
        raise Failure(f"{target} is a {type(found).__name__}, not a torch.nn.Module or a function that returns one")
    return found


def _load_program(path: Path) -> ExportedProgram:
    if not path.exists():
        raise FileNotFoundError(2, os.strerror(2), str(path))
    program: ExportedProgram = _guarded(f"reading {path}", lambda: torch.export.load(path))
    return program


def _guarded(what: str, action: Callable[[], Any]) -> Any:
    """The result of code that is not ours; whatever it raises becomes one line."""
    try:
        return with_torchvision(action)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise Failure(f"{what} failed: {type(error).__name__}: {first}") from None


def _import(place: str) -> ModuleType:
    """A module by its dotted name, from the working directory first, or a file beside which imports are looked up."""
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.exists():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _examples(model: Model, shapes: Sequence[tuple[int, ...]], span: tuple[float, float] | None) -> tuple[Tensor, ...]:
    """Those that a program carries, else random ones: uniform over the range, or from -1 to 1."""
    carried = model.example_inputs if isinstance(model, ExportedProgram) else None
    if not shapes and carried is not None:
        return tuple(carried[0])
    if not shapes:
        raise Failure("give the shape of an input (--example 1x1x28x28), or calibration data")
    low, high = span if span is not None and span[0] < span[1] else (-1.0, 1.0)
    values = model.state_dict().values()
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    generator = torch.Generator().manual_seed(0)
    return tuple(
        (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes
    )


def _require_same_shapes(examples: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Calibration data have to agree with --example, the batch aside."""
    if shapes and [tuple(x.shape[1:]) for x in examples] != [shape[1:] for shape in shapes]:
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
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Measure the ranges on these inputs instead of proving them.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="The largest error that is not marked.")] = TOLERANCE,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the errors as a heat strip (.png, .svg).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Float against fixed point, layer by layer: errors, ranges, headroom; the first layer over the tolerance."""
    with clear_errors():
        arrays = [read_array(path) for path in inputs]
        if plot is not None:
            from tacit.plots import plot_diff, require_matplotlib

            require_matplotlib(plot)
        found = compare_layers(
            load_model(model),
            *arrays,
            tolerance=tolerance,
            input_range=input_range,
            frac_bits=frac_bits,
            max_error=max_error,
            calibration=tuple(arrays) if calibrated else None,
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
        if not as_json:
            typer.echo(zoo.table([]))
        for name in models or zoo.names():
            row, _ = zoo.compile_one(name)
            typer.echo(json.dumps(dataclasses.asdict(row)) if as_json else zoo.line(row))
