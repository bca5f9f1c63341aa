"""The compiler's front door: from a model and an example to a compiled model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from tacit.arguments import arguments_of, slots_of, slots_of_program
from tacit.bug import reported
from tacit.capture import Capture
from tacit.examples import bound_examples, inputs_of, require_fit, require_tensors
from tacit.explain import sequence_first
from tacit.export import export
from tacit.faithful import float_answers, require_faithful
from tacit.options import (
    MARGIN,
    Range,
    read_frac_bits,
    read_how,
    read_margin,
    read_max_error,
    read_name,
    read_protocol,
    read_ranges,
    read_reveal,
)
from tacit.passes import Draft, run_pipeline
from tacit.passes.ranges import told_of_ranges
from tacit.passes.trial import count
from tacit.probes import edges, measured, probes, tried_edges
from tacit.progress import log, waiting
from tacit.runtime.leaving import stops_at_exit
from tacit.runtime.memory import release_freed_buffers
from tacit.runtime.reference import interpret
from tacit.secure import Secure, check_input

Tensor = torch.Tensor
Model = torch.nn.Module | ExportedProgram


@stops_at_exit
def compile(
    model: Model,
    example_inputs: Any,
    *,
    reveal: str = "logits",
    protocol: str = "fused",
    ranges: str = "auto",
    margin: int | tuple[int, int] = MARGIN,
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
    ranges: how large values can become. "auto": proved from the input's range and the weights, for every input; where
        that takes more bits than there are, as in deep networks, measured on the example, on calibration data and on
        random inputs of the range. "proved" insists, "measured" measures in any case, which takes fewer bytes. The
        plan's lines say what was measured, and a RangeWarning tells if few inputs stood behind it.
    margin: how many times the largest magnitude seen fits a measured range, a power of two: the least, and what is
        taken wherever it is cheap; or one number for both.
    calibration: typical inputs, on which ranges are measured where they are not proved. Some hundred are many.
    input_range: (low, high), or one such pair for each input. Clients refuse inputs outside it. Default: symmetric,
        to the power of two at or above twice the largest magnitude of the example, at least 4; all that uint8, int8
        and bool hold. The range of indices is that of the tables they are looked up in, whatever is given here.
    frac_bits: fractional bits of activations, 1 to 20; weights get up to four more. Default: the fewest with which
        logits stay within 2^-8 of the float model's, tried out on the whole example, on random and on blank inputs of
        the range, and on faint ones, which deviate by a thousandth; where logits are larger than any of the example,
        within as much more. Where even 20 are too few (of faint inputs: for 2^-6), a PrecisionWarning names the layer.
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
        "ranges": ranges,
        "margin": margin,
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
    for told in (*draft.doubts, *told_of_ranges(draft)):
        warnings.warn(told, stacklevel=3)  # the caller of compile
    found = Secure(draft.plan, draft.weights, answer=draft.answer, model=model)
    del draft
    release_freed_buffers()  # drafts of large models were large
    return found


def prepare(
    model: Model,
    example_inputs: Any,
    *,
    reveal: str = "logits",
    protocol: str = "fused",
    ranges: str = "auto",
    margin: int | tuple[int, int] = MARGIN,
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
    reveal, protocol, name = read_reveal(reveal), read_protocol(protocol), read_name(name)
    ranges, margin = read_how(ranges), read_margin(margin)
    frac_bits, max_error = read_frac_bits(frac_bits), read_max_error(max_error)
    arguments = arguments_of(model, example_inputs, kwargs)
    require_tensors(arguments, "example_inputs")
    program = export(model, arguments.args, arguments.kwargs)
    exported(program)
    examples = bound_examples(slots_of_program(program), arguments, "example_inputs")
    capture = Capture(program, read_ranges(input_range, list(examples.values())))
    capture.hints = _hints(model)
    plan = capture.run(name or _name_of(model), reveal)
    require_fit(plan, examples, "example_inputs")
    if isinstance(model, torch.nn.Module):
        require_faithful(model, program, arguments)
    shown: Mapping[str, Tensor] = {}
    if calibration is not None:
        given = arguments_of(model, calibration)
        require_tensors(given, "calibration")
        shown = bound_examples([slot for slot in slots_of(plan) if slot.label in examples], given, "calibration")
        require_fit(plan, shown, "calibration")
        for line, op in inputs_of(plan):
            check_input(plan.node(line), shown[op.label])
    tried = probes(plan, examples, shown)
    blank = edges(plan, examples, declared=input_range is not None)
    parts = (tried, *measured(plan, shown, blank))
    blank, kinds = tried_edges(plan, blank)
    rows = count(examples), count(shown)
    return Draft(
        plan.with_nodes(plan.nodes, protocol=protocol),
        capture.weights,
        tried,
        interpret,
        parts,
        frac_bits=frac_bits,
        max_error=max_error,
        ranges=ranges,
        margin=margin,
        rows=(*rows, sum(count(part) for part in parts) - sum(rows)),
        edges=blank,
        kinds=kinds,
        floats=partial(float_answers, program),
        answer=capture.answer,
    )


def _hints(model: Model) -> dict[str, str]:
    """What else is to be said of a batch that is out of place, by the paths of modules."""
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    return {path: hint for path, module in modules if (hint := sequence_first(module))}


def _name_of(model: torch.nn.Module | ExportedProgram) -> str:
    name = type(model).__name__.lower()
    return name if name.isidentifier() else "model"
