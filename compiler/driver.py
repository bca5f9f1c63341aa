"""The compiler's front door: from a model and an example to a compiled model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from tacit.bug import reported
from tacit.capture import INTEGERS, Capture
from tacit.explain import STATE_SECOND, sequence_first
from tacit.export import export
from tacit.faithful import require_faithful
from tacit.fit import FLOATS
from tacit.ir.errors import CompileError
from tacit.ir.ops.model import CountCorrect
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.options import Range, read_frac_bits, read_max_error, read_name, read_protocol, read_ranges, read_reveal
from tacit.passes import Draft, run_pipeline
from tacit.progress import log, waiting
from tacit.runtime.reference import interpret
from tacit.secure import Secure, check_input
from tacit.structure import in_order, leaves

Tensor = torch.Tensor
Model = torch.nn.Module | ExportedProgram
_PROBES = 16


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
    example_inputs: a float tensor or a tuple of the model's arguments, each a float tensor or a tuple, list or
        dictionary of them; the first dimension of all is the batch. Indices of an embedding are integers.
    reveal: what the client learns: "logits", "argmax", or "correct" (how many of a batch match secret targets).
    protocol: "fused" (three-round comparisons) or "securenn" (the textbook suite, a baseline).
    calibration: inputs on which value ranges are measured, with a margin of one bit; without them, ranges are proved.
    input_range: (low, high), or one such pair for each input. Clients refuse inputs outside it. Default: symmetric,
        to the power of two at or above twice the largest magnitude of the example, at least 4.
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
    reveal, protocol, name = read_reveal(reveal), read_protocol(protocol), read_name(name)
    frac_bits, max_error = read_frac_bits(frac_bits), read_max_error(max_error)
    arguments = _arguments(example_inputs)
    examples = _as_tuple(arguments, "example_inputs")
    measured = None if calibration is None else _as_tuple(calibration, "calibration")
    ranges = read_ranges(input_range, examples)
    program = export(model, arguments)
    exported(program)
    capture = Capture(program, ranges)
    capture.hints = _hints(model)
    plan = capture.run(name or _name_of(model), reveal)
    _require_fit(plan, examples, "example_inputs")
    if isinstance(model, torch.nn.Module):
        require_faithful(model, program, arguments)
    if measured is not None:
        _require_fit(plan, measured, "calibration")
    return Draft(
        plan.with_nodes(plan.nodes, protocol=protocol),
        capture.weights,
        _probes(plan, examples, measured),
        interpret,
        _calibration(plan, measured),
        frac_bits,
        max_error,
    )


def _arguments(examples: Any) -> tuple[Any, ...]:
    """The arguments of the model's forward, one by one; each may be nested."""
    several = isinstance(examples, (tuple, list))
    return tuple(in_order(x) for x in examples) if several else (in_order(examples),)


def _as_tuple(value: Any, what: str) -> tuple[Tensor, ...]:
    items = leaves(value)
    if items and all(isinstance(x, (bool, int, float)) for x in items):
        raise CompileError(f"{what} holds numbers: make a tensor of them by torch.tensor(x), the batch first")
    for x in items:
        reason = _misfit(x)
        if reason:
            raise CompileError(
                f"{what} {reason}; it has to be a float tensor (or indices of an embedding), or a tuple of them, with "
                "the batch as first dimension"
            )
    if not items:
        raise CompileError(f"{what} is empty: give one tensor for each argument of the model")
    if len({len(x) for x in items}) != 1:
        raise CompileError(
            f"the tensors of {what} differ in batch size. The batch is the first dimension of each, also of the start "
            f"state of a recurrent layer: {STATE_SECOND}"
        )
    return tuple(x.detach() for x in items)


def _misfit(x: Any) -> str:
    """Why this is no example of an input; "" where it is one."""
    if isinstance(x, (np.ndarray, np.generic)):
        return "holds an array of NumPy: convert it by torch.from_numpy(x)"
    if not isinstance(x, torch.Tensor):
        return f"holds a {type(x).__name__}: set what is no tensor in a module around the model"
    if x.is_nested or x.layout != torch.strided or x.is_meta:
        return f"holds a tensor whose numbers cannot be read as they stand ({x.layout}, {x.device.type})"
    if len(x.shape) < 2:
        return f"has shape {tuple(x.shape)}, without a batch: add it, as in x[None], or x[:, None] to single numbers"
    if x.numel() == 0:
        return f"has shape {tuple(x.shape)}, and so no element"
    if x.is_complex():
        return f"is {x.dtype}: give real and imaginary parts as two tensors"
    if x.dtype not in (*FLOATS, *INTEGERS):
        return f"is {x.dtype}: convert it by x.float(), or by x.long() where it holds indices"
    return "" if bool(torch.isfinite(x).all()) else "holds NaN or infinity"


def _require_fit(plan: Plan, values: Sequence[Tensor], what: str) -> None:
    if len(values) != len(_inputs(plan)):
        raise CompileError(f"{what} holds {len(values)} tensors, the model takes {len(_inputs(plan))} inputs")
    for (name, op), x in zip(_inputs(plan), values, strict=True):
        declared = plan.node(name).type
        if tuple(x.shape) != declared.at(len(x)).dims:
            raise CompileError(f"{what} has shape {tuple(x.shape)} where the model takes {declared}")
        if op.integers and (float(x.min()) < op.low or float(x.max()) > op.high):
            raise CompileError(f"{what} holds an index outside of [{op.low:g}, {op.high:g}] for input '{op.label}'")


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
        spread = op.low + spread * (op.high - op.low)
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


def _hints(model: Model) -> dict[str, str]:
    """What else is to be said of a batch that is out of place, by the paths of modules."""
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    return {path: hint for path, module in modules if (hint := sequence_first(module))}


def _name_of(model: torch.nn.Module | ExportedProgram) -> str:
    name = type(model).__name__.lower()
    return name if name.isidentifier() else "model"
