"""Capture: from an exported graph to a plan of the model level."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from tacit.constants import NotConstant
from tacit.export import exported_as, module_path, source_line
from tacit.fit import FLOATS
from tacit.graph import Graph
from tacit.ir.errors import CompileError
from tacit.ir.op import Level
from tacit.ir.ops.layer import WHOLE, Layer, layers
from tacit.ir.ops.model import Argmax, CountCorrect
from tacit.ir.ops.outputs import Pack
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Plan
from tacit.ir.types import Batch, Type
from tacit.layout import Laid, Layout
from tacit.options import Range
from tacit.rewrite import opaque, simplified

Tensor = torch.Tensor
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
INTEGERS = (torch.int64, torch.int32)
_VIEWS = {
    f"aten.{name}"
    for name in (
        "view.default",
        "reshape.default",
        "_unsafe_view.default",
        "flatten.using_ints",
        "unflatten.int",
        "unsqueeze.default",
        "squeeze.default",
        "squeeze.dim",
        "squeeze.dims",
        "view_as.default",
    )
}
_PERMUTATIONS = {
    f"aten.{name}"
    for name in ("permute.default", "transpose.int", "swapaxes.default", "swapdims.default", "t.default",
                 "movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist")
}  # fmt: skip


class Capture(Graph):
    """Reads an exported graph node by node; layers write themselves through `emit`."""

    def __init__(self, program: ExportedProgram, ranges: Sequence[Range]) -> None:
        self._layers = layers()
        super().__init__(simplified(program, self._layers.keys() | _VIEWS | _PERMUTATIONS))
        self._values: dict[torch.fx.Node, Any] = {}  # a Laid, or a list of them for several results
        self._lines: dict[torch.fx.Node, str] = {}  # of constants that are in use
        self._sources: dict[torch.fx.Node, tuple[str, Tensor]] = {}  # parameters and buffers
        self._ranges = list(ranges)
        self._layout = Layout(self, self.unsupported)

    def run(self, name: str, reveal: str) -> Plan:
        """The whole graph, with the argmax or the count that `reveal` asks for."""
        result = ""
        self._require_no_writes()
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                with self.at(module_path(node), source_line(node)):
                    self._call(node)
            elif node.op == "output":
                result = self._output(node, reveal)
            elif node.op != "get_attr":  # the graph of a call, which says more of itself
                self.unsupported(f"the graph holds a '{node.op}' node")
        if self._ranges:
            raise CompileError(f"there are {len(self._ranges)} examples more than the model has inputs")
        plan = Plan(name, tuple(self.nodes), result, Level.MODEL, reveal=reveal, ranges="none")
        plan = plan.without_dead_lines()
        self.weights = {n.op.label: self.weights[n.op.label] for n in plan.find(Weight) if isinstance(n.op, Weight)}
        return plan.verify()

    def _require_no_writes(self) -> None:
        """A model is a function of its input: it keeps nothing and changes nothing that it was given."""
        signature = self.program.graph_signature
        kept = signature.buffers_to_mutate | signature.parameters_to_mutate
        for name, label in (kept | signature.user_inputs_to_mutate).items():
            self.node = next(node for node in self.program.graph.nodes if node.name == name)
            keeps = (
                ", and a plan keeps nothing for the next call: write under `if self.training:`" if name in kept else ""
            )
            self.unsupported(
                f"the model writes to '{label}' while it runs{keeps}; compute on a copy, as in x = x + 1 or x.clone()"
            )

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
        self._sources[node] = (label, value)
        self.constants.put(node, value)

    def _input(self, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        rows = self._vocabulary(node) if isinstance(value, torch.Tensor) and value.dtype in INTEGERS else 0
        if not isinstance(value, torch.Tensor) or (value.dtype not in FLOATS and not rows):
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            self.unsupported(
                f"input '{node.name}' is {kind}; inputs are float32 or float64 tensors, or indices of an embedding"
            )
        if value.dim() < 1 or isinstance(value.shape[0], int):
            self.unsupported(
                f"input '{node.name}' has no symbolic batch as its first dimension: export with a dynamic one"
            )
        dynamic = [str(i) for i, size in enumerate(value.shape) if i and not isinstance(size, int)]
        if dynamic:
            self.unsupported(
                f"dimension {', '.join(dynamic)} of input '{node.name}' is dynamic, but a plan is for one size: export "
                "with the batch alone dynamic, once for each size; pad to the largest where there are many"
            )
        self.constants.symbols |= value.shape[0].node.expr.free_symbols
        if not self._ranges:
            raise CompileError("the model takes more inputs than there are examples")
        low, high = self._ranges.pop(0)
        op = Input(node.name, 0.0, float(rows - 1), integers=True) if rows else Input(node.name, low, high)
        declared = Type("real", tuple(self.dim(d) for d in value.shape))
        self._values[node] = Laid(self.declare(op, declared, name=node.name))

    @staticmethod
    def _vocabulary(node: torch.fx.Node) -> int:
        """Of how many rows an integer input chooses: the fewest of all embeddings that read it; 0 where none does."""
        tables = [user.args[0] for user in node.users if str(user.target) == "aten.embedding.default"]
        return min((len(table.meta["val"]) for table in tables if isinstance(table, torch.fx.Node)), default=0)

    def _call(self, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        if not node.users:
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self.unsupported(opaque(node))
        if any(isinstance(x, Tensor) and free_unbacked_symbols(x) for x in pytree.tree_leaves(value)):
            self.unsupported(
                "the shape of its result depends on values, which nobody may see: keep all elements and choose among "
                "them, as in torch.where(mask, x, 0)"
            )
        if value is None or isinstance(value, _NUMBERS):
            self._number(node)
            return
        if node.target is operator.getitem and node.all_input_nodes[0] in self._values:
            source: Any = self._values[node.all_input_nodes[0]]
            index: Any = node.args[1]
            if index >= len(source):
                self.unsupported("this one of several results is not computed; use the first alone")
            self._values[node] = self._fits(source[index], value)
            return
        if self._is_constant(node):
            return
        self.target = str(node.target)
        if self._whole_batch(node):
            self._values[node] = self._values[node.all_input_nodes["scatter" in self.target]]
            return
        if self.target in _VIEWS or self.target in _PERMUTATIONS:
            self._values[node] = self._fits(self._moved(node), value)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            self.unsupported(opaque(node))
        layer = self._layers.get(self.target)
        if layer is None:
            self.unsupported(_unknown(self.target, exported_as(node), self._layers))
        found = self._captured(layer, self._arguments(node, layer.numbers), value)
        self._values[node] = found if isinstance(found, list) else self._fits(found, value)
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool and isinstance(found, Laid):
            self.truths.add(found.line)

    def _number(self, node: torch.fx.Node) -> None:
        """A size, as in x.view(x.size(0), -1), or a check of one: shapes are read off the results. No value is."""
        if "item" not in str(node.target) and "_local_scalar_dense" not in str(node.target):
            return
        if not self._is_constant(node):
            self.unsupported(
                "a number is read off a value that depends on the input, which nobody may see; "
                "use tensor operations (torch.where, torch.clamp) instead"
            )

    def _is_constant(self, node: torch.fx.Node) -> bool:
        try:
            return self.constants.evaluate(node)
        except NotConstant as reason:
            self.unsupported(str(reason))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            self.unsupported(f"it cannot be computed ahead of time: {str(error).splitlines()[0]}")

    def _whole_batch(self, node: torch.fx.Node) -> bool:
        """Whether this is a slice like the first of x[:, 1:3], which takes all of the batch, or writes to it."""
        if self.target not in ("aten.slice.Tensor", "aten.slice_scatter.default"):
            return False
        source = node.all_input_nodes["scatter" in self.target]
        if source not in self._values:
            return False
        given: list[Any] = [*node.args[1 + ("scatter" in self.target) :]]
        defaults: list[Any] = [0, None, None, 1]
        dim, start, end, step = given + defaults[len(given) :]
        x = self._values[source]
        everything = start in (None, 0) and (end is None or (isinstance(end, int) and end >= 1 << 62)) and step == 1
        return bool(dim % len(self._layout.shape(x)) == x.place and everything)

    def _moved(self, node: torch.fx.Node) -> Laid:
        """Views, and dimensions in another order."""
        k = self._arguments(node)
        x = k["self"] if "self" in k else k["input"]
        if self.target in _VIEWS:
            return self._layout.view(x, self.result_shape())
        return self._layout.permute(x, _order(node, len(self._layout.shape(x))))

    def _captured(self, layer: type[Layer], k: dict[str, Any], value: Any) -> Laid | list[Laid]:
        """The layer written out on lines; its results laid out as its operands are."""
        # What has a shape of its own is not aligned with the others: weights, and the states of recurrent layers.
        k = {key: _mapped(v, lambda x: x.line) if key in layer.own_shapes else v for key, v in k.items()}
        laid = [x for x in _flat(k.values()) if isinstance(x, Laid)]
        first = laid[0]
        if all(x.trivial for x in laid) or not layer.batch_anywhere:
            names = _mapped(k, self._layout.batch_first)
            first = Laid(first.line)
        else:
            rank = max(len(self._layout.shape(x)) for x in laid)
            laid = [self._of_rank(x, rank) for x in laid]
            first = laid[0]
            if any((x.place, x.left, x.right) != (first.place, first.left, first.right) for x in laid):
                self.unsupported("its operands hold the batch in different dimensions")
            names = _mapped(k, lambda x: self._of_rank(x, rank).line)
            own = layer.own_shapes
            names = {key: v if key in own else self._laid_weights(v, first, rank) for key, v in names.items()}
        for key in layer.axes:
            names[key] = self._axes(names.get(key), first) if key in names else None
        found = layer.capture(self, **{key: v for key, v in names.items() if key in k})
        if isinstance(found, list):
            return [self._result(first, line, val) for line, val in zip(found, value, strict=False)]
        return self._result(first, found, value)

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

    def _result(self, like: Laid, line: str, value: Any) -> Laid:
        """A result with the batch where PyTorch has it."""
        if self.is_weight(line):
            return Laid(line)
        symbolic = [i for i, d in enumerate(value.shape) if not isinstance(d, int)]
        return self._layout.joined(like.like(line, symbolic[0] if symbolic else 0))

    def _fits(self, found: Laid, value: Any) -> Laid:
        """The result, whose shape has to be the one that PyTorch has."""
        if not self.is_weight(found.line):
            shape = tuple(self.dim(d) for d in value.shape)
            if not any(isinstance(d, Batch) for d in shape):
                self.unsupported(WHOLE)
            if self._layout.shape(found) != shape:
                self.unsupported(f"its shape came out as {self._layout.shape(found)}, torch has {tuple(value.shape)}")
        return found

    def _arguments(self, node: torch.fx.Node, numbers: Sequence[str] = ()) -> dict[str, Any]:
        """Arguments by the names of the ATen schema, defaults filled in; values as `Laid`, constants as lines.

        A number in the place of a tensor becomes a constant, unless it is one of `numbers`.
        """
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
            value = self._resolve(value)
            if type(value) in (int, float, bool) and argument.name not in numbers and _is_tensor(argument.type):
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
        if isinstance(value.meta.get("val"), _NUMBERS):
            return self.constants.number(value)
        if value not in self._lines:
            try:
                tensor = self.constants.value(value)
            except NotConstant as reason:
                self.unsupported(str(reason))
            label = (
                self._sources[value][0] if value in self._sources else f"{module_path(value) or 'model'}.{value.name}"
            )
            self._lines[value] = self.weight(label, tensor)
        return self._lines[value]

    def _output(self, node: torch.fx.Node, reveal: str) -> str:
        outputs: Any = node.args[0]
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        lines: list[str | None] = []
        for output in outputs:
            if output is None:
                lines.append(None)
                continue
            found = self._values.get(output) if isinstance(output, torch.fx.Node) else None
            if not isinstance(found, Laid) or self.is_weight(found.line):
                name = getattr(output, "name", output)
                label = self._sources[output][0] if output in self._sources else name
                self.unsupported(f"every result has to be a tensor that depends on the input; '{label}' does not")
            lines.append(self._layout.batch_first(found))
        tensors = [line for line in lines if line is not None]
        if not tensors:
            self.unsupported("the model returns no tensor")
        spec = self.program.call_spec.out_spec
        if len(lines) == 1 and (spec is None or spec.is_leaf()):
            return self._revealed(tensors[0], reveal)
        if reveal != "logits":
            raise CompileError(f"reveal='{reveal}' needs a model that returns one tensor, this one returns {spec}")
        return self.emit(Pack.of(self, lines, spec), *tensors)

    def _revealed(self, result: str, reveal: str) -> str:
        if reveal == "logits":
            return result
        if not isinstance(self.op(result), Argmax):
            if len(self.shape(result)) != 2:
                raise CompileError(f"reveal='{reveal}' needs N x classes, the model returns {self.types[result]}")
            result = self.emit(Argmax(), result)
        if reveal == "argmax":
            return result
        classes = self.fixed_shape(self.operands(result)[0])[1]
        label = "targets"
        while label in self.types:
            label += "_"
        op = Input(label, 0.0, float(classes - 1), integers=True)
        targets = self.declare(op, Type("real", (Batch(),)), name=label)
        return self.emit(CountCorrect(), result, targets)


def _unknown(target: str, exported: str, known: dict[str, type[Layer]]) -> str:
    names = ", ".join(sorted({t.split(".")[1].rstrip("_") for t in known} | {t.split(".")[1] for t in _VIEWS}))
    inside = f" ('{target}' inside of it)" if target != exported else ""
    return (
        f"'{exported}' is not supported{inside}.\nSupported: {names}.\nTo add it, write one subclass of "
        "tacit.ir.ops.model.ModelOp with `aten`, `capture`, `reference` and `expand`, and import it first"
    )


def _is_tensor(kind: Any) -> bool:
    """Whether the schema asks for a tensor, or for one or nothing."""
    return str(kind) in ("Tensor", "Optional[Tensor]")


def _order(node: torch.fx.Node, rank: int) -> list[int]:
    """Where the dimensions of a permutation come from: told by their sizes, all different."""
    assert callable(node.target)
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")
    return [size - 1 for size in node.target(probe, *node.args[1:], **node.kwargs).shape]


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _mapped(value: Any, function: Any) -> Any:
    """The arguments with every laid-out value replaced by its line."""
    if isinstance(value, Laid):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(v, function) for key, v in value.items()}
    if isinstance(value, list):
        return [_mapped(v, function) for v in value]
    return value
