"""What layers ask while they are read off an exported graph: shapes, constants, the node under way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.export import ExportedProgram

from tacit.constants import Constants
from tacit.export import module_path, source_line
from tacit.fit import misfit
from tacit.indices import Indices
from tacit.ir.build import Builder
from tacit.ir.errors import CompileError, draw
from tacit.ir.op import Level, Op
from tacit.ir.ops.arithmetic import Add, MulScalar
from tacit.ir.ops.layer import SECRET_INDEX, Layer
from tacit.ir.ops.model import AsReal
from tacit.ir.ops.moves import Move, Reshape, Slice
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.types import Batch, Dim, Type, dim_at

Tensor = torch.Tensor
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SOFTMAXES = {"softmax", "safe_softmax"}
_KEEPS_SCORES = {
    "add", "alias", "baddbmm", "clone", "contiguous", "expand", "flatten", "masked_fill", "permute", "repeat",
    "reshape", "select", "slice", "squeeze", "to", "to_copy", "transpose", "type_as", "unflatten", "unsafe_view",
    "unsqueeze", "view", "view_as"
}  # fmt: skip


class Graph(Builder):
    """The model plan under construction, beside the exported graph that it is read from."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(Level.MODEL)
        self.program = program
        self.weights: dict[str, Tensor] = {}
        self.target = ""  # the operator under way, as "aten.relu.default"
        self.node: torch.fx.Node | None = None
        self.constants = Constants()
        self.hints: Mapping[str, str] = {}  # by the paths of modules: what to do where the batch is out of place
        self.truths: set[str] = set()  # lines of truth values
        self.indices = Indices(self)
        self.wholes: set[str] = set()  # lines of whole numbers, truth values among them: without fractional bits
        self._labels: dict[str, str] = {}  # the label of each line that holds a weight
        self._raw: dict[str, Tensor] = {}  # constants as the model has them, truth values and indices among them
        self._ops: dict[str, tuple[Op, tuple[str, ...]]] = {}

    def shape(self, name: str) -> tuple[Dim, ...]:
        return self.types[name].shape

    def fixed_shape(self, name: str) -> tuple[int, ...]:
        """The shape for a batch of one."""
        return self.types[name].at(1).dims

    def batches(self, name: str) -> int:
        """How many times N the first dimension is."""
        return dim_at(self.types[name].shape[0], 1)

    def op(self, name: str) -> Op | None:
        """What a line was made by; numbers made of a truth value count as the truth value."""
        op, args = self.made_by(name)
        return self.op(args[0]) if isinstance(op, AsReal) else op

    def operands(self, name: str) -> tuple[str, ...]:
        op, args = self._ops[name]
        return self.operands(args[0]) if isinstance(op, AsReal) else args

    def scalar(self, value: complex) -> float:
        """A number of the model's own text, which has to be real and finite."""
        if isinstance(value, complex) or not math.isfinite(value):
            self.unsupported(f"the scalar {value} is not finite and real (a division by zero gives inf)")
        return float(value)

    def emit(self, op: Op, *args: str, name: str = "", width: int | None = None) -> str:
        """As every builder; an op on constants alone is computed here and becomes a constant."""
        whole = isinstance(op, Layer) and op.is_whole(*(self.is_whole(arg) for arg in args))
        if args and all(self.is_weight(arg) for arg in args):
            operands = [self.value(arg) for arg in args]
            operands = [x if x.is_floating_point() else x.double() if whole else x.float() for x in operands]
            value = op.reference(None, *operands)
            return self.constant(f"folded{len(self.weights)}", value.long() if whole else value)
        line = super().emit(op, *args, name=name, width=width)
        self._ops[line] = (op, args)
        if whole:
            self.wholes.add(line)
        if isinstance(op, Move) and all(self.is_truth(arg) for arg in args):
            self.truths.add(line)
        return line

    def is_weight(self, name: str) -> bool:
        return name in self._labels

    def is_truth(self, name: str) -> bool:
        """Whether the line holds truth values, 0 or 1."""
        from tacit.ir.ops.compare import Comparison

        if self.is_weight(name):
            return self.value(name).dtype == torch.bool
        return name in self.truths or isinstance(self.made_by(name)[0], Comparison)

    def is_whole(self, name: str) -> bool:
        """Whether the line holds whole numbers, as PyTorch has them in a type of integers or truth values."""
        return not self.value(name).is_floating_point() if self.is_weight(name) else name in self.wholes

    def made_by(self, name: str) -> tuple[Op | None, tuple[str, ...]]:
        """The op of a line and its operands; nothing for an input or a weight."""
        return self._ops.get(name, (None, ()))

    def whole_of(self, name: str, *beside: float) -> str:
        """The whole numbers that a line has as reals; the line itself where it has none, or one of `beside` is none."""
        op, args = self.made_by(name)
        return args[0] if isinstance(op, AsReal) and all(x == int(x) for x in beside) else name

    def value(self, name: str) -> Tensor:
        """The constant behind a line."""
        return self._raw[self._labels[name]]

    def require_weights(self, arguments: dict[str, Any], *names: str) -> None:
        """Stop where one of these arguments depends on the input."""
        for name in names:
            if arguments.get(name) is not None and not self.is_weight(arguments[name]):
                self.unsupported(f"its {name.replace('_', ' ')} depends on the input, and has to be constant")

    def constant(self, label: str, value: Tensor) -> str:
        """A weight that the model leaves implicit, such as the unit scale of a batch norm without one."""
        unique = f"{self.path or 'model'}.{label}"
        while unique in self.weights:
            unique = f"{self.path or 'model'}.{label}{len(self.weights)}"
            label += "_"
        return self.weight(unique, value)

    def valued(self, weight: str, rank: int = 0) -> str:
        """A constant as a value, of that rank at least, for what takes two of these; it comes with a batch of one."""
        shape = self.fixed_shape(weight)
        weight = self.reshaped_weight(weight, (*(1,) * (rank - len(shape)), *shape))
        inputs = sorted((n for n in self.nodes if isinstance(n.op, Input)), key=lambda n: self.is_whole(n.name))
        base = inputs[-1 if self.is_whole(weight) else 0].name
        if self.is_whole(weight) and not self.is_whole(base):
            self.unsupported("integers that repeat along the batch, in a model without an input of integers")
        flat = self.emit(Reshape((math.prod(self.fixed_shape(base)[1:]),)), base)
        first = self.emit(Slice(1, 0, 1), flat)
        first = first if self.is_whole(weight) == self.is_whole(base) else self.emit(AsReal(), first)
        nothing = self.emit(Reshape((1,) * (len(self.fixed_shape(weight)) - 1)), self.emit(MulScalar(0.0), first))
        return self.emit(Add(), nothing, weight)

    def reshaped_weight(self, name: str, shape: Sequence[int]) -> str:
        """A constant in another shape."""
        value = self.value(name).reshape(*shape)
        return name if value.shape == self.value(name).shape else self.constant(f"reshaped{len(self.weights)}", value)

    def static_indices(self, name: str, size: int) -> list[int]:
        """The indices in a constant, from 0 up."""
        if not self.is_weight(name):
            self.unsupported(SECRET_INDEX)
        return self.static_indices_of(self.value(name), size)

    def static_indices_of(self, value: Tensor, size: int) -> list[int]:
        found: list[int] = value.flatten().tolist()
        if value.is_floating_point() or any(not -size <= i < size for i in found):
            self.unsupported(f"an index that is no integer below {size}")
        return [i % size for i in found]

    def result_shape(self) -> tuple[Dim, ...]:
        """The shape of the graph node under way, as torch.export has it."""
        assert self.node is not None
        return tuple(self.dim(d) for d in self.node.meta["val"].shape)

    def result_dtype(self) -> torch.dtype:
        assert self.node is not None
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype

    def before_softmax(self, node: torch.fx.Node | None = None) -> bool:
        """Whether a graph node, the one under way, is read by softmaxes alone, added to and moved about before."""
        node = node or self.node
        assert node is not None

        def leads_there(user: torch.fx.Node) -> bool:
            name = str(user.target).removeprefix("aten.").split(".")[0].strip("_")
            if name == "scaled_dot_product_attention":
                return node not in user.args[:3]
            return name in _SOFTMAXES or (name in _KEEPS_SCORES and self.before_softmax(user))

        return bool(node.users) and all(map(leads_there, node.users))

    def uses(self, index: int) -> bool:
        """Whether this one of several results of the graph node under way is read."""
        assert self.node is not None
        return any(user.args[1] == index and user.users for user in self.node.users)

    @contextmanager
    def as_target(self, target: str) -> Iterator[None]:
        """While a layer is written by means of another one's operator."""
        before, self.target = self.target, target
        yield
        self.target = before

    def unsupported(self, reason: str) -> NoReturn:
        """Stop with the graph drawn around the node under way."""
        assert self.node is not None
        lines = [n.format_node() or str(n) for n in self.program.graph.nodes]
        place = list(self.program.graph.nodes).index(self.node)
        path, source = module_path(self.node), source_line(self.node)
        if not source and "aten.copy." in str(self.node.target):  # by which an operator in place ends
            source = next(filter(None, map(source_line, reversed(self.node.all_input_nodes))), "")
        where = f"module '{path}'" if path else "the model"
        hint = self._hint(path) if "the batch" in reason else ""
        head = f"{where}{', ' + source if source else ''}: {reason}{'. ' + hint if hint else ''}"
        raise CompileError(draw(lines, place, head))

    def _hint(self, path: str) -> str:
        """That of the module, or of the innermost one around it that has one."""
        around = path.split(".") if path else []
        paths = [".".join(around[:i]) for i in range(len(around), -1, -1)]
        return next((self.hints[p] for p in paths if p in self.hints), "")

    def weight(self, label: str, value: Tensor) -> str:
        """A line for a constant; it goes again if nothing but its shape or its indices are used."""
        reason = misfit(label, value)
        if reason:
            self.unsupported(reason)
        value = value.detach()
        wrong = value.is_floating_point() and not bool(torch.isfinite(value.sum(dtype=torch.float64)))
        if wrong and not bool(torch.isfinite(value[value != -torch.inf]).all()):  # a mask may hold minus infinity
            self.unsupported(f"'{label}' holds NaN or infinity")
        shaped = value.reshape(1) if value.dim() == 0 else value
        self.weights[label] = shaped if value.is_floating_point() else shaped.double()
        self._raw[label] = value
        name = self.declare(Weight(label), Type("real", tuple(shaped.shape)), name=self.fresh("w"))
        self._labels[name] = label
        return name

    def dim(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        symbols = self.constants.symbols
        expression = size.node.expr
        one, three = (expression.subs(dict.fromkeys(symbols, n)) for n in (1, 3))
        if not one.is_Integer or one < 1 or three != 3 * one:
            self.unsupported(f"a dimension of {size} is neither fixed nor a multiple of the batch")
        return Batch(int(one))
