"""Which integers an input may hold: what every table that reads it as indices allows, element by element.

A line of indices is followed back to the inputs that its elements come from. PyTorch refuses an index outside of its
table; here the client does, before anything is shared. What is followed is moved about, and changed by constants; the
range of any other line of integers is proved with the others, once the ranges of inputs are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.errors import CompileError
from tacit.ir.ops.arithmetic import Add, AddScalar, Mul, MulScalar
from tacit.ir.ops.model import NoOp
from tacit.ir.ops.moves import Concat, Move
from tacit.ir.ops.roles import Input
from tacit.ir.ops.whole import Within
from tacit.ir.plan import Node

if TYPE_CHECKING:
    from tacit.graph import Graph

Tensor = torch.Tensor


@dataclass(frozen=True)
class Origin:
    """What the elements of a line are, for a batch of one: factor times an element of the inputs, plus offset.

    Elements of all inputs are numbered from 1; source is 0 for a constant. Three int64 tensors of the line's shape.
    """

    source: Tensor
    factor: Tensor
    offset: Tensor

    @staticmethod
    def of_constant(value: Tensor) -> Origin:
        nothing = torch.zeros(value.shape, dtype=torch.int64)
        return Origin(nothing, nothing, value.long())

    def scaled(self, by: Any) -> Origin:
        factor = self.factor * by
        return Origin(torch.where(factor == 0, 0, self.source), factor, self.offset * by)

    def plus(self, other: Origin) -> Origin | None:
        """The sum; None where it is of two different elements."""
        one, two = self.source, other.source
        if not bool(((one == two) | (one == 0) | (two == 0)).all()):
            return None
        return Origin(torch.maximum(one, two), self.factor + other.factor, self.offset + other.offset)


class Indices:
    """The bounds that tables set to the elements of integer inputs."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._first: dict[str, int] = {}  # of each input, the number of its first element
        self._low = self._high = torch.zeros(1, dtype=torch.int64)
        self._origins: dict[str, Origin | None] = {}

    def enter(self, line: str) -> None:
        """An input of integers."""
        shape = self._graph.fixed_shape(line)
        first, count = len(self._low), torch.Size(shape).numel()
        limits = torch.iinfo(torch.int64)
        self._low = torch.cat([self._low, torch.full((count,), limits.min)])
        self._high = torch.cat([self._high, torch.full((count,), limits.max)])
        self._first[line] = first
        source = torch.arange(first, first + count).reshape(shape)
        self._origins[line] = Origin(source, torch.ones_like(source), torch.zeros_like(source))

    def below(self, line: str, size: int) -> str:
        """The line, whose integers are indices of a table of that many rows."""
        if not self._graph.is_whole(line):
            self._graph.unsupported("indices that are not exact; compute them of integers alone")
        origin = self._origin(line)
        if origin is not None:
            self._require(origin, size)
        if line in self._first:
            return line
        return self._graph.emit(Within(0, size - 1, indices=True, claimed=origin is not None), line)

    def _require(self, origin: Origin, size: int) -> None:
        fixed = origin.factor == 0
        if bool((fixed & ((origin.offset < 0) | (origin.offset >= size))).any()):
            self._graph.unsupported(f"a constant among its indices lies outside of the table of {size} rows")
        source, factor, offset = (v[~fixed] for v in (origin.source, origin.factor, origin.offset))
        ends = torch.stack([-offset, size - 1 - offset])
        least = torch.where(factor > 0, ends[0], ends[1])
        most = torch.where(factor > 0, ends[1], ends[0])
        least = -torch.div(-least, factor, rounding_mode="floor")
        most = torch.div(most, factor, rounding_mode="floor")
        self._low = self._low.scatter_reduce(0, source, least, "amax")
        self._high = self._high.scatter_reduce(0, source, most, "amin")

    def bounded(self, node: Node) -> Node:
        """The input with the range of every element: what tables allow, else the one that it was declared with."""
        op, first = node.op, self._first.get(node.name)
        if first is None:
            return node
        assert isinstance(op, Input)
        shape = self._graph.fixed_shape(node.name)
        here, limits = slice(first, first + torch.Size(shape).numel()), torch.iinfo(torch.int64)
        low, high = self._low[here].reshape(shape)[0], self._high[here].reshape(shape)[0]
        low = torch.where(low == limits.min, int(op.low), low)
        high = torch.where(high == limits.max, int(op.high), high)
        if bool((low > high).any()):
            raise CompileError(
                f"input '{op.label}': no integer fits all tables that read it, each with its own offset; check these"
            )
        return replace(node, op=op.bounded(low, high))

    def _origin(self, line: str) -> Origin | None:
        if line not in self._origins:
            self._origins[line] = self._traced(line)
        return self._origins[line]

    def _traced(self, line: str) -> Origin | None:
        graph = self._graph
        if graph.is_weight(line):
            return Origin.of_constant(graph.value(line)) if graph.is_whole(line) else None
        op, args = graph.made_by(line)
        origins = [self._origin(arg) for arg in args]
        known = [origin for origin in origins if origin is not None]
        return _through(op, known) if known and len(known) == len(args) and graph.is_whole(line) else None


def _through(op: object, origins: Sequence[Origin]) -> Origin | None:
    """What an op makes of elements of which it is known what they are."""
    x = origins[0]
    if isinstance(op, Concat):
        return _moved(op.together, origins)
    if isinstance(op, Move):
        return _moved(op.moved, origins)
    if isinstance(op, (NoOp, Within)):
        return x
    if isinstance(op, AddScalar):
        return Origin(x.source, x.factor, x.offset + int(op.value))
    if isinstance(op, MulScalar):
        return x.scaled(int(op.value))
    if isinstance(op, Add):
        return x.plus(origins[1])
    return x.scaled(origins[1].offset) if isinstance(op, Mul) else None


def _moved(move: Any, origins: Sequence[Origin]) -> Origin:
    columns = zip(*((x.source, x.factor, x.offset) for x in origins), strict=True)
    return Origin(*(move(*column) for column in columns))
