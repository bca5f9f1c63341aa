"""Norms by the statistics of their own input: layer, group and instance norm, variances, lengths of vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.op import Sample
from tacit.ir.ops import local
from tacit.ir.ops.approximated import Function
from tacit.ir.ops.arithmetic import Add, Mul, SumAlong
from tacit.ir.ops.bilinear import Times, square
from tacit.ir.ops.layer import WHOLE, Layer, real
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import reshaped
from tacit.ir.types import Batch

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()
# Fractional bits that differences from a mean, and what they are multiplied with, have more than activations.
_EXTRA, _EXTRA_FACTOR = 4, 6
# Squares have twice as many, and sums of those have to fit the ring; so does a small difference times a large factor.
_MOST_BITS = 18
# Fractional bits of a sum of squares, less those of their number, that fit the ring beside values of 2^8; but as many
# bits of what is squared are kept in any case.
_MOST_SQUARED_BITS, _LEAST_FACTOR_BITS = 46, 16
# Fractional bits of sums of squares that are left, and the least mean of squares that is told from less: the
# polynomials of a root reach over 36 bits or so.
_LEAST_MEAN = 2.0**-22
_LEAST_SUM_BITS, _MOST_SUM_BITS = 12, 26
# To what the factor is approximated at least, unless less is asked for: alike for all elements, it scales the result.
_FACTOR_ERROR = 2.0**-11
# How far below eps the sum of squares is still resolved.
_BELOW_EPS = 8
# Fractional bits of count x: values of 2^18 and more still fit the ring beside them.
_MOST_FINE_BITS = 44


def centred(b: FixedBuilder, x: str, axes: tuple[int, ...]) -> tuple[str, float]:
    """x less its mean along axes, times a factor from 1 up to 2 that is told; a few bits more than activations.

    count x - sum(x) is exact, and 0 where all elements are equal, however x would have been rounded; a truncation
    keeps 0. The largest power of two in the count joins the scale, the rest is the factor. So x is not truncated
    before, unless it has so many bits that count x would not fit the ring.
    """
    count = local.Sum(axes).count(b.types[x].at(1).dims)
    bits = count.bit_length() - 1
    x = b.at_precision(x, max(b.frac, _MOST_FINE_BITS - bits))
    total = b.emit(local.MulPublic(1, bits), b.emit(local.Sum(axes), x)) if bits else b.emit(local.Sum(axes), x)
    apart = b.minus(b.emit(local.MulPublic(count, bits), x) if bits else x, total)
    return b.at_precision(apart, max(b.frac, min(b.frac + _EXTRA, _MOST_BITS))), count / 2.0**bits


def sum_of_squares(b: FixedBuilder, x: str, axes: tuple[int, ...], frac: int) -> str:
    """Of x along axes, with at most `frac` fractional bits; never negative."""
    count = local.Sum(axes).count(b.types[x].at(1).dims)
    x = b.at_precision(x, max(_LEAST_FACTOR_BITS, (_MOST_SQUARED_BITS - count.bit_length()) // 2))
    squares = b.emit(square(b.types[x].frac), x)
    return b.known(b.at_precision(b.emit(local.Sum(axes), squares), frac), low=0.0)


def normalised(b: FixedBuilder, x: str, axes: tuple[int, ...], count: float, eps: float) -> str:
    """x / sqrt(sum of squares / count + eps).

    Where eps is less, a mean below (4 units of x)^2 is taken as that, because x is known no better; below 2^-22 it is
    taken as that in any case.
    """
    floor = count * max(2.0 ** (4 - 2 * b.frac), _LEAST_MEAN)
    resolved = math.ceil(-math.log2(max(eps * count, floor))) + _BELOW_EPS
    bits = max(min(b.frac, _LEAST_SUM_BITS), min(resolved, _MOST_SUM_BITS))
    squares = sum_of_squares(b, x, axes, bits)
    factor = b.function(
        "rsqrt_of_mean",
        squares,
        (float(count), eps, floor) if floor > eps * count else (float(count), eps),
        frac=max(b.frac, min(b.frac + _EXTRA_FACTOR, _MOST_BITS)),
        error=max(b.max_error / 2, min(b.max_error, _FACTOR_ERROR)),
        relative=True,
    )
    out = b.emit(Times(), x, factor)
    # |x| <= sqrt(sum of squares), up to the errors of the factor and of the sum: Cauchy-Schwarz.
    reach = math.sqrt(count) * 2.0 ** b.types[out].frac * 17 / 16
    return b.known(out, low=-reach, high=reach)


@dataclass(frozen=True)
class Normalise(ModelOp):
    """(x - mean) / sqrt(variance + eps) along axes."""

    name = "model.normalise"
    batch_anywhere = True

    over: tuple[int, ...]
    eps: float

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        variance, mean = torch.var_mean(args[0], self.over, correction=0, keepdim=True)
        return (args[0] - mean) * torch.rsqrt(variance + self.eps)

    def gain(self, *args: Tensor) -> Tensor:
        return torch.rsqrt(torch.var(args[0], self.over, correction=0, keepdim=True) + self.eps)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        """Of c (x - mean) and c^2 eps, which is the same."""
        x, factor = centred(b, args[0], self.over)
        count = local.Sum(self.over).count(b.types[x].at(1).dims)
        return normalised(b, x, self.over, count, self.eps * factor**2)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls((1,), 1e-5), (real(_N, 7),)), Sample(cls((2, 3), 1e-5), (real(_N, 3, 2, 4),))


@dataclass(frozen=True)
class UnitLength(ModelOp):
    """x / max(|x|, eps) along axes, up to the rounding of very short vectors: torch.nn.functional.normalize."""

    name = "model.unit_length"
    batch_anywhere = True

    over: tuple[int, ...]
    eps: float

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(args[0], dim=self.over, keepdim=True)
        return args[0] / length.clamp(min=self.eps)

    def gain(self, *args: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(args[0], dim=self.over, keepdim=True)
        return 1 / length.clamp(min=self.eps)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = b.as_factor(args[0])
        return normalised(b, x, self.over, 1.0, self.eps**2)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1,), 1e-6), (real(_N, 7),)),)


@dataclass(frozen=True)
class Variance(ModelOp):
    """The mean of squares about the mean along axes, which stay; the divisor is the count less a correction."""

    name = "model.variance"
    batch_anywhere = True

    over: tuple[int, ...]
    correction: float = 1.0

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        found: Tensor = torch.var(args[0], self.over, correction=self.correction, keepdim=True)
        return found

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x, factor = centred(b, args[0], self.over)
        count = local.Sum(self.over).count(b.types[x].at(1).dims) - self.correction
        total = sum_of_squares(b, x, self.over, b.frac + _EXTRA)
        bits = b.weight_frac + math.ceil(math.log2(max(count, 1)))
        share = b.constant(1 / (count * factor**2), bits)
        return b.at_activation_scale(b.emit(local.MulPublic(share, bits), total))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1,)), (real(_N, 7),)),)


@dataclass(frozen=True)
class SumOfSquares(ModelOp):
    """Along axes, which stay; never negative."""

    name = "model.sum_of_squares"
    batch_anywhere = True

    over: tuple[int, ...]

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] ** 2).sum(self.over, keepdim=True)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.at_activation_scale(sum_of_squares(b, b.as_factor(args[0]), self.over, b.frac + _EXTRA))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1,)), (real(_N, 7),)),)


class LayerNorm(Layer):
    """torch.nn.LayerNorm and RMSNorm; of the three results that a decomposition has, the first."""

    aten = ("aten.layer_norm.default", "aten.native_layer_norm.default", "aten.rms_norm.default")
    batch_anywhere = True
    own_shapes = ("weight", "bias")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str | list[str]:
        graph.require_weights(k, "weight", "bias")
        x = k["input"]
        rank = len(graph.shape(x))
        over = tuple(range(rank - len(k["normalized_shape"]), rank))
        if "rms" in graph.target:
            eps = torch.finfo(torch.float32).eps if k["eps"] is None else k["eps"]
            out = graph.emit(RootMeanSquare(over, eps), x)
        else:
            out = graph.emit(Normalise(over, k["eps"]), x)
        out = affine(graph, out, k.get("weight"), k.get("bias"))
        return [out] if "native" in graph.target else out


@dataclass(frozen=True)
class RootMeanSquare(ModelOp):
    """x / sqrt(mean of squares + eps) along axes."""

    name = "model.rms_normalise"
    batch_anywhere = True

    over: tuple[int, ...]
    eps: float

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * torch.rsqrt((args[0] ** 2).mean(self.over, keepdim=True) + self.eps)

    def gain(self, *args: Tensor) -> Tensor:
        return torch.rsqrt((args[0] ** 2).mean(self.over, keepdim=True) + self.eps)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = b.as_factor(args[0])
        return normalised(b, x, self.over, local.Sum(self.over).count(b.types[x].at(1).dims), self.eps)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1,), 1e-5), (real(_N, 7),)),)


class GroupNorm(Layer):
    """torch.nn.GroupNorm, and InstanceNorm by the statistics of its input: a group for every channel."""

    aten = ("aten.group_norm.default",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        graph.require_weights(k, "weight", "bias")
        return cls.of(graph, k["input"], k["num_groups"], k["weight"], k["bias"], k["eps"])

    @staticmethod
    def of(graph: Capture, x: str, groups: int, weight: str | None, bias: str | None, eps: float) -> str:
        shape = graph.fixed_shape(x)[1:]
        grouped = reshaped(graph, x, (groups, math.prod(shape) // groups))
        out = reshaped(graph, graph.emit(Normalise((2,), eps), grouped), shape)
        wide = (-1, *(1,) * (len(shape) - 1))
        weight, bias = (w and graph.reshaped_weight(w, wide) for w in (weight, bias))
        return affine(graph, out, weight, bias)


def affine(graph: Capture, x: str, weight: str | None, bias: str | None) -> str:
    """x weight + bias."""
    x = graph.emit(Mul(), x, weight) if weight is not None else x
    return graph.emit(Add(), x, bias) if bias is not None else x


class VarianceAlong(Layer):
    """var, std, var_mean and std_mean along dimensions, with any correction."""

    aten = tuple(
        f"aten.{name}.{kind}" for name in ("var", "std", "var_mean", "std_mean") for kind in ("dim", "correction")
    )
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str | list[str]:
        if k["dim"] is None or k["dim"] == []:
            graph.unsupported(WHOLE)
        over, name = tuple(sorted(k["dim"])), graph.target.split(".")[1]
        correction = (
            float(k["unbiased"]) if "unbiased" in k else graph.scalar(1 if k["correction"] is None else k["correction"])
        )
        out = graph.emit(Variance(over, correction), k["self"])
        if name.startswith("std"):
            out = graph.emit(Function("sqrt"), out)
        found = [out]
        if name.endswith("mean"):
            found.append(graph.emit(SumAlong(over, True), k["self"]))
        if not k["keepdim"]:
            left = [d for i, d in enumerate(graph.fixed_shape(k["self"])) if i and i not in over]
            found = [reshaped(graph, line, left) for line in found]
        return found if name.endswith("mean") else found[0]


class VectorNorm(Layer):
    """The Euclidean length along dimensions."""

    aten = ("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        order = k.get("ord", k.get("p"))
        if k["dim"] is None or k["dim"] == []:
            graph.unsupported(WHOLE)
        if order not in (2, 2.0, None):
            graph.unsupported(f"a norm of order {order}; the Euclidean one, of order 2, is supported")
        dims = k["dim"] if isinstance(k["dim"], list) else [k["dim"]]
        over = tuple(sorted(dims))
        out = graph.emit(Function("sqrt"), graph.emit(SumOfSquares(over), k["self"]))
        left = [d for i, d in enumerate(graph.fixed_shape(k["self"])) if i and i not in over]
        return out if k["keepdim"] else reshaped(graph, out, left)


class CosineSimilarity(Layer):
    """The scalar product of two vectors of length 1."""

    aten = ("aten.cosine_similarity.default",)
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.products import product

        if graph.is_weight(k["x1"]) or graph.is_weight(k["x2"]):
            graph.unsupported("the similarity to a constant; divide it by its length and use a linear layer")
        x, y = (graph.emit(UnitLength((k["dim"],), graph.scalar(k["eps"])), k[key]) for key in ("x1", "x2"))
        out = graph.emit(SumAlong((k["dim"],)), product(graph, x, y))
        left = [d for i, d in enumerate(graph.fixed_shape(out)) if i and i != k["dim"]]
        return reshaped(graph, out, left)
