"""Why torch.export failed: what is the matter, where in the model, and what to do."""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch.utils import _pytree as pytree

from tacit.arguments import Arguments
from tacit.containers import in_own_containers
from tacit.ir.errors import draw
from tacit.tracing import FRACTIONS, hushed, listening, tell

_NOT_THE_USERS = {Path(file).parent for file in (str(torch.__file__), __file__)}
_STANDARD = Path(inspect.__file__).parent  # the library that comes with Python; packages may be installed inside
_FIXED = (
    "A shape, or a loop, fixes the batch: compute on the whole batch at once, without a loop over its rows, take the "
    "batch from the input, as in x.shape[0] or x.flatten(1), and create constants without a batch dimension"
)
_VALUES = (
    "This is control flow that depends on values, or a number that Python reads off them, and nobody may see them: "
    "compute both branches and choose by torch.where, give sizes as numbers (num_classes of one_hot), and leave checks "
    "of values out of the export, under `if not torch.compiler.is_exporting():` (validate_args=False of distributions)"
)
_OUTSIDE = (
    "Values are handed to code outside of PyTorch here, such as NumPy, of which the compiler sees nothing: use "
    "PyTorch's own functions"
)
_STRUCTURE = "Only tensors in tuples, lists, dictionaries and None go into a model and come out of it: return those"
_GRADIENTS = "The model computes gradients while it runs, which inference does without: write the derivative out"
_KEPT = (
    "The model keeps a tensor of one call for another, by an assignment to an attribute or to .data: hand it on as an "
    "argument and a result"
)
_NO_OPERATOR = "PyTorch cannot trace this operator: write it in terms of others"
_OTHER = "What PyTorch said below is all that is known; torch.export.export has to work on the model"
STATE_SECOND = (
    "PyTorch has it as layers x batch x features; take it as batch x layers x features, and transpose it in a module "
    "around the model, as in h.transpose(0, 1)"
)
_BATCH_FIXED = "specialized|Constraints violated"
# What torch.export says, by the kinds of its messages and exceptions, and what is to be said of it.
_KINDS = (
    (r"data-dependent|DataDependent|DynamicOutputShape|aten\.equal", _VALUES),
    (_BATCH_FIXED, _FIXED),
    (r"\.numpy\(\)|data pointer|__array__", _OUTSIDE),
    (r"not a known type|register a pytree|Unsupported (?:input|output) type|known type", _STRUCTURE),
    (r"require grad|requires_grad|grad_fn|create_graph", _GRADIENTS),
    (r"fake tensor in", _KEPT),
    (r"UnsupportedOperator", _NO_OPERATOR),
)
_ARGUMENTS = re.compile(
    r"required (?:positional |keyword-only )?argument|too many positional|positional arguments? but"
)
_SYMBOL = re.compile(r"\bs\d+\b")  # what stands for the batch in PyTorch's messages


@dataclass(frozen=True)
class Place:
    """Where in the model: a module by its path, and the innermost line of the user's own in or below it, if any.

    inner: the innermost module under way, which need not be the user's.
    """

    path: str
    module: torch.nn.Module
    inner: torch.nn.Module
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        """As the head of a message, the line drawn."""
        where = f"module '{self.path}'" if self.path else "the model"
        if not self.file:
            return f"{where} ({type(self.module).__name__}): "
        lines = linecache.getlines(self.file)
        head = f"{where}, {self.file}:{self.line}:"
        if not lines:
            return head + " "
        return draw([text.rstrip() for text in lines], self.line - 1, head, context=1) + "\n\n"


def explained(error: Exception, model: torch.nn.Module, arguments: Arguments, again: Callable[[], object]) -> str:
    """The message for what torch.export raised; `again` exports once more."""
    tell("".join(traceback.format_exception(error)))
    said = _SYMBOL.sub("N", _first_line(error))
    place = _place(traceback.walk_tb(error.__traceback__), model)
    failure = _failure(model, arguments)
    if failure is not None:
        return _stopped(place, _misfit(model, arguments, f"{said} {failure}"), said)
    kinds = [advice for pattern, advice in _KINDS if re.search(pattern, f"{type(error).__name__} {error}")]
    advice = kinds[0] if kinds else _OTHER
    if advice is _FIXED:
        place = _where_the_batch_was_fixed(model, again)
        advice = _of_a_recurrent_layer(place.inner) or advice if place else advice
    return f"{place or ''}torch.export could not capture the model with a batch of any size. {advice}.\nIt said: {said}"


