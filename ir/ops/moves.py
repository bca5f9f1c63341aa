"""Ops that move, repeat or drop elements: the same at every level, and no message at any.

Axis 0 of every line is the batch; these ops keep it where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.build import Label
from tacit.ir.op import Level, LocalOp, Sample, expect, probed_shape
from tacit.ir.ops.layer import Layer
from tacit.ir.ranges import Interval
from tacit.ir.types import Batch, Type, dim_at, shape_text

if TYPE_CHECKING:
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Move(Layer, LocalOp):
    """Base of the moves: `moved` says where the elements go."""

    levels = frozenset(Level)
    batch_anywhere = True
    tight = True

    def moved(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def wants(self, frac: int) -> int:
        return frac

    def infer(self, x: Type) -> Type:
        expect(x.kind in ("real", "secret"), f"expected a real or secret operand, found {x}")
        expect(x.batched, f"only a batched value is moved about: {x}")
        return x.with_(shape=probed_shape(self.moved, x))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return self.moved(*args)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return self.moved(*shares)

    def bound(self, x: Interval) -> Interval:
        return x.rearranged(lambda v: self.moved(v[None])[0])

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(self, *args)


@dataclass(frozen=True)
class Reshape(Move):
    """The same elements in another shape; `shape` leaves out the batch, of which the result has `batch` times N."""

    name = "reshape"

    shape: tuple[int, ...] = ()
    batch: int = 1

    def infer(self, x: Type) -> Type:
        expect(x.kind in ("real", "secret"), f"expected a real or secret operand, found {x}")
        expect(x.batched, "only a batched value is reshaped")
        new = x.with_(shape=(Batch(self.batch), *self.shape))
        expect(new.at(1).numel == x.at(1).numel, f"{x} has another number of elements than {shape_text(new.shape)}")
        old = dim_at(x.shape[0], 1)
        expect(old % self.batch == 0 or self.batch % old == 0, f"{x} does not become {shape_text(new.shape)}")
        return new

    def moved(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, torch.Size(self.shape).numel())
        return x.reshape(rows, *self.shape)

    def bound(self, x: Interval) -> Interval:
        inside, outside = x.low.numel(), torch.Size(self.shape).numel()
        if outside < inside:  # a dimension joins the batch: its hull
            rows = inside // outside
            x = x.rearranged(lambda v: v.reshape(rows, outside)).hull((0,)).rearranged(lambda v: v[0])
        elif outside > inside:  # the batch gives a dimension back
            x = x.rearranged(lambda v: v.reshape(1, inside).expand(outside // inside, inside))
        return x.reshape(self.shape)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 3, 2, 2), 12, 20)
        return (
            Sample(cls((12,)), (x,)),
            Sample(cls((2, 2), 3), (x,)),
            Sample(cls((3, 2)), (x.with_(shape=(Batch(3), 2)),)),
        )


@dataclass(frozen=True)
class Permute(Move):
    """Axes in another order; `order` lists the old ones, the batch first."""

    name = "permute"

    order: tuple[int, ...]

    def infer(self, x: Type) -> Type:
        expect(self.order[:1] == (0,), "the batch stays first")
        return super().infer(x)

    def moved(self, x: Tensor) -> Tensor:
        return x.permute(self.order).contiguous()

    def bound(self, x: Interval) -> Interval:
        return x.rearranged(lambda v: v[None].permute(self.order)[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((0, 3, 1, 2)), (Type("secret", (_N, 4, 3, 2), 12, 20),)),)


@dataclass(frozen=True)
class Slice(Move):
    """Elements start, start + step, ... below stop along one axis."""

    name = "slice"
    aten = ("aten.slice.Tensor", "aten.narrow.default")
    axes = ("dim",)

    axis: int
    start: int
    stop: int
    step: int = 1

    @classmethod
    def capture(cls, graph: Any, **k: Any) -> str:
        size = graph.fixed_shape(k["input" if "input" in k else "self"])[k["dim"]]
        if graph.target == "aten.narrow.default":
            return cls._of(graph, k["self"], k["dim"], k["start"], k["start"] + k["length"], 1)
        start, stop, step = slice(k["start"], k["end"], k["step"]).indices(size)
        return cls._of(graph, k["self"], k["dim"], start, stop, step)

    @classmethod
    def _of(cls, graph: Any, x: str, axis: int, start: int, stop: int, step: int) -> str:
        if (start, stop, step) == (0, graph.fixed_shape(x)[axis], 1):
            return x
        if stop <= start:
            graph.unsupported("a slice without any element")
        out: str = graph.emit(cls(axis, start, stop, step), x)
        return out

    def infer(self, x: Type) -> Type:
        expect(0 < self.axis < len(x.shape), f"axis {self.axis} is not one of {x}, or is the batch")
        size = x.at(1).dims[self.axis]
        expect(0 <= self.start < self.stop <= size and self.step > 0, f"the slice does not lie inside {x}")
        return super().infer(x)

    def moved(self, x: Tensor) -> Tensor:
        return x[(slice(None),) * self.axis + (slice(self.start, self.stop, self.step),)]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 4, 5), 12, 20)
        return Sample(cls(2, 1, 5, 2), (x,)), Sample(cls(1, 3, 4), (x,))


@dataclass(frozen=True)
class Take(Move):
    """Elements by their index along one axis, in any order and as often as listed: part of the architecture."""

    name = "take"

    axis: int
    indices: tuple[int, ...]

    def infer(self, x: Type) -> Type:
        expect(0 < self.axis < len(x.shape), f"axis {self.axis} is not one of {x}, or is the batch")
        size = x.at(1).dims[self.axis]
        expect(all(0 <= i < size for i in self.indices) and len(self.indices) > 0, f"an index lies outside {x}")
        return super().infer(x)

    def moved(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, torch.tensor(self.indices, device=x.device))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(1, (2, 0, 0, 3)), (Type("secret", (_N, 4, 3), 12, 20),)),)


@dataclass(frozen=True)
class Expand(Move):
    """An axis of one element, repeated."""

    name = "expand"

    axis: int
    size: int

    def infer(self, x: Type) -> Type:
        expect(0 < self.axis < len(x.shape) and x.shape[self.axis] == 1, f"axis {self.axis} of {x} is not of size 1")
        return super().infer(x)

    def moved(self, x: Tensor) -> Tensor:
        sizes = [-1] * x.dim()
        sizes[self.axis] = self.size
        return x.expand(sizes)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(1, 4), (Type("secret", (_N, 1, 3), 12, 20),)),)


@dataclass(frozen=True)
class Pad(Move):
    """Zeros around the value, as torch.nn.functional.pad has it: before and after, the last axis first."""

    name = "pad"

    pads: tuple[int, ...]

    def infer(self, x: Type) -> Type:
        expect(len(self.pads) % 2 == 0 and len(self.pads) <= 2 * len(x.shape) - 2, f"{self.pads} does not pad {x}")
        return super().infer(x)

    def moved(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads)

    def bound(self, x: Interval) -> Interval:
        """Where whole dimensions share a bound, so does the padding."""
        shape = tuple(F.pad(torch.empty((1, *x.shape), device="meta"), self.pads).shape[1:])
        narrow = x.narrowed()
        if all(narrow.shape[-1 - i] == 1 for i in range(len(self.pads) // 2)):
            return narrow.union(Interval.full((1,) * len(shape), 0.0, 0.0)).expand(shape)
        return super().bound(x)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 2, 3, 4), 12, 20)
        return Sample(cls((1, 2)), (x,)), Sample(cls((0, 1, 2, -1)), (x,))


@dataclass(frozen=True)
class Concat(Move):
    """Values one after the other along an axis, at one scale. Weights among them are the same for all of the batch."""

    name = "concat"
    aten = ("aten.cat.default", "aten.concat.default", "aten.concatenate.default", "aten.stack.default")
    axes = ("dim",)

    axis: int

    @classmethod
    def capture(cls, graph: Any, **k: Any) -> str:
        out: str = graph.emit(cls(k["dim"]), *k["tensors"])
        return out

    def infer(self, *args: Type) -> Type:
        expect(len(args) > 0, "there is nothing to put together")
        x = next((arg for arg in args if arg.batched), args[0])
        for arg in args:
            expect(arg.kind in ("real", "secret") and arg.kind == x.kind, f"expected operands like {x}, found {arg}")
            expect(arg.frac == x.frac, f"scales differ: f{x.frac} and f{arg.frac}; shift one of them first")
        expect(x.batched and 0 < self.axis < len(x.shape), f"axis {self.axis} is not one of {x}, or is the batch")
        return x.with_(shape=probed_shape(self.together, *args), width=max(arg.width for arg in args))

    def moved(self, x: Tensor) -> Tensor:
        return self.together(x)

    def together(self, *args: Tensor) -> Tensor:
        rows = max(len(x) for x in args)
        return torch.cat([x.expand(rows, *x.shape[1:]) if len(x) == 1 else x for x in args], self.axis)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return self.together(*args)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return self.together(*shares)

    def bound(self, *args: Interval) -> Interval:
        axis, rank = self.axis - 1, min(x.low.dim() for x in args)  # weights bring the batch along
        parts = [Interval(x.low[0], x.high[0]) if x.low.dim() == rank + 1 else x for x in args]
        sizes = [x.shape[axis] for x in parts]
        shape = (*parts[0].shape[:axis], sum(sizes), *parts[0].shape[axis + 1 :])
        narrow = [x.narrowed(keep=(axis,)) for x in parts]
        common = [max(x.shape[d] for x in narrow) for d in range(rank)]
        pieces = [x.expand((*common[:axis], n, *common[axis + 1 :])) for x, n in zip(narrow, sizes, strict=True)]
        whole = Interval(torch.cat([x.low for x in pieces], axis), torch.cat([x.high for x in pieces], axis))
        return whole.expand(shape)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        """At the least of the scales, but not below that of activations; weights are encoded at it."""
        values = [arg for arg in args if not isinstance(arg, Label)]
        frac = max(b.types[arg].frac for arg in values)
        if any(b.types[arg].frac != frac for arg in values):
            values = [b.at_scale(arg) for arg in values]
            frac = max(b.types[arg].frac for arg in values)
        lines = iter(values)
        return b.emit(
            self, *(b.weight(arg, frac) if isinstance(arg, Label) else b.aligned(next(lines), frac) for arg in args)
        )

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, w = Type("secret", (_N, 2, 3), 12, 20), Type("secret", (1, 4, 3), 12, 24)
        return Sample(cls(1), (x, x)), Sample(cls(1), (w, x.with_(width=22), x))


def taken(graph: Any, x: str, axis: int, indices: Sequence[int]) -> str:
    """The line for these elements: a slice where they are one after the other."""
    start, count = indices[0], len(indices)
    if list(indices) == list(range(start, start + count)):
        return Slice._of(graph, x, axis, start, start + count, 1)
    out: str = graph.emit(Take(axis, tuple(indices)), x)
    return out


def reshaped(graph: Any, x: str, shape: Sequence[int]) -> str:
    """x in another shape, given without the batch; x itself where it has that shape."""
    if graph.shape(x)[1:] == tuple(shape):
        return x
    out: str = graph.emit(Reshape(tuple(shape), dim_at(graph.shape(x)[0], 1)), x)
    return out


def permuted(graph: Any, x: str, order: Sequence[int]) -> str:
    """x with its axes in another order; x itself where that is the order it has."""
    if list(order) == list(range(len(order))):
        return x
    out: str = graph.emit(Permute(tuple(order)), x)
    return out
