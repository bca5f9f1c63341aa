"""Layers that are linear in their input with secret weights: linear, convolutions, batch norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.op import Sample
from tacit.ir.ops import linear as fixed
from tacit.ir.ops.layer import Layer, real, spread
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import Pad, Permute, Reshape, Take
from tacit.ir.types import Batch, dim_at

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Linear(ModelOp):
    """torch.nn.Linear."""

    name = "model.linear"
    aten = ("aten.linear.default",)
    batch_anywhere = True
    own_shapes = ("weight", "bias")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if graph.is_weight(k["input"]) or not graph.is_weight(k["weight"]):
            graph.unsupported("a linear layer whose weight depends on the input")
        return graph.emit(cls(), k["input"], *(k[key] for key in ("weight", "bias") if k[key] is not None))

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight with each feature of the result times its factor."""
        return (weight * factor.reshape(-1, 1)).to(weight.dtype)

    def wants(self, frac: int) -> int:
        return frac

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.linear(*args)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.product(fixed.FixedLinear(), args[0], args[1], args[2] if len(args) > 2 else None, (-1,))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7), real(5, 7), real(5))),)


class MatrixTimesWeight(Layer):
    """x W and x W + b, as decompositions of a linear layer have them."""

    aten = ("aten.mm.default", "aten.addmm.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, w = (k["mat1"], k["mat2"]) if "mat1" in k else (k["self"], k["mat2"])
        if graph.is_weight(x) or not graph.is_weight(w):
            graph.unsupported("a product with a constant on the left; write it as x @ w")
        w = graph.emit(Transpose(), w)
        if graph.target == "aten.mm.default":
            return graph.emit(Linear(), x, w)
        bias = k["self"]
        if (k["alpha"], k["beta"]) != (1, 1) or not graph.is_weight(bias) or len(graph.value(bias).shape) != 1:
            graph.unsupported("addmm with factors, or with a bias that is not one constant per feature")
        return graph.emit(Linear(), x, w, bias)


@dataclass(frozen=True)
class Transpose(ModelOp):
    """The transpose of a constant matrix: computed when the model is captured."""

    name = "model.transpose"

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].t().contiguous()

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(5, 7),)),)


@dataclass(frozen=True)
class Convolving(ModelOp):
    """Base of the convolutions; options have one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def wants(self, frac: int) -> int:
        return frac

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        graph.require_weights(k, "weight", "bias")
        kernel = graph.fixed_shape(k["weight"])[2:]
        dilation, padding = spread(k["dilation"], len(kernel)), k["padding"]
        if isinstance(padding, str):
            total = [d * (size - 1) if padding == "same" else 0 for d, size in zip(dilation, kernel, strict=True)]
            if any(t % 2 for t in total):  # the odd one goes to the end
                k["input"] = graph.emit(Pad(tuple(n for t in reversed(total) for n in (0, t % 2))), k["input"])
            padding = [t // 2 for t in total]
        op = cls(spread(k["stride"], len(kernel)), spread(padding, len(kernel)), dilation, k["groups"])
        return graph.emit(op, k["input"], *(k[key] for key in ("weight", "bias") if k[key] is not None))

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight with each channel of the result times its factor."""
        return (weight * factor.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


@dataclass(frozen=True)
class Conv2d(Convolving):
    """torch.nn.Conv2d."""

    name = "model.conv2d"
    aten = ("aten.conv2d.default", "aten.conv2d.padding")

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        bias = args[2] if len(args) > 2 else None
        return F.conv2d(args[0], args[1], bias, self.stride, self.padding, self.dilation, self.groups)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        op = fixed.FixedConv2d(self.stride, self.padding, self.dilation, self.groups)
        return b.product(op, args[0], args[1], args[2] if len(args) > 2 else None, (-1, 1, 1))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((2, 2), (1, 1)), (real(_N, 3, 8, 8), real(4, 3, 3, 3), real(4))),)


@dataclass(frozen=True)
class Conv1d(Convolving):
    """torch.nn.Conv1d: a convolution of images one pixel high."""

    name = "model.conv1d"
    aten = ("aten.conv1d.default", "aten.conv1d.padding")

    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        bias = args[2] if len(args) > 2 else None
        return F.conv1d(args[0], args[1], bias, self.stride, self.padding, self.dilation, self.groups)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        channels, length = b.types[args[0]].at(1).dims[1:]
        o, c, k = b.real(args[1]).shape
        x = b.emit(Reshape((channels, 1, length), dim_at(b.types[args[0]].shape[0], 1)), args[0])
        op = fixed.FixedConv2d((1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)
        out = b.product(op, x, b.derived(args[1], "2d", (o, c, 1, k)), args[2] if len(args) > 2 else None, (-1, 1, 1))
        return b.emit(Reshape((o, b.types[out].at(1).dims[3]), dim_at(b.types[out].shape[0], 1)), out)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((2,), (1,)), (real(_N, 3, 8), real(4, 3, 3), real(4))),)


