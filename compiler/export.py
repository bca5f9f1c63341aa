"""From a PyTorch model to an exported graph, and what that graph says about the source it comes from."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from tacit.arguments import Arguments
from tacit.containers import in_own_containers
from tacit.explain import explained, fixes_the_batch
from tacit.fit import require_fit
from tacit.ir.errors import CompileError, TacitError
from tacit.tensors import plain_tensor
from tacit.tracing import hushed, one_at_a_time, quiet

Tensor = torch.Tensor


@one_at_a_time
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
    require_fit(model)
    arguments = Arguments(tuple(examples), named or {})

    def run() -> ExportedProgram:
        with hushed(), in_own_containers(model, arguments) as plain:
            args, kwargs = pytree.tree_map_only(Tensor, _enough, plain)
            shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
            for x in pytree.tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    shapes[x] = {0: Dim.DYNAMIC}
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)

    with torch.no_grad(), quiet():
        try:
            return run()
        except TacitError:
            raise
        except Exception as error:  # torch.export raises many unrelated types
            if fixes_the_batch(error):
                with suppress(Exception), _symbolic_lengths():
                    return run()
            told = explained(error, model, arguments, run)
    raise CompileError(told)  # the traceback through PyTorch is in the log


def _enough(x: Tensor) -> Tensor:
    """An example that tells the batch from a constant: a batch of one would be taken for one."""
    x = plain_tensor(x)
    return torch.cat([x, x]) if x.shape[0] == 1 else x.clone()


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


def _traced(node: torch.fx.Node) -> torch.fx.Node:
    """The node; for a call with a graph of its own, of which nothing is known, the last one inside."""
    module = node.graph.owning_module
    if node.meta.get("stack_trace") or module is None:
        return node
    graphs = [arg for arg in node.args if isinstance(arg, torch.fx.Node) and arg.op == "get_attr"]
    inside = [inner for arg in graphs for inner in module.get_submodule(str(arg.target)).graph.nodes]  # type: ignore[union-attr]
    return next((inner for inner in reversed(inside) if inner.meta.get("stack_trace")), node)


def module_path(node: torch.fx.Node) -> str:
    """The module that a node of the graph comes from; "" for the model itself, or where it is not known."""
    stack = _traced(node).meta.get("nn_module_stack") or {}
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
    trace = _traced(node).meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    frames = [line for line in frames if "<eval_with_key>" not in line]  # code that PyTorch made up
    outside = [f for f in frames if "/torch/nn/" not in f] or frames
    if not outside:
        return ""
    parts = outside[-1].split(",")
    return f"{parts[0].removeprefix('File ').strip(chr(34))}:{parts[1].removeprefix(' line ').strip()}"
