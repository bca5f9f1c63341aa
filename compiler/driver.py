"""The compiler's front door: from a model and an example to a compiled model."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from tacit.bug import reported
from tacit.capture import Capture, Range
from tacit.export import export
from tacit.graph import INTEGERS
from tacit.ir.errors import CompileError
from tacit.ir.ops.model import CountCorrect
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.passes import Draft, run_pipeline
from tacit.passes.lower import SUITES
from tacit.passes.quantise import MOST_FRAC_BITS
from tacit.progress import log, waiting
from tacit.runtime.reference import interpret
from tacit.secure import Secure, check_input
from tacit.structure import in_order, leaves

Tensor = torch.Tensor
Model = torch.nn.Module | ExportedProgram
REVEALS = ("logits", "argmax", "correct")
_PROBES = 16
# Without a declared range, inputs may reach this far at least.
_LEAST_REACH, _MOST_REACH = 4.0, 2.0**40


def compile(
    model: Model,
    example_inputs: Any,
    *,
    reveal: str = "logits",
    protocol: str = "fused",
    calibration: Any = None,
    input_range: Range | Sequence[Range] | None = None,
    frac_bits: int | None = None,
    max_error: float | None = None,
    name: str | None = None,
) -> Secure:
    """Compile a trained model into a protocol plan and the shares-to-be of its weights.

    model: a torch.nn.Module in evaluation mode, a torch.fx.GraphModule, or an ExportedProgram with a dynamic batch.
    example_inputs: a tensor or a tuple of the model's arguments, each a tensor or a tuple, list or dictionary of them:
        floats, integers or truth values. The first dimension of all is the batch.
    reveal: what the client learns: "logits", "argmax", or "correct" (how many of a batch match secret targets).
    protocol: "fused" (three-round comparisons) or "securenn" (the textbook suite, a baseline).
    calibration: inputs on which value ranges are measured, with a margin of one bit; without them, ranges are proved.
    input_range: (low, high), or one such pair for each input. Clients refuse inputs outside it. Default: symmetric,
        to the power of two at or above twice the largest magnitude of the example, at least 4; all that uint8, int8
        and bool hold. The range of indices is that of the tables they are looked up in, whatever is given here.
    frac_bits: fractional bits of activations, 1 to 20; weights get up to four more. Default: the fewest with which
        logits stay within 2^-8 of the float model's.
    max_error: how far the polynomials that stand for sigmoid, GELU, exp and the like may be from them, over the range
        that their operand can have; relative where the function is above 1. From 2^-20 to 2^-3. Default: 2^-10, or four
        units of the scale of activations where that is less.
    name: what the plan is called; default: the class of the model.

    Raises CompileError, which names the module, its source line and the remedy; and CompilerBug where the compiler
    itself fails.
    """
    options: dict[str, Any] = {
        "reveal": reveal,
        "protocol": protocol,
        "frac_bits": frac_bits,
        "max_error": max_error,
        "name": name,
    }
    begin = time.perf_counter()
    with waiting("compiling"), reported(options | {"calibrated": calibration is not None}) as kept:
        draft = prepare(
            model,
            example_inputs,
            calibration=calibration,
            input_range=input_range,
            exported=kept.exported,
            **options,
        )
        draft = run_pipeline(draft, kept.plan)
    log.info("compiled %s: %d lines, %.2f s", draft.plan.name, len(draft.plan.nodes), time.perf_counter() - begin)
    kinds = [x.dtype for x in leaves(example_inputs) if x.is_floating_point()]
    return Secure(draft.plan, draft.weights, kinds[0] if kinds else torch.float32)


def prepare(
    model: Model,
    example_inputs: Any,
    *,
    reveal: str = "logits",
    protocol: str = "fused",
    calibration: Any = None,
    input_range: Range | Sequence[Range] | None = None,
    frac_bits: int | None = None,
    max_error: float | None = None,
    name: str | None = None,
    exported: Callable[[ExportedProgram], None] = lambda program: None,
) -> Draft:
    """What the passes start from: the captured model, with everything they need to know.

    `exported` is shown the graph before it is captured.
    """
    if reveal not in REVEALS:
        raise CompileError(f"reveal has to be one of {', '.join(REVEALS)}, not {reveal!r}")
    if protocol not in SUITES:
        raise CompileError(f"protocol has to be one of {', '.join(SUITES)}, not {protocol!r}")
    if frac_bits is not None and (type(frac_bits) is not int or not 1 <= frac_bits <= MOST_FRAC_BITS):
        raise CompileError(f"frac_bits has to be an integer from 1 to {MOST_FRAC_BITS}, not {frac_bits!r}")
    if max_error is not None and not (isinstance(max_error, (int, float)) and 2.0**-20 <= max_error <= 2.0**-3):
        raise CompileError(f"max_error has to be a number from 2^-20 to 2^-3, not {max_error!r}")
    if name is not None and not re.fullmatch(r"[\w.]+", name):
        raise CompileError(f"the name of a plan consists of letters, digits, '_' and '.', not {name!r}")
    arguments = _arguments(example_inputs)
    examples = _as_tuple(arguments, "example_inputs")
    ranges = _ranges(input_range, examples)
    program = export(model, arguments)
    exported(program)
    capture = Capture(program, ranges)
    plan = capture.run(name or _name_of(model), reveal)
    _require_fit(plan, examples, "example_inputs")
    if calibration is not None:
        calibration = _as_tuple(calibration, "calibration")
        _require_fit(plan, calibration, "calibration")
    return Draft(
        plan.with_nodes(plan.nodes, protocol=protocol),
        capture.weights,
        _probes(plan, examples, calibration),
        interpret,
        _calibration(plan, calibration),
        frac_bits,
        max_error,
    )


def _arguments(examples: Any) -> tuple[Any, ...]:
    """The arguments of the model's forward, one by one; each may be nested."""
    several = isinstance(examples, (tuple, list))
    return tuple(in_order(x) for x in examples) if several else (in_order(examples),)


