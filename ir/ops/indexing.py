"""Elements that are read, or replaced, by their place: slices and constant indices, which are part of the architecture.

What writes to a view of a tensor arrives here as a function: x with some of its elements replaced. Where they are
chosen by a truth value that depends on the input, that is a choice between two values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.ops.arithmetic import Add
from tacit.ir.ops.compare import chosen
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.masks import finite
from tacit.ir.ops.moves import Concat, Expand, reshaped, taken

if TYPE_CHECKING:
    from tacit.capture import Capture

Tensor = torch.Tensor


class Scatter(Layer):
    """x with a slice or an element replaced: what writing to a view of x becomes."""

    aten = ("aten.slice_scatter.default", "aten.select_scatter.default")
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, source, axis = k["self"], k["src"], k["dim"]
        size = graph.fixed_shape(x)[axis]
        if "index" in k:
            return replaced(graph, x, axis, [k["index"] % size], source)
        return replaced(graph, x, axis, range(*slice(k["start"], k["end"], k["step"]).indices(size)), source)


class Copy(Layer):
    """The second operand in the shape of the first, whose values are not read."""

    aten = ("aten.copy.default",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        source: str = k["src"]
        if not graph.result_dtype().is_floating_point and not graph.is_whole(source):
            graph.unsupported("floats written to integers, which rounds them; make what they are written to float")
        return repeated(graph, source, graph.fixed_shape(k["self"])[1:])


class Index(Layer):
    """x[..., indices, ...] with constant indices along axes that follow each other, which broadcast."""

    aten = ("aten.index.Tensor",)
    choosers = ("indices",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x = k["self"]
        if any(graph.is_truth(index) for index in k["indices"] if index is not None and not graph.is_weight(index)):
            graph.unsupported(
                "elements chosen by a mask that depends on the input, of which nobody may see how many there are; keep "
                "all, and choose by torch.where(mask, x, 0)"
            )
        if any(graph.is_weight(index) and graph.is_truth(index) for index in k["indices"] if index is not None):
            graph.unsupported("a mask as an index; write the indices of its true elements")
        places, shape = Places.of(graph, x, k["indices"]), graph.fixed_shape(x)
        out = taken(graph, places.joined(graph, x), places.axis, places.listed)
        return reshaped(graph, out, places.around(shape, *places.flat.shape))


class IndexPut(Layer):
    """x with elements replaced, or added to, at constant indices; or one number where a truth value says so."""

    aten = ("aten.index_put.default", "aten.index_put_.default")
    choosers = ("indices",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, source, listed = k["self"], k["values"], k["indices"]
        if len(listed) == 1 and not graph.is_weight(listed[0]) and graph.is_truth(listed[0]):
            return cls._by_mask(graph, x, listed[0], source, add=k["accumulate"])
        places, shape = Places.of(graph, x, listed), graph.fixed_shape(x)
        source = repeated(graph, source, places.around(shape, *places.flat.shape))
        narrow = places.around(shape, places.flat.numel())
        weight = graph.is_weight(source)
        source = graph.reshaped_weight(source, (1, *narrow)) if weight else reshaped(graph, source, narrow)
        write = added if k["accumulate"] else replaced
        out = write(graph, places.joined(graph, x), places.axis, places.listed, source)
        return reshaped(graph, out, shape[1:])

    @staticmethod
    def _by_mask(graph: Capture, x: str, mask: str, source: str, *, add: bool) -> str:
        if not graph.is_weight(source) or graph.value(source).numel() != 1 or add:
            graph.unsupported(
                "several values written where a mask says so, of which nobody may see how many there are; write "
                "torch.where(mask, values, x), with values as large as x"
            )
        more = len(graph.shape(x)) - len(graph.shape(mask))
        mask = reshaped(graph, mask, (*graph.fixed_shape(mask)[1:], *[1] * more))
        if float(graph.value(source)) == -math.inf:
            return chosen(graph, mask, finite(graph, -math.inf), x)
        return chosen(graph, mask, graph.reshaped_weight(source, (1,)), x)


@dataclass(frozen=True)
class Places:
    """Constant indices: the first of the axes that they are for, the sizes of these, and where in all of them."""

    axis: int
    sizes: tuple[int, ...]
    flat: Tensor

    @classmethod
    def of(cls, graph: Capture, x: str, listed: Sequence[str | None]) -> Places:
        """What x is indexed by: an entry for each axis, or for all that a mask of truth values has."""
        if any(not graph.is_weight(index) for index in listed if index is not None):
            table = "; F.embedding(index, table) reads rows of a constant by integers" if graph.is_weight(x) else ""
            graph.unsupported(f"an index that depends on the input{table}")
        values: list[Tensor | None] = []
        for index in listed:
            value = None if index is None else graph.value(index)
            if value is None or value.dtype != torch.bool:
                values.append(value)
                continue
            if not values and value.dim() > 1 and len(value) == 1:  # the same for all of the batch
                values, value = [None], value[0]
            values += value.nonzero(as_tuple=True)
        used = [i for i, value in enumerate(values) if value is not None]
        if 0 in used or used != list(range(used[0], used[-1] + 1)):
            graph.unsupported("constant indices of the batch, or of axes that do not follow each other")
        sizes = graph.fixed_shape(x)[used[0] : used[-1] + 1]
        flat = torch.zeros((), dtype=torch.int64)
        for value, size in zip((value for value in values if value is not None), sizes, strict=True):
            flat = flat * size + torch.tensor(graph.static_indices_of(value, size), dtype=torch.int64).reshape(
                value.shape
            )
        if not flat.numel():
            graph.unsupported("an index without any element")
        return cls(used[0], sizes, flat)

    @property
    def listed(self) -> list[int]:
        found: list[int] = self.flat.flatten().tolist()
        return found

    def around(self, shape: Sequence[int], *inside: int) -> list[int]:
        """A shape, without the batch, with other sizes in place of those of the axes."""
        return [*shape[1 : self.axis], *inside, *shape[self.axis + len(self.sizes) :]]

    def joined(self, graph: Capture, x: str) -> str:
        """x with these axes as one."""
        shape = self.around(graph.fixed_shape(x), math.prod(self.sizes))
        return graph.reshaped_weight(x, (1, *shape)) if graph.is_weight(x) else reshaped(graph, x, shape)


def replaced(graph: Capture, x: str, axis: int, places: Sequence[int], source: str) -> str:
    """x with the elements at these places of an axis replaced; of several for one place, the last is kept."""
    size = graph.fixed_shape(x)[axis]
    indices = list(range(size))
    for i, place in enumerate(places):
        indices[place] = size + i
    return taken(graph, graph.emit(Concat(axis), x, source), axis, indices)


def added(graph: Capture, x: str, axis: int, places: Sequence[int], source: str) -> str:
    """x with elements added at these places of an axis: those for one place one after the other."""
    size, shape = graph.fixed_shape(x)[axis], graph.fixed_shape(source)
    kind = torch.int64 if graph.is_whole(source) else torch.float32
    nothing = graph.constant("nothing", torch.zeros(1, *shape[1:axis], 1, *shape[axis + 1 :], dtype=kind))
    padded = graph.emit(Concat(axis), source, nothing)
    waiting: list[list[int]] = [[] for _ in range(size)]
    for i, place in enumerate(places):
        waiting[place].append(i)
    for turn in range(max(map(len, waiting))):
        more = taken(graph, padded, axis, [(w[turn : turn + 1] or [len(places)])[0] for w in waiting])
        x = graph.emit(Add(), more, x) if graph.is_weight(x) else graph.emit(Add(), x, more)
    return x


def repeated(graph: Capture, x: str, shape: Sequence[int]) -> str:
    """x as it broadcasts to a shape, which is without the batch."""
    if graph.is_weight(x):
        value = graph.value(x)
        return x if value.shape[1:] == torch.Size(shape) else graph.constant("repeated", value.expand(1, *shape))
    if len(graph.shape(x)) != len(shape) + 1:
        graph.unsupported(
            "a value is written that lacks dimensions of the place it is written to; add them, as in y[:, None]"
        )
    for axis, size in enumerate(shape, 1):
        if graph.fixed_shape(x)[axis] == 1 != size:
            x = graph.emit(Expand(axis, size), x)
    return x
