"""Comparisons, and choices by them, at the model level. A truth value is 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.op import Sample, expect
from tacit.ir.ops import choice, local
from tacit.ir.ops.arithmetic import Add, AddScalar, Mul, MulScalar
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.masks import finite
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.products import Times
from tacit.ir.ops.whole import Within
from tacit.ir.types import Batch, Type, broadcast

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Comparison(ModelOp):
    """1 where x >= 0, or where x > 0 if `strict`, else 0: exact on the fixed-point value of x."""

    name = "model.comparison"
    batch_anywhere = True

    strict: bool = False

    def is_whole(self, *operands: bool) -> bool:
        return True

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] > 0 if self.strict else args[0] >= 0).to(args[0].dtype)

    def margin(self, *args: Tensor) -> Tensor:
        return args[0].abs()

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(choice.FixedPositive(), self.shifted(b, args[0]))

    def shifted(self, b: FixedBuilder, x: str) -> str:
        """x > 0 is x - 1 >= 0 in the integers that stand for x."""
        return b.emit(local.AddPublic(-1), x) if self.strict else x

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls(), (real(_N, 7),)), Sample(cls(True), (real(_N, 7),))


@dataclass(frozen=True)
class Selection(ModelOp):
    """value where x >= 0, or where x > 0 if `strict`, else 0: operands x, value. One comparison, no further round."""

    name = "model.selection"
    batch_anywhere = True

    strict: bool = False

    def is_whole(self, *operands: bool) -> bool:
        return operands[1]

    def infer(self, *args: Type) -> Type:
        shape = broadcast(args[0].shape, args[1].shape)
        expect(isinstance(shape[0], Batch), f"{args[0]} and {args[1]} do not share their batch")
        return Type("real", shape)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return torch.where(args[0] > 0 if self.strict else args[0] >= 0, args[1], torch.zeros((), dtype=args[1].dtype))

    def margin(self, *args: Tensor) -> Tensor:
        return args[0].abs()

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x, value = Comparison(self.strict).shifted(b, args[0]), args[1]
        x = b.broadcast_to(x, b.types[value].at(1).dims)
        value = b.broadcast_to(value, b.types[x].at(1).dims)
        return b.emit(choice.FixedChoose(), x, value)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 3, 7), real(_N, 1, 7))), Sample(cls(True), (real(_N, 7), real(_N, 7))))


class Compare(Layer):
    """x > y and its likes."""

    aten = tuple(
        f"aten.{name}.{kind}" for name in ("gt", "ge", "lt", "le", "eq", "ne") for kind in ("Tensor", "Scalar")
    )
    batch_anywhere = True
    numbers = ("other",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        name = graph.target.split(".")[1]
        d = difference(graph, k["self"], k["other"])
        if name in ("gt", "ge"):
            return graph.emit(Comparison(strict=name == "gt"), d)
        if name in ("lt", "le"):
            return graph.emit(Comparison(strict=name == "lt"), graph.emit(MulScalar(-1.0), d))
        return unequal(graph, d) if name == "ne" else equal(graph, d)


class Logic(Layer):
    """not, and, or, exclusive or, on truth values."""

    aten = ("aten.logical_not.default", "aten.bitwise_not.default") + tuple(
        f"aten.{name}"
        for kind in ("and", "or", "xor")
        for name in (f"logical_{kind}.default", f"bitwise_{kind}.Tensor", f"__{kind}__.Tensor")
    )
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        name = graph.target.split(".")[1].strip("_").split("_")[-1]
        if not graph.is_truth(k["self"]) or ("other" in k and not graph.is_truth(k["other"])):
            graph.unsupported("logic on values that are no truth values; compare with 0 first")
        if name == "not":
            return negation(graph, k["self"])
        both = together(graph, k["self"], k["other"], -1.0)
        if name == "or":
            return graph.emit(Comparison(), both)
        twice = graph.emit(Comparison(strict=True), both)
        if name == "and":
            return twice
        return together(graph, graph.emit(Comparison(), both), graph.emit(MulScalar(-1.0), twice), 0.0)


@dataclass(frozen=True)
class Sign(ModelOp):
    """[x > 0] + [x >= 0] - 1."""

    name = "model.sign"
    aten = ("aten.sign.default",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return graph.emit(cls(), k["self"])

    def is_whole(self, *operands: bool) -> bool:
        return True

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].sign()

    def margin(self, *args: Tensor) -> Tensor:
        return args[0].abs()

    def expand(self, b: FixedBuilder, *args: str) -> str:
        above, at_least = (Comparison(strict).expand(b, args[0]) for strict in (True, False))
        return b.plus_scalar(b.emit(local.Add(), above, at_least), -1.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7),)),)


class Where(Layer):
    """A choice between two values, by a comparison or by a constant mask."""

    aten = (
        "aten.where.self",
        "aten.where.ScalarSelf",
        "aten.where.ScalarOther",
        "aten.where.Scalar",
        "aten.masked_fill.Scalar",
        "aten.masked_fill.Tensor",
        "aten.masked_fill_.Scalar",
        "aten.masked_fill_.Tensor",
    )
    batch_anywhere = True
    choosers = ("mask", "condition")
    numbers = ("self", "other")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if "masked_fill" in graph.target:
            return chosen(graph, k["mask"], finite(graph, k["value"]), k["self"])
        return chosen(graph, k["condition"], *(finite(graph, k[key]) for key in ("self", "other")))


class Threshold(Layer):
    """x where x > threshold, else a value; x where |x| > lambda, else 0."""

    aten = ("aten.threshold.default", "aten.threshold_.default", "aten.hardshrink.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x = k["self"]
        if "threshold" in k:
            bit = graph.emit(Comparison(strict=True), difference(graph, x, k["threshold"]))
            return chosen(graph, bit, x, k["value"])
        reach = graph.scalar(k["lambd"])
        above = graph.emit(AddScalar(-reach), x)
        below = graph.emit(AddScalar(-reach), graph.emit(MulScalar(-1.0), x))
        kept = [graph.emit(Selection(strict=True), side, x) for side in (above, below)]
        return graph.emit(Add(), *kept)


def difference(graph: Capture, x: str, y: Any) -> str:
    """x - y for tensors and scalars."""
    if not isinstance(y, str):
        return graph.emit(AddScalar(-graph.scalar(y)), x) if y else x
    if graph.is_weight(x):
        return graph.emit(Add(), graph.emit(MulScalar(-1.0), y), x)
    return graph.emit(Add(), x, graph.emit(MulScalar(-1.0), y))


def equal(graph: Capture, d: str) -> str:
    """d == 0."""
    back = graph.emit(MulScalar(-1.0), d)
    both = together(graph, graph.emit(Comparison(), d), graph.emit(Comparison(), back), -1.0)
    return graph.emit(Within(0, 1, claimed=True), both)


def unequal(graph: Capture, d: str) -> str:
    """d != 0."""
    return negation(graph, equal(graph, d))


def either(graph: Capture, x: str, y: Any) -> str:
    """x or y, of truth values."""
    total = together(graph, x, y, 0.0) if isinstance(y, str) else graph.emit(AddScalar(float(y)), x)
    return graph.emit(Comparison(strict=True), total)


def together(graph: Capture, x: str, y: str, constant: float) -> str:
    """x + y + constant."""
    total = graph.emit(Add(), y, x) if graph.is_weight(x) else graph.emit(Add(), x, y)
    return graph.emit(AddScalar(constant), total) if constant else total


def negation(graph: Capture, bit: str) -> str:
    """The opposite of a truth value."""
    op = graph.op(bit)
    if isinstance(op, Comparison):
        return graph.emit(Comparison(not op.strict), graph.emit(MulScalar(-1.0), graph.operands(bit)[0]))
    return graph.emit(AddScalar(1.0), graph.emit(MulScalar(-1.0), bit))


def chosen(graph: Capture, condition: str, x: Any, y: Any) -> str:
    """x where the condition holds, else y: y + condition (x - y)."""
    if not graph.is_truth(condition):
        graph.unsupported("a condition that is no truth value; compare with 0 first")
    if graph.is_weight(condition):
        return _masked(graph, condition, x, y)
    if not isinstance(x, str) and not isinstance(y, str):
        low, high = graph.scalar(y), graph.scalar(x)
        scaled = graph.emit(MulScalar(high - low), condition)
        return graph.emit(AddScalar(low), scaled) if low else scaled
    if not isinstance(x, str):  # swap, so that the scalar is the alternative
        return selected(graph, negation(graph, condition), y, graph.scalar(x))
    return selected(graph, condition, x, y if isinstance(y, str) else graph.scalar(y))


def _masked(graph: Capture, mask: str, x: Any, y: Any) -> str:
    """By a constant mask: mask x + (1 - mask) y."""
    rest = negation(graph, mask)
    parts = []
    for factor, value in ((mask, x), (rest, y)):
        if not isinstance(value, str):
            parts.append(graph.emit(MulScalar(graph.scalar(value)), factor))
        else:
            parts.append(Mul.of(graph, *((factor, value) if graph.is_weight(value) else (value, factor))))
    return together(graph, parts[0], parts[1], 0.0)


def selected(graph: Capture, bit: str, x: str, y: str | float | None) -> str:
    """x where the secret truth value is 1, else y, which is 0 if there is none."""
    op, bit, gain = graph.op(bit), graph.whole_of(bit), x if not y else difference(graph, x, y)
    if graph.is_weight(gain):
        out = Mul.of(graph, bit, gain)
    elif isinstance(op, Comparison):
        out = graph.emit(Selection(op.strict), graph.operands(bit)[0], gain)
    else:
        out = graph.emit(Times(), gain, bit)
    if not y:
        return out
    return together(graph, out, y, 0.0) if isinstance(y, str) else graph.emit(AddScalar(y), out)