def sequence_first(module: torch.nn.Module) -> str:
    """What is to be said of a module that takes its batch in second place; "" for every other one."""
    if getattr(module, "batch_first", True):
        return ""
    return (
        f"{type(module).__name__} takes the batch in second place, and inputs have it first: create it with "
        "batch_first=True, or transpose its input and its result, as in x.transpose(0, 1)"
    )


def _of_a_recurrent_layer(module: torch.nn.Module) -> str:
    """Where such a one fixes the batch: it takes it in second place, or its state does."""
    if not isinstance(module, (torch.nn.RNNBase, torch.nn.MultiheadAttention)):
        return ""
    state = "Its start state fixes the batch: create a constant one with x.shape[0]; as an input, " + STATE_SECOND
    return sequence_first(module) or (state if isinstance(module, torch.nn.RNNBase) else "")


def fixes_the_batch(error: Exception) -> bool:
    """Whether torch.export stops because the batch became a number."""
    return bool(re.search(_BATCH_FIXED, str(error)))


def stops_on(model: torch.nn.Module, arguments: Arguments, error: Exception) -> str:
    """The message where the model itself raises this on the example; its text may hold values, and fractions go."""
    place = _place(traceback.walk_tb(error.__traceback__), model)
    return _stopped(place, _misfit(model, arguments, str(error)), FRACTIONS.sub("#", _first_line(error)))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _stopped(place: Place | None, advice: str, said: str) -> str:
    return f"{place or ''}the model does not run on the example. {advice}.\nIt said: {said}"


def _failure(model: torch.nn.Module, arguments: Arguments) -> Exception | None:
    """What PyTorch itself raises when it runs the model on the example; None where it does not."""
    # Buffers that the model writes to keep their values.
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with torch.enable_grad(), hushed(), in_own_containers(model, arguments) as plain:
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, plain)
            torch.func.functional_call(model, buffers, args, kwargs)
    except Exception as error:
        return error
    return None


def _misfit(model: torch.nn.Module, arguments: Arguments, said: str) -> str:
    if _ARGUMENTS.search(said):
        return (
            f"Its forward takes {inspect.signature(model.forward)}, the example holds {arguments.count()} arguments: "
            "give one for each in a tuple, or in a dictionary by their names"
        )
    tensors = [x for _, x in arguments.tensors()]
    if re.search(r"indices|Long|[Ii]nteger|\blong\b|\bInt\b", said) and re.search(r"[Ff]loat|Double", said):
        if all(x.is_floating_point() for x in tensors):
            return "It takes whole numbers where the example has fractions: give indices as torch.int64"
        if not any(x.is_floating_point() for x in tensors):
            return "It computes with fractions where the example has whole numbers: give floats, as in x.float()"
    shapes = ", ".join(
        f"{'x'.join(('N', *map(str, x.shape[1:])))} {str(x.dtype).removeprefix('torch.')}"
        for _, x in arguments.tensors()
    )
    return f"PyTorch itself stops on it, without Tacit: make model(example) run first; the example is {shapes}"


def _place(frames: Iterable[tuple[FrameType, int]], model: torch.nn.Module) -> Place | None:
    """The innermost module, and the innermost frame that is the user's own; None where no module is under way."""
    paths = {id(module): (name, module) for name, module in model.named_modules()}
    inside: tuple[str, torch.nn.Module] | None = None
    found: tuple[str, torch.nn.Module, str, int] | None = None
    for frame, line in frames:
        file = frame.f_code.co_filename
        inside = paths.get(id(frame.f_locals.get("self")), inside)
        if inside is not None and _of_the_user(Path(file)):
            found = (*inside, file, line)
    if inside is None:
        return None
    path, module, file, line = found or (*inside, "", 0)
    return Place(path, module, inside[1], file, line)


def _of_the_user(file: Path) -> bool:
    around = set(file.parents)
    return not _NOT_THE_USERS & around and (_STANDARD not in around or "site-packages" in file.parts)


def _where_the_batch_was_fixed(model: torch.nn.Module, again: Callable[[], object]) -> Place | None:
    """The place at which a symbolic size became a number, which PyTorch tells its log alone, while it happens."""
    places: list[Place | None] = []

    def hear(message: str) -> None:
        if message.startswith("set_replacement"):
            places.append(_place(reversed(list(traceback.walk_stack(None))), model))

    try:
        with listening("torch.fx.experimental.symbolic_shapes", hear):
            again()
    except Exception:  # the one that is being explained
        return next((place for place in places if place is not None), None)
    return None
