"""Pools: maxima and averages over windows, in one, two and three dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.op import Sample
from tacit.ir.ops import local, nonlinear
from tacit.ir.ops.layer import Layer, real, spread
from tacit.ir.ops.model import Argmax, ModelOp
from tacit.ir.ops.moves import Take, reshaped
from tacit.ir.types import Batch
from tacit.ir.windows import adaptive_spans

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class MaxPool2d(ModelOp):
    """torch.nn.MaxPool2d."""

    name = "model.max_pool2d"
    aten = ("aten.max_pool2d.default",)

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    ceil_mode: bool = False

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        kernel = spread(k["kernel_size"], 2)
        stride = spread(k["stride"], 2) if k["stride"] else kernel
        op = cls(kernel, stride, spread(k["padding"], 2), spread(k["dilation"], 2), k["ceil_mode"])
        return graph.emit(op, k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.max_pool2d(args[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        # What the next truncation drops anyway need not be compared.
        drop = max(0, b.types[args[0]].frac - b.frac)
        op = nonlinear.FixedMaxPool2d(self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, drop)
        return b.emit(op, args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((3, 3), (2, 2), (1, 1)), (real(_N, 3, 8, 8),)),)


class MaxPoolOfOtherDimensions(Layer):
    """One dimension as an image one pixel high; three as a pool of the slices and then across them."""

    aten = ("aten.max_pool1d.default", "aten.max_pool3d.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, n = k["self"], 1 if "1d" in graph.target else 3
        kernel = spread(k["kernel_size"], n)
        stride = spread(k["stride"], n) if k["stride"] else kernel
        padding, dilation, ceil = spread(k["padding"], n), spread(k["dilation"], n), k["ceil_mode"]
        if n == 1:
            return _along(graph, x, MaxPool2d((1, *kernel), (1, *stride), (0, *padding), (1, *dilation), ceil))
        flat = MaxPool2d(kernel[1:], stride[1:], padding[1:], dilation[1:], ceil)
        deep = MaxPool2d((kernel[0], 1), (stride[0], 1), (padding[0], 0), (dilation[0], 1), ceil)
        return _slices_then_depth(graph, x, flat, deep)


class MaxPoolWithIndices(Layer):
    """As decompositions have them; of the two results, the indices may not be used."""

    aten = ("aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        known = MaxPool2d if "2d" in graph.target else MaxPoolOfOtherDimensions
        return [known.capture(graph, **k)]


class AdaptiveMaxPool(Layer):
    """Windows of uneven size are filled up with elements they already hold."""

    aten = (
        "aten.adaptive_max_pool1d.default",
        "aten.adaptive_max_pool2d.default",
        "aten.adaptive_max_pool3d.default",
    )

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        x, sizes = k["self"], graph.fixed_shape(k["self"])[2:]
        kernel = []
        for axis, (size, wanted) in enumerate(zip(sizes, spread(k["output_size"], len(sizes)), strict=True), 2):
            spans, lengths = adaptive_spans(size, wanted or size)
            longest = max(lengths)
            indices = [min(start + i, end - 1) for start, end in spans for i in range(longest)]
            if indices != list(range(size)):
                x = graph.emit(Take(axis, tuple(indices)), x)
            kernel.append(longest)
        stand_in = {1: "aten.max_pool1d.default", 2: "aten.max_pool2d.default", 3: "aten.max_pool3d.default"}
        with graph.as_target(stand_in[len(kernel)]):
            layer = MaxPool2d if len(kernel) == 2 else MaxPoolOfOtherDimensions
            options = {"stride": kernel, "padding": 0, "dilation": 1, "ceil_mode": False}
            return [layer.capture(graph, self=x, kernel_size=kernel, **options)]


class LargestAlong(Layer):
    """amax, amin, max and min along a dimension: one window; and an argmax, where the indices are used."""

    axes = ("dim",)
    aten = ("aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str | list[str]:
        from tacit.ir.ops.arithmetic import MulScalar, rows

        dims = k["dim"] if isinstance(k["dim"], (list, tuple)) else [k["dim"]]
        least = "amin" in graph.target or "min.dim" in graph.target
        x = graph.emit(MulScalar(-1.0), k["self"]) if least else k["self"]
        line, shape = rows(graph, x, dims, k["keepdim"])
        kept, count = graph.fixed_shape(line)[1:]
        image = reshaped(graph, line, (1, kept, count))
        best = graph.emit(MaxPool2d((1, count), (1, count)), image)
        out = reshaped(graph, graph.emit(MulScalar(-1.0), best) if least else best, shape)
        if not graph.target.endswith(".dim"):
            return out
        if not graph.uses(1):
            return [out]
        with graph.as_target("aten.argmin.default" if least else "aten.argmax.default"):
            return [out, Argmax.capture(graph, **k)]


@dataclass(frozen=True)
class AvgPool2d(ModelOp):
    """torch.nn.AvgPool2d: a sum whose divisor joins the scale."""

    name = "model.avg_pool2d"
    aten = ("aten.avg_pool2d.default",)

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int = 0

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        kernel = spread(k["kernel_size"], 2)
        stride = spread(k["stride"], 2) if k["stride"] else kernel
        options = (k["ceil_mode"], k["count_include_pad"], k["divisor_override"] or 0)
        return graph.emit(cls(kernel, stride, spread(k["padding"], 2), *options), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        options = (self.padding, self.ceil_mode, self.count_include_pad, self.divisor or None)
        return F.avg_pool2d(args[0], self.kernel, self.stride, *options)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        def op(bits: int) -> local.AvgPool2d:
            return local.AvgPool2d(
                self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor, bits
            )

        return _averaged(b, args[0], op)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((2, 2), (2, 2)), (real(_N, 3, 8, 8),)),)


class AvgPoolOfOtherDimensions(Layer):
    """One dimension as an image one pixel high; three as a pool of the slices and then across them."""

    aten = ("aten.avg_pool1d.default", "aten.avg_pool3d.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, n = k["self"], 1 if "1d" in graph.target else 3
        kernel = spread(k["kernel_size"], n)
        stride = spread(k["stride"], n) if k["stride"] else kernel
        padding, modes = spread(k["padding"], n), (k["ceil_mode"], k["count_include_pad"])
        if n == 1:
            return _along(graph, x, AvgPool2d((1, *kernel), (1, *stride), (0, *padding), *modes))
        divisor = k["divisor_override"] or 0
        flat = AvgPool2d(kernel[1:], stride[1:], padding[1:], *modes, divisor)
        deep = AvgPool2d((kernel[0], 1), (stride[0], 1), (padding[0], 0), *modes, 1 if divisor else 0)
        return _slices_then_depth(graph, x, flat, deep)


@dataclass(frozen=True)
class AdaptiveAvgPool2d(ModelOp):
    """torch.nn.AdaptiveAvgPool2d."""

    name = "model.adaptive_avg_pool2d"
    aten = ("aten.adaptive_avg_pool2d.default", "aten._adaptive_avg_pool2d.default")

    output: tuple[int, ...]

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        sizes = zip(graph.fixed_shape(k["self"])[2:], spread(k["output_size"], 2), strict=True)
        return graph.emit(cls(tuple(size if wanted is None else wanted for size, wanted in sizes)), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(args[0], list(self.output))  # type: ignore[arg-type]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return _averaged(b, args[0], lambda bits: local.AdaptiveAvgPool2d(self.output, bits))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1, 1)), (real(_N, 3, 8, 8),)),)


class AdaptiveAvgPoolOfOtherDimensions(Layer):
    """As the other pools of one and of three dimensions."""

    aten = (
        "aten.adaptive_avg_pool1d.default",
        "aten.adaptive_avg_pool3d.default",
        "aten._adaptive_avg_pool3d.default",
    )

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        sizes = graph.fixed_shape(k["self"])[2:]
        output = [w or size for size, w in zip(sizes, spread(k["output_size"], len(sizes)), strict=True)]
        if len(output) == 1:
            return _along(graph, k["self"], AdaptiveAvgPool2d((1, *output)))
        flat, deep = AdaptiveAvgPool2d(tuple(output[1:])), AdaptiveAvgPool2d((output[0], math.prod(output[1:])))
        return _slices_then_depth(graph, k["self"], flat, deep)


def _along(graph: Capture, x: str, op: ModelOp) -> str:
    """A pool of N x C x L, as one of images one pixel high."""
    channels, length = graph.fixed_shape(x)[1:]
    out = graph.emit(op, reshaped(graph, x, (channels, 1, length)))
    return reshaped(graph, out, (channels, graph.fixed_shape(out)[3]))


def _slices_then_depth(graph: Capture, x: str, flat: ModelOp, deep: ModelOp) -> str:
    """A pool of N x C x D x H x W: over height and width of every slice, then over depth."""
    channels, depth, height, width = graph.fixed_shape(x)[1:]
    out = graph.emit(flat, reshaped(graph, x, (channels * depth, height, width)))
    height, width = graph.fixed_shape(out)[2:]
    out = graph.emit(deep, reshaped(graph, out, (channels, depth, height * width)))
    return reshaped(graph, out, (channels, graph.fixed_shape(out)[2], height, width))


def _averaged(b: FixedBuilder, x: str, op: Any) -> str:
    """The pool with its divisor in the scale: exactly for powers of two, else to the weights' precision."""
    height, width = b.types[x].at(1).dims[2:]
    bits = op(0).scale_bits(height, width, b.weight_frac)
    return b.emit(op(bits), x if bits < b.weight_frac else b.as_factor(x))
