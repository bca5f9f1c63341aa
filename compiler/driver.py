"""The compiler's front door: from a model and an example to a compiled model."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from tacit.arguments import CONSTANTS, Arguments, Slot, arguments_of, bind, slots_of, slots_of_program
from tacit.bug import reported
from tacit.capture import Capture, Range
from tacit.export import export
from tacit.graph import INTEGERS
from tacit.ir.errors import CompileError, InputError, PrecisionWarning
from tacit.ir.ops.model import CountCorrect
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.passes import Draft, run_pipeline
from tacit.passes.lower import SUITES
from tacit.passes.quantise import MOST_FRAC_BITS
from tacit.progress import log, waiting
from tacit.runtime.leaving import stops_at_exit
from tacit.runtime.reference import interpret
from tacit.secure import Secure, check_input
from tacit.tensors import comparable, plain_tensor, unreadable

Tensor = torch.Tensor
Model = torch.nn.Module | ExportedProgram
REVEALS = ("logits", "argmax", "correct")
# Inputs from all over the range on which a scale is tried out; calibration data, of which it takes more.
_PROBES, _CALIBRATED_PROBES = 16, 64
# The standard deviation of a faint input: about a quarter of a step of 8 bits in an image from 0 to 1.
_FAINT = 1e-3
# Without a declared range, inputs may reach this far at least.
_LEAST_REACH, _MOST_REACH = 4.0, 2.0**40


@stops_at_exit
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
    kwargs: Mapping[str, Any] | None = None,
) -> Secure:
    """Compile a trained model into a protocol plan and the shares-to-be of its weights.

    model: a torch.nn.Module in evaluation mode, a torch.fx.GraphModule, or an ExportedProgram with a dynamic batch.
    example_inputs: a tensor or a tuple of the model's arguments, each a tensor or a tuple, list, dictionary or
        dataclass of them: floats, integers or truth values. The first dimension of all is the batch. A dictionary whose
        keys are names of forward's parameters holds its arguments by name; `({...},)` is one argument.
    reveal: what the client learns: "logits", "argmax", or "correct" (how many of a batch match secret targets).
    protocol: "fused" (three-round comparisons) or "securenn" (the textbook suite, a baseline).
    calibration: inputs on which value ranges are measured, with a margin of one bit; without them, ranges are proved.
    input_range: (low, high), or one such pair for each input. Clients refuse inputs outside it. Default: symmetric,
        to the power of two at or above twice the largest magnitude of the example, at least 4; all that uint8, int8
        and bool hold. The range of indices is that of the tables they are looked up in, whatever is given here.
    frac_bits: fractional bits of activations, 1 to 20; weights get up to four more. Default: the fewest with which
        logits stay within 2^-8 of the float model's, tried out on the whole example, on random, blank and faint
        inputs of the range. Where even 20 are too few, a PrecisionWarning names the layer.
    max_error: how far the polynomials that stand for sigmoid, GELU, exp and the like may be from them, over the range
        that their operand can have; relative where the function is above 1. From 2^-20 to 2^-3. Default: 2^-10, or four
        units of the scale of activations where that is less.
    name: what the plan is called; default: the class of the model.
    kwargs: arguments by name, beside those in example_inputs. None, numbers and texts among them are fixed in the plan.

    The compiled model takes tensors by position and by name, as the model does, and returns what the model returns, in
    containers of the same classes.

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
            kwargs=kwargs,
            exported=kept.exported,
            **options,
        )
        draft = run_pipeline(draft, kept.plan)
    log.info("compiled %s: %d lines, %.2f s", draft.plan.name, len(draft.plan.nodes), time.perf_counter() - begin)
    for told in draft.doubts:
        warnings.warn(told, PrecisionWarning, stacklevel=2)
    return Secure(draft.plan, draft.weights, answer=draft.answer)


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
    kwargs: Mapping[str, Any] | None = None,
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
    arguments = arguments_of(model, example_inputs, kwargs)
    _require_tensors(arguments, "example_inputs")
    program = export(model, arguments.args, arguments.kwargs)
    exported(program)
    examples = _bound(slots_of_program(program), arguments, "example_inputs")
    capture = Capture(program, _ranges(input_range, examples))
    plan = capture.run(name or _name_of(model), reveal)
    _require_fit(plan, examples, "example_inputs")
    measured = None
    if calibration is not None:
        given = arguments_of(model, calibration)
        _require_tensors(given, "calibration")
        measured = _bound([slot for slot in slots_of(plan) if slot.label in examples], given, "calibration")
        _require_fit(plan, measured, "calibration")
    return Draft(
        plan.with_nodes(plan.nodes, protocol=protocol),
        capture.weights,
        _probes(plan, examples, measured),
        interpret,
        _calibration(plan, measured or {}),
        frac_bits,
        max_error,
        edges=_edges(plan),
        answer=capture.answer,
    )


