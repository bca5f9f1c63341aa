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
# Their squares have twice as many; sums of those have to fit the ring.
_MOST_BITS = 18
# Fractional bits of vectors up to which short ones are told apart: the polynomials of a root reach over 36 bits or so.
_TOLD_APART = 13
# How far below eps the sum of squares is still resolved.
_BELOW_EPS = 10


def centred(b: FixedBuilder, x: str, axes: tuple[int, ...]) -> str:
    """x less its mean along axes, with a few bits more than activations."""
    x = b.as_factor(x)
    count = local.Sum(axes).count(b.types[x].at(1).dims)
    bits = b.weight_frac + math.ceil(math.log2(count)) if count & (count - 1) else int(math.log2(count))
    total = b.emit(local.Sum(axes), x)
    mean = b.emit(local.MulPublic(round(2**bits / count), bits), total) if bits else total
    return b.at_precision(b.minus(x, mean), max(b.frac, min(b.frac + _EXTRA, _MOST_BITS)))


def sum_of_squares(b: FixedBuilder, x: str, axes: tuple[int, ...], frac: int) -> str:
    """Of x along axes, with at most `frac` fractional bits; never negative."""
    squares = b.emit(square(b.types[x].frac), x)
    return b.known(b.at_precision(b.emit(local.Sum(axes), squares), frac), low=0.0)


def normalised(b: FixedBuilder, x: str, axes: tuple[int, ...], count: float, eps: float) -> str:
    """x / sqrt(sum of squares / count + eps).

    An eps below (4 units of x)^2 is taken as that: x is known no better. Units finer than 2^-13 count as that.
    """
    eps = max(eps, 2.0 ** (4 - 2 * min(b.frac, _TOLD_APART)))
    resolved = math.ceil(-math.log2(eps * count)) + _BELOW_EPS
    squares = sum_of_squares(b, x, axes, max(b.frac, min(resolved, 2 * _TOLD_APART)))
    factor = b.function(
        "rsqrt_of_mean",
        squares,
        (float(count), eps),
        frac=b.frac + _EXTRA_FACTOR,
        error=b.max_error / 2,
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

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = centred(b, args[0], self.over)
        return normalised(b, x, self.over, local.Sum(self.over).count(b.types[x].at(1).dims), self.eps)

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
        x = centred(b, args[0], self.over)
        count = local.Sum(self.over).count(b.types[x].at(1).dims) - self.correction
        total = sum_of_squares(b, x, self.over, b.frac + _EXTRA)
        bits = b.weight_frac + math.ceil(math.log2(max(count, 1)))
        return b.at_activation_scale(b.emit(local.MulPublic(b.constant(1 / count, bits), bits), total))

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
