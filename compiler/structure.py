"""Arguments and results as PyTorch models have them: tensors inside tuples, dictionaries, dataclasses and the like.

A structure is taken apart into its leaves and a tree that builds it again, of the model's own classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tacit.ir.errors import CompileError, InputError
from tacit.ir.tree import MAX_DEPTH, Branch, Leaf, Tree, built, can_name_fields, is_name

_Make = Callable[[Sequence[Any]], Any]


class TooDeepError(CompileError, InputError):
    """An argument or a result is a structure inside of structures without end, or nearly so."""


@dataclass
class Apart:
    """A structure taken apart: what stands at its leaves, the path to each, and the tree that builds it again."""

    tree: Tree = None
    leaves: list[Any] = field(default_factory=list)
    paths: list[tuple[Any, ...]] = field(default_factory=list)
    keyed: bool = False  # whether a path has a key in it, that of a dictionary or an object
    named: bool = False  # or the field of a named tuple, which has a place too

    def built(self, values: Sequence[Any] | None = None) -> Any:
        """The structure, of these values instead of its own."""
        return built(self.tree, iter(self.leaves if values is None else values))

    def plain(self) -> Any:
        """The structure with dictionaries for whatever has keys; named tuples stay."""
        return built(_plain(self.tree), iter(self.leaves))


def taken_apart(value: Any, *, by_key: bool = False, absent: bool = False) -> Apart:
    """A structure's leaves and tree. What is no container that we know is a leaf, whatever it is.

    by_key: entries of dictionaries sorted by their keys, as their order says nothing of an argument.
    absent: None is no leaf, but stays where it is. Raises TooDeepError.
    """
    out = Apart()

    def walk(value: Any, path: tuple[Any, ...]) -> Tree:
        if len(path) > MAX_DEPTH:
            raise TooDeepError(f"arguments and results are structures of at most {MAX_DEPTH} levels")
        found = _container(value, by_key)
        if found is None:
            if value is None and absent:
                return None
            out.leaves.append(value)
            out.paths.append(path)
            return Leaf()
        branch, items = found
        steps = range(len(items)) if branch.keys is None else branch.keys
        out.keyed |= branch.form == "{"
        out.named |= branch.keys is not None
        children = tuple(walk(item, (*path, step)) for step, item in zip(steps, items, strict=True))
        return replace(branch, children=children)

    out.tree = walk(value, ())
    return out


def leaves(value: Any) -> list[Any]:
    """What stands at the leaves, from first to last, dictionaries by their sorted keys."""
    return taken_apart(value, by_key=True).leaves


def named_leaves(value: Any) -> dict[str, Any]:
    """The leaves by where they stand, as in "0", "logits", "1.mask"; a leaf alone has no name, and None is none."""
    apart = taken_apart(value, by_key=True, absent=True)
    return {".".join(map(str, path)): leaf for path, leaf in zip(apart.paths, apart.leaves, strict=True)}


def together(answers: Sequence[Any], join: Callable[[tuple[Any, ...]], Any]) -> Any:
    """Several answers of one structure as one: what stands at a place in all of them is joined."""
    apart = [taken_apart(answer, absent=True) for answer in answers]
    return apart[0].built([join(parts) for parts in zip(*(a.leaves for a in apart), strict=True)])


def _plain(tree: Tree) -> Tree:
    if not isinstance(tree, Branch):
        return tree
    children = tuple(_plain(child) for child in tree.children)
    if tree.form == "(":
        return replace(tree, children=children)
    return Branch(tree.form, children, tree.keys)


def _container(value: Any, by_key: bool) -> tuple[Branch, Sequence[Any]] | None:
    """A container's kind and what is in it; None for anything else."""
    if isinstance(value, (torch.Tensor, str, bytes)):
        return None
    if isinstance(value, Mapping):
        keys = _sorted(value) if by_key else list(value)
        return _of_mapping(value, tuple(keys)), [value[key] for key in keys]
    if is_dataclass(value) and not isinstance(value, type):
        names = sorted(f.name for f in fields(value)) if by_key else [f.name for f in fields(value)]
        make = _filling(type(value), tuple(names))
        return Branch("{", keys=tuple(names), name=_name(value), make=make), [getattr(value, name) for name in names]
    if isinstance(value, tuple):
        return _of_tuple(value), value
    if type(value) is list:
        return Branch("["), value
    items, spec = pytree.tree_flatten(value, is_leaf=lambda x: x is not value)
    if not spec.is_leaf():  # a class that somebody has registered with PyTorch
        return Branch("[", make=lambda values: pytree.tree_unflatten(values, spec)), items
    return (Branch("["), value) if isinstance(value, list) else None


def _of_mapping(value: Mapping[Any, Any], keys: tuple[Any, ...]) -> Branch:
    """A dictionary; a record where it is an object with fields too, as the outputs of Hugging Face's models are."""
    make: _Make | None = None
    name = _name(value) if is_dataclass(value) else ""
    if name:
        cls: Any = type(value)
        make = lambda values: cls(**dict(zip(keys, values, strict=True)))  # noqa: E731
    elif type(value) is not dict and isinstance(value, MutableMapping):
        make = _refilling(value, keys)
    return Branch("{", keys=keys, name=name, make=make)


def _of_tuple(value: tuple[Any, ...]) -> Branch:
    cls: Any = type(value)
    names = getattr(cls, "_fields", None)
    make: _Make = getattr(cls, "_make", cls)
    if names is None and hasattr(cls, "n_sequence_fields"):  # such as torch.return_types.max
        names = cls.__match_args__
    if names is None:
        return Branch("(")
    if not can_name_fields(names):
        return Branch("(", make=make)
    return Branch("(", keys=tuple(names), name=_name(value), make=make)


def _name(value: Any) -> str:
    name = type(value).__name__.rpartition(".")[2]
    return name if is_name(name) else "Result"


def _sorted(keys: Mapping[Any, Any]) -> list[Any]:
    try:
        return sorted(keys)
    except TypeError:  # keys of several types
        return sorted(keys, key=lambda key: (type(key).__name__, str(key)))


def _filling(cls: type, names: tuple[str, ...]) -> _Make:
    """Makes an object of a dataclass from its fields as they are: what its __init__ would do has been done to them."""

    def make(values: Sequence[Any]) -> Any:
        made: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(made, name, value)
        return made

    return make


def _refilling(value: MutableMapping[Any, Any], keys: tuple[Any, ...]) -> _Make | None:
    """Makes a mapping of the same class, if it can be emptied and filled; None for a plain dictionary."""
    try:
        empty = copy.copy(value)
        empty.clear()
    except Exception:  # whatever a class of somebody else's may raise
        return None

    def make(values: Sequence[Any]) -> Any:
        made: Any = copy.copy(empty)
        made.update(zip(keys, values, strict=True))
        return made

    return make
