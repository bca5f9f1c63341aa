"""Capture: from an exported graph to a plan of the model level."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from tacit.arguments import slots_of_program
from tacit.constants import NotConstant
from tacit.containers import results_of
from tacit.export import exported_as, module_path, source_line
from tacit.fit import FLOATS
from tacit.graph import INTEGERS
from tacit.ir.errors import CompileError
from tacit.ir.op import Level
from tacit.ir.ops.layer import WHOLE, Layer, layers
from tacit.ir.ops.model import Argmax, CountCorrect, NoOp
from tacit.ir.ops.outputs import Pack
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Plan
from tacit.ir.tree import Leaf, Tree
from tacit.ir.types import Batch, Type
from tacit.layout import Laid
from tacit.operands import NUMBERS, Operands, flat, mapped
from tacit.options import Range
from tacit.rewrite import opaque, simplified

Tensor = torch.Tensor
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


class Capture(Operands):
    """Reads an exported graph node by node; layers write themselves through `emit`."""

    def __init__(self, program: ExportedProgram, ranges: Sequence[Range]) -> None:
        self._layers = layers()
        super().__init__(simplified(program, self._layers.keys() | _VIEWS | _PERMUTATIONS))
        self._ranges = list(ranges)
        self._slots = {slot.label: slot for slot in slots_of_program(self.program)}
        self.answer: Tree = None  # the structure of the results in the model's own classes; None for a lone tensor

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
                found, value = self._values.get(node), node.meta.get("val")
                if isinstance(found, Laid) and isinstance(value, Tensor) and value.dtype == torch.bool:
                    self.truths.add(found.line)
            elif node.op == "output":
                result = self._output(node, reveal)
            elif node.op != "get_attr":  # the graph of a call, which says more of itself
                self.unsupported(f"the graph holds a '{node.op}' node")
        if self._ranges:
            raise CompileError(f"there are {len(self._ranges)} examples more than the model has inputs")
        nodes = tuple(self.indices.bounded(node) for node in self.nodes)
        plan = Plan(name, nodes, result, Level.MODEL, reveal=reveal)
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
        if node.name in self._slots:
            self._input(node)
            return
        if node.name in {spec.arg.name for spec in signature.input_specs if isinstance(spec.arg, ConstantArgument)}:
            return  # PyTorch has written it into the graph
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
        if not isinstance(value, torch.Tensor) or value.dtype not in (*FLOATS, *INTEGERS, torch.bool):
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            self.unsupported(
                f"input '{node.name}' is {kind}; inputs are float32, float64, int8 to int64, uint8 or bool"
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
        options = {"integers": value.dtype not in FLOATS, "by_name": self._slots[node.name].by_name}
        op = Input(node.name, *self._ranges.pop(0), **options)
        line = self.declare(op, Type("real", tuple(self.dim(d) for d in value.shape)), name=node.name)
        if op.integers:
            self.wholes.add(line)
            self.indices.enter(line)
        if value.dtype == torch.bool:
            self.truths.add(line)
        self._values[node] = Laid(line)

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
        if value is None or isinstance(value, NUMBERS):
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
            self._keep(node, node.args["scatter" in self.target])
            return
        if self.target in _VIEWS or self.target in _PERMUTATIONS:
            self._values[node] = self._fits(self._moved(node), value)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            self.unsupported(opaque(node))
        layer = self._layers.get(self.target)
        if layer is None:
            self.unsupported(_unknown(self.target, exported_as(node), self._layers))
        found = self._captured(layer, self._arguments(node, layer), value)
        self._values[node] = found if isinstance(found, list) else self._fits(found, value)

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
        scatter = "scatter" in self.target
        given: list[Any] = [*node.args[1 + scatter :]]
        defaults: list[Any] = [0, None, None, 1]
        dim, _, _, step = given + defaults[len(given) :]
        piece: Any = node.args[1] if scatter else node
        sizes = [v.meta["val"].shape[dim] for v in (node.args[0], piece)]  # type: ignore[union-attr]
        alike = all(len({self.constants.size(size, batch) for size in sizes}) == 1 for batch in (2, 3))
        return step == 1 and alike and not isinstance(sizes[0], int)

    def _keep(self, node: torch.fx.Node, source: Any) -> None:
        """A node whose value is that of another one."""
        if source in self._values:
            self._values[node] = self._values[source]
        else:
            self.constants.keep(node, source)

    def _moved(self, node: torch.fx.Node) -> Laid:
        """Views, and dimensions in another order."""
        k = self._arguments(node)
        x = k["self"] if "self" in k else k["input"]
        if self.target in _VIEWS:
            return self._layout.view(x, self.result_shape())
        return self._layout.permute(x, _order(node, len(self._layout.shape(x))))

    def _captured(self, layer: type[Layer], k: dict[str, Any], value: Any) -> Laid | list[Laid]:
        """The layer written out on lines; its results laid out as its operands are."""
        k = self._with_dimension(k, value)
        if self._on_floats(layer, k, value):
            k = {key: v if key in layer.choosers else mapped(v, self._as_real) for key, v in k.items()}
        # What has a shape of its own is not aligned with the others: weights, and the states of recurrent layers.
        k = {key: mapped(v, lambda x: x.line) if key in layer.own_shapes else v for key, v in k.items()}
        laid = [x for x in flat(k.values()) if isinstance(x, Laid)]
        first = laid[0]
        if all(x.trivial for x in laid) or not layer.batch_anywhere:
            names = mapped(k, self._layout.batch_first)
            first = Laid(first.line)
        else:
            rank = max(len(self._layout.shape(x)) for x in laid)
            laid = [self._of_rank(x, rank) for x in laid]
            first = laid[0]
            if any((x.place, x.left, x.right) != (first.place, first.left, first.right) for x in laid):
                self.unsupported("its operands hold the batch in different dimensions")
            names = mapped(k, lambda x: self._of_rank(x, rank).line)
            own = layer.own_shapes
            names = {key: v if key in own else self._laid_weights(v, first, rank) for key, v in names.items()}
        for key in layer.axes:
            names[key] = self._axes(names.get(key), first) if key in names else None
        found = layer.capture(self, **{key: v for key, v in names.items() if key in k})
        exact = any(self.is_whole(x.line) for x in laid)
        if isinstance(found, list):
            pairs = zip(found, value, strict=False)
            return [self._result(first, self._typed(line, val, exact=exact), val) for line, val in pairs]
        return self._result(first, self._typed(found, value, exact=exact), value)

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

    def _output(self, node: torch.fx.Node, reveal: str) -> str:
        given: Any = node.args[0]
        results = results_of(self.program.call_spec.out_spec, given if isinstance(given, (list, tuple)) else [given])
        lines = [self._result_line(output) for output in results.values]
        if not lines:
            self.unsupported("the model returns no tensor")
        dtypes = [str(output.meta["val"].dtype).removeprefix("torch.") for output in results.values]
        if isinstance(results.tree, Leaf):
            return self._revealed(lines[0], dtypes[0], reveal)
        self.answer = results.tree
        if reveal != "logits":
            raise CompileError(
                f"reveal='{reveal}' needs a model that returns one tensor alone, this one returns a structure of "
                f"{len(lines)}"
            )
        dtypes = ["" if dtype == "float32" else dtype for dtype in dtypes]
        return self.emit(Pack.of(self, results.tree, lines, dtypes), *lines)

    def _result_line(self, output: Any) -> str:
        found = self._values.get(output) if isinstance(output, torch.fx.Node) else None
        if not isinstance(found, Laid) or self.is_weight(found.line):
            name = getattr(output, "name", output)
            label = self._sources[output][0] if output in self._sources else name
            self.unsupported(f"every result has to be a tensor that depends on the input; '{label}' does not")
        return self._layout.batch_first(found)

    def _revealed(self, result: str, dtype: str, reveal: str) -> str:
        source = result
        while isinstance(self.op(source), NoOp):
            source = self.operands(source)[0]
        classified = isinstance(self.op(source), Argmax)
        if reveal == "logits":  # without a word on it, classes are int64 and everything else is float32
            natural = "int64" if classified else "float32"
            return result if dtype == natural else self.emit(Pack.of(self, Leaf(), [result], [dtype]), result)
        if not classified and len(self.shape(result)) != 2:
            raise CompileError(f"reveal='{reveal}' needs N x classes, the model returns {self.types[result]}")
        result = source if classified else self.emit(Argmax(), result)
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


def _order(node: torch.fx.Node, rank: int) -> list[int]:
    """Where the dimensions of a permutation come from: told by their sizes, all different."""
    assert callable(node.target)
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")
    return [size - 1 for size in node.target(probe, *node.args[1:], **node.kwargs).shape]
