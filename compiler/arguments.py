"""How a model is called: which argument is which input of the plan, by position and by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind

from tacit.ir.errors import CompileError, InputError
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.structure import Apart, taken_apart
from tacit.tensors import unreadable

Tensor = torch.Tensor
_UNFIT = re.compile(r"[^a-z0-9]")
CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Arguments:
    """What forward is called with; what is no tensor among the named ones is part of the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[tuple[str, Any]]:
        """Every leaf that is an input, with a name for messages, from first to last."""
        places: list[tuple[str, Any]] = [(f"argument {i + 1}", arg) for i, arg in enumerate(self.args)]
        places += [(f"'{name}'", arg) for name, arg in self.inputs().items()]
        out = []
        for place, arg in places:
            apart = taken_apart(arg, by_key=True)
            for path, leaf in zip(apart.paths, apart.leaves, strict=True):
                out.append((place + "".join(f"[{step!r}]" for step in path), leaf))
        return out

    def count(self) -> int:
        return len(self.args) + len(self.kwargs)

    def inputs(self) -> dict[str, Any]:
        """The named arguments that are no constants."""
        return {name: arg for name, arg in self.kwargs.items() if not isinstance(arg, CONSTANTS)}


@dataclass(frozen=True)
class Slot:
    """An input of a plan: its label, and whether it is given by name alone."""

    label: str
    by_name: bool = False


def slots_of(plan: Plan) -> list[Slot]:
    """The inputs of a plan, in its order."""
    ops = [node.op for node in plan.find(Input)]
    return [Slot(op.label, op.by_name) for op in ops if isinstance(op, Input)]


def slots_of_program(program: torch.export.ExportedProgram) -> list[Slot]:
    """The inputs of an exported graph, in its order. Those after a constant, or a gap, cannot be told by position."""
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    spec = program.call_spec.in_spec
    by_position = len(given) if spec is None else spec.children()[0].num_leaves
    inputs = [(i, arg) for i, arg in enumerate(given) if not isinstance(arg, ConstantArgument)]
    return [Slot(arg.name, i >= by_position) for i, arg in inputs]


def arguments_of(model: Any, example: Any, kwargs: Mapping[str, Any] | None = None) -> Arguments:
    """An example as the arguments of the model's forward, those that can be told by position first.

    A tuple or a list holds arguments by position; so does a named tuple, unless forward takes one as a whole. A
    dictionary holds them by name, where its keys are names of forward's parameters and leave none out that has no
    default; otherwise it is an argument itself. Raises CompileError where forward does not take what is given by name.
    """
    signature = None if isinstance(model, torch.export.ExportedProgram) else _signature(model)
    args: tuple[Any, ...] = (example,)
    named = dict(kwargs or {})
    if isinstance(example, Mapping) and kwargs is None and signature is not None and _names(signature, example):
        args, named = (), dict(example)
    elif isinstance(example, (tuple, list)) and not _as_a_whole(signature, example):
        args = tuple(example)
    if not named:
        return Arguments(args)
    if signature is None:
        return Arguments(args, named)
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        raise CompileError(f"forward{signature} does not take these arguments: {error}") from None
    rest = [name for name in named if name not in signature.parameters]
    if rest:
        raise CompileError(
            f"forward{signature} has no parameter '{rest[0]}' of its own, and torch.export takes no batch of any size "
            "behind two asterisks: write it as a parameter"
        )
    return _in_order(signature, args, named)


