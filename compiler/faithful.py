"""Whether the exported graph computes what the model does: both run on a piece of the example, in floats."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from tacit.arguments import Arguments
from tacit.containers import in_own_containers
from tacit.explain import stops_on
from tacit.ir.errors import CompileError
from tacit.tensors import plain_tensor
from tacit.tracing import hushed, one_at_a_time, quiet

Tensor = torch.Tensor
_ROWS = 2
# Two runs of one model differ by less, and fused kernels from single ones.
_SAME, _CLOSE = 2.0**-14, 2.0**-8
_CHANGING = (
    "the model gives different results for the same input: it reads something beside its input and its tensors, as a "
    "random generator of Python's or NumPy's, the time, or what an earlier call has left. A plan would keep what that "
    "was when the model was compiled: leave it out, or pass it as an input"
)
_OTHERWISE = (
    "the exported graph gives other results than the model on the example, by up to {:.2g}: either the model does "
    "something else while it is exported, or a comparison in it hangs on the last bits"
)


@one_at_a_time
def require_faithful(model: torch.nn.Module, program: ExportedProgram, arguments: Arguments) -> None:
    """Raises CompileError where the model itself stops on the example, or gives this result now and that one then.

    Where it keeps to one result and the graph to another, that is a warning: values on the edge of a step may do so.
    """
    with torch.no_grad(), quiet(), hushed(), in_own_containers(model, arguments) as plain:

        def run(of: Callable[..., Any]) -> list[Tensor]:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: plain_tensor(x)[:_ROWS].clone(), plain)
            results = pytree.tree_leaves(of(*args, **kwargs))
            return [x.double() for x in results if isinstance(x, Tensor) and not x.is_complex()]

        try:
            found, again = run(model), run(model)
        except Exception as error:
            raise CompileError(stops_on(model, arguments, error)) from None
        if _distance(found, again) > _SAME:
            raise CompileError(_CHANGING)
        distance = _distance(again, run(_graph_of(program)))
    if distance > _CLOSE:
        warnings.warn(_OTHERWISE.format(distance), stacklevel=6)


@one_at_a_time
def float_answers(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """What PyTorch itself answers to inputs by label, N x all numbers of the result; None where it cannot tell."""
    places = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    values: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            constant = isinstance(spec.arg, ConstantArgument)
            values.append(spec.arg.value if constant else inputs[spec.arg.name].to(places[spec.arg.name].dtype))
    with torch.no_grad(), quiet(), hushed():
        try:
            found = [x for x in pytree.tree_leaves(_graph_of(program)(*values)) if isinstance(x, Tensor)]
            return torch.cat([x.double().flatten(1) for x in found], 1)
        except Exception:  # a model may stop on inputs that are none of its own, for reasons of its own
            return None


def _graph_of(program: ExportedProgram) -> Callable[..., Any]:
    """The graph as a function, run node by node: generated code trips over the names that modules may have."""
    constants = {**program.state_dict, **program.constants}
    targets = [spec.target for spec in program.graph_signature.input_specs]

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = iter(pytree.tree_leaves((args, kwargs)))
        values = [next(inputs) if target is None else constants[target] for target in targets]
        return torch.fx.Interpreter(program.graph_module).run(*values)

    return run


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value where that is above 1; of two structures, none."""
    if [x.shape for x in some] != [y.shape for y in others]:
        return 0.0
    size = max((float(x.nan_to_num().abs().max()) for x in some if x.numel()), default=0.0)
    pairs = [(x.nan_to_num(), y.nan_to_num()) for x, y in zip(some, others, strict=True) if x.numel()]
    return max((float((x - y).abs().max()) for x, y in pairs), default=0.0) / max(1.0, size)
