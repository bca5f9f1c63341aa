"""From a PyTorch model to an exported graph, and what that graph says about the source it comes from."""

from __future__ import annotations

import builtins
import linecache
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from tacit.arguments import Arguments
from tacit.containers import in_own_containers
from tacit.ir.errors import CompileError, TacitError, draw
from tacit.runtime.forks import in_child
from tacit.tensors import plain_tensor

Tensor = torch.Tensor
_NOT_THE_USERS = {Path(file).parent for file in (str(torch.__file__), __file__, logging.__file__)}
_VALUES = (
    "This is control flow that depends on values, which nobody may see: compute both branches and choose by torch.where"
)
_FIXED = (
    "A shape fixes the batch: take the batch from the input, as in x.shape[0] or x.flatten(1), and create constants "
    "without a batch dimension"
)
_T = TypeVar("_T")
_P = ParamSpec("_P")
_MOST_REWRITES = 4  # what a rule writes may need another
_OTHER = "Usual causes: control flow that depends on values, or a shape that fixes the batch"


_exporting = threading.RLock()


def _renew_lock() -> None:
    """In a forked process: a lock that another thread held is held for ever."""
    global _exporting
    _exporting = threading.RLock()


in_child(_renew_lock)


def _one_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """torch.export changes PyTorch for all threads while it runs, and warnings are filtered for all of them."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _exporting:
            return function(*args, **kwargs)

    return alone


@_one_at_a_time
def export(
    model: torch.nn.Module | ExportedProgram, examples: Sequence[Any], named: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """The exported graph, with a symbolic batch; raises CompileError. `examples` and the `named` ones may be nested."""
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, torch.nn.Module):
        raise CompileError(
            f"expected a torch.nn.Module, a GraphModule or an ExportedProgram, not {type(model).__name__}"
        )
    _require_fit_module(model)
    arguments = Arguments(tuple(examples), named or {})

    def run() -> ExportedProgram:
        with torch.no_grad(), _without_noise(), in_own_containers(model, arguments) as plain:
            args, kwargs = pytree.tree_map_only(Tensor, _enough, plain)
            shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
            for x in pytree.tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    shapes[x] = {0: Dim.DYNAMIC}
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)

    try:
        return run()
    except TacitError:
        raise
    except Exception as error:  # torch.export raises many unrelated types
        if _fixes_the_batch(error):
            with suppress(Exception), _symbolic_lengths():
                return run()
        raise CompileError(_told(error, model, run)) from error


def _enough(x: Tensor) -> Tensor:
    """An example that tells the batch from a constant: a batch of one would be taken for one."""
    x = plain_tensor(x)
    return torch.cat([x, x]) if x.shape[0] == 1 else x.clone()


def _require_fit_module(model: torch.nn.Module) -> None:
    """Evaluation mode, and weights of a type that is compiled; raises CompileError naming the module."""
    for name, module in model.named_modules():
        where = f"module '{name or type(model).__name__}'"
        if module.training:
            raise CompileError(f"the model is in training mode ({where}); call model.eval() first")
        if "quantized" in type(module).__module__:
            raise CompileError(
                f"{where} is quantised ({type(module).__name__}); compile the model before quantising it"
            )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_complex():
            raise CompileError(f"'{name}' is {value.dtype}: write real and imaginary parts as two tensors")
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise CompileError(f"'{name}' is {value.dtype}; weights are float32 or float64: convert with model.float()")


def _fixes_the_batch(error: Exception) -> bool:
    return "specialized" in str(error) or "Constraints violated" in str(error)


@contextmanager
def _symbolic_lengths() -> Iterator[None]:
    """len(x), of which Python makes a plain number, as the symbolic x.shape[0]."""
    length = len

    def symbolic(x: Any) -> Any:
        return x.shape[0] if isinstance(x, Tensor) and x.dim() else length(x)

    builtins.len = symbolic
    try:
        yield
    finally:
        builtins.len = length


def _told(error: Exception, model: torch.nn.Module, again: Callable[[], object]) -> str:
    """What torch.export ran into, where in the model, and what to do."""
    said = (str(error) or type(error).__name__).strip()
    advice, place = _OTHER, _place(traceback.walk_tb(error.__traceback__), model)
    if "data-dependent" in said or "DataDependent" in type(error).__name__:
        advice = _VALUES
    elif _fixes_the_batch(error):
        advice, place = _FIXED, _where_the_batch_was_fixed(model, again)
    return (
        f"{place}torch.export could not capture the model with a batch of any size. {advice}.\n"
        f"It said: {said.splitlines()[0]}"
    )


def _place(frames: Iterable[tuple[FrameType, int]], model: torch.nn.Module) -> str:
    """The innermost frame that is the user's own, drawn, with the path of its module; "" where there is none."""
    paths = {id(module): name for name, module in model.named_modules()}
    path, found = None, None
    for frame, line in frames:
        file = frame.f_code.co_filename
        path = paths.get(id(frame.f_locals.get("self")), path)
        if path is not None and not _NOT_THE_USERS & set(Path(file).parents):
            found = (file, line)
    if path is None or found is None:
        return ""
    place = f"module '{path}'" if path else "the model"
    file, line = found
    lines = linecache.getlines(file)
    head = f"{place}, {file}:{line}:"
    return draw([text.rstrip() for text in lines], line - 1, head, context=1) + "\n\n" if lines else head + " "


