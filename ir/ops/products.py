"""Products of two values that depend on the input, at the model level: element-wise, of matrices, einsum; quotients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.build import MOST_FINE
from tacit.ir.op import Sample, expect
from tacit.ir.ops import bilinear
from tacit.ir.ops.affine import Linear
from tacit.ir.ops.arithmetic import Add, MulScalar
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.masks import finite
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import Expand, Reshape, permuted, reshaped
from tacit.ir.types import Batch, Type, broadcast, dim_at

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Times(ModelOp):
    """x times y, element by element; where both are the same, a square, opened once."""

    name = "model.times"
    batch_anywhere = True

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def infer(self, *args: Type) -> Type:
        shape = broadcast(args[0].shape, args[1].shape)
        expect(isinstance(shape[0], Batch), f"{args[0]} and {args[1]} do not share their batch")
        return Type("real", shape)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * args[1]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        if args[0] == args[1]:
            x = b.as_factor(args[0])
            return b.known(b.emit(bilinear.square(b.types[x].frac), x), low=0.0)
        x, y = (b.as_factor(_of_rank(b, arg, args)) for arg in args)
        return b.emit(bilinear.Times(), x, y)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 3, 7), real(_N, 1, 7))),)


def _of_rank(b: FixedBuilder, x: str, others: tuple[str, ...]) -> str:
    """x with leading dimensions of one element behind the batch, as many as the others have."""
    rank, shape = max(len(b.types[other].shape) for other in others), b.types[x].at(1).dims
    if len(shape) == rank:
        return x
    return b.emit(Reshape((*(1,) * (rank - len(shape)), *shape[1:]), dim_at(b.types[x].shape[0], 1)), x)


@dataclass(frozen=True)
class Quotient(ModelOp):
    """x / y, as a product with the reciprocal of y, whose error is relative; the range of y must not hold 0."""

    name = "model.quotient"
    batch_anywhere = True

    def infer(self, *args: Type) -> Type:
        return Times().infer(*args)

    def wants(self, frac: int) -> int:
        return MOST_FINE

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] / args[1]

    def gain(self, *args: Tensor) -> Tensor:
        return 1 / args[1].abs()

    def expand(self, b: FixedBuilder, *args: str) -> str:
        y = b.as_fine(args[1])
        frac = b.frac + _RECIPROCAL_BITS
        inverse = b.function("reciprocal", y, frac=frac, error=b.max_error, relative=True)
        x = b.as_factor(_of_rank(b, args[0], args))
        return b.emit(bilinear.Times(), x, _of_rank(b, inverse, args))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7), real(_N, 7))),)


# A divisor is larger than 1 more often than not; its reciprocal has so many fractional bits more than activations.
_RECIPROCAL_BITS = 6


@dataclass(frozen=True)
class MatMul(ModelOp):
    """x (N, ..., A, B) times y (N, ..., B, C), with the same leading dimensions."""

    name = "model.matmul"

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] @ args[1]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(bilinear.MatMul(), *(b.as_factor(arg) for arg in args))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 2, 3, 4), real(_N, 2, 4, 5))),)


class MatrixProduct(Layer):
    """matmul, bmm and baddbmm of two activations, or of an activation and a constant matrix on either side."""

    aten = ("aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if "baddbmm" in graph.target:
            if (k["alpha"], k["beta"]) != (1, 1):
                graph.unsupported("baddbmm with factors")
            product, added = cls.of(graph, k["batch1"], k["batch2"]), finite(graph, k["self"])
            first, second = (product, added) if graph.is_weight(added) else (added, product)
            return graph.emit(Add(), first, second)
        return cls.of(graph, k["self"], k["mat2" if "mat2" in k else "other"])

    @staticmethod
    def of(graph: Capture, x: str, y: str) -> str:
        x, y = (_several(graph, line, other) for line, other in ((x, y), (y, x)))
        if graph.is_weight(y):
            return constant_on_the_right(graph, x, y)
        if graph.is_weight(x):
            rank = len(graph.shape(y))
            if len(graph.fixed_shape(x)) != 2 or rank < 3:
                graph.unsupported("a product with a constant that is no matrix")
            turned = [*range(rank - 2), rank - 1, rank - 2]
            left = graph.constant("transposed", graph.value(x).t().contiguous())
            return permuted(graph, constant_on_the_right(graph, permuted(graph, y, turned), left), turned)
        ranks = [len(graph.shape(line)) for line in (x, y)]
        if min(ranks) < 3:
            graph.unsupported("a product of vectors, which takes in the batch; add a dimension, as in x[:, None]")
        if ranks[0] != ranks[1]:
            graph.unsupported("a product of matrices whose leading dimensions differ in number")
        shape = [max(a, b) for a, b in zip(graph.fixed_shape(x)[1:-2], graph.fixed_shape(y)[1:-2], strict=True)]
        for axis, size in enumerate(shape, 1):
            x, y = (
                graph.emit(Expand(axis, size), line) if graph.fixed_shape(line)[axis] != size else line
                for line in (x, y)
            )
        return graph.emit(MatMul(), x, y)


def _several(graph: Capture, x: str, other: str) -> str:
    """A constant of several matrices as a value; anything else as it stands."""
    rank, dims = len(graph.shape(other)), len(graph.fixed_shape(x))
    return graph.valued(x, rank) if graph.is_weight(x) and 3 <= dims <= rank else x


def constant_on_the_right(graph: Capture, x: str, w: str) -> str:
    """x @ W for a constant matrix."""
    value = graph.value(w)
    if value.dim() == 1:
        out = graph.emit(Linear(), x, graph.constant("row", value.reshape(1, -1)))
        return reshaped(graph, out, graph.fixed_shape(out)[1:-1])
    if value.dim() != 2:
        graph.unsupported("a product with a constant that is no matrix")
    return graph.emit(Linear(), x, graph.constant("transposed", value.t().contiguous()))


class Bilinear(Layer):
    """torch.nn.Bilinear: x1 times a matrix for each result, and the scalar products of the rows with x2."""

    aten = ("aten.bilinear.default",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        graph.require_weights(k, "weight", "bias")
        x, y, weight = k["input1"], k["input2"], graph.value(k["weight"])
        out, left, right = weight.shape
        lead = graph.fixed_shape(x)[1:-1]
        rows = graph.constant("rows", weight.permute(0, 2, 1).reshape(out * right, left).contiguous())
        matrix = reshaped(graph, graph.emit(Linear(), x, rows), (*lead, out, right))
        times = MatrixProduct.of(graph, matrix, reshaped(graph, y, (*lead, right, 1)))
        total = reshaped(graph, times, (*lead, out))
        return total if k["bias"] is None else graph.emit(Add(), total, k["bias"])


class Einsum(Layer):
    """einsum of two operands, without ellipses, diagonals, or letters of one operand that are summed alone."""

    aten = ("aten.einsum.default",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        equation, operands = k["equation"].replace(" ", ""), k["tensors"]
        if len(operands) != 2 or "." in equation or "->" not in equation:
            graph.unsupported("an einsum of other than two operands, or one with '...' or without '->'")
        inputs, output = equation.split("->")
        left, right = inputs.split(",")
        if any(len(set(t)) != len(t) for t in (left, right, output)) or set(output) - set(left + right):
            graph.unsupported(f"the einsum '{equation}' takes a diagonal")
        shapes = [graph.fixed_shape(x) for x in operands]
        sizes = {c: n for t, shape in zip((left, right), shapes, strict=True) for c, n in zip(t, shape, strict=True)}
        both = set(left) & set(right)
        summed = [c for c in left if c in both and c not in output]
        if any(c not in both and c not in output for c in left + right) or not summed:
            graph.unsupported(f"the einsum '{equation}' sums over a letter of one operand alone, or over none")
        x, y = operands
        if graph.is_weight(x):
            (x, y), (left, right) = (y, x), (right, left)
        batch = [c for c in left if c in both and c in output]
        rows, columns = ([c for c in t if c not in both] for t in (left, right))
        if graph.is_weight(y):
            if batch[:1] == [left[0]]:  # a constant that the batch repeats is there once
                y = graph.reshaped_weight(
                    y, [n for c, n in zip(right, graph.fixed_shape(y), strict=True) if c != left[0]]
                )
                right, batch = right.replace(left[0], ""), batch[1:]
            if not batch:
                return cls._by_constant(graph, x, y, left, right, output, sizes, (rows, summed, columns))
            y, right, batch = graph.valued(y, len(right) + 1), left[0] + right, [left[0], *batch]
            rows = [c for c in rows if c != left[0]]
        if not batch or left[0] != right[0] or batch[0] != left[0] or output[0] != left[0]:
            graph.unsupported(
                f"in the einsum '{equation}' the batch has to be the first letter of both and of the result"
            )

        def size(letters: list[str]) -> int:
            return math.prod(sizes[c] for c in letters)

        inner = [sizes[c] for c in batch[1:]]
        first = permuted(graph, x, [left.index(c) for c in (*batch, *rows, *summed)])
        second = permuted(graph, y, [right.index(c) for c in (*batch, *summed, *columns)])
        first = reshaped(graph, first, (*inner, size(rows), size(summed)))
        second = reshaped(graph, second, (*inner, size(summed), size(columns)))
        out = graph.emit(MatMul(), first, second)
        found = [*batch, *rows, *columns]
        out = reshaped(graph, out, [sizes[c] for c in found[1:]])
        return permuted(graph, out, [found.index(c) for c in output])

    @staticmethod
    def _by_constant(
        graph: Capture, x: str, y: str, left: str, right: str, output: str, sizes: dict[str, int], groups: Any
    ) -> str:
        rows, summed, columns = groups
        rows = rows if rows[:1] == [left[0]] else [left[0], *rows]
        if output[0] != left[0]:
            graph.unsupported("an einsum with a constant, of which the result has the batch in another place")
        value = graph.value(y).permute([right.index(c) for c in (*columns, *summed)])
        wide = math.prod(sizes[c] for c in columns), math.prod(sizes[c] for c in summed)
        weight = graph.constant("einsum", value.reshape(wide).contiguous())
        line = permuted(graph, x, [left.index(c) for c in (*rows, *summed)])
        line = reshaped(graph, line, (*(sizes[c] for c in rows[1:]), wide[1]))
        found = [*rows, *columns]
        out = reshaped(graph, graph.emit(Linear(), line, weight), [sizes[c] for c in found[1:]])
        return permuted(graph, out, [found.index(c) for c in output])


def product(graph: Capture, x: str, y: str) -> str:
    """x y; as a selection where one of them is the result of a comparison; sign(x) |x| is x.

    Of two factors one may stay whole: the product has the fractional bits of the other, and none to truncate.
    """
    from tacit.ir.ops.compare import Comparison, Sign, selected
    from tacit.ir.ops.known import Absolute

    for bit, value in ((x, y), (y, x)):
        if isinstance(graph.op(bit), Comparison):
            return selected(graph, bit, value, None)
        if isinstance(graph.op(bit), Sign) and isinstance(graph.op(value), Absolute):
            (signed,), (other,) = graph.operands(bit), graph.operands(value)
            if signed == other:
                return signed
    if graph.whole_of(x) != x != y:
        return graph.emit(Times(), graph.whole_of(x), y)
    return graph.emit(Times(), x, y if x == y else graph.whole_of(y))


def quotient(graph: Capture, x: str, y: str) -> str:
    """x / y for a y that depends on the input; by the length of x, as torch.nn.functional.normalize has it."""
    from tacit.ir.ops.activation import Clamp
    from tacit.ir.ops.approximated import Function
    from tacit.ir.ops.arithmetic import Mul
    from tacit.ir.ops.norms import SumOfSquares, UnitLength

    if graph.is_weight(x):
        inverse = graph.emit(Function("reciprocal"), y)
        value = graph.value(x)
        return graph.emit(MulScalar(float(value)), inverse) if value.dim() == 0 else graph.emit(Mul(), inverse, x)
    source = y
    while isinstance(graph.op(source), (Expand, Reshape)):
        (source,) = graph.operands(source)
    clamp, eps = graph.op(source), 0.0
    if isinstance(clamp, Clamp) and clamp.high == math.inf and clamp.low > 0:
        eps, (source,) = clamp.low, graph.operands(source)
    root = graph.op(source)
    if isinstance(root, Function) and root.function == "sqrt":
        (squares,) = graph.operands(source)
        op = graph.op(squares)
        if isinstance(op, SumOfSquares) and graph.operands(squares) == (x,) and eps > 0:
            return graph.emit(UnitLength(op.over, eps), x)
    return graph.emit(Quotient(), x, y)
