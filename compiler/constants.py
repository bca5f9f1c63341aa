"""Values of the exported graph that do not depend on the input: computed once, by PyTorch itself.

Masks, position tables, zeros to start from: what a model computes from its parameters and from sizes alone. They may
depend on the batch only by repeating themselves along it; they are then kept once. A graph is run at two batch sizes
to find out. Equal rows of float32 may come out of a product unequal, as its sums run in another order: whether they
are equal is seen in a second run in float64, in which such differences are far smaller than any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Tensor = torch.Tensor
_BATCHES = (2, 3)
# Elements that repeat one another in float64: to the precision of float32, and to rounding beside the largest of them.
_RELATIVE, _ABSOLUTE = 2.0**-22, 2.0**-36
_SHAPE_ALONE = ("new_", "_like.", "aten.fill.", "aten.zero.", "aten.copy.")  # read no value of their first operand
_LIKE_THE_SECOND = ("_as.",)  # nor of their second: expand_as, view_as, type_as
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout")


class NotConstant(Exception):
    """What keeps a value from being computed; shown to the user."""


@dataclass(frozen=True)
class Repeated:
    """A constant once, with one element along dimensions in which the batch alone repeats it.

    Where a dimension has others beside the batch in it, as after x.flatten(0, 1), `place` says which, and `left` and
    `right` how many there are on its two sides, in dimensions of their own; the batch is then in front of them all.
    """

    value: Tensor
    place: int = 0
    left: int = 1
    right: int = 1

    @property
    def flattened(self) -> bool:
        return self.left * self.right > 1


class Constants:
    """Values of nodes, each as one tensor or as one for each trial batch size."""

    def __init__(self) -> None:
        self.symbols: set[Any] = set()  # what stands for the batch: a symbol for each input, all the same number
        self._values: dict[torch.fx.Node, tuple[Any, ...]] = {}
        self._doubles: dict[torch.fx.Node, tuple[Any, ...]] = {}  # those with a value for each trial, in float64

    def __contains__(self, node: torch.fx.Node) -> bool:
        return node in self._values

    def put(self, node: torch.fx.Node, value: Tensor) -> None:
        self._values[node] = (value,)

    def keep(self, node: torch.fx.Node, source: torch.fx.Node) -> None:
        """A node whose value is that of another one."""
        self._values[node] = self._values[source]
        if source in self._doubles:
            self._doubles[node] = self._doubles[source]

    def evaluate(self, node: torch.fx.Node) -> bool:
        """Compute a node, if all that it reads is constant; raises NotConstant where it cannot be done."""
        if not callable(node.target) or not all(self._known(arg, node) for arg in node.all_input_nodes):
            return False
        name = str(node.target).split(".")[-2] if "." in str(node.target) else str(node.target)
        if any(word in name for word in _RANDOM) and "eval" not in name and not self._harmless(node, name):
            raise NotConstant(f"'{node.target}' is random; pass its values as an input")
        if any(self._varies(arg) for arg in node.all_input_nodes):
            self._doubles[node] = tuple(self._run(node, i, doubles=True) for i in range(len(_BATCHES)))
            self._values[node] = tuple(self._run(node, i) for i in range(len(_BATCHES)))
        else:
            self._values[node] = (self._run(node, 0),)
        return True

    def _harmless(self, node: torch.fx.Node, name: str) -> bool:
        """Dropout of a constant in evaluation."""
        return "dropout" in name and not any(value is True for value in (*node.args, *node.kwargs.values()))

    def _known(self, arg: torch.fx.Node, user: torch.fx.Node) -> bool:
        symbolic = isinstance(arg.meta.get("val"), (int, float, bool, torch.SymInt))
        return arg in self._values or symbolic or self._shape_alone(arg, user)

    @staticmethod
    def _shape_alone(arg: torch.fx.Node, user: torch.fx.Node) -> bool:
        """Whether the operator reads no more than the shape of this operand."""
        places = ((0, _SHAPE_ALONE), (1, _LIKE_THE_SECOND))
        return any(
            len(user.args) > i and arg is user.args[i] and any(word in str(user.target) for word in words)
            for i, words in places
        )

    def _varies(self, arg: torch.fx.Node) -> bool:
        if arg in self._values:
            return len(self._values[arg]) > 1
        return True

    def _run(self, node: torch.fx.Node, trial: int, *, doubles: bool = False) -> Any:
        given = ({k: v for k, v in node.kwargs.items() if k != "device"}, node.args)
        kwargs, args = torch.fx.node.map_arg(given, lambda n: self._at(n, trial, doubles))
        if doubles:
            kwargs, args = pytree.tree_map(_double, (kwargs, args))
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):  # it is run more than once
            args = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, args)
        assert callable(node.target)
        with torch.no_grad():
            found = node.target(*args, **kwargs)
        if ".empty" in str(node.target) or ".new_empty" in str(node.target):
            found.zero_()  # memory as it was found may hold these; models write over it
        return pytree.tree_map(_double, found) if doubles else found

    def _at(self, node: torch.fx.Node, trial: int, doubles: bool) -> Any:
        if node in self._values:
            values = self._doubles[node] if doubles and node in self._doubles else self._values[node]
            return values[min(trial, len(values) - 1)]
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return torch.empty([self.size(d, _BATCHES[trial]) for d in value.shape], dtype=value.dtype)
        return self.size(value, _BATCHES[trial])

    def size(self, value: Any, batch: int) -> Any:
        """A size as a number, for that batch."""
        if not isinstance(value, torch.SymInt):
            return value
        return int(value.node.expr.subs(dict.fromkeys(self.symbols, batch)))

    def value(self, node: torch.fx.Node) -> Repeated:
        """The tensor without what the batch repeats; raises NotConstant."""
        values = self._values[node]
        first = values[0]
        if not isinstance(first, torch.Tensor):
            raise NotConstant("a constant that is no tensor")
        if len(values) == 1:
            return Repeated(first)
        doubles = self._doubles[node]
        grown = [dim for dim, (a, b) in enumerate(zip(first.shape, values[1].shape, strict=True)) if a != b]
        once = tuple(slice(0, 1) if dim in grown else slice(None) for dim in range(first.dim()))
        if all(_alike(double, doubles[0][once]) for double in doubles):
            return Repeated(first[once])
        if len(grown) == 1:
            (dim,) = grown
            count, rest = divmod(first.shape[dim], _BATCHES[0])
            for left in (n for n in range(1, count + 1) if not rest and count > 1 and count % n == 0):
                apart = [_apart(x, dim, left, batch) for x, batch in zip(doubles, _BATCHES, strict=True)]
                if all(_alike(x, apart[0][:1]) for x in apart):
                    return Repeated(_apart(first, dim, left, _BATCHES[0])[:1], dim, left, count // left)
        raise NotConstant("a constant that depends on the place in the batch; make it the same for all elements")

    def trials(self, node: torch.fx.Node) -> dict[int, Tensor]:
        """The value of a constant by batch size, of those that were tried."""
        values = self._values[node]
        return {batch: values[min(i, len(values) - 1)] for i, batch in enumerate(_BATCHES)}

    def number(self, node: torch.fx.Node) -> float:
        """A number that was read off a constant."""
        found: float = self._values[node][0]
        return found


def _double(value: Any) -> Any:
    """What is float32, or asks for it, in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def _apart(value: Tensor, dim: int, left: int, batch: int) -> Tensor:
    """With the batch in front, and what was joined with it at `dim` on either side in dimensions of its own."""
    before, after = value.shape[:dim], value.shape[dim + 1 :]
    right = value.shape[dim] // (left * batch)
    split = value.reshape(*before, left, batch, right, *after).movedim(dim + 1, 0)
    return split.reshape(batch, *before, *(n for n in (left, right) if n > 1), *after)


def _alike(value: Tensor, once: Tensor) -> bool:
    """Whether a tensor repeats what `once` holds: exactly where it is no float, else but for rounding."""
    once = once.expand(value.shape)
    if not value.is_floating_point() or torch.equal(value, once):
        return torch.equal(value, once)
    largest = float(once[once.isfinite()].abs().max()) if bool(once.isfinite().any()) else 0.0
    return torch.allclose(value, once, rtol=_RELATIVE, atol=_ABSOLUTE * largest, equal_nan=True)