def _as_tuple(value: Any, what: str) -> tuple[Tensor, ...]:
    items = leaves(value)
    for x in items:
        whole = isinstance(x, torch.Tensor) and x.dtype in (*INTEGERS, torch.bool)
        fit = isinstance(x, torch.Tensor) and len(x.shape) >= (1 if whole else 2) and len(x) > 0
        if not fit or not (x.is_floating_point() or whole):
            raise CompileError(
                f"{what} has to be a tensor of floats, integers or truth values, or a tuple of them, with the batch as "
                "first dimension"
            )
        if not bool(torch.isfinite(x).all()):
            raise CompileError(f"{what} holds NaN or infinity")
    if not items or len({len(x) for x in items}) != 1:
        raise CompileError(f"{what} is empty, or its tensors differ in batch size")
    return tuple(x.detach() for x in items)


def _ranges(given: Range | Sequence[Range] | None, examples: Sequence[Tensor]) -> list[Range]:
    """For each input; of integers that are indices, the tables tell it."""
    if given is None:
        return [_type_range(x) or _reach(x) for x in examples]
    try:
        listed: list[Any] = list(given)
        pairs = [listed] * len(examples) if isinstance(listed[0], (int, float)) else listed
        out = [(float(low), float(high)) for low, high in pairs]
    except (TypeError, ValueError, IndexError):
        raise CompileError(
            f"input_range has to be (low, high), or one such pair for each input, not {given!r}"
        ) from None
    for low, high in out:
        if not (math.isfinite(low) and math.isfinite(high) and low < high and max(-low, high) <= _MOST_REACH):
            raise CompileError(f"input_range has to be finite, below 2^40, with low < high, not ({low}, {high})")
    if len(out) != len(examples):
        raise CompileError(f"{len(out)} input ranges for {len(examples)} inputs")
    for (low, high), x in zip(out, examples, strict=True):
        if x.is_floating_point() and (float(x.min()) < low or float(x.max()) > high):
            raise CompileError(f"the example input lies outside input_range ({low}, {high})")
    return [pair if x.is_floating_point() else _whole(*pair, x) for pair, x in zip(out, examples, strict=True)]


