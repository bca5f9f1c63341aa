"""Capture: from a PyTorch model to a plan of the model level, through torch.export."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram

from tacit.ir.build import Builder
from tacit.ir.errors import CompileError, draw
from tacit.ir.op import Level, Op
from tacit.ir.ops.model import Argmax, CountCorrect, layers
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Plan
from tacit.ir.types import Batch, Dim, Type

Tensor = torch.Tensor
Range = tuple[float, float]
_FLOATS = (torch.float32, torch.float64)


def export(model: torch.nn.Module | ExportedProgram, examples: tuple[Tensor, ...]) -> ExportedProgram:
    """The exported graph, with a symbolic batch; raises CompileError."""
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, torch.nn.Module):
        raise CompileError(
            f"expected a torch.nn.Module, a GraphModule or an ExportedProgram, not {type(model).__name__}"
        )
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise CompileError(f"the model is in training mode (module '{training[0]}'); call model.eval() first")
    # A batch of one would be taken for a constant.
    enough = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in examples)
    dynamic = tuple({0: ExportDim.DYNAMIC} for _ in enough)
    try:
        return torch.export.export(model, enough, dynamic_shapes=dynamic)
    except Exception as error:  # torch.export raises many unrelated types
        raise CompileError(
            "torch.export could not capture the model with a batch of any size. Usual causes: control flow that "
            "depends on values, or a shape that fixes the batch. "
            f"It said: {(str(error) or type(error).__name__).strip().splitlines()[0]}"
        ) from error


class Capture(Builder):
    """Reads an exported graph node by node; ops write themselves through `emit`."""

    def __init__(self, program: ExportedProgram, ranges: Sequence[Range]) -> None:
        super().__init__(Level.MODEL)
        self.program = program
        self.weights: dict[str, Tensor] = {}
        self.target = ""
        self._names: dict[torch.fx.Node, str] = {}
        self._pending: dict[torch.fx.Node, tuple[str, Tensor]] = {}
        self._labels: dict[str, str] = {}  # the label of each line that holds a weight
        self._node: torch.fx.Node | None = None
        self._batch: Any = None
        self._ranges = list(ranges)
        self._layers = layers()

    def shape(self, name: str) -> tuple[Dim, ...]:
        return self.types[name].shape

    def fixed_shape(self, name: str) -> tuple[int, ...]:
        """The shape for a batch of one."""
        return self.types[name].at(1).dims

    def scalar(self, value: complex) -> float:
        """A number of the model's own text, which has to be real and finite."""
        if isinstance(value, complex) or not math.isfinite(value):
            self.unsupported(f"the scalar {value} is not finite and real (a division by zero gives inf)")
        return float(value)

    def emit(self, op: Op, *args: str, name: str = "", width: int | None = None) -> str:
        """As every builder; an op on constants alone is computed here and becomes a constant."""
        if args and all(self.is_weight(arg) for arg in args):
            operands = [self.weights[self._labels[arg]] for arg in args]
            return self.constant(f"folded{len(self.weights)}", op.reference(None, *operands))
        return super().emit(op, *args, name=name, width=width)

    def is_weight(self, name: str) -> bool:
        return name in self._labels

    def constant(self, label: str, value: Tensor) -> str:
        """A weight that the model leaves implicit, such as the unit scale of a batch norm without one."""
        return self._weight(f"{self.path or 'model'}.{label}", value)

    def result_shape(self) -> tuple[Dim, ...]:
        """The shape of the graph node under way, as torch.export has it."""
        assert self._node is not None
        return tuple(self._dim(d) for d in self._node.meta["val"].shape)

    def unsupported(self, reason: str) -> NoReturn:
        """Stop with the graph drawn around the node under way."""
        assert self._node is not None
        lines = [n.format_node() or str(n) for n in self.program.graph.nodes]
        place = list(self.program.graph.nodes).index(self._node)
        where = f"module '{self.path}'" if self.path else "the model"
        head = f"{where}{', ' + self.source if self.source else ''}: {reason}"
        raise CompileError(draw(lines, place, head))

    def run(self, name: str, reveal: str) -> Plan:
        """The whole graph, with the argmax or the count that `reveal` asks for."""
        result = ""
        for node in self.program.graph.nodes:
            self._node = node
            if node.op == "placeholder":
                self._placeholder(node)
            elif isinstance(node.meta.get("val"), (int, torch.SymInt)):
                continue  # a size, as in x.view(x.size(0), -1): shapes are read off the results
            elif node.op == "call_function":
                with self.at(_module_path(node), _source(node)):
                    self._names[node] = self._call(node)
            elif node.op == "output":
                result = self._output(node)
            else:
                self.unsupported(f"the graph holds a '{node.op}' node")
        if self._ranges:
            raise CompileError(f"there are {len(self._ranges)} examples more than the model has inputs")
        result = self._revealed(result, reveal)
        plan = Plan(name, tuple(self.nodes), result, Level.MODEL, reveal=reveal, ranges="none")
        return plan.verify()

    def _placeholder(self, node: torch.fx.Node) -> None:
        signature = self.program.graph_signature
        if node.name in signature.user_inputs:
            self._input(node)
            return
        label = (
            signature.inputs_to_parameters | signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
        ).get(node.name)
        if label is None:
            self.unsupported(f"the graph input '{node.name}' is neither an input, a parameter nor a buffer")
        value = self.program.state_dict.get(label)
        value = self.program.constants[label] if value is None else value
        self._pending[node] = (label, value)

    def _input(self, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS:
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            self.unsupported(f"input '{node.name}' is {kind}; inputs are float32 or float64 tensors")
        if value.dim() < 2 or isinstance(value.shape[0], int):
            self.unsupported(
                f"input '{node.name}' has no symbolic batch as its first dimension: export with a dynamic one"
            )
        self._batch = value.shape[0] if self._batch is None else self._batch
        if not self._ranges:
            raise CompileError("the model takes more inputs than there are examples")
        low, high = self._ranges.pop(0)
        declared = Type("real", tuple(self._dim(d) for d in value.shape))
        self._names[node] = self.declare(Input(node.name, low, high), declared, name=node.name)

    def _dim(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        ratio = size.node.expr / self._batch.node.expr
        if not ratio.is_Integer or ratio < 1:
            self.unsupported(f"a dimension of {size} is neither fixed nor a multiple of the batch")
        return Batch(int(ratio))

    def _call(self, node: torch.fx.Node) -> str:
        if node.target is operator.getitem:
            self.unsupported("an op with several results")
        self.target = str(node.target)
        layer = self._layers.get(self.target)
        if layer is None:
            known = ", ".join(sorted({t.split(".")[1] for t in self._layers}))
            self.unsupported(
                f"'{self.target}' is not supported.\nSupported: {known}.\nTo add it, write one subclass of "
                "tacit.ir.ops.model.ModelOp with `aten`, `capture`, `reference` and `expand`, and import it first"
            )
        name = layer.capture(self, **self._arguments(node))
        if not self.is_weight(name) and self.types[name].shape != self.result_shape():
            self.unsupported(
                f"its shape came out as {self.types[name].shape}, torch has {tuple(node.meta['val'].shape)}"
            )
        return name

    def _arguments(self, node: torch.fx.Node) -> dict[str, Any]:
        """Arguments by the names of the ATen schema, defaults filled in, tensors as names of lines."""
        schema = node.target._schema  # type: ignore[union-attr]
        out: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            if i < len(node.args):
                value: Any = node.args[i]
            elif argument.name in node.kwargs:
                value = node.kwargs[argument.name]
            else:
                value = argument.default_value if argument.has_default_value() else None
            out[argument.name] = self._resolve(value)
        return out

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            if value in self._pending:
                self._names[value] = self._weight(*self._pending.pop(value))
            return self._names.get(value, value)
        if isinstance(value, (list, tuple)):
            return [self._resolve(v) for v in value]
        return value

    def _weight(self, label: str, value: Tensor) -> str:
        if value.dtype not in _FLOATS:
            self.unsupported(f"'{label}' is {value.dtype}; weights are float32 or float64 (convert with model.float())")
        if not bool(torch.isfinite(value).all()):
            self.unsupported(f"'{label}' holds NaN or infinity")
        value = value.detach()
        value = value.reshape(1) if value.dim() == 0 else value
        self.weights[label] = value
        name = self.declare(Weight(label), Type("real", tuple(value.shape)), name=self.fresh("w"))
        self._labels[name] = label
        return name

    def _output(self, node: torch.fx.Node) -> str:
        outputs: Any = node.args[0]
        if not isinstance(outputs, (list, tuple)) or len(outputs) != 1 or outputs[0] not in self._names:
            self.unsupported("the model has to return exactly one tensor that depends on its input")
        if self.is_weight(self._names[outputs[0]]):
            self.unsupported("the model has to return exactly one tensor that depends on its input")
        return self._names[outputs[0]]

    def _revealed(self, result: str, reveal: str) -> str:
        if reveal == "logits":
            return result
        if not isinstance(next(n for n in self.nodes if n.name == result).op, Argmax):
            if len(self.shape(result)) != 2:
                raise CompileError(f"reveal='{reveal}' needs N x classes, the model returns {self.types[result]}")
            result = self.emit(Argmax(), result)
        if reveal == "argmax":
            return result
        argmax = next(n for n in self.nodes if n.name == result)
        classes = self.types[argmax.args[0]].at(1).dims[1]
        label = "targets"
        while label in self.types:
            label += "_"
        op = Input(label, 0.0, float(classes - 1), integers=True)
        targets = self.declare(op, Type("real", (Batch(),)), name=label)
        return self.emit(CountCorrect(), result, targets)


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    made_up = "_empty_nn_module_stack" in path or not all(c.isalnum() or c in "._" for c in path)
    return "" if made_up else path


def _source(node: torch.fx.Node) -> str:
    """`file:line` of the innermost frame in the user's code."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    outside = [f for f in frames if "/torch/nn/" not in f] or frames
    if not outside:
        return ""
    parts = outside[-1].split(",")
    return f"{parts[0].removeprefix('File ').strip(chr(34))}:{parts[1].removeprefix(' line ').strip()}"
