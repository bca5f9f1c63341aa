"""The example and calibration data: tensors of one batch, each the input of the plan that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tacit.arguments import CONSTANTS, Arguments, Slot, bind
from tacit.explain import STATE_SECOND
from tacit.fit import FLOATS
from tacit.graph import INTEGERS
from tacit.ir.errors import CompileError, InputError
from tacit.ir.ops.model import CountCorrect
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.tensors import comparable, plain_tensor, unreadable

Tensor = torch.Tensor


def require_tensors(arguments: Arguments, what: str) -> None:
    """Dense tensors with one batch in front; raises CompileError naming the argument."""
    if arguments.args and all(type(arg) in (bool, int, float) for arg in arguments.args):
        raise CompileError(f"{what} holds numbers: make a tensor of them by torch.tensor(x), the batch first")
    for arg in arguments.args:
        if isinstance(arg, CONSTANTS):
            raise CompileError(
                f"{what} holds no tensor, but {type(arg).__name__}: to fix it in the plan give it by name, in a "
                "dictionary of all arguments or in kwargs="
            )
    sizes = set()
    for place, given in arguments.tensors():
        reason = unreadable(given) or _misfit(plain_tensor(given))
        if reason:
            raise CompileError(f"{what}: {place} {reason}")
        sizes.add(len(given))
    if not sizes:
        raise CompileError(f"{what} is empty: give one tensor for each argument of the model")
    if len(sizes) != 1:
        raise CompileError(
            f"the tensors of {what} differ in batch size. The batch is the first dimension of each, also of the start "
            f"state of a recurrent layer: {STATE_SECOND}"
        )


def _misfit(x: Tensor) -> str:
    """Why this is no example of an input; "" where it is one."""
    whole = x.dtype in (*INTEGERS, torch.bool)
    if x.dim() < (1 if whole else 2):
        return f"has shape {tuple(x.shape)}, without a batch: add it, as in x[None], or x[:, None] to single numbers"
    if x.numel() == 0:
        return f"has shape {tuple(x.shape)}, and so no element"
    if not whole and x.dtype not in FLOATS:
        return f"is {x.dtype}: convert it by x.float(), or by x.long() where it holds indices"
    return "" if bool(torch.isfinite(x).all()) else "holds NaN or infinity"


def bound_examples(slots: Sequence[Slot], arguments: Arguments, what: str) -> dict[str, Tensor]:
    """The tensors by the labels of the inputs, in the order of the plan."""
    try:
        found = bind(slots, arguments.args, arguments.inputs())
    except InputError as error:
        raise CompileError(f"{what}: {error}") from None
    return {label: comparable(plain_tensor(x)) for label, x in found.items()}


def require_fit(plan: Plan, values: Mapping[str, Tensor], what: str) -> None:
    for name, op in inputs_of(plan):
        declared, x = plan.node(name).type, values[op.label]
        if tuple(x.shape) != declared.at(len(x)).dims:
            raise CompileError(f"{what} has shape {tuple(x.shape)} where the model takes {declared}")
        low, high = op.ends(x.shape[1:])
        if op.integers and bool(((x < low) | (x > high)).any()):
            raise CompileError(
                f"{what} holds integers for '{op.label}' outside of [{op.low:.0f}, {op.high:.0f}]"
                f"{', or of the range of their place' if op.along else ''}, where their tables or input_range end"
            )


def inputs_of(plan: Plan) -> list[tuple[str, Input]]:
    """The inputs of the model by their lines, without the targets of a count."""
    targets = {node.args[1] for node in plan.find(CountCorrect)}
    inputs = [(node.name, node.op) for node in plan.find(Input) if isinstance(node.op, Input)]
    return [(name, op) for name, op in inputs if name not in targets]
