"""Values of the exported graph that do not depend on the input: computed once, by PyTorch itself.

Masks, position tables, zeros to start from: what a model computes from its parameters and from sizes alone. They may
depend on the batch only by repeating themselves along it; they are then kept once. A graph is run at two batch sizes
to find out.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
_BATCHES = (2, 3)
_SHAPE_ALONE = ("new_", "_like.", "aten.fill.", "aten.zero.", "aten.copy.")  # read no value of their first operand
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "empty")


class NotConstant(Exception):
    """What keeps a value from being computed; shown to the user."""


class Constants:
    """Values of nodes, each as one tensor or as one for each trial batch size."""

    def __init__(self) -> None:
        self.symbols: set[Any] = set()  # what stands for the batch: a symbol for each input, all the same number
        self._values: dict[torch.fx.Node, tuple[Any, ...]] = {}

    def __contains__(self, node: torch.fx.Node) -> bool:
        return node in self._values

    def put(self, node: torch.fx.Node, value: Tensor) -> None:
        self._values[node] = (value,)

    def evaluate(self, node: torch.fx.Node) -> bool:
        """Compute a node, if all that it reads is constant; raises NotConstant where it cannot be done."""
        if not callable(node.target) or not all(self._known(arg, node) for arg in node.all_input_nodes):
            return False
        name = str(node.target).split(".")[-2] if "." in str(node.target) else str(node.target)
        if any(word in name for word in _RANDOM) and "eval" not in name and not self._harmless(node, name):
            raise NotConstant(f"'{node.target}' is random, or of undefined content; pass its values as an input")
        trials = _BATCHES if any(self._varies(arg) for arg in node.all_input_nodes) else _BATCHES[:1]
        self._values[node] = tuple(self._run(node, i) for i in range(len(trials)))
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
        return arg is user.args[0] and any(word in str(user.target) for word in _SHAPE_ALONE)

    def _varies(self, arg: torch.fx.Node) -> bool:
        if arg in self._values:
            return len(self._values[arg]) > 1
        return True

    def _run(self, node: torch.fx.Node, trial: int) -> Any:
        args = torch.fx.node.map_arg(node.args, lambda n: self._at(n, trial))
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: self._at(n, trial))
        assert callable(node.target)
        with torch.no_grad():
            return node.target(*args, **{k: v for k, v in kwargs.items() if k != "device"})

    def _at(self, node: torch.fx.Node, trial: int) -> Any:
        if node in self._values:
            values = self._values[node]
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

    def value(self, node: torch.fx.Node) -> Tensor:
        """The tensor, with one element along a dimension in which the batch repeats it; raises NotConstant."""
        values = self._values[node]
        first = values[0]
        if not isinstance(first, torch.Tensor):
            raise NotConstant("a constant that is no tensor")
        if len(values) == 1:
            return first
        second, shape = values[1], list(first.shape)
        for dim, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)):
            if a != b:
                shape[dim] = 1
        once = first[tuple(slice(0, n) for n in shape)]
        if not (torch.equal(first, once.expand(first.shape)) and torch.equal(second, once.expand(second.shape))):
            raise NotConstant("a constant that depends on the place in the batch; make it the same for all elements")
        return once

    def number(self, node: torch.fx.Node) -> float:
        """A number that was read off a constant."""
        found: float = self._values[node][0]
        return found
