"""Where a tensor of the exported graph lies in a line of the plan.

Lines have the batch first. PyTorch moves it about: to the second place for attention, into a product with the windows
of an image, and back. A tensor is therefore a line and a note on where its batch stands: of a logical shape
(a, b, N, c), or (a, b, x N y, c) where the batch dimension took in x from its left and y from its right, the line has
shape (N, a, b, x, y, c). Nothing is moved for a permutation that moves the batch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from tacit.ir.build import Builder
from tacit.ir.ops.moves import Permute, Reshape
from tacit.ir.types import Batch, Dim, dim_at

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Laid:
    """A line, the place of the batch among the logical dimensions, and what it took in from its left and right."""

    line: str
    place: int = 0
    left: int = 1
    right: int = 1

    @property
    def trivial(self) -> bool:
        """Whether the line is the tensor as it stands."""
        return (self.place, self.left, self.right) == (0, 1, 1)

    @property
    def extra(self) -> int:
        """Axes of the line beyond the logical dimensions."""
        return (self.left > 1) + (self.right > 1)

    def like(self, line: str, place: int) -> Laid:
        return Laid(line, place, self.left, self.right)

    def axis(self, dim: int) -> int:
        """The axis of the line that holds a logical dimension; that of the batch is 0."""
        if dim == self.place:
            return 0
        return dim + 1 if dim < self.place else dim + self.extra


class Layout:
    """Views and permutations, written with the fewest moves."""

    def __init__(self, builder: Builder, unsupported: Callable[[str], NoReturn]) -> None:
        self._b = builder
        self._unsupported = unsupported

    def shape(self, x: Laid) -> Shape:
        """The logical shape."""
        batch, *rest = self._b.types[x.line].shape
        after = x.place + x.extra
        return (*rest[: x.place], Batch(dim_at(batch, 1) * x.left * x.right), *rest[after:])

    def view(self, x: Laid, wanted: Shape) -> Laid:
        """The same elements in the same order, in another shape."""
        place, factor = self._batch(wanted)
        if x.trivial and place == 0 and factor == dim_at(self._b.types[x.line].shape[0], 1):
            return Laid(self._reshape(x.line, wanted[1:], factor))
        x = self._split(x)
        rest = self._b.types[x.line].at(1).dims[1:]
        cut = x.place + (x.left > 1)
        before, behind = math.prod(rest[:cut]), math.prod(rest[cut:])
        left, right = (self._share(n, dims) for n, dims in ((before, wanted[:place]), (behind, wanted[place + 1 :])))
        if left * right != factor:
            self._unsupported("a reshape that moves or splits the batch dimension; keep the batch whole")
        taken = [n for n in (left, right) if n > 1]
        line = self._reshape(x.line, (*wanted[:place], *taken, *wanted[place + 1 :]), 1)
        return self.joined(Laid(line, place, left, right))

    def permute(self, x: Laid, order: Sequence[int]) -> Laid:
        """Logical dimension i of the result is order[i] of x."""
        x = x if x.trivial and order[0] == 0 else self._split(x)
        axes: list[int] = []
        for dim in order:
            axes += [x.place + 1 + i for i in range(x.extra)] if dim == x.place else [x.axis(dim)]
        axes = [0, *axes]
        line = x.line if axes == sorted(axes) else self._b.emit(Permute(tuple(axes)), x.line)
        return self.joined(x.like(line, list(order).index(x.place)))

    def batch_first(self, x: Laid) -> str:
        """The line that is the tensor as it stands."""
        x = self.joined(x)
        if not x.trivial:
            self._unsupported(
                f"the batch is dimension {x.place} of its input, and has to be the first: permute it back before"
                if x.place
                else "its input joins the batch and another dimension, the other one first; keep them apart"
            )
        return x.line

    def _split(self, x: Laid) -> Laid:
        """With a batch of N, what joined it on the right apart."""
        batch, *_ = self._b.types[x.line].shape
        factor = dim_at(batch, 1)
        if factor == 1:
            return x
        assert x.trivial
        return Laid(self._reshape(x.line, (factor, *self._b.types[x.line].shape[1:]), 1), 0, 1, factor)

    def joined(self, x: Laid) -> Laid:
        """As a trivial one, where the batch is first."""
        if x.place or x.left > 1 or x.right == 1:
            return x
        return Laid(self._reshape(x.line, self._b.types[x.line].shape[2:], x.right))

    def _reshape(self, line: str, shape: Sequence[Dim], batch: int) -> str:
        if self._b.types[line].shape == (Batch(batch), *shape):
            return line
        return self._b.emit(Reshape(tuple(d for d in shape if isinstance(d, int)), batch), line)

    def _share(self, elements: int, dims: Shape) -> int:
        """What is left for the batch of so many elements on one side of it."""
        kept = math.prod(d for d in dims if isinstance(d, int))
        if not kept or elements % kept:
            self._unsupported("a reshape that moves or splits the batch dimension; keep the batch whole")
        return elements // kept

    def _batch(self, shape: Shape) -> tuple[int, int]:
        places = [(i, d.factor) for i, d in enumerate(shape) if isinstance(d, Batch)]
        if len(places) != 1:
            self._unsupported("its result has no batch dimension, or several; keep the batch a dimension of its own")
        return places[0]
