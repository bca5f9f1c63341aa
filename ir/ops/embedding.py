"""Rows of a table chosen by secret indices: the index as a one-hot vector, and its product with the table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.cost import DEALT, P2, PRF, RING, RING_BYTES, Cost, Randomness, links
from tacit.ir.op import Level, Material, Op, Program, Sample, Subprotocol, expect, expect_kind
from tacit.ir.ops.arithmetic import Mul, MulScalar, SumAlong
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.linear import FixedLinear
from tacit.ir.ops.local import Sum
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import Reshape, reshaped, taken
from tacit.ir.ops.products import product
from tacit.ir.ranges import Interval
from tacit.ir.seen import OPENED, Sights
from tacit.ir.types import Batch, Shape, Type, bits_for, dim_at

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_N = Batch()
_SUM, _MAX = 0, 2  # modes of a bag, beside the mean


@dataclass(frozen=True)
class Rotate(Subprotocol):
    """[j = x] for j = 0 .. classes - 1, from a dealt unit vector that both parties rotate by what they opened.

    P2 knows r and deals the vector e with e_k = [k = r mod 2^bits]. P0 and P1 open c = x + r, uniform, and take
    e_{c - j mod 2^bits} = [r = c - j] = [j = x] for 0 <= x < 2^bits: local. P2 sees nothing.
    """

    shape: Shape
    classes: int

    @property
    def size(self) -> int:
        """2^bits, the least power of two that is no less than the number of classes."""
        return 1 << (self.classes - 1).bit_length()

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    def randomness(self) -> tuple[Randomness, ...]:
        return (Randomness("r", self.shape, RING, PRF), Randomness("unit vector", (self.n, self.size), RING, DEALT))

    def cost(self) -> Cost:
        size = RING_BYTES * self.n
        return Cost(1, links(p0_p1=size, p1_p0=size))

    def seen(self) -> Sights:
        return OPENED

    def deal(self, party: Party) -> Material:
        r = party.mask("r", self.shape)
        known = F.one_hot(r.reshape(-1) & (self.size - 1), self.size) if party.rank == P2 else None
        unit = party.share("unit vector", (self.n, self.size), known)
        return {} if unit is None else {"r": r, "unit": unit}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            yield from party.open(None)
            return None
        (c,) = yield from party.open(values[0] + material["r"])
        places = (c.reshape(-1, 1) - torch.arange(self.classes)) & (self.size - 1)
        return material["unit"].gather(1, places).view(*self.shape, self.classes)


@dataclass(frozen=True)
class OneHot(Op):
    """1 at the place of each index, else 0, along a new last dimension. Indices lie in 0 .. classes - 1."""

    name = "one_hot"
    levels = frozenset({Level.FIXED, Level.PROTOCOL})

    classes: int

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(x.frac == 0 and self.classes > 0, f"expected indices, found {x}")
        return x.with_(shape=(*x.shape, self.classes), width=2)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        """As the protocol has it, modulo the power of two."""
        size = Rotate((), self.classes).size
        return F.one_hot(args[0] & (size - 1), size)[..., : self.classes]

    def bound(self, x: Interval) -> Interval:
        return Interval.full((*x.shape, self.classes), 0.0, 1.0)

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        return (Rotate(x.dims, self.classes),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls(6), (Type("secret", (_N, 3), 0, 4),)), Sample(cls(1), (Type("secret", (_N,), 0, 2),))


@dataclass(frozen=True)
class Embedding(ModelOp):
    """Rows of a constant table by secret indices: operands indices, table (rows, features)."""

    name = "model.embedding"
    aten = ("aten.embedding.default",)
    batch_anywhere = True
    own_shapes = ("weight",)
    choosers = ("indices",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        graph.require_weights(k, "weight")
        return cls.of(graph, k["indices"], k["weight"])

    @classmethod
    def of(cls, graph: Capture, indices: str, table: str) -> str:
        return graph.emit(cls(), graph.indices.below(indices, graph.fixed_shape(table)[0]), table)

    def infer(self, *args: Type) -> Type:
        expect(len(args) == 2 and len(args[1].shape) == 2, "it takes indices and a table")
        return real(*args[0].shape, args[1].shape[1])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.embedding(_inside(args[0], len(args[1])), args[1])

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return _rows(b, b.emit(OneHot(len(b.real(args[1]))), args[0]), args[1], 1)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 3), real(5, 4))),)


def _inside(indices: Tensor, size: int) -> Tensor:
    """Indices as they are looked up while scales are tried out: ranges, which refuse others, are proved later."""
    return indices.long().clamp(0, size - 1)


def _rows(b: FixedBuilder, chosen: str, table: str, count: int) -> str:
    """The sum of `count` rows of a table, of which `chosen` says how often each."""
    value, bits = b.real(table), b.bits_of(table)
    weight = b.weight(table, bits)
    # A row of the table, as it is encoded: no larger than its largest element.
    reach = count * 2.0 ** (bits_for(-float(value.abs().max()), 0) - 1 + bits)
    return b.known(b.emit(FixedLinear(rows=True), chosen, weight), low=-reach, high=reach)


@dataclass(frozen=True)
class OneHotRows(ModelOp):
    """torch.nn.functional.one_hot, with the number of classes given."""

    name = "model.one_hot"
    aten = ("aten.one_hot.default",)
    batch_anywhere = True

    classes: int

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if k["num_classes"] < 1:
            graph.unsupported("one_hot without the number of classes, which is public; give num_classes")
        return cls.of(graph, k["self"], k["num_classes"])

    @classmethod
    def of(cls, graph: Capture, indices: str, classes: int) -> str:
        return graph.emit(cls(classes), graph.indices.below(indices, classes))

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.one_hot(_inside(args[0], self.classes), self.classes).to(args[0].dtype)

    def infer(self, *args: Type) -> Type:
        return real(*args[0].shape, self.classes)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(OneHot(self.classes), args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(5), (real(_N, 3),)),)


@dataclass(frozen=True)
class SumOfRows(ModelOp):
    """Sums of the rows of a table (rows, features) that indices (N, count) choose: one product with how often each."""

    name = "model.sum_of_rows"

    def infer(self, *args: Type) -> Type:
        expect(len(args) == 2 and len(args[0].shape) == len(args[1].shape) == 2, "it takes N x indices and a table")
        return real(args[0].shape[0], args[1].shape[1])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.embedding(_inside(args[0], len(args[1])), args[1]).sum(1)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        size, count = len(b.real(args[1])), b.types[args[0]].at(1).dims[1]
        often = b.emit(Sum((1,)), b.emit(OneHot(size), args[0]))
        often = b.emit(Reshape((size,), dim_at(b.types[often].shape[0], 1)), often)
        return _rows(b, often, args[1], count)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 3), real(5, 4))),)


class EmbeddingBag(Layer):
    """torch.nn.EmbeddingBag with sums or means of N x T indices; a padding index counts in neither."""

    aten = ("aten.embedding_bag.padding_idx", "aten.embedding_bag.default", "aten._embedding_bag.default")
    own_shapes = ("weight",)
    choosers = ("indices",)
    unresolved = ("offsets",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        graph.require_weights(k, "weight")
        if k["mode"] == _MAX:
            graph.unsupported("a bag's maximum; take it of an nn.Embedding, as in embedding(x).amax(1)")
        count = graph.batches(k["indices"])
        if k["include_last_offset"] or not cls._regular(graph, k["offsets"], count):
            graph.unsupported("bags of different lengths, which are public; pass N x T indices, padded to one length")
        indices = graph.emit(Reshape((count,), 1), k["indices"])
        table, pad = k["weight"], k["padding_idx"]
        if pad is not None and pad >= 0:
            rows = graph.value(table).clone()
            rows[pad] = 0
            table = graph.constant("without_padding", rows)
        if k["per_sample_weights"] is not None:
            return [cls._weighted(graph, indices, table, k["per_sample_weights"])]
        indices = graph.indices.below(indices, graph.fixed_shape(table)[0])
        total = graph.emit(SumOfRows(), indices, table)
        if k["mode"] == _SUM:
            return [total]
        if table == k["weight"]:
            return [graph.emit(MulScalar(1 / count), total)]
        return [cls._over_others(graph, indices, graph.fixed_shape(table)[0], pad, total)]

    @staticmethod
    def _regular(graph: Capture, offsets: Any, count: int) -> bool:
        """Whether each bag begins `count` indices behind the one before it, as of a matrix of indices."""
        trials = graph.constants.trials(offsets) if isinstance(offsets, torch.fx.Node) else None
        return trials is not None and all(torch.equal(v, torch.arange(n) * count) for n, v in trials.items())

    @staticmethod
    def _weighted(graph: Capture, indices: str, table: str, weights: str) -> str:
        """A sum whose terms have weights."""
        rows, count = Embedding.of(graph, indices, table), graph.fixed_shape(indices)[1]
        constant = graph.is_weight(weights)  # one number for all, as others of the length of a bag are values
        shaped = graph.reshaped_weight(weights, (1, 1)) if constant else graph.emit(Reshape((count, 1), 1), weights)
        times = Mul.of if constant else product
        total = graph.emit(SumAlong((1,)), times(graph, rows, shaped))
        return reshaped(graph, total, graph.fixed_shape(total)[2:])

    @staticmethod
    def _over_others(graph: Capture, indices: str, classes: int, pad: int, total: str) -> str:
        """The sum divided by how many indices are no padding, or by 1 where all are: looked up, as they are few."""
        count = graph.fixed_shape(indices)[1]
        pads = taken(graph, OneHotRows.of(graph, indices, classes), 2, [pad])
        pads = reshaped(graph, graph.emit(SumAlong((1,)), pads), ())
        inverse = 1 / torch.arange(count, -1, -1).clamp(min=1)
        each = Embedding.of(graph, pads, graph.constant("inverse_counts", inverse.reshape(-1, 1)))
        return product(graph, total, each)
