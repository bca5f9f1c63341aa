"""Rows of a table chosen by secret indices: the index as a one-hot vector, and its product with the table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.cost import DEALT, P2, PRF, RING, RING_BYTES, Cost, Randomness, links
from tacit.ir.op import Level, Material, Op, Program, Sample, Subprotocol, expect, expect_kind
from tacit.ir.ops.layer import real
from tacit.ir.ops.linear import FixedLinear
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.roles import Input
from tacit.ir.ranges import Interval
from tacit.ir.seen import OPENED, Sights
from tacit.ir.types import Batch, Shape, Type, bits_for

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_N = Batch()


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

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        indices = k["indices"]
        graph.require_weights(k, "weight")
        if graph.is_weight(indices):
            return graph.constant("embedded", F.embedding(graph.value(indices), graph.value(k["weight"])))
        if not any(n.name == indices and isinstance(n.op, Input) and n.op.integers for n in graph.nodes):
            graph.unsupported("an embedding of indices that are computed; they have to be an input of integers")
        return graph.emit(cls(), indices, k["weight"])

    def infer(self, *args: Type) -> Type:
        expect(len(args) == 2 and len(args[1].shape) == 2, "it takes indices and a table")
        return real(*args[0].shape, args[1].shape[1])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.embedding(args[0].long(), args[1])

    def expand(self, b: FixedBuilder, *args: str) -> str:
        table = b.real(args[1])
        chosen = b.emit(OneHot(len(table)), args[0])
        weight = b.weight(b.new(args[1], "columns", table.t().contiguous()), b.weight_frac)
        # A row of the table, as it is encoded: no larger than its largest element.
        reach = 2.0 ** (bits_for(-float(table.abs().max()), 0) - 1 + b.weight_frac)
        return b.known(b.emit(FixedLinear(), chosen, weight), low=-reach, high=reach)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 3), real(5, 4))),)
