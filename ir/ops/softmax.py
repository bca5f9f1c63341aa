"""softmax, log_softmax and attention: the maximum, exp, and the reciprocal of a sum.

What is subtracted before exp need not be the maximum, only near it: comparisons look at few bits. The sum is then
between about 1 and e n, and its reciprocal is accurate to a relative error. Attention divides after the product with
the values: by as many numbers as there are rows, not entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.op import Sample, expect
from tacit.ir.ops import local
from tacit.ir.ops.arithmetic import Add, AddScalar, MulScalar
from tacit.ir.ops.bilinear import MatMul, Times
from tacit.ir.ops.known import WithinHull
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.masks import MASKED
from tacit.ir.ops.model import AsReal, ModelOp
from tacit.ir.ops.moves import Permute, Reshape, reshaped
from tacit.ir.ops.nonlinear import FixedMaxPool2d
from tacit.ir.types import Batch, Type, dim_at

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()
# Sums of exp, reciprocals and probabilities have so many bits more than activations.
_EXTRA = 4


def exponentials(b: FixedBuilder, x: str, axis: int) -> tuple[str, str, str]:
    """x - m for a common m of each row, its exp, and the sum of exp, all at a scale of their own.

    m is one of the row, at most 1/2 below its maximum, so that the sum is at least 1 but for the error of exp.
    """
    x = b.at_activation_scale(x)
    shape = b.types[x].at(1).dims
    count, one = shape[axis], 2.0**b.frac
    shifted = b.minus(x, _near_maximum(b, x, axis))
    shifted = b.known(shifted, high=one / 2)
    # All errors of a row, which may go the same way, stay below 1/16 of its sum: what `known` and `WithinHull` claim.
    error = min(b.max_error / 8, 1 / (32 * count))
    e = b.function("exp", shifted, frac=max(b.frac + _EXTRA, 6 + math.ceil(math.log2(count))), error=error)
    total = b.emit(local.Sum((axis,)), e)
    unit = 2.0 ** b.types[e].frac
    return shifted, e, b.known(total, low=0.75 * unit, high=(1.7 * count + 1) * unit)


def _near_maximum(b: FixedBuilder, x: str, axis: int) -> str:
    """An element of each row, at most 1/2 below its largest: differences of less than a step may go either way."""
    batch, shape = dim_at(b.types[x].shape[0], 1), b.types[x].at(1).dims[1:]
    before, count, after = math.prod(shape[: axis - 1]), shape[axis - 1], math.prod(shape[axis:])
    levels = max(1, math.ceil(math.log2(count)))
    drop = max(0, b.frac - 1 - math.ceil(math.log2(levels)))
    image = b.emit(Reshape((before, count, after), batch), x)
    best = b.emit(FixedMaxPool2d((count, 1), (count, 1), drop=drop), image)
    return b.emit(Reshape((*shape[: axis - 1], 1, *shape[axis:]), batch), best)


def inverse(b: FixedBuilder, total: str, count: int) -> str:
    """1 / total for the sum of `count` exponentials, with enough bits to be accurate when it is small."""
    frac = b.frac + _EXTRA + math.ceil(math.log2(count))
    return b.function("reciprocal", total, frac=frac, error=b.max_error / 4, relative=True)


@dataclass(frozen=True)
class Softmax(ModelOp):
    """torch.nn.Softmax and LogSoftmax along a dimension other than the batch."""

    name = "model.softmax"
    aten = (
        "aten.softmax.int",
        "aten.log_softmax.int",
        "aten._softmax.default",
        "aten._log_softmax.default",
        "aten._safe_softmax.default",
    )
    axes = ("dim",)
    batch_anywhere = True

    dim: int
    log: bool = False

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return graph.emit(cls(k["dim"], "log" in graph.target), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (F.log_softmax if self.log else F.softmax)(args[0], self.dim)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        shifted, e, total = exponentials(b, args[0], self.dim)
        if self.log:
            return b.minus(shifted, b.function("log", total))
        count = b.types[e].at(1).dims[self.dim]
        out = b.emit(Times(), e, inverse(b, total, count))
        unit = 2.0 ** b.types[out].frac
        return b.at_precision(b.known(out, low=-unit / 16, high=unit * 17 / 16), b.frac + _EXTRA)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls(1), (real(_N, 7),)), Sample(cls(2, True), (real(_N, 3, 5),))


@dataclass(frozen=True)
class LogSumExp(ModelOp):
    """torch.logsumexp along a dimension, which stays: the maximum, nearly, and the log of the sum above it."""

    name = "model.log_sum_exp"
    batch_anywhere = True

    dim: int

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return torch.logsumexp(args[0], self.dim, keepdim=True)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = b.at_activation_scale(args[0])
        _, _, total = exponentials(b, x, self.dim)
        return b.plus(b.function("log", total), _near_maximum(b, x, self.dim))  # the one that was subtracted

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(1), (real(_N, 7),)),)


class LogSumExpAlong(Layer):
    """torch.logsumexp along any dimensions."""

    aten = ("aten.logsumexp.default",)
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        out = k["self"]
        for dim in k["dim"]:
            out = graph.emit(LogSumExp(dim), out)
        left = [size for i, size in enumerate(graph.fixed_shape(out)) if i and i not in k["dim"]]
        return out if k["keepdim"] else reshaped(graph, out, left)


@dataclass(frozen=True)
class Attention(ModelOp):
    """softmax(scale q k^T + mask) v, for q (N, ..., L, E), k (N, ..., S, E), v (N, ..., S, F), a mask or none."""

    name = "model.attention"

    scale: float

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        q, k, v, *mask = args
        scores = q @ k.transpose(-1, -2) * self.scale
        return F.softmax(scores + mask[0] if mask else scores, -1) @ v

    def infer(self, *args: Type) -> Type:
        expect(len(args) in (3, 4) and len({len(x.shape) for x in args[:3]}) == 1, "it takes q, k, v and maybe a mask")
        return super().infer(*args)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        q, k, v, *mask = args
        rank = len(b.types[q].shape)
        turned = b.emit(Permute((*range(rank - 2), rank - 1, rank - 2)), b.as_factor(k))
        scores = b.emit(MatMul(), b.as_factor(MulScalar(self.scale).expand(b, q)), turned)
        if mask:
            scores = Add().expand(b, scores, mask[0])
        _, e, total = exponentials(b, scores, rank - 1)
        v = b.as_factor(v)
        sums = b.at_precision(b.emit(MatMul(), e, v), max(b.frac, b.types[v].frac))
        out = b.emit(Times(), sums, inverse(b, total, b.types[e].at(1).dims[-1]))
        return b.emit(WithinHull(b.types[out].frac - b.types[v].frac), out, v)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        q, k, v = real(_N, 2, 5, 4), real(_N, 2, 3, 4), real(_N, 2, 3, 6)
        masks = real(5, 3), real(_N, 1, 1, 3)
        return Sample(cls(0.5), (q, k, v)), *(Sample(cls(0.3), (q, k, v, mask)) for mask in masks)


class ScaledDotProductAttention(Layer):
    """torch.nn.functional.scaled_dot_product_attention in evaluation, with a mask or a causal one."""

    aten = ("aten.scaled_dot_product_attention.default",)
    choosers = ("attn_mask",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if k["dropout_p"]:
            graph.unsupported("attention with dropout_p above 0; pass 0 in evaluation: `p if self.training else 0.0`")
        if k.get("enable_gqa"):
            graph.unsupported("attention with grouped queries; repeat keys and values for each group")
        q, key, v = k["query"], k["key"], k["value"]
        rank = max(len(graph.shape(x)) for x in (q, key, v))
        q, key, v = (graph.valued(x, rank) if graph.is_weight(x) else x for x in (q, key, v))
        scale = graph.scalar(k["scale"]) if k["scale"] else graph.fixed_shape(q)[-1] ** -0.5
        mask = k["attn_mask"]
        if k["is_causal"]:
            rows, columns = graph.fixed_shape(q)[-2], graph.fixed_shape(key)[-2]
            mask = graph.constant("causal_mask", torch.full((rows, columns), MASKED).triu(1))
        elif mask is not None:
            mask = constant_mask(graph, mask) if graph.is_weight(mask) else cls._secret(graph, mask)
        return graph.emit(Attention(scale), q, key, v, *([] if mask is None else [mask]))

    @staticmethod
    def _secret(graph: Capture, mask: str) -> str:
        """A mask that depends on the input, as a summand."""
        if not graph.is_truth(mask):
            return mask
        return graph.emit(AddScalar(MASKED), graph.emit(MulScalar(-MASKED), graph.emit(AsReal(), mask)))


def constant_mask(graph: Capture, mask: str) -> str:
    """A mask of truth values, or of what is added to the scores, as a finite summand."""
    value = graph.value(mask)
    added = torch.where(value, 0.0, MASKED) if value.dtype == torch.bool else value.clamp(min=MASKED)
    return graph.constant("attention_mask", added)
