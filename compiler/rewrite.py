"""An exported graph in simpler terms: regions that change nothing are written out, strangers are decomposed."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.utils import _pytree as pytree

from tacit.fit import is_of_a_trace, misfit
from tacit.ir.errors import CompileError
from tacit.tracing import one_at_a_time, quiet

Node = torch.fx.Node
_MOST_REWRITES = 4  # what a rule writes may need another
# Calls with a graph of their own that mean no more than the graph does.
_TRANSPARENT = frozenset(
    {
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
        "tag_activation_checkpoint",
        "wrap_activation_checkpoint",
        "wrap",
        "invoke_subgraph",
    }
)
_BRANCHES = (
    "a branch (torch.cond): a plan runs all its lines whatever the values are; compute both sides and choose by "
    "torch.where, or by Python's `if` where the condition is a constant"
)
_AUTOCAST = (
    "torch.autocast computes in {dtype} here, values of a plan are fixed-point numbers instead of float32: leave the "
    "region out, as in torch.autocast('{device}', enabled=False)"
)
_LOOPS = (
    "'{name}' is a call with a program of its own, which is not read; write it as operators on whole tensors, or as a "
    "loop of Python's, which is unrolled"
)
# Checks of values, which nobody may see, and of sizes, which the plan fixes.
_CHECKS = frozenset({"aten._assert_async.default", "aten._assert_async.msg", "aten._assert_scalar.default"})
# Fixed-point values are finite numbers. What is asked of one, and the answer.
_ANSWERS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False, "isfinite": True}


@one_at_a_time
def simplified(program: ExportedProgram, known: Collection[str]) -> ExportedProgram:
    """The program without in-place operators that other values could notice, and in terms of `known` operators.

    Most of the former are harmless: relu_(conv(x)) where nothing else reads conv(x). The others PyTorch rewrites
    itself, as it does operators that are not known and that it has a decomposition for. Regions that change nothing are
    written out, checks are left out, and what is known of any fixed-point value is answered. Raises CompileError where
    a constant has no value.
    """
    for label, value in program.constants.items():
        if isinstance(value, torch.Tensor) and is_of_a_trace(value):
            raise CompileError(misfit(label, value))
    rules = torch.export.default_decompositions()
    for _ in range(_MOST_REWRITES):
        program = _cleared(program)
        strange = {t for t in _unknown(program, known) if t in rules or t._can_decompose()}
        if not strange and not _noticed(program):
            break
        with quiet():  # which decomposes composites without a rule in any case
            program = program.run_decompositions({target: rules[target] for target in strange if target in rules})
    return program


def _cleared(program: ExportedProgram) -> ExportedProgram:
    """Without transparent regions, checks and questions whose answer is known; the program itself is not touched."""
    secret = _secret(program)
    if not any(_goes(node, secret) for node in program.graph.nodes):
        return program
    module, signature = copy.deepcopy(program.graph_module), copy.deepcopy(program.graph_signature)
    for node, original in zip(module.graph.nodes, program.graph.nodes, strict=True):
        node.name = original.name  # a copy renames what is called like a function of Python's, as 'input' is
    _write_out_regions(module, signature)
    with quiet():
        program = program._update(module, signature)
    finite = _finite(program)
    for node in list(module.graph.nodes):
        answer = None if node._erased else _answer(node, finite)
        if answer is not None:
            _write_answer(node, answer, program.graph_signature)
        elif not node._erased and str(node.target) in _CHECKS:
            _erase(node)
        elif not node._erased and (found := _lookup(node, _secret(program))) is not None:
            _write_lookup(node, *found, program.graph_signature)
    module.recompile()
    return program


def _write_answer(node: Node, answer: bool, signature: ExportGraphSignature) -> None:
    """The answer to a question in its place; choices that hang on it alone are made."""
    for user in list(node.users):
        if str(user.target).startswith("aten.where.") and user.args[0] is node:
            taken = user.args[1 if answer else 2]
            if isinstance(taken, Node) and _alike(taken, user):
                _replace(user, taken, signature)
    if node._erased:  # nobody else asked
        return
    with node.graph.inserting_before(node):
        full = node.graph.call_function(torch.ops.aten.full_like.default, (node.args[0], answer), {"dtype": torch.bool})
    full.meta = dict(node.meta)
    _replace(node, full, signature)


def _lookup(node: Node, secret: Collection[Node]) -> tuple[Node, Node] | None:
    """The table and the indices of a call that reads elements of a constant along its first dimension."""
    name = str(node.target)
    if name == "aten.index_select.default" and node.args[1] == 0:
        table, index = node.args[0], node.args[2]
    elif name == "aten.index.Tensor" and len(node.args[1]) == 1:  # type: ignore[arg-type]
        table, index = node.args[0], node.args[1][0]  # type: ignore[index]
    else:
        return None
    if not isinstance(table, Node) or not isinstance(index, Node) or table in secret or index not in secret:
        return None
    fits = not index.meta["val"].is_floating_point() and index.meta["val"].dtype != torch.bool
    return (table, index) if fits and table.meta["val"].is_floating_point() else None


def _write_lookup(node: Node, table: Node, index: Node, signature: ExportGraphSignature) -> None:
    """The rows of the table, each in its own shape, by an embedding."""
    aten, shape = torch.ops.aten, table.meta["val"].shape
    with node.graph.inserting_before(node):

        def call(target: torch._ops.OpOverload, *args: Any) -> Node:
            made = node.graph.call_function(target, args)
            made.meta = node.meta | {"val": target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))}
            return made

        rows = table if len(shape) == 2 else call(aten.reshape.default, table, [shape[0], math.prod(shape[1:])])
        found = call(aten.embedding.default, rows, index)
        if len(shape) == 1:
            found = call(aten.squeeze.dim, found, -1)
        elif len(shape) > 2:
            found = call(aten.unflatten.int, found, -1, list(shape[1:]))
    _replace(node, found, signature)


def _alike(x: Node, y: Node) -> bool:
    a, b = x.meta["val"], y.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def _goes(node: Node, secret: Collection[Node]) -> bool:
    rules = _region(node) is not None or _answer(node, secret) is not None or _lookup(node, secret) is not None
    return rules or str(node.target) in _CHECKS


def _replace(node: Node, other: Node, signature: ExportGraphSignature) -> None:
    """The other one in all places of a node, which goes."""
    node.replace_all_uses_with(other)
    signature.replace_all_uses(node.name, other.name)
    _erase(node)


def _region(node: Node) -> int | None:
    """Which argument of a transparent call is its graph; None for all other nodes."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target.__name__ not in _TRANSPARENT:
        return None
    if node.target.__name__ == "wrap_with_autocast":
        device, _, enabled, *_ = node.args
        if enabled and device == "cpu":  # the autocast of a device that is not used changes nothing
            return None
    graphs = [i for i, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr"]
    return graphs[0] if graphs else None


def _write_out_regions(module: torch.fx.GraphModule, signature: ExportGraphSignature) -> None:
    """Put the nodes of transparent regions, and of regions in them, into the graph around them."""
    for node in list(module.graph.nodes):
        place = _region(node)
        if place is None:
            continue
        inner = module.get_submodule(node.args[place].target)
        _write_out_regions(inner, signature)  # type: ignore[arg-type]
        for attribute in inner.graph.find_nodes(op="get_attr"):  # type: ignore[union-attr, operator]
            name = f"{node.name}_{attribute.target}"
            module.add_submodule(name, inner.get_submodule(attribute.target))
            attribute.target = name
        operands = [arg for arg in node.args[place + 1 :] if not isinstance(arg, str)]
        values = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))  # type: ignore[union-attr, operator]
        with module.graph.inserting_before(node):
            results: Any = module.graph.graph_copy(inner.graph, values)  # type: ignore[arg-type]
        if isinstance(results, Node):
            _replace(node, results, signature)
            continue
        for user in list(node.users):  # each takes one of several results
            _replace(user, results[user.args[1]], signature)
        if not node._erased:
            _erase(node)