def _reach(x: Tensor) -> Range:
    """Symmetric, to the power of two at or above twice the largest magnitude."""
    reach = 2.0 ** math.ceil(math.log2(max(_LEAST_REACH, 2 * float(x.double().abs().max()))))
    return -reach, reach


def _type_range(x: Tensor) -> Range | None:
    """What a small type holds."""
    if x.dtype == torch.bool:
        return 0.0, 1.0
    small = x.dtype in (torch.uint8, torch.int8)
    return (float(torch.iinfo(x.dtype).min), float(torch.iinfo(x.dtype).max)) if small else None


def _whole(low: float, high: float, x: Tensor) -> Range:
    """The whole numbers from low to high that the type of x holds."""
    least, most = _type_range(x) or (low, high)
    found = float(math.ceil(max(low, least))), float(math.floor(min(high, most)))
    if found[0] > found[1]:
        raise CompileError(f"input_range ({low}, {high}) holds no {x.dtype}")
    return found


def _require_fit(plan: Plan, values: Sequence[Tensor], what: str) -> None:
    if len(values) != len(_inputs(plan)):
        raise CompileError(f"{what} holds {len(values)} tensors, the model takes {len(_inputs(plan))} inputs")
    for (name, op), x in zip(_inputs(plan), values, strict=True):
        declared = plan.node(name).type
        if tuple(x.shape) != declared.at(len(x)).dims:
            raise CompileError(f"{what} has shape {tuple(x.shape)} where the model takes {declared}")
        low, high = op.ends(x.shape[1:])
        if op.integers and bool(((x < low) | (x > high)).any()):
            raise CompileError(
                f"{what} holds integers for '{op.label}' outside of [{op.low:.0f}, {op.high:.0f}]"
                f"{', or of the range of their place' if op.along else ''}, where their tables or input_range end"
            )


def _inputs(plan: Plan) -> list[tuple[str, Input]]:
    targets = {node.args[1] for node in plan.find(CountCorrect)}
    inputs = [(node.name, node.op) for node in plan.find(Input) if isinstance(node.op, Input)]
    return [(name, op) for name, op in inputs if name not in targets]


def _probes(plan: Plan, examples: Sequence[Tensor], calibration: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """Inputs on which scales are tried out: calibration data, or the example and values from all over the range."""
    inputs = _inputs(plan)
    if calibration is not None:
        return _with_targets(plan, {op.label: x[: 4 * _PROBES] for (_, op), x in zip(inputs, calibration, strict=True)})
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for (_, op), x in zip(inputs, examples, strict=True):
        spread = torch.rand((_PROBES, *x.shape[1:]), generator=generator, dtype=torch.float64)
        low, high = op.ends(x.shape[1:])
        spread = low + spread * (high - low)
        chosen[op.label] = torch.cat([x[:_PROBES].double(), spread.round() if op.integers else spread])
    return _with_targets(plan, chosen)


def _calibration(plan: Plan, given: Sequence[Tensor] | None) -> dict[str, Tensor]:
    if given is None:
        return {}
    return _with_targets(
        plan, {op.label: check_input(plan.node(name), x) for (name, op), x in zip(_inputs(plan), given, strict=True)}
    )


def _with_targets(plan: Plan, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values, and zeros for the targets of a count."""
    batch = len(next(iter(values.values())))
    labels = [node.op.label for node in plan.find(Input) if isinstance(node.op, Input) and node.op.label not in values]
    return {k: x.double() for k, x in values.items()} | {label: torch.zeros(batch).double() for label in labels}


def _name_of(model: torch.nn.Module | ExportedProgram) -> str:
    name = type(model).__name__.lower()
    return name if name.isidentifier() else "model"