@dataclass(frozen=True)
class Conv3d(Convolving):
    """torch.nn.Conv3d: a convolution of images whose channels are the channels of the slices under the kernel."""

    name = "model.conv3d"
    aten = ("aten.conv3d.default", "aten.conv3d.padding")

    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        bias = args[2] if len(args) > 2 else None
        return F.conv3d(args[0], args[1], bias, self.stride, self.padding, self.dilation, self.groups)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return self.convolved(b, args[0], args[1], args[2] if len(args) > 2 else None)

    def convolved(self, b: FixedBuilder, x: str, weight: str, bias: str | None) -> str:
        batch, (c, depth, h, w) = dim_at(b.types[x].shape[0], 1), b.types[x].at(1).dims[1:]
        o, per_group, kd, kh, kw = b.real(weight).shape
        pad = self.padding[0]
        if pad:
            x = b.emit(Pad((0, 0, 0, 0, pad, pad)), x)
        steps = (depth + 2 * pad - self.dilation[0] * (kd - 1) - 1) // self.stride[0] + 1
        under = [d * self.stride[0] + i * self.dilation[0] for d in range(steps) for i in range(kd)]
        x = b.emit(Take(2, tuple(under)), x)
        x = b.emit(Permute((0, 2, 1, 3, 4, 5)), b.emit(Reshape((c, steps, kd, h, w), batch), x))
        x = b.emit(Reshape((c * kd, h, w), batch * steps), x)
        op = fixed.FixedConv2d(self.stride[1:], self.padding[1:], self.dilation[1:], self.groups)
        out = b.product(op, x, b.derived(weight, "2d", (o, per_group * kd, kh, kw)), bias, (-1, 1, 1))
        oh, ow = b.types[out].at(1).dims[2:]
        return b.emit(Permute((0, 2, 1, 3, 4)), b.emit(Reshape((steps, o, oh, ow), batch), out))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((2, 1, 1), (1, 1, 0)), (real(_N, 2, 5, 4, 4), real(4, 2, 3, 3, 2), real(4))),)


