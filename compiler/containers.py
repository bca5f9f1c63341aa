"""A model's own containers around torch.export, which knows none that nobody has registered with PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tacit.arguments import CONSTANTS, Arguments
from tacit.ir.errors import CompileError
from tacit.ir.tree import Leaf, Tree
from tacit.structure import taken_apart


class Results:
    """What a model returns, taken apart: PyTorch keeps the tree with the graph that it exports."""

    def __init__(self, tree: Tree, values: Sequence[Any]) -> None:
        self.tree = tree
        self.values = list(values)


pytree.register_pytree_node(
    Results,
    lambda results: (results.values, results.tree),
    lambda values, tree: Results(tree, list(values)),
    flatten_with_keys_fn=lambda results: (
        [(pytree.SequenceKey(i), value) for i, value in enumerate(results.values)],
        results.tree,
    ),
)


def results_of(spec: Any, values: Sequence[Any]) -> Results:
    """The results of an exported graph: `values`, in the structure that a specification of PyTorch's describes."""
    if spec is None:
        return Results(Leaf(), values)
    if spec.type is Results:
        return Results(spec.context, values)
    # Tensors stand for tensors, as a class may look at what it is made of.
    stands = [torch.empty(0, device="meta") if isinstance(value, torch.fx.Node) else value for value in values]
    apart = taken_apart(pytree.tree_unflatten(stands, spec), absent=True)
    order = {id(stand): value for stand, value in zip(stands, values, strict=True)}
    return Results(apart.tree, [order.get(id(leaf), leaf) for leaf in apart.leaves])


@contextmanager
def in_own_containers(model: torch.nn.Module, arguments: Arguments) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments in plain containers, with which the model may be exported: it is handed its own kinds of them.

    Its results leave it taken apart, as `Results`.
    """
    args = [taken_apart(arg, by_key=True) for arg in arguments.args]
    kwargs = {name: taken_apart(arg, by_key=True) for name, arg in arguments.kwargs.items()}
    here = get_ident()

    def enter(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if get_ident() != here:
            return None
        own = tuple(a.built(taken_apart(x, by_key=True).leaves) for a, x in zip(args, given, strict=True))
        return own, {name: kwargs[name].built(taken_apart(x, by_key=True).leaves) for name, x in named.items()}

    def leave(module: Any, given: Any, result: Any) -> Any:
        return result if get_ident() != here else _results(result)

    # A model that is called by another thread meanwhile returns what it always does.
    before = model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
    after = model.register_forward_hook(leave)
    try:
        yield tuple(a.plain() for a in args), {name: a.plain() for name, a in kwargs.items()}
    finally:
        before.remove()
        after.remove()


def _results(result: Any) -> Results:
    apart = taken_apart(result, absent=True)
    for path, leaf in zip(apart.paths, apart.leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            place = f"result '{'.'.join(map(str, path))}' of the model" if path else "the model's result"
            raise CompileError(f"{place} {_no_tensor(leaf)}")
    return Results(apart.tree, apart.leaves)


def _no_tensor(leaf: Any) -> str:
    kind = type(leaf).__name__
    if isinstance(leaf, (*CONSTANTS, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"is a number or a text ({kind}), and no tensor: take it out of what the model returns"
    return f"is of type {kind}: return tensors, inside tuples, lists, dictionaries, named tuples or dataclasses"
