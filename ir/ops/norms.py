"""Norms by the statistics of their own input: layer, group and instance norm, variances, lengths of vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.build import MOST_FINE, fine_enough
from tacit.ir.op import Sample
from tacit.ir.ops import choice, local
from tacit.ir.ops.approximated import Function
from tacit.ir.ops.arithmetic import Add, Mul, MulScalar, SumAlong
from tacit.ir.ops.bilinear import SquaresModulo, Times, square
from tacit.ir.ops.layer import WHOLE, Layer, real
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import reshaped
from tacit.ir.types import Batch

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()
# Fractional bits of a sum of squares, less those of their number, that fit the ring beside values of 2^8; but as many
# bits of what is squared are kept in any case.
_MOST_SQUARED_BITS, _LEAST_FACTOR_BITS, _LEAST_SQUARED_BITS = 46, 16, 6
# Fractional bits of variances, above those of activations.
_EXTRA = 4
# Of what x is multiplied with: 2^-8 to three digits. Less those, x may have as many as its norm has room for.
_FACTOR_BITS, _PRODUCT_BITS = 20, 60
# To what that is approximated at least, unless less is asked for: alike for all elements, it scales the result.
_FACTOR_ERROR = 2.0**-11
# Fractional bits of sums of squares that are left, and the least mean of squares that is told from less: the
# polynomials of a root reach over 36 bits or so.
_LEAST_SUM_BITS, _MOST_SUM_BITS, _LEAST_MEAN = 12, 26, 2.0**-22
# How far below eps the sum of squares is still resolved.
_BELOW_EPS = 8
# Where eps lies below that, rows with a mean below 2^-16 are looked at in another form: x with 28 fractional bits, of
# which the squares would not fit for other rows, and their sum with up to 49, less those of their number.
_SMALL_MEAN, _SMALL_BITS, _SMALL_SUM_BITS = 2.0**-16, 28, 49
# By how many bits those have to be more than the ones that are squared in any case.
_WORTH_IT = 3
# How many bits of what x should be known to may be missing where it is squared: the errors of many are averaged.
_BLURRED = 9


def centred(b: FixedBuilder, x: str, axes: tuple[int, ...]) -> tuple[str, float]:
    """x less its mean along axes, times a factor from 1 up to 2 that is told; with all the bits that there are.

    count x - sum(x) is exact, and 0 where all elements are equal, however x would have been rounded; a truncation
    keeps 0. The largest power of two in the count joins the scale, the rest is the factor. So x is not truncated
    before, unless it has so many bits that count x would not fit the ring.
    """
    count = local.Sum(axes).count(b.types[x].at(1).dims)
    bits = count.bit_length() - 1
    room = math.ceil(math.log2(max(2 * b.reach(x), 1.0))) + bits
    x = b.at_precision(x, max(b.frac, _PRODUCT_BITS - bits - room))
    total = b.emit(local.MulPublic(1, bits), b.emit(local.Sum(axes), x)) if bits else b.emit(local.Sum(axes), x)
    apart = b.minus(b.emit(local.MulPublic(count, bits), x) if bits else x, total)
    return apart, count / 2.0**bits


def sum_of_squares(b: FixedBuilder, x: str, axes: tuple[int, ...], reach: float, frac: int) -> str:
    """Of x, which may be as large as its reach, along axes, with at most `frac` fractional bits; never negative."""
    return b.at_precision(_all_bits(b, x, axes, reach), frac)


def _all_bits(b: FixedBuilder, x: str, axes: tuple[int, ...], reach: float) -> str:
    """The sum of squares as it comes, of x with as many bits as fit; never negative."""
    x = b.at_precision(x, _squared_bits(b, x, axes, reach))
    squares = b.emit(square(b.types[x].frac), x)
    return b.known(b.emit(local.Sum(axes), squares), low=0.0)


def _squared_bits(b: FixedBuilder, x: str, axes: tuple[int, ...], reach: float) -> int:
    count = local.Sum(axes).count(b.types[x].at(1).dims)
    usual = max(_LEAST_FACTOR_BITS, (_MOST_SQUARED_BITS - count.bit_length()) // 2)
    whole = 2 * math.ceil(math.log2(max(reach, 1.0))) + count.bit_length()
    return max(_LEAST_SQUARED_BITS, min(usual, (_PRODUCT_BITS - whole) // 2))


@dataclass(frozen=True)
class _Inverse:
    """What a vector is multiplied with, as a function of the sum of its squares.

    kind "mean": 1 / sqrt(sum / count + eps). "length": 1 / max(sqrt(sum), eps). "added": 1 / (sqrt(sum) + eps).
    """

    kind: str
    eps: float
    count: float = 1.0

    @property
    def least(self) -> float:
        """The sum of squares below which eps rules: a root is still seen beside an eps that is larger."""
        if self.kind == "mean":
            return self.eps * self.count
        return self.eps**2 * (2.0**-14 if self.kind == "added" else 1.0)

    def smallest(self, gain: float) -> float:
        """The least sum of squares that matters, where the factor does not become larger than that."""
        return max(self.least, self.count / gain**2)

    def of(self, b: FixedBuilder, squares: str, floor: float, gap: float | None = None) -> str:
        """The function of a line, with the sum taken as `floor` where it is less; 0 where it lies below -gap / 2."""
        parameters: tuple[float, ...]
        if self.kind == "added":
            name, parameters = "inverse_length", (self.eps, floor)
        elif self.kind == "length":
            name, parameters = "rsqrt_of_mean", (1.0, 0.0, max(floor, self.least))
        else:
            name, parameters = "rsqrt_of_mean", (float(self.count), self.eps, floor)
        if gap is not None:
            name, parameters = f"{name}_or_none", (*parameters, gap)
        error = max(b.max_error / 2, min(b.max_error, _FACTOR_ERROR))
        return b.function(name, squares, parameters, frac=_FACTOR_BITS, error=error, relative=True)


def normalised(b: FixedBuilder, x: str, axes: tuple[int, ...], reach: float, inverse: _Inverse) -> str:
    """x, which may be as large as its reach, times a function of the sum of its squares along axes.

    A sum below that of (4 units of x)^2 is taken as that, because x is known no better.
    """
    count = local.Sum(axes).count(b.types[x].at(1).dims)
    least = inverse.smallest(b.gain)
    whole, most = x, max(b.frac, _PRODUCT_BITS - _FACTOR_BITS - 1 - math.ceil(math.log2(count) / 2))
    squared, needed = _squared_bits(b, x, axes, reach), fine_enough(math.sqrt(least / count))
    # Without a truncation of its own where that has few enough bits, or where as many as are squared do.
    x = b.at_precision(whole, squared if needed <= squared + _WORTH_IT and b.types[x].frac > most else most)
    fine = min(b.types[x].frac, _SMALL_BITS)
    small_rows = needed > min(fine_enough(math.sqrt(_SMALL_MEAN)), squared + _BLURRED)
    if small_rows and least < inverse.count * _LEAST_MEAN and fine > squared + _WORTH_IT:
        x = b.at_precision(whole, fine)
        factor = _by_size(b, whole, x, axes, reach, inverse)
    else:
        known = inverse.count * 2.0 ** (4 - 2 * fine)
        floor = max(known, min(inverse.count * _LEAST_MEAN, least * 2.0**-_BELOW_EPS))
        resolved = math.ceil(-math.log2(max(least, floor))) + _BELOW_EPS
        bits = max(min(b.frac, _LEAST_SUM_BITS), min(resolved, _MOST_SUM_BITS))
        factor = inverse.of(b, sum_of_squares(b, whole, axes, reach, bits), floor)
    out = b.emit(Times(), x, factor)
    # |x| <= sqrt(sum of squares), up to the errors of the factor and of the sum: Cauchy-Schwarz.
    reach = math.sqrt(inverse.count) * 2.0 ** b.types[out].frac * 17 / 16
    return b.known(out, low=-reach, high=reach)


def _by_size(b: FixedBuilder, whole: str, x: str, axes: tuple[int, ...], reach: float, inverse: _Inverse) -> str:
    """The factor of rows of any size: of small ones from all bits of x, whose squares would not fit for large ones.

    whole: the same values as they came, of which fewer bits are squared in any case.

    One comparison tells which a row is. The sum of squares that does not count becomes a number well below 0, of which
    the function is 0: so the two are added up, and no second choice is needed.
    """
    large, frac = _all_bits(b, whole, axes, reach), 2 * b.types[x].frac
    limit = inverse.count * _SMALL_MEAN
    edge, gap = b.constant(limit, b.types[large].frac), b.constant(limit, frac)
    small_row = b.emit(local.AddPublic(edge), b.emit(local.MulPublic(-1), large))
    large_row = b.emit(local.AddPublic(-edge - 1), large)
    chosen = b.emit(choice.FixedChoose(), small_row, b.emit(SquaresModulo(axes, gap), x))
    chosen = b.known(chosen, low=0.0, high=4.0 * gap)  # of a sum up to twice the limit: `large` is rounded
    bits = _SMALL_SUM_BITS - math.ceil(math.log2(inverse.count))
    chosen = b.at_precision(b.emit(local.AddPublic(-gap), chosen), bits)
    small = inverse.of(b, chosen, inverse.count * 2.0 ** (4 - frac), limit)
    rest = b.emit(choice.FixedChoose(), large_row, b.emit(local.AddPublic(edge), large))
    rest = b.at_precision(b.emit(local.AddPublic(-edge), rest), _MOST_SUM_BITS)
    return b.plus(small, inverse.of(b, rest, limit, limit))


@dataclass(frozen=True)
class Normalise(ModelOp):
    """(x - mean) / sqrt(variance + eps) along axes; or (x - mean) / (sqrt(variance) + eps)."""

    name = "model.normalise"
    batch_anywhere = True

    over: tuple[int, ...]
    eps: float
    added: bool = False

    def wants(self, frac: int) -> int:
        return fine_enough(self.eps if self.added else math.sqrt(self.eps), frac)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] - args[0].mean(self.over, keepdim=True)) * self.gain(*args)

    def gain(self, *args: Tensor) -> Tensor:
        variance = torch.var(args[0], self.over, correction=0, keepdim=True)
        return 1 / (variance.sqrt() + self.eps) if self.added else torch.rsqrt(variance + self.eps)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        """Of c (x - mean) and c^2 eps, which is the same."""
        reach = 4 * b.reach(args[0])
        x, factor = centred(b, args[0], self.over)
        count = local.Sum(self.over).count(b.types[x].at(1).dims)
        if not self.added:
            return normalised(b, x, self.over, reach, _Inverse("mean", self.eps * factor**2, count))
        eps = self.eps * factor * math.sqrt(count)
        out = normalised(b, x, self.over, reach, _Inverse("added", eps))
        return MulScalar(math.sqrt(count)).expand(b, out)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls((1,), 1e-5), (real(_N, 7),)), Sample(cls((2, 3), 1e-5, True), (real(_N, 3, 2, 4),))


@dataclass(frozen=True)
class UnitLength(ModelOp):
    """x / max(|x|, eps) along axes, as torch.nn.functional.normalize has it, or x / (|x| + eps)."""

    name = "model.unit_length"
    batch_anywhere = True

    over: tuple[int, ...]
    eps: float
    added: bool = False

    def wants(self, frac: int) -> int:
        return fine_enough(self.eps, frac)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * self.gain(*args)

    def gain(self, *args: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(args[0], dim=self.over, keepdim=True)
        return 1 / (length + self.eps if self.added else length.clamp(min=self.eps))

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return normalised(
            b, args[0], self.over, b.reach(args[0]), _Inverse("added" if self.added else "length", self.eps)
        )

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls((1,), 1e-6, added), (real(_N, 7),)) for added in (False, True))


@dataclass(frozen=True)
class Variance(ModelOp):
    """The mean of squares about the mean along axes, which stay; the divisor is the count less a correction."""

    name = "model.variance"
    batch_anywhere = True

    over: tuple[int, ...]
    correction: float = 1.0

    def wants(self, frac: int) -> int:
        return frac and MOST_FINE

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        found: Tensor = torch.var(args[0], self.over, correction=self.correction, keepdim=True)
        return found

    def expand(self, b: FixedBuilder, *args: str) -> str:
        reach = 4 * b.reach(args[0])
        x, factor = centred(b, args[0], self.over)
        count = local.Sum(self.over).count(b.types[x].at(1).dims) - self.correction
        total = sum_of_squares(b, x, self.over, reach, b.frac + _EXTRA)
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

    def wants(self, frac: int) -> int:
        return frac and MOST_FINE

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] ** 2).sum(self.over, keepdim=True)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        reach = b.reach(args[0])
        return b.at_activation_scale(sum_of_squares(b, b.as_factor(args[0]), self.over, reach, b.frac + _EXTRA))

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

    def wants(self, frac: int) -> int:
        return fine_enough(math.sqrt(self.eps), frac)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * torch.rsqrt((args[0] ** 2).mean(self.over, keepdim=True) + self.eps)

    def gain(self, *args: Tensor) -> Tensor:
        return torch.rsqrt((args[0] ** 2).mean(self.over, keepdim=True) + self.eps)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        count = local.Sum(self.over).count(b.types[args[0]].at(1).dims)
        return normalised(b, args[0], self.over, b.reach(args[0]), _Inverse("mean", self.eps, count))

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