def _require_tensors(arguments: Arguments, what: str) -> None:
    """Dense tensors with one batch in front; raises CompileError naming the argument."""
    for arg in arguments.args:
        if isinstance(arg, CONSTANTS):
            raise CompileError(
                f"{what} holds no tensor, but {type(arg).__name__}: to fix it in the plan give it by name, in a "
                "dictionary of all arguments or in kwargs="
            )
    sizes = set()
    for place, given in arguments.tensors():
        if reason := unreadable(given):
            raise CompileError(f"{what}: {place} {reason}")
        x = comparable(plain_tensor(given))
        whole = x.dtype in (*INTEGERS, torch.bool)
        if x.dim() < (1 if whole else 2) or len(x) == 0 or not (x.is_floating_point() or whole):
            raise CompileError(
                f"{what} has to be a tensor of floats, integers or truth values, or a tuple of them, with the batch as "
                "first dimension"
            )
        if not bool(torch.isfinite(x).all()):
            raise CompileError(f"{what} holds NaN or infinity")
        sizes.add(len(x))
    if len(sizes) != 1:
        raise CompileError(f"{what} is empty, or its tensors differ in batch size")


def _bound(slots: Sequence[Slot], arguments: Arguments, what: str) -> dict[str, Tensor]:
    """The tensors by the labels of the inputs, in the order of the plan."""
    try:
        found = bind(slots, arguments.args, arguments.inputs())
    except InputError as error:
        raise CompileError(f"{what}: {error}") from None
    return {label: comparable(plain_tensor(x)) for label, x in found.items()}


def _ranges(given: Range | Sequence[Range] | None, by_label: Mapping[str, Tensor]) -> list[Range]:
    """For each input; of integers that are indices, the tables tell it."""
    examples = list(by_label.values())
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


def _require_fit(plan: Plan, values: Mapping[str, Tensor], what: str) -> None:
    for name, op in _inputs(plan):
        declared, x = plan.node(name).type, values[op.label]
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


def _probes(plan: Plan, examples: Mapping[str, Tensor], calibration: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Inputs on which scales are tried out: the whole example, and calibration data or values all over the range."""
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for _, op in _inputs(plan):
        shown = examples[op.label].double()
        if calibration is not None:
            more = calibration[op.label][:_CALIBRATED_PROBES].double()
        else:
            spread = torch.rand((_PROBES, *shown.shape[1:]), generator=generator, dtype=torch.float64)
            low, high = op.ends(shown.shape[1:])
            spread = low + spread * (high - low)
            more = spread.round() if op.integers else spread
        chosen[op.label] = torch.cat([shown, more])
    return _with_targets(plan, chosen)


def _edges(plan: Plan) -> dict[str, Tensor]:
    """Blank inputs, all low, all high and zero; and faint ones, around zero and around a value above the middle."""
    generator = torch.Generator().manual_seed(1)
    chosen = {}
    for name, op in _inputs(plan):
        shape = plan.node(name).type.at(1).dims
        low, high = op.ends(shape[1:])
        zero, above = torch.zeros_like(low).clamp(low, high), low + 0.6 * (high - low)
        rows = [value[None].clone() for value in (low, high, zero, zero, above)]
        if op.integers:
            rows[4].round_()
        else:
            for faint in rows[3:]:
                deviation = min(_FAINT, (op.high - op.low) / 1024)
                faint += deviation * torch.randn(shape, generator=generator, dtype=torch.float64)
                faint.clamp_(op.low, op.high)
        chosen[op.label] = torch.cat(rows)
    return _with_targets(plan, chosen)


def _calibration(plan: Plan, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not given:
        return {}
    return _with_targets(plan, {op.label: check_input(plan.node(n), given[op.label]) for n, op in _inputs(plan)})


def _with_targets(plan: Plan, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values, and zeros for the targets of a count."""
    batch = len(next(iter(values.values())))
    labels = [node.op.label for node in plan.find(Input) if isinstance(node.op, Input) and node.op.label not in values]
    return {k: x.double() for k, x in values.items()} | {label: torch.zeros(batch).double() for label in labels}


def _name_of(model: torch.nn.Module | ExportedProgram) -> str:
    name = type(model).__name__.lower()
    return name if name.isidentifier() else "model"