def _signature(model: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (AttributeError, TypeError, ValueError):
        return None


def _names(signature: inspect.Signature, example: Mapping[Any, Any]) -> bool:
    """Whether the keys are names of parameters, and what is left goes to one like **rest."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {name for name, parameter in signature.parameters.items() if parameter.kind in kinds}
    if names.isdisjoint(example) or not all(isinstance(key, str) for key in example):
        return False
    return _binds(lambda: signature.bind(**example))


def _as_a_whole(signature: inspect.Signature | None, example: Sequence[Any]) -> bool:
    """Whether a named tuple is one argument: forward takes one, and not as many as it has fields."""
    if signature is None or not hasattr(example, "_fields"):
        return False
    return _binds(lambda: signature.bind(example)) and not _binds(lambda: signature.bind(*example))


def _binds(bind: Callable[[], object]) -> bool:
    try:
        bind()
    except TypeError:
        return False
    return True


def _in_order(signature: inspect.Signature, args: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
    """Named arguments by position as far as there is no gap, the others in the order of the parameters."""
    moved = list(args)
    for name, parameter in list(signature.parameters.items())[len(args) :]:
        fits = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name in named
        if not fits or isinstance(named[name], CONSTANTS):
            break
        moved.append(named.pop(name))
    return Arguments(tuple(moved), {name: named[name] for name in signature.parameters if name in named})


def in_order(slots: Sequence[Slot], given: Sequence[Tensor]) -> tuple[Any, ...]:
    """Tensors without names in the order of a plan's inputs, as the arguments of a call."""
    if len(given) == len(slots) and any(slot.by_name for slot in slots):
        return ({slot.label: x for slot, x in zip(slots, given, strict=True)},)
    return tuple(given)


def bind(slots: Sequence[Slot], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Which tensor is which input, by label, in the order of the slots; raises InputError.

    An input's label is the name of forward's parameter, with the path into it, as in `mask` and `pair_0`. Arguments by
    position fill the inputs in their order; what is inside of dictionaries and objects is found by its name there.
    """
    parts = [taken_apart(arg, by_key=True) for arg in args]
    named = {key: taken_apart(value, by_key=True) for key, value in (kwargs or {}).items()}
    binding = _Binding(slots, sum(len(part.leaves) for part in (*parts, *named.values())))
    if len(parts) == 1 and not parts[0].named and not binding.fits(parts[0]) and isinstance(args[0], (tuple, list)):
        parts = [taken_apart(arg, by_key=True) for arg in args[0]]  # a list of all arguments
    for part in parts:
        binding.by_position(part)
    for key, part in named.items():
        binding.by_name(key, part)
    return binding.finished(bool(named))


class _Binding:
    """Inputs that have found their tensors so far."""

    def __init__(self, slots: Sequence[Slot], given: int) -> None:
        self._slots = slots
        self._bound: dict[str, Any] = {}
        self._takes = ", ".join(slot.label for slot in slots)
        self._expected = f"expected {len(slots)} inputs ({self._takes}), found {given}"
        self._given = given

    def fits(self, part: Apart) -> bool:
        """Whether the next inputs are called as the leaves of this argument are."""
        return bool(_by_path(part, self._free(by_position=True)[: len(part.leaves)]))

    def by_position(self, part: Apart) -> None:
        labels = self._free(by_position=True)
        _require_tensors(part, labels)
        found = self._inside(part, labels[: len(part.leaves)]) if any(part.paths) else labels[: len(part.leaves)]
        if len(found) < len(part.leaves):
            free = self._free()
            if len(self._slots) != self._given or not free:
                raise InputError(self._expected)
            raise InputError(f"input '{free[len(found)]}' cannot be told by its position: give it by name")
        self._bound |= zip(found, part.leaves, strict=True)

    def _free(self, *, by_position: bool = False) -> list[str]:
        free = [slot for slot in self._slots if slot.label not in self._bound]
        return [slot.label for slot in free if not (by_position and slot.by_name)]

    def _inside(self, part: Apart, labels: list[str]) -> list[str]:
        """The inputs inside of one argument, by their names there; it may be a dictionary of arguments itself."""
        found, names = _by_path(part, labels), [_label(*path) for path in part.paths]
        if found:
            return found
        if part.keyed and set(names) <= set(self._free()):
            return names
        if len(self._slots) != self._given:
            raise InputError(self._expected)
        strange = any(label.endswith(f"_{name}") for name in names for label in labels)
        if len(names) == 1 or (part.named and not part.keyed and not strange):
            return labels  # there is but one order: a named tuple may stand in the place of a tuple
        raise InputError(
            f"{', '.join(names)} inside of an argument are not the inputs {', '.join(labels)}: give it the structure "
            "and the names that the example had"
        )

    def by_name(self, key: str, part: Apart) -> None:
        labels = {slot.label for slot in self._slots}
        for path, leaf in zip(part.paths, part.leaves, strict=True):
            name = _label(key, *path)
            if name not in labels:
                raise InputError(
                    f"there is no input '{name}'; the plan takes {self._takes}. An argument that the example left out, "
                    "or that is no tensor, was fixed when the model was compiled: leave it out"
                )
            if name in self._bound:
                raise InputError(f"input '{name}' is given twice")
            _require_tensors(part, [name])
            self._bound[name] = leaf

    def finished(self, by_name: bool) -> dict[str, Any]:
        missing = [slot.label for slot in self._slots if slot.label not in self._bound]
        if missing and not by_name:
            raise InputError(self._expected)
        if missing:
            raise InputError(f"input '{missing[0]}' is missing; the plan takes {self._takes}")
        return {slot.label: self._bound[slot.label] for slot in self._slots}


def _by_path(part: Apart, labels: Sequence[str]) -> list[str]:
    """The label of each leaf of one argument, among as many; none where the names do not fit."""
    paths = [_label(*path) for path in part.paths]
    if not all(paths):
        return []
    for label in labels:
        if not label.endswith(f"_{paths[0]}"):
            continue
        prefix = label.removesuffix(paths[0])
        found = [prefix + path for path in paths]
        if sorted(found) == sorted(labels):
            return found
    # Names that were taken already have a number more.
    fits = len(labels) == len(paths) and all(
        re.fullmatch(rf".+_{re.escape(path)}(_\d+)?", label) for path, label in zip(paths, labels, strict=True)
    )
    return list(labels) if fits else []


def _label(*path: Any) -> str:
    """As PyTorch calls the input of an exported graph."""
    return "_".join(_UNFIT.sub("_", str(step).lower()) for step in path)


def _require_tensors(part: Apart, labels: Sequence[str]) -> None:
    """Every leaf is a tensor; the message names the input that it would be."""
    for i, leaf in enumerate(part.leaves):
        if not isinstance(leaf, Tensor):
            which = f"input '{labels[min(i, len(labels) - 1)]}'" if labels else "an input"
            raise InputError(f"{which} {unreadable(leaf)}")