def _answer(node: Node, finite: Collection[Node]) -> bool | None:
    """Of a question about a value, what is true of every finite number; None where it depends on the value."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args or node.args[0] not in finite:
        return None
    name = str(node.target).split(".")[1]
    if name in _ANSWERS:
        return _ANSWERS[name]
    if name not in ("eq", "ne", "lt", "le", "gt", "ge") or len(node.args) < 2:
        return None
    other = node.args[1]
    if other is node.args[0]:
        return name in ("eq", "le", "ge")
    if isinstance(other, float) and math.isnan(other):
        return name == "ne"
    if isinstance(other, float) and math.isinf(other):
        return name in (("ne", "lt", "le") if other > 0 else ("ne", "gt", "ge"))
    return None


def _erase(node: Node) -> None:
    """The node, and what was computed for nothing but it."""
    operands = node.all_input_nodes
    node.graph.erase_node(node)
    for operand in operands:
        if operand._erased:
            continue
        writes = isinstance(operand.target, torch._ops.OpOverload) and operand.target._schema.is_mutable
        if not operand.users and operand.op in ("call_function", "get_attr") and not writes:
            _erase(operand)


def opaque(node: Node) -> str:
    """Why a call with a program of its own, which is not transparent, is not read."""
    name = getattr(node.target, "__name__", str(node.target))
    if name == "cond":
        return _BRANCHES
    if name == "wrap_with_autocast":
        return _AUTOCAST.format(device=node.args[0], dtype=node.args[1])
    return _LOOPS.format(name="vmap" if name.endswith("batch_dim") else name)


def _secret(program: ExportedProgram) -> set[Node]:
    """The nodes that hold tensors and depend on an input."""
    inputs, secret = program.graph_signature.user_inputs, set[Node]()
    for node in program.graph.nodes:
        if node.name in inputs or (_holds_tensors(node) and not secret.isdisjoint(node.all_input_nodes)):
            secret.add(node)
    return secret


def _finite(program: ExportedProgram) -> set[Node]:
    """The secrets into which no infinity or NaN goes, as a mask may bring it; fixed point has none of its own."""
    signature, odd = program.graph_signature, set[Node]()
    labels = signature.inputs_to_parameters | signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        label = labels.get(node.name)
        if label is not None:
            value = program.state_dict.get(label, program.constants.get(label))
            brings = isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all())
        else:
            brings = any(isinstance(x, float) and not math.isfinite(x) for x in pytree.tree_leaves(node.args))
        asks = isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dtype == torch.bool
        if not asks and (brings or not odd.isdisjoint(node.all_input_nodes)):
            odd.add(node)
    return _secret(program) - odd


def _unknown(program: ExportedProgram, known: Collection[str]) -> set[torch._ops.OpOverload]:
    """The operators that are not known, and compute tensors that depend on an input."""
    targets = {node.target for node in _secret(program)}
    return {t for t in targets if isinstance(t, torch._ops.OpOverload) and str(t) not in known}


def _holds_tensors(node: Node) -> bool:
    return any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(node.meta.get("val")))


def _noticed(program: ExportedProgram) -> bool:
    """Whether a value is read after an in-place operator wrote to it, or to what it is a view of."""
    roots: dict[Node, Node] = {}
    written: dict[Node, Node] = {}  # root: the operator that wrote to it last
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


def _aliases(node: Node) -> tuple[Node | None, Node | None]:
    """The operand that the result shares its memory with, and the operand that is written to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.args or not isinstance(node.args[0], Node):
        same = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        return (same if node.op == "call_function" else None), None
    first = schema.arguments[0].alias_info
    target = node.args[0] if first is not None and first.is_write else None
    shares = any(r.alias_info is not None for r in schema.returns) or "dropout" in str(node.target)
    return (node.args[0] if shares else None), target
