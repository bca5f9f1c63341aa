"""Arguments of a call in the exported graph as lines of the plan, and lines as results of PyTorch's types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

from tacit.constants import NotConstant
from tacit.export import module_path
from tacit.graph import Graph
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.model import AsReal, NoOp
from tacit.ir.ops.moves import Move
from tacit.ir.ops.whole import Within
from tacit.layout import Laid, Layout

Tensor = torch.Tensor
NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


class Operands(Graph):
    """What nodes of the graph are in the plan: values on lines that hold them some way round, constants, numbers."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program)
        self._values: dict[torch.fx.Node, Any] = {}  # a Laid, or a list of them for several results
        self._lines: dict[torch.fx.Node, str | Laid] = {}  # of constants that are in use
        self._sources: dict[torch.fx.Node, tuple[str, Tensor]] = {}  # parameters and buffers
        self._layout = Layout(self, self.unsupported)

    def _arguments(self, node: torch.fx.Node, layer: type[Layer] = Layer) -> dict[str, Any]:
        """Arguments by the names of the ATen schema, defaults filled in; values as `Laid`, constants as lines, or as
        nodes where they stay unresolved. A number in the place of a tensor becomes a constant, unless the layer reads
        numbers there."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            self.unsupported(f"'{node.target}' is no operator of PyTorch's, but a call with a graph of its own")
        out: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            if i < len(node.args):
                value: Any = node.args[i]
            elif argument.name in node.kwargs:
                value = node.kwargs[argument.name]
            else:
                value = argument.default_value if argument.has_default_value() else None
            kept = argument.name in layer.unresolved and isinstance(value, torch.fx.Node) and value in self.constants
            value = value if kept else self._resolve(value)
            if type(value) in (int, float, bool) and argument.name not in layer.numbers and _is_tensor(argument.type):
                value = self.constant(argument.name, torch.tensor(self.scalar(value)))
            out[argument.name] = value
        return out

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._resolve(v) for v in value]
        if not isinstance(value, torch.fx.Node) or value in self._values:
            return self._values.get(value, value) if isinstance(value, torch.fx.Node) else value
        if value not in self.constants:
            return value
        if isinstance(value.meta.get("val"), NUMBERS):
            return self.constants.number(value)
        if value not in self._lines:
            try:
                found = self.constants.value(value)
            except NotConstant as reason:
                self.unsupported(str(reason))
            label = (
                self._sources[value][0] if value in self._sources else f"{module_path(value) or 'model'}.{value.name}"
            )
            line = self.weight(label, found.value)
            laid = Laid(line, found.place, found.left, found.right)
            self._lines[value] = self._layout.joined(replace(laid, line=self.valued(line))) if found.flattened else line
        return self._lines[value]

    def _with_dimension(self, k: dict[str, Any], value: Any) -> dict[str, Any]:
        """Operands that lack the dimension which the call is about, with one element in it."""
        key = {"aten.select_scatter.default": "src", "aten.stack.default": "tensors"}.get(self.target)
        if key is None:
            return k
        dim = k["dim"] % len(value.shape)

        def wide(x: Any) -> Any:
            if isinstance(x, list):
                return [wide(item) for item in x]
            if isinstance(x, Laid):
                shape = self._layout.shape(x)
                return self._layout.view(x, (*shape[:dim], 1, *shape[dim:]))
            sizes = self.fixed_shape(x)
            return self.reshaped_weight(x, (*sizes[:dim], 1, *sizes[dim:]))

        return k | {key: wide(k[key])}

    def _on_floats(self, layer: type[Layer], k: dict[str, Any], value: Any) -> bool:
        """Whether PyTorch computes on floats here, to which it converts the integers among the operands."""
        first = value[0] if isinstance(value, (list, tuple)) else value
        operands = flat(v for key, v in k.items() if key not in layer.choosers)
        lines = [x.line if isinstance(x, Laid) else x for x in operands]
        tensors = [x for x in lines if isinstance(x, str) and x in self.types]
        return bool(first.is_floating_point()) or not all(self.is_whole(x) for x in tensors)

    def _as_real(self, x: Laid) -> Laid:
        return replace(x, line=self.emit(AsReal(), x.line)) if self.is_whole(x.line) else x

    def _typed(self, line: str, value: Tensor, *, exact: bool) -> str:
        """A result in the type that PyTorch has it in: `exact` says that integers are among the operands."""
        if self.is_weight(line):
            return line
        if value.is_floating_point():
            return self.emit(AsReal(), line) if self.is_whole(line) else line
        if exact and not self.is_whole(line):
            self.unsupported("integers are computed exactly, for which it has no form; convert first, as in x.float()")
        if value.dtype in (torch.bool, torch.int64) or not self.is_whole(line):
            return line
        assert self.node is not None
        read = [v.meta["val"].dtype for v in self.node.all_input_nodes if isinstance(v.meta.get("val"), Tensor)]
        if isinstance(self.made_by(line)[0], (Move, NoOp)) and all(
            torch.promote_types(dtype, value.dtype) == value.dtype for dtype in read
        ):
            return line
        ends = torch.iinfo(value.dtype)
        return self.emit(Within(ends.min, ends.max), line)

    def _of_rank(self, x: Laid, rank: int) -> Laid:
        shape = self._layout.shape(x)
        return x if len(shape) == rank else self._layout.view(x, (*(1,) * (rank - len(shape)), *shape))

    def _laid_weights(self, value: Any, like: Laid, rank: int) -> Any:
        """Constants as they broadcast against lines laid out like `like`."""
        if isinstance(value, list):
            return [self._laid_weights(v, like, rank) for v in value]
        if (
            not isinstance(value, str)
            or not self.is_weight(value)
            or len(self.fixed_shape(value)) <= rank - like.place - 1
        ):
            return value
        shape = [1] * (rank - len(self.fixed_shape(value))) + list(self.fixed_shape(value))
        if shape[like.place] != 1:
            self.unsupported("a constant that differs along the batch")
        wide = [1, *shape[: like.place], *[1] * like.extra, *shape[like.place + 1 :]]
        return self.reshaped_weight(value, wide)

    def _axes(self, dims: Any, x: Laid) -> Any:
        """Dimensions as axes of the line; the batch is none of them, but for a slice that takes all of it."""
        if dims is None:
            return None
        if isinstance(dims, (list, tuple)):
            return [self._axes(d, x) for d in dims]
        dim = dims % len(self._layout.shape(x))
        if dim == x.place:
            self.unsupported(
                "it acts along the batch, but elements of a batch do not depend on each other; name other dimensions"
            )
        return x.axis(dim)


def _is_tensor(kind: Any) -> bool:
    """Whether the schema asks for a tensor, or for one or nothing."""
    return str(kind) in ("Tensor", "Optional[Tensor]")


def flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        else:
            yield value


def mapped(value: Any, function: Any) -> Any:
    """The arguments with every laid-out value replaced by its line."""
    if isinstance(value, Laid):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(v, function) for key, v in value.items()}
    if isinstance(value, list):
        return [mapped(v, function) for v in value]
    return value