@dataclass(frozen=True)
class ConvTranspose(Convolving):
    """torch.nn.ConvTranspose1d, 2d and 3d: weights are (in, out / groups, kernel).

    With stride s, output s y + a is a convolution of the input with every s-th tap of the kernel: one convolution for
    all s x s phases a at the input's resolution, and a rearrangement. Nothing is opened that is known to be zero.
    """

    name = "model.conv_transpose"
    aten = ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")

    output_padding: tuple[int, ...] = (0, 0)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        graph.require_weights(k, "weight", "bias")
        n = len(graph.fixed_shape(k["weight"])) - 2
        stride, padding, dilation, extra = (
            spread(k[key], n) for key in ("stride", "padding", "dilation", "output_padding")
        )
        op = cls(stride, padding, dilation, k["groups"], extra)
        return graph.emit(op, k["input"], *(k[key] for key in ("weight", "bias") if k[key] is not None))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        bias, options = args[2] if len(args) > 2 else None, (self.stride, self.padding, self.output_padding)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.stride) - 1]
        return function(args[0], args[1], bias, *options, self.groups, self.dilation)

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        shape = (self.groups, -1, *weight.shape[1:])
        grouped = weight.reshape(shape) * factor.reshape(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        return grouped.reshape(weight.shape).to(weight.dtype)

    def _phases(self, weight: Tensor) -> Tensor:
        """(out x s x s, in / groups, K / s, K / s): the sub-kernels of all phases, flipped; kernels padded to K."""
        (i, per_group, *kernel), n = weight.shape, len(self.stride)
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, self.dilation, strict=True)]
        taps = [-(-r // s) for r, s in zip(reach, self.stride, strict=True)]
        wide = weight.new_zeros(i, per_group, *(t * s for t, s in zip(taps, self.stride, strict=True)))
        places: list[slice] = [slice(0, r, d) for r, d in zip(reach, self.dilation, strict=True)]
        wide[(slice(None), slice(None), *places)] = weight
        pairs = [size for pair in zip(taps, self.stride, strict=True) for size in pair]
        grouped = wide.reshape(self.groups, i // self.groups, per_group, *pairs)
        # group, out, phase, in, taps from the last to the first
        order = (0, 2, *range(4, 4 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))
        phases = grouped.permute(order).flip(tuple(range(-n, 0)))
        return phases.reshape(-1, i // self.groups, *taps)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x, weight, n = args[0], b.real(args[1]), len(self.stride)
        batch, (channels, *size) = dim_at(b.types[x].shape[0], 1), b.types[x].at(1).dims[1:]
        if n == 1:  # images one pixel high
            options = (
                (1, *self.stride),
                (0, *self.padding),
                (1, *self.dilation),
                self.groups,
                (0, *self.output_padding),
            )
            flat = ConvTranspose(*options)
            x = b.emit(Reshape((channels, 1, *size), batch), x)
            out = flat.expand(b, x, b.derived(args[1], "2d", (*weight.shape[:2], 1, *weight.shape[2:])), *args[2:])
            return b.emit(Reshape((b.types[out].at(1).dims[1], b.types[out].at(1).dims[3]), batch), out)
        kernels = self._phases(weight)
        ones, padding = (1,) * n, tuple(k - 1 for k in kernels.shape[2:])
        phases = b.new(args[1], "phases", kernels)
        if n == 2:
            out = b.product(fixed.FixedConv2d(ones, padding, ones, self.groups), x, phases, None, ())
        else:
            out = Conv3d(ones, padding, ones, self.groups).convolved(b, x, phases, None)
        if math.prod(self.stride) > 1:
            o, found = len(kernels) // math.prod(self.stride), b.types[out].at(1).dims[2:]
            between = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
            out = b.emit(Permute((0, 1, *between)), b.emit(Reshape((o, *self.stride, *found), batch), out))
            out = b.emit(Reshape((o, *(f * s for f, s in zip(found, self.stride, strict=True))), batch), out)
        out = self._cut(b, out, weight.shape[2:], size)
        return b.plus_weight(out, args[2], (-1, *ones)) if len(args) > 2 else out

    def _cut(self, b: FixedBuilder, x: str, kernel: torch.Size, size: Sequence[int]) -> str:
        """Drop the padding at both ends; what lies beyond the last tap is zero."""
        pads: list[int] = []
        options = (self.stride, self.padding, self.dilation, self.output_padding)
        for s, p, d, extra, k, n, found in zip(*options, kernel, size, b.types[x].at(1).dims[2:], strict=True):
            wanted = (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
            pads = [-p, wanted + p - found, *pads]
        return b.emit(Pad(tuple(pads)), x) if any(pads) else x

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, w = real(_N, 4, 5, 6), real(4, 2, 3, 3)
        return (
            Sample(cls((2, 2), (1, 1), (1, 1), 1, (1, 1)), (x, w, real(2))),
            Sample(cls((3, 1), (0, 1), (1, 2), 2, (1, 0)), (x, w)),
            Sample(cls((2,), (1,), (1,), 1, (0,)), (real(_N, 4, 5), real(4, 2, 3))),
            Sample(
                cls((2, 1, 3), (1, 0, 1), (1, 2, 1), 2, (1, 0, 0)), (real(_N, 4, 3, 4, 2), real(4, 1, 3, 2, 2), real(2))
            ),
        )


class Convolution(Layer):
    """aten.convolution, which decompositions make of all of them."""

    aten = ("aten.convolution.default", "aten._convolution.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        n = len(k["stride"])
        if k["transposed"]:
            return ConvTranspose.capture(graph, **k)
        return (Conv1d, Conv2d, Conv3d)[n - 1].capture(graph, **k)


@dataclass(frozen=True)
class BatchNorm(ModelOp):
    """torch.nn.BatchNorm1d to 3d in evaluation: operands x, weight, bias, running mean, running variance."""

    name = "model.batch_norm"
    aten = ("aten.batch_norm.default", "aten.instance_norm.default")

    eps: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if k.get("use_input_stats"):
            from tacit.ir.ops.norms import GroupNorm

            graph.require_weights(k, "weight", "bias")
            channels = graph.fixed_shape(k["input"])[1]
            return GroupNorm.of(graph, k["input"], channels, k["weight"], k["bias"], k["eps"])
        if k.get("training") or k["running_mean"] is None:
            graph.unsupported(
                "the norm uses the statistics of its input, which mixes the elements of a batch: as in training, or "
                "always where track_running_stats=False; train it with running statistics, or use a LayerNorm, "
                "GroupNorm or InstanceNorm"
            )
        return cls._of(graph, k)

    @classmethod
    def _of(cls, graph: Capture, k: dict[str, Any]) -> str:
        graph.require_weights(k, "weight", "bias", "running_mean", "running_var")
        channels = graph.fixed_shape(k["running_mean"])
        weight = k["weight"] or graph.constant("ones", torch.ones(*channels))
        bias = k["bias"] or graph.constant("zeros", torch.zeros(*channels))
        return graph.emit(cls(k["eps"]), k["input"], weight, bias, k["running_mean"], k["running_var"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        x, weight, bias, mean, variance = args
        return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(1e-5), (real(_N, 3, 4, 4), *[real(3)] * 4)),)


class DecomposedBatchNorm(Layer):
    """Batch norm as decompositions have it: with the statistics of a batch as further results, empty here."""

    aten = ("aten._native_batch_norm_legit_no_training.default",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        return [BatchNorm._of(graph, k)]
