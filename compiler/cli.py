"""The command line: compile a model, show a plan, tell its cost, run it among virtual parties."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.text import Text
from rich.theme import Theme
from torch.export import ExportedProgram
from typer.core import TyperGroup

from tacit.cli_net import bench_processes, register
from tacit.cli_shared import AsJson, Failure, clear_errors, read_array
from tacit.diff import TOLERANCE, ranges_text
from tacit.diff import diff as compare_layers
from tacit.diff import text as diff_text
from tacit.driver import compile as compile_model
from tacit.ir.errors import PlanError
from tacit.ir.ops.roles import Input
from tacit.ir.plan import NodeCost, Plan, PlanCost
from tacit.peers import INTERPRETERS
from tacit.secure import PLAN_FILE, WEIGHTS_FILE, Secure, load

Tensor = torch.Tensor
Model = torch.nn.Module | ExportedProgram
_PRINTED = 1000  # longer answers are abbreviated on the screen

app = typer.Typer(
    help="Compile PyTorch models into plans for secure three-party inference, look at them, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="The folder of a compiled model, or its plan.txt.")]


register(app)


def main() -> None:
    """The console script `tacit`."""
    app()


# --- compile ---


@app.command("compile")
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
    frac_bits: Annotated[int | None, typer.Option(help="Fractional bits of activations; default: chosen.")] = None,
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
        loaded = _load_model(model)
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


def _load_model(target: str) -> Model:
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
        return action()
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
        **_totals(cost),
        "folder": str(folder),
    }
    if as_json:
        typer.echo(json.dumps(summary))
        return
    typer.echo(f"plan {plan.name}: {plan.protocol} protocol, reveals {plan.reveal}, ranges {plan.ranges}")
    for label, declared in inputs.items():
        typer.echo(f"input     {label} : {declared}")
    typer.echo(f"result    {summary['result']}")
    typer.echo(_totals_text(summary))
    typer.echo(f"digest    {plan.digest}")
    typer.echo(f"written   {folder / PLAN_FILE} (public), {folder / WEIGHTS_FILE} (the owner's alone)")


def _totals(cost: PlanCost) -> dict[str, int]:
    return {
        "batch": cost.batch,
        "rounds": cost.rounds,
        "online_bytes": cost.online_bytes,
        "offline_bytes": cost.offline_bytes,
        "session_bytes": cost.session_bytes,
    }


def _totals_text(totals: Mapping[str, Any]) -> str:
    return (
        f"rounds    {totals['rounds']}\n"
        f"bytes     {totals['online_bytes']:,} online, {totals['offline_bytes']:,} offline "
        f"for a batch of {totals['batch']}; {totals['session_bytes']:,} once per session"
    )


# --- show ---


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


@app.command()
def show(
    plan: PlanPath,
    ranges: Annotated[bool, typer.Option("--ranges", help="The range of every line, and the bits left above.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a plan, after checking every line of it."""
    with clear_errors():
        found = _read_plan(plan)
    if ranges:
        typer.echo(ranges_text(found))
        return
    console = Console(theme=_THEME, highlight=False)
    if as_json:
        typer.echo(json.dumps(_plan_object(found)))
    elif console.is_terminal:
        text = Text(str(found), end="", no_wrap=True)
        _PlanHighlighter().highlight(text)
        console.print(text, soft_wrap=True)
    else:
        typer.echo(str(found), nl=False)


def _read_plan(path: Path) -> Plan:
    path = path / PLAN_FILE if path.is_dir() else path
    try:
        return Plan.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise PlanError(f"{path} is not a text file") from None


