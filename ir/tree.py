"""Structures of tensors: the text that a plan has for one, and what is built from that text.

    tree   = shape [":" dtype] | "None" | "(" trees ")" | "[" trees "]" | [name] "{" fields "}" | name "(" fields ")"
    trees  = [tree (";" tree)*]
    fields = [key ":" tree (";" key ":" tree)*]

Tuples, lists and dictionaries; a name before "(" makes a named tuple, before "{" a record. A shape without a dtype has
the floats of the model. A name is nothing but a name: no class that a plan speaks of is ever looked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from keyword import iskeyword
from typing import Any, TypeAlias

import torch

from tacit.ir.errors import PlanError, shortened
from tacit.ir.types import Dim, Type, shape_text

MAX_DEPTH = 64  # of structures inside of one another
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64
    )
}  # fmt: skip
_TOKEN = re.compile(r"[()\[\]{};:]|[\w.\-]+")
_KEY = re.compile(r"[\w.\-]+")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Leaf:
    """A tensor: its shape, and its dtype by name; "" for the floats of the model."""

    shape: tuple[Dim, ...] = ()
    dtype: str = ""


@dataclass(frozen=True)
class Branch:
    """A container: "(", "[" or "{", what is in it, the keys where it has keys, and a name where its class has one.

    make: builds the model's own container from its elements. Only the process that has compiled the model knows it.
    """

    form: str
    children: tuple[Tree, ...] = ()
    keys: tuple[Any, ...] | None = None
    name: str = ""
    make: Callable[[Sequence[Any]], Any] | None = field(default=None, compare=False, repr=False)


Tree: TypeAlias = Branch | Leaf | None


class Record(dict[str, Any]):
    """What stands for an object whose class is not known here: a dictionary with its fields as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def leaves_of(tree: Tree) -> Iterator[Leaf]:
    """From first to last."""
    if isinstance(tree, Branch):
        for child in tree.children:
            yield from leaves_of(child)
    elif tree is not None:
        yield tree


def with_leaves(tree: Tree, leaves: Iterator[Leaf]) -> Tree:
    """The same structure of other tensors."""
    if isinstance(tree, Branch):
        return replace(tree, children=tuple(with_leaves(child, leaves) for child in tree.children))
    return None if tree is None else next(leaves)


def built(tree: Tree, values: Iterator[Any]) -> Any:
    """The structure with these values at its leaves: the model's own containers where they are known."""
    if tree is None:
        return None
    if isinstance(tree, Leaf):
        return next(values)
    items = [built(child, values) for child in tree.children]
    if tree.make is not None:
        return tree.make(items)
    if tree.form == "[":
        return items
    if tree.keys is None:
        return tuple(items)
    if tree.form == "(":
        return _named_tuple(tree.name, tree.keys)(*items)
    entries = dict(zip(tree.keys, items, strict=True))
    return Record(entries) if tree.name else entries


def text_of(tree: Tree) -> str:
    """The inverse of `parse`; raises PlanError where a key cannot be written."""
    if tree is None:
        return "None"
    if isinstance(tree, Leaf):
        return shape_text(tree.shape) + (f":{tree.dtype}" if tree.dtype else "")
    _check(tree)
    children = [text_of(child) for child in tree.children]
    if tree.keys is not None:
        children = [f"{key}:{child}" for key, child in zip(tree.keys, children, strict=True)]
    return f"{tree.name}{tree.form}{';'.join(children)}{_CLOSING[tree.form]}"


@lru_cache(maxsize=16)
def parse(text: str) -> Tree:
    """The structure that a text describes; raises PlanError."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        raise PlanError(f"'{shortened(text)}' is no structure of results")
    try:
        tokens.reverse()
        tree = _read(tokens, 0)
    except IndexError:
        raise PlanError(f"'{shortened(text)}' is no structure of results: it ends too early") from None
    if tokens:
        raise PlanError(f"'{shortened(text)}' is no structure of results: something follows it")
    return tree


def can_name_fields(names: Sequence[str]) -> bool:
    """Whether a named tuple may have these fields."""
    return all(is_name(name) and not name.startswith("_") for name in names) and len(set(names)) == len(names)


def is_name(text: str) -> bool:
    """Whether Python has such a name; of those that it takes for equal, the one that it keeps."""
    return text.isidentifier() and not iskeyword(text) and unicodedata.normalize("NFKC", text) == text


def _check(branch: Branch) -> None:
    if branch.name and not is_name(branch.name):
        raise PlanError(f"'{shortened(branch.name)}' is no name of a class")
    if branch.keys is None:
        return
    for key in branch.keys:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise PlanError(f"a key consists of letters, digits, '_', '.' and '-', not {shortened(repr(key))}")
    if len(set(branch.keys)) != len(branch.keys):
        raise PlanError("a key stands twice in one structure")
    if branch.form == "(" and not can_name_fields(branch.keys):
        raise PlanError(f"a named tuple cannot have the fields {shortened(', '.join(branch.keys))}")


def _read(tokens: list[str], depth: int) -> Tree:
    """One tree off the end of the reversed tokens; IndexError where they end too early."""
    if depth > MAX_DEPTH:
        raise PlanError(f"structures are at most {MAX_DEPTH} deep")
    first, name = tokens.pop(), ""
    if first not in _CLOSING and tokens and tokens[-1] in ("(", "{"):
        first, name = tokens.pop(), first
    if first not in _CLOSING:
        return None if first == "None" else _leaf(first, tokens)
    keyed = first == "{" or bool(name)
    keys, children = list[str](), list[Tree]()
    while tokens[-1] != _CLOSING[first]:
        if children and tokens.pop() != ";":
            raise PlanError("items of a structure are separated by ';'")
        if keyed:
            keys.append(tokens.pop())
            if tokens.pop() != ":":
                raise PlanError("a key is followed by ':'")
        children.append(_read(tokens, depth + 1))
    tokens.pop()
    branch = Branch(first, tuple(children), tuple(keys) if keyed else None, name)
    _check(branch)
    return branch


def _leaf(shape: str, tokens: list[str]) -> Leaf:
    dtype = ""
    if tokens and tokens[-1] == ":":
        tokens.pop()
        dtype = tokens.pop()
        if dtype not in DTYPES:
            raise PlanError(f"results are {', '.join(DTYPES)}, not {shortened(dtype)}")
    return Leaf(Type.parse(f"real<{shape}>").shape, dtype)


@lru_cache(maxsize=64)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """A class of that name; what it makes can be pickled, though no module has the class."""
    create: Any = namedtuple  # which mypy takes for a declaration
    made = create(name, fields, module=__name__)
    made.__reduce__ = lambda self: (_again, (name, fields, tuple(self)))
    return made


def _again(name: str, fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    return _named_tuple(name, fields)(*values)