def _where_the_batch_was_fixed(model: torch.nn.Module, again: Callable[[], object]) -> str:
    """The place at which a symbolic size became a number, which PyTorch tells its log alone, while it happens."""
    places: list[str] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("set_replacement"):
                outwards = traceback.walk_stack(None)
                places.append(_place(reversed(list(outwards)), model))

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.level, logger.propagate, logger.handlers
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, [Watch()]
    try:
        again()
    except Exception:  # the one that is being explained
        return next((place for place in places if place), "")
    finally:
        logger.level, logger.propagate, logger.handlers = before
    return ""


@contextmanager
def _without_noise() -> Iterator[None]:
    """What PyTorch warns of while it traces is nothing that a user of the compiler can act on.

    It asks whether stdout is a terminal, which a closed file does not answer: nobody reads that one in any case.
    """
    closed = getattr(sys.stdout, "closed", False)
    with warnings.catch_warnings(), redirect_stdout(None) if closed else nullcontext():
        warnings.simplefilter("ignore")
        yield


@_one_at_a_time
def simplified(program: ExportedProgram, known: Collection[str]) -> ExportedProgram:
    """The program without in-place operators that other values could notice, and in terms of `known` operators.

    Most of the former are harmless: relu_(conv(x)) where nothing else reads conv(x). The others PyTorch rewrites
    itself, as it does operators that are not known and that it has a decomposition for.
    """
    rules = torch.export.default_decompositions()
    for _ in range(_MOST_REWRITES):
        strange = {t for t in _unknown(program, known) if t in rules or t._can_decompose()}
        if not strange and not _noticed(program):
            break
        with _without_noise():  # which decomposes composites without a rule in any case
            program = program.run_decompositions({target: rules[target] for target in strange if target in rules})
    return program


def _unknown(program: ExportedProgram, known: Collection[str]) -> set[torch._ops.OpOverload]:
    """The operators that are not known, and compute tensors that depend on an input."""
    inputs, secret = program.graph_signature.user_inputs, set[torch.fx.Node]()
    found = set[torch._ops.OpOverload]()
    for node in program.graph.nodes:
        if node.name in inputs or (_holds_tensors(node) and not secret.isdisjoint(node.all_input_nodes)):
            secret.add(node)
            if isinstance(node.target, torch._ops.OpOverload) and str(node.target) not in known:
                found.add(node.target)
    return found


def _holds_tensors(node: torch.fx.Node) -> bool:
    return any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(node.meta.get("val")))


def _noticed(program: ExportedProgram) -> bool:
    """Whether a value is read after an in-place operator wrote to it, or to what it is a view of."""
    roots: dict[torch.fx.Node, torch.fx.Node] = {}
    written: dict[torch.fx.Node, torch.fx.Node] = {}  # root: the operator that wrote to it last
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in program.graph.nodes:
        for arg in node.all_input_nodes:
            writer = written.get(roots.get(arg, arg))
            if writer is not None and place[arg] < place[writer]:
                return True
        viewed, target = _aliases(node)
        roots[node] = roots.get(viewed, viewed) if viewed is not None else node
        if target is not None:
            written[roots.get(target, target)] = node
            if target.op == "placeholder":
                return True
    return False


def _aliases(node: torch.fx.Node) -> tuple[torch.fx.Node | None, torch.fx.Node | None]:
    """The operand that the result shares its memory with, and the operand that is written to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.args or not isinstance(node.args[0], torch.fx.Node):
        same = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
        return (same if node.op == "call_function" else None), None
    first = schema.arguments[0].alias_info
    target = node.args[0] if first is not None and first.is_write else None
    shares = any(r.alias_info is not None for r in schema.returns) or "dropout" in str(node.target)
    return (node.args[0] if shares else None), target


def module_path(node: torch.fx.Node) -> str:
    """The module that a node of the graph comes from; "" for the model itself, or where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    made_up = "_empty_nn_module_stack" in path or not all(c.isalnum() or c in "._" for c in path)
    return "" if made_up else path


def exported_as(node: torch.fx.Node) -> str:
    """The operator that the model's own code called, where decompositions have rewritten it since."""
    sources = node.meta.get("from_node")
    target = str(node.target)
    while sources:
        target, sources = str(sources[0].target), sources[0].from_node
    return target


def source_line(node: torch.fx.Node) -> str:
    """`file:line` of the innermost frame in the user's code."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    outside = [f for f in frames if "/torch/nn/" not in f] or frames
    if not outside:
        return ""
    parts = outside[-1].split(",")
    return f"{parts[0].removeprefix('File ').strip(chr(34))}:{parts[1].removeprefix(' line ').strip()}"
