"""Sums, differences, products with constants, sums along dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.build import Label
from tacit.ir.op import Sample, expect
from tacit.ir.ops import linear as fixed_linear
from tacit.ir.ops import local
from tacit.ir.ops.layer import WHOLE, Layer, inverse, real
from tacit.ir.ops.masks import finite
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import permuted, reshaped
from tacit.ir.types import Batch, Shape, Type, broadcast

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Add(ModelOp):
    """x + y: two activations, or an activation and a constant tensor. A difference adds the negative."""

    name = "model.add"
    aten = ("aten.add.Tensor", "aten.add_.Tensor", "aten.sub.Tensor", "aten.sub_.Tensor")
    batch_anywhere = True
    numbers = ("other",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.compare import either

        x, y, sign = k["self"], k["other"], -1.0 if graph.target.startswith("aten.sub") else 1.0
        factor = sign * graph.scalar(k["alpha"])
        if not isinstance(y, str):
            value = factor * graph.scalar(y)
            return graph.emit(AddScalar(value), graph.whole_of(x, value))
        if graph.result_dtype() == torch.bool:
            return either(graph, x, y)
        if factor != 1.0:
            y = graph.emit(MulScalar(factor), y)
        x, y = finite(graph, x), finite(graph, y)
        return graph.emit(cls(), y, x) if graph.is_weight(x) else graph.emit(cls(), x, y)

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def infer(self, *args: Type) -> Type:
        shape = broadcast(args[0].shape, args[1].shape)
        expect(
            isinstance(shape[0], Batch), f"to broadcast {args[0]} and {args[1]} moves the batch from its first place"
        )
        return Type("real", shape)

    def wants(self, frac: int) -> int:
        return frac

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] + args[1]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x, y = args
        return b.plus_weight(x, y, tuple(b.real(y).shape)) if isinstance(y, Label) else b.plus(x, y)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 3, 4, 4), real(_N, 3, 4, 4))), Sample(cls(), (real(_N, 7), real(7))))


class ReversedSub(Layer):
    """other - alpha self."""

    aten = ("aten.rsub.Tensor",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        negative = graph.emit(MulScalar(-graph.scalar(k["alpha"])), k["self"])
        first, second = (k["other"], negative) if graph.is_weight(negative) else (negative, k["other"])
        return graph.emit(Add(), first, second)


@dataclass(frozen=True)
class Mul(ModelOp):
    """x times a constant tensor, element by element. Products of two activations are written by `products`."""

    name = "model.mul"
    aten = ("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor", "aten.div_.Tensor")
    batch_anywhere = True
    numbers = ("other",)

    whole: bool = False  # both are whole numbers, and the constant is encoded without fractional bits

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.products import product, quotient

        x, y = k["self"], k["other"]
        if k.get("rounding_mode"):
            graph.unsupported("a quotient that is rounded")
        divide = graph.target.startswith("aten.div")
        if not isinstance(y, str):
            x = graph.whole_of(x)
            value = inverse(y) if divide else finite(graph, y) if graph.is_whole(x) else y
            return graph.emit(MulScalar(graph.scalar(value)), x)
        if divide and graph.is_weight(y):
            y = graph.emit(Reciprocal(), y)
        elif divide:
            return quotient(graph, x, y)
        if graph.is_weight(x):
            x, y = y, x
        return cls.of(graph, x, y) if graph.is_weight(y) else product(graph, x, y)

    @classmethod
    def of(cls, graph: Capture, x: str, constant: str) -> str:
        """x times a constant; whole numbers stay whole."""
        return graph.emit(cls(graph.is_whole(x) and graph.is_whole(constant)), x, constant)

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def wants(self, frac: int) -> int:
        return frac

    def infer(self, *args: Type) -> Type:
        return Add().infer(*args)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * args[1]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        w = b.weight(args[1], 0 if self.whole else b.bits_of(args[1]))
        return b.emit(fixed_linear.FixedMul(), b.as_factor(b.broadcast_to(args[0], tuple(b.real(args[1]).shape))), w)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(whole), (real(_N, 3, 4, 4), real(3, 1, 1))) for whole in (False, True))


@dataclass(frozen=True)
class Reciprocal(ModelOp):
    """1 / w of a constant: computed when the model is captured."""

    name = "model.reciprocal_of_constant"

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return 1 / args[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(5),)),)


@dataclass(frozen=True)
class AddScalar(ModelOp):
    """x + value: part of the architecture, and public in the plan."""

    name = "model.add_scalar"
    aten = ("aten.add.Scalar", "aten.sub.Scalar", "aten.rsub.Scalar")
    batch_anywhere = True

    value: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        value, x, alpha = graph.scalar(k["other"]), k["self"], graph.scalar(k["alpha"])
        if graph.target == "aten.rsub.Scalar":  # other - alpha * self
            return graph.emit(cls(value), graph.emit(MulScalar(-alpha), graph.whole_of(x, value, alpha)))
        value *= alpha
        return graph.emit(cls(-value if graph.target == "aten.sub.Scalar" else value), graph.whole_of(x, value))

    def is_whole(self, *operands: bool) -> bool:
        return all(operands) and self.value == int(self.value)

    def wants(self, frac: int) -> int:
        return frac

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] + self.value

    def expand(self, b: FixedBuilder, *args: str) -> str:
        coarse = b.types[args[0]].frac < b.frac and self.value != int(self.value)
        return b.plus_scalar(b.aligned(args[0], b.frac) if coarse else args[0], self.value)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(0.5), (real(_N, 7),)),)


@dataclass(frozen=True)
class MulScalar(ModelOp):
    """x times value: part of the architecture, and public in the plan."""

    name = "model.mul_scalar"
    aten = ("aten.mul.Scalar", "aten.div.Scalar", "aten.neg.default", "aten.neg_.default")
    batch_anywhere = True

    value: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if graph.target.startswith("aten.neg"):
            return graph.emit(cls(-1.0), k["self"])
        value = k["other"]
        value = graph.scalar(inverse(value) if graph.target == "aten.div.Scalar" else value)
        return graph.emit(cls(value), graph.whole_of(k["self"]))

    def is_whole(self, *operands: bool) -> bool:
        return all(operands) and self.value == int(self.value)

    def wants(self, frac: int) -> int:
        return frac

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * self.value

    def expand(self, b: FixedBuilder, *args: str) -> str:
        mantissa, exponent = math.frexp(self.value)
        if self.value == int(self.value):
            return b.emit(local.MulPublic(b.constant(self.value, 0)), args[0])
        if abs(mantissa) == 0.5 and 1 - exponent <= b.weight_frac:  # a power of two: the scale takes it up
            return b.emit(local.MulPublic(int(2 * mantissa), 1 - exponent), args[0])
        # Whole numbers leave the fractional bits of activations to the constant.
        bits = b.bits_of_number(self.value) + (b.frac if b.types[args[0]].frac == 0 else 0)
        return b.emit(local.MulPublic(b.constant(self.value, bits), bits), b.as_factor(args[0]))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(0.5), (real(_N, 7),)),)


@dataclass(frozen=True)
class SumAlong(ModelOp):
    """Sums and means along axes, which stay with one element; the divisor of a mean joins the scale."""

    name = "model.sum"
    aten = ("aten.sum.dim_IntList", "aten.mean.dim")
    axes = ("dim",)
    batch_anywhere = True

    over: tuple[int, ...]
    mean: bool = False

    def is_whole(self, *operands: bool) -> bool:
        return all(operands) and not self.mean

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if k["dim"] is None or k["dim"] == []:
            graph.unsupported(WHOLE)
        out = graph.emit(cls(tuple(sorted(k["dim"])), "mean" in graph.target), k["self"])
        if k["keepdim"]:
            return out
        shape = [d for i, d in enumerate(graph.fixed_shape(out)) if i and i not in k["dim"]]
        return reshaped(graph, out, shape)

    def wants(self, frac: int) -> int:
        return frac

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (torch.mean if self.mean else torch.sum)(args[0], dim=self.over, keepdim=True)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        op = local.Sum(self.over)
        total = b.emit(op, args[0])
        count = op.count(b.types[args[0]].at(1).dims)
        return MulScalar(1 / count).expand(b, total) if self.mean and count > 1 else total

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1, 3)), (real(_N, 4, 3, 2),)), Sample(cls((2,), True), (real(_N, 4, 3),)))


class OverEverything(Layer):
    """What takes in the batch together with all other dimensions."""

    aten = tuple(
        f"aten.{name}.default" for name in ("sum", "mean", "max", "min", "all", "any", "prod", "norm", "std", "var")
    )

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        graph.unsupported(WHOLE)


def rows(graph: Capture, x: str, axes: Sequence[int], keepdim: bool) -> tuple[str, Shape]:
    """x as N x kept x count, the axes joined in the last; and the shape, without the batch, once they are gone."""
    shape = graph.fixed_shape(x)
    kept = [axis for axis in range(1, len(shape)) if axis not in axes]
    count = math.prod(shape[axis] for axis in axes)
    line = reshaped(graph, permuted(graph, x, [0, *kept, *axes]), (math.prod(shape[a] for a in kept), count))
    left = tuple((1 if axis in axes else shape[axis]) for axis in range(1, len(shape)) if keepdim or axis in kept)
    return line, left