def _plan_object(plan: Plan) -> dict[str, Any]:
    lines = [
        {
            "name": n.name,
            "type": str(n.type),
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


# --- cost ---


@app.command()
def cost(
    plan: PlanPath,
    batch: Annotated[int, typer.Option(min=1, help="Elements in the batch.")] = 1,
    requirements: Annotated[bool, typer.Option("--requirements", help="List the randomness consumed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rounds and bytes of a plan, per op and per party, as they will be counted on the wire."""
    with clear_errors():
        found = _read_plan(plan)
    total = found.cost(batch=batch)
    if as_json:
        typer.echo(json.dumps(_cost_object(found, total) | (_needs_object(found, batch) if requirements else {})))
        return
    rows = [
        [f"%{r.name}", r.op, _rounds_text(r.start, r.cost.rounds, r.session), *_phases(r), r.path] for r in total.per_op
    ]
    typer.echo(_table(["line", "op", "rounds", "online", "offline", "session", "module"], rows, numbers=range(2, 6)))
    typer.echo("")
    parties = [
        [party, *(f"{sent[k]:,}" for k in ("online", "offline", "session"))] for party, sent in total.per_party.items()
    ]
    typer.echo(_table(["bytes sent by", "online", "offline", "session"], parties, numbers=range(1, 4)))
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
        typer.echo(_table(header, needs, numbers=range(4, 8)))
    typer.echo("")
    typer.echo(_totals_text(_totals(total)))


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
    return {"name": plan.name, "digest": plan.digest, **_totals(total), "per_op": per_op, "per_party": total.per_party}


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: range) -> str:
    """Aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    signs = [">" if i in numbers else "<" for i in range(len(header))]
    lines = [
        "  ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


# --- run ---


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `tacit compile` wrote.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT.npy", help="One array for each input of the model.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File (.npy) for the answer.")] = None,
    targets: Annotated[Path | None, typer.Option(help="The classes (.npy) to count, for reveal=correct.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every line with the clear oracle, bit for bit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encrypted inference among three virtual parties in this process."""
    with clear_errors():
        secure = load(folder)
        arrays = [read_array(path) for path in [*inputs, *([targets] if targets else [])]]
        answer = (secure.check(*arrays) if check else secure(*arrays)).numpy()
        if output is not None:
            with output.open("wb") as out:
                np.save(out, answer, allow_pickle=False)
    _print_run(secure, answer, output, check, as_json)


def _print_run(secure: Secure, answer: np.ndarray[Any, Any], output: Path | None, checked: bool, as_json: bool) -> None:
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
        told: dict[str, Any] = {"answer": answer.tolist()} if output is None else {"output": str(output)}
        typer.echo(json.dumps(told | {"checked": checked} | figures))
        return
    typer.echo(f"written   {output}" if output else np.array2string(answer, threshold=_PRINTED))
    if checked:
        typer.echo("checked   every line equals the clear oracle, bit for bit")
    typer.echo(_totals_text(figures))
    typer.echo(f"seconds   {measured.online_seconds:.4f} online, {measured.offline_seconds:.4f} offline")


# --- diff ---


@app.command("diff")
def diff_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `tacit compile`. Loading it runs its code.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT.npy", help="One array for each input of the model.")],
    input_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW HIGH", help="The range of the inputs."),
    ] = None,
    frac_bits: Annotated[int | None, typer.Option(help="Fractional bits of activations; default: chosen.")] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Measure the ranges on these inputs instead of proving them.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="The largest error that is not marked.")] = TOLERANCE,
    as_json: AsJson = False,
) -> None:
    """Float against fixed point, layer by layer: errors, ranges, headroom; the first layer over the tolerance."""
    with clear_errors():
        arrays = [read_array(path) for path in inputs]
        found = compare_layers(
            _load_model(model),
            *arrays,
            tolerance=tolerance,
            input_range=input_range,
            frac_bits=frac_bits,
            calibration=tuple(arrays) if calibrated else None,
        )
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else diff_text(found))


# --- zoo ---


@app.command("zoo")
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


# --- bench ---


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
app.add_typer(bench_app, name="bench")


@bench_app.command("model")
def bench_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="mlp, lenet, a, b, c, d, alexnet, vgg16, resnet18, ...")
    ],
    batch: Annotated[int, typer.Option("--batch", "-n", min=1, help="Images in a batch.")] = 1,
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
    as_json: AsJson = False,
) -> None:
    """Time and bytes of one network with random weights, beside plaintext PyTorch in the same run."""
    from tacit.bench import bench, text

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
    as_json: AsJson = False,
) -> None:
    """CrypTen and SPU beside Tacit, where they are installed: the same networks, inputs and answers, in one run."""
    from tacit.peers.compare import HEADER, Row, cells, compare

    def report(row: Row) -> None:
        told = row.problem or f"{row.ms_per_image:.3f} ms/image"
        typer.echo(f"{row.model}, batch {row.batch}, {row.system}: {told}", err=True)

    batches = [_count(size) for text in batch or [] for size in text.split(",")]
    with clear_errors():
        rows = compare(
            [name.strip() for name in models.split(",")],
            batches=batches,
            runs=runs,
            interpreters={"crypten": crypten, "spu": spu},
            deadline_s=deadline,
            report=report,
        )
    if as_json:
        typer.echo(json.dumps({"runs": runs, "cores": os.cpu_count(), "rows": [dataclasses.asdict(r) for r in rows]}))
        return
    table = [[row.model, str(row.batch), *cells(row)] for row in rows]
    typer.echo(_table(["model", "batch", *HEADER], table, numbers=range(3, 10)))


def _count(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) > 0):
        raise typer.BadParameter(f"'{text}' is not a number of images", param_hint="--batch")
    return int(text)
