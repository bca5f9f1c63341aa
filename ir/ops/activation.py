"""Activations made of ReLUs: piecewise linear, and exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.op import Sample
from tacit.ir.ops import linear as fixed_linear
from tacit.ir.ops import local, nonlinear
from tacit.ir.ops.arithmetic import Add, AddScalar, MulScalar
from tacit.ir.ops.known import Absolute
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.model import ModelOp
from tacit.ir.types import Batch

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class ReLU(ModelOp):
    """torch.nn.ReLU: the truncation back to the activations' scale is fused into it."""

    name = "model.relu"
    aten = ("aten.relu.default", "aten.relu_.default")
    batch_anywhere = True
    increasing = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x: str = k["self"]
        return x if isinstance(graph.op(x), Absolute) else graph.emit(cls(), x)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].relu()

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.at_scale(b.emit(nonlinear.FixedReLU(), args[0]))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7),)),)


@dataclass(frozen=True)
class Clamp(ModelOp):
    """min(max(x, low), high), as low + ReLU(x - low) - ReLU(x - high), in the same rounds; an end may be infinite."""

    name = "model.clamp"
    aten = (
        "aten.clamp.default",
        "aten.clamp_.default",
        "aten.clamp_min.default",
        "aten.clamp_min_.default",
        "aten.clamp_max.default",
        "aten.clamp_max_.default",
        "aten.hardtanh.default",
        "aten.hardtanh_.default",
        "aten.relu6.default",
        "aten.relu6_.default",
    )
    batch_anywhere = True
    increasing = True

    low: float
    high: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if "relu6" in graph.target:
            return graph.emit(cls(0.0, 6.0), k["self"])
        low, high = k.get("min_val", k.get("min")), k.get("max_val", k.get("max"))
        low = -math.inf if low in (None, -math.inf) else graph.scalar(low)
        high = math.inf if high in (None, math.inf) else graph.scalar(high)
        return graph.emit(cls(min(low, high), high), k["self"])

    def is_whole(self, *operands: bool) -> bool:
        return all(operands) and not self._between

    @property
    def _between(self) -> bool:
        """Whether an end is no whole number, and takes fractional bits."""
        return any(math.isfinite(end) and end != int(end) for end in (self.low, self.high))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].clamp(self.low, self.high)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = b.aligned(args[0], b.frac) if b.types[args[0]].frac < b.frac and self._between else args[0]
        below = b.relu(b.plus_scalar(x, -self.low)) if math.isfinite(self.low) else None
        above = b.relu(b.plus_scalar(x, -self.high)) if math.isfinite(self.high) else None
        if below is None:
            return x if above is None else b.minus(b.at_scale(x), above)
        out = b.plus_scalar(below if above is None else b.minus(below, above), self.low)
        return out if b.types[out].frac else b.known(out, low=self.low, high=min(self.high, 2.0**62))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = real(_N, 7)
        return Sample(cls(0.0, 6.0), (x,)), Sample(cls(-1.0, math.inf), (x,)), Sample(cls(-math.inf, 2.0), (x,))


@dataclass(frozen=True)
class Confined(Clamp):
    """A clamp with two finite ends, of a truncated x: no rounding follows, so it is known to lie between them."""

    name = "model.confined"

    def expand(self, b: FixedBuilder, *args: str) -> str:
        out = super().expand(b, b.at_scale(args[0]))
        low, high = (b.constant(end, b.types[out].frac) for end in (self.low, self.high))
        return b.known(out, low=low, high=high)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(0.25, 0.75), (real(_N, 7),)),)


@dataclass(frozen=True)
class LeakyReLU(ModelOp):
    """slope x + (1 - slope) ReLU(x)."""

    name = "model.leaky_relu"
    aten = ("aten.leaky_relu.default", "aten.leaky_relu_.default", "aten.rrelu.default", "aten.rrelu_.default")
    batch_anywhere = True

    slope: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if "rrelu" not in graph.target:
            return graph.emit(cls(graph.scalar(k["negative_slope"])), k["self"])
        if k["training"]:
            graph.unsupported("a random slope: its call says training=True; pass training=self.training")
        return graph.emit(cls((graph.scalar(k["lower"]) + graph.scalar(k["upper"])) / 2), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.leaky_relu(args[0], self.slope)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        # Truncation and ReLU run side by side; each rounds for itself.
        x, positive = b.at_scale(args[0]), b.relu(args[0])
        factor = b.constant(self.slope, b.weight_frac)
        left = b.emit(local.MulPublic(factor, b.weight_frac), x)
        right = b.emit(local.MulPublic((1 << b.weight_frac) - factor, b.weight_frac), positive)
        return b.plus(left, right)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(0.1), (real(_N, 7),)),)


@dataclass(frozen=True)
class PReLU(ModelOp):
    """ReLU(x) + w (x - ReLU(x)) for slopes w of the owner's, one or one for each channel."""

    name = "model.prelu"
    aten = ("aten.prelu.default", "aten._prelu_kernel.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        graph.require_weights(k, "weight")
        slopes, rank = graph.value(k["weight"]).flatten(), len(graph.shape(k["self"]))
        shape = (-1, *[1] * (rank - 2)) if len(slopes) > 1 else (1,)
        return graph.emit(cls(), k["self"], graph.reshaped_weight(k["weight"], shape))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return torch.where(args[0] > 0, args[0], args[0] * args[1])

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x, positive = b.at_scale(args[0]), b.relu(args[0])
        w = b.weight(args[1], b.bits_of(args[1]))
        negative = b.broadcast_to(b.minus(x, positive), b.types[w].dims)
        return b.plus(b.emit(fixed_linear.FixedMul(), negative, w), positive)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 3, 4), real(3, 1))),)


class HardSigmoid(Layer):
    """min(max(x + 3, 0), 6) / 6."""

    aten = ("aten.hardsigmoid.default", "aten.hardsigmoid_.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        clamped = graph.emit(Clamp(0.0, 6.0), graph.emit(AddScalar(3.0), k["self"]))
        return graph.emit(MulScalar(1 / 6), clamped)


class SoftShrink(Layer):
    """x without its part between -lambda and lambda."""

    aten = ("aten.softshrink.default",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        reach = graph.scalar(k["lambd"])
        middle = graph.emit(Clamp(-reach, reach), k["self"])
        return graph.emit(Add(), k["self"], graph.emit(MulScalar(-1.0), middle))


class LargerOfTwo(Layer):
    """max(x, y) = y + ReLU(x - y), and min likewise; bounds of a clamp may be tensors."""

    aten = (
        "aten.maximum.default",
        "aten.minimum.default",
        "aten.max.other",
        "aten.min.other",
        "aten.clamp.Tensor",
        "aten.clamp_min.Tensor",
        "aten.clamp_max.Tensor",
    )
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x = k["self"]
        if "clamp" not in graph.target:
            return cls.of(graph, x, k["other"], largest="max" in graph.target)
        if k.get("min") is not None:
            x = cls.of(graph, x, k["min"], largest=True)
        return x if k.get("max") is None else cls.of(graph, x, k["max"], largest=False)

    @staticmethod
    def of(graph: Capture, x: str, y: str, *, largest: bool) -> str:
        if graph.is_weight(x):
            x, y = y, x
        # max: x + ReLU(y - x); min: x - ReLU(x - y).
        sign = 1.0 if largest else -1.0
        toward, away = graph.emit(MulScalar(sign), y), graph.emit(MulScalar(-sign), x)
        gain = graph.emit(ReLU(), graph.emit(Add(), away, toward))
        return graph.emit(Add(), x, graph.emit(MulScalar(sign), gain))
