"""The model level: real-valued ops as PyTorch has them, and how each becomes fixed point.

A layer is one class: the ATen overloads it stands for (`aten`), how it is read off the exported graph
(`capture`), its meaning on floats (`reference`, from which types follow), and its expansion into fixed-point ops
(`expand`). Adding a layer to the compiler is adding such a class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from tacit.ir.build import Label
from tacit.ir.errors import CompileError, PlanError
from tacit.ir.op import Level, Op, Sample, expect
from tacit.ir.ops import linear as fixed_linear
from tacit.ir.ops import local, nonlinear
from tacit.ir.types import Batch, Dim, Type, broadcast

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()
_PROBES = (3, 5)


def _real(*shape: Dim) -> Type:
    return Type("real", shape)


@dataclass(frozen=True)
class ModelOp(Op):
    """Base of the layers. Values are float64 tensors whose first dimension is the batch."""

    levels = frozenset({Level.MODEL})
    aten: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def capture(cls, graph: Capture, **kwargs: Any) -> str:
        """Write this op into the model plan; arguments are those of the ATen schema."""
        raise NotImplementedError

    def expand(self, b: FixedBuilder, *args: str) -> str:
        """Write the fixed-point form; operands that are weights come as their labels."""
        raise NotImplementedError

    def infer(self, *args: Type) -> Type:
        """Shapes from running `reference` on shapeless data, at two batch sizes."""
        shapes = []
        for batch in _PROBES:
            operands = [torch.empty(arg.at(batch).dims, device="meta", dtype=torch.float64) for arg in args]
            try:
                shapes.append(self.reference(None, *operands).shape)
            except (RuntimeError, IndexError, ValueError) as error:
                raise PlanError(f"{self.name} does not take {', '.join(map(str, args))}: {error}") from None
        return Type("real", tuple(_symbolic(a, b) for a, b in zip(*shapes, strict=True)))


def _symbolic(a: int, b: int) -> Dim:
    """The dimension that is a at the first probe of the batch size and b at the second."""
    if a == b:
        return a
    if a * _PROBES[1] != b * _PROBES[0] or a % _PROBES[0]:
        raise PlanError("a dimension depends on the batch in an unsupported way")
    return Batch(a // _PROBES[0])


def _pair(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value, value)
    values = tuple(value)
    return values * 2 if len(values) == 1 else values


@dataclass(frozen=True)
class Linear(ModelOp):
    """torch.nn.Linear."""

    name = "model.linear"
    aten = ("aten.linear.default",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return graph.emit(cls(), k["input"], *(k[key] for key in ("weight", "bias") if k[key] is not None))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.linear(*args)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.product(fixed_linear.FixedLinear(), args[0], args[1], args[2] if len(args) > 2 else None, (-1,))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_real(_N, 7), _real(5, 7), _real(5))),)


@dataclass(frozen=True)
class Conv2d(ModelOp):
    """torch.nn.Conv2d."""

    name = "model.conv2d"
    aten = ("aten.conv2d.default", "aten.conv2d.padding")

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        dilation, padding = _pair(k["dilation"]), k["padding"]
        if isinstance(padding, str):
            kernel = graph.fixed_shape(k["weight"])[2:]
            total = [d * (size - 1) if padding == "same" else 0 for d, size in zip(dilation, kernel, strict=True)]
            if any(t % 2 for t in total):
                graph.unsupported("padding='same' with an even kernel pads unevenly; pad explicitly instead")
            padding = [t // 2 for t in total]
        op = cls(_pair(k["stride"]), _pair(padding), dilation, k["groups"])
        return graph.emit(op, k["input"], *(k[key] for key in ("weight", "bias") if k[key] is not None))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        bias = args[2] if len(args) > 2 else None
        return F.conv2d(args[0], args[1], bias, self.stride, self.padding, self.dilation, self.groups)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        op = fixed_linear.FixedConv2d(self.stride, self.padding, self.dilation, self.groups)
        return b.product(op, args[0], args[1], args[2] if len(args) > 2 else None, (-1, 1, 1))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((2, 2), (1, 1)), (_real(_N, 3, 8, 8), _real(4, 3, 3, 3), _real(4))),)


@dataclass(frozen=True)
class BatchNorm(ModelOp):
    """torch.nn.BatchNorm1d and 2d in evaluation: operands x, weight, bias, running mean, running variance."""

    name = "model.batch_norm"
    aten = ("aten.batch_norm.default",)

    eps: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if k["training"]:
            graph.unsupported(
                "batch norm uses the statistics of the batch; call model.eval() first, with running statistics"
            )
        channels = graph.fixed_shape(k["running_mean"])
        weight = k["weight"] or graph.constant("ones", torch.ones(*channels))
        bias = k["bias"] or graph.constant("zeros", torch.zeros(*channels))
        return graph.emit(cls(k["eps"]), k["input"], weight, bias, k["running_mean"], k["running_var"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        x, weight, bias, mean, variance = args
        return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(1e-5), (_real(_N, 3, 4, 4), *[_real(3)] * 4)),)


@dataclass(frozen=True)
class ReLU(ModelOp):
    """torch.nn.ReLU: the truncation back to the activations' scale is fused into it."""

    name = "model.relu"
    aten = ("aten.relu.default", "aten.relu_.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return graph.emit(cls(), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].relu()

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.at_scale(b.emit(nonlinear.FixedReLU(), args[0]))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_real(_N, 7),)),)


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

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        kernel = _pair(k["kernel_size"])
        stride = _pair(k["stride"]) if k["stride"] else kernel
        op = cls(kernel, stride, _pair(k["padding"]), _pair(k["dilation"]), k["ceil_mode"])
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
        return (Sample(cls((3, 3), (2, 2), (1, 1)), (_real(_N, 3, 8, 8),)),)


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
        kernel = _pair(k["kernel_size"])
        stride = _pair(k["stride"]) if k["stride"] else kernel
        return graph.emit(
            cls(
                kernel, stride, _pair(k["padding"]), k["ceil_mode"], k["count_include_pad"], k["divisor_override"] or 0
            ),
            k["self"],
        )

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.avg_pool2d(
            args[0],
            self.kernel,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor or None,
        )

    def expand(self, b: FixedBuilder, *args: str) -> str:
        def op(bits: int) -> local.AvgPool2d:
            return local.AvgPool2d(
                self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor, bits
            )

        return _averaged(b, args[0], op)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((2, 2), (2, 2)), (_real(_N, 3, 8, 8),)),)


@dataclass(frozen=True)
class AdaptiveAvgPool2d(ModelOp):
    """torch.nn.AdaptiveAvgPool2d, and the mean over height and width."""

    name = "model.adaptive_avg_pool2d"
    aten = ("aten.adaptive_avg_pool2d.default", "aten.mean.dim")

    output: tuple[int, ...]

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        size = graph.fixed_shape(k["self"])
        if graph.target == "aten.mean.dim":
            if len(size) != 4 or {d % 4 for d in k["dim"]} != {2, 3} or k["dtype"] is not None:
                graph.unsupported("a mean over anything but height and width of N x C x H x W")
            pooled = graph.emit(cls((1, 1)), k["self"])
            return pooled if k["keepdim"] else graph.emit(Reshape((size[1],)), pooled)
        wanted = [s if w is None else w for s, w in zip(size[2:], k["output_size"], strict=True)]
        return graph.emit(cls(tuple(wanted)), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(args[0], list(self.output))  # type: ignore[arg-type]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return _averaged(b, args[0], lambda bits: local.AdaptiveAvgPool2d(self.output, bits))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((1, 1)), (_real(_N, 3, 8, 8),)),)


def _averaged(b: FixedBuilder, x: str, op: Any) -> str:
    """The pool with its divisor in the scale: exactly for powers of two, else to the weights' precision."""
    height, width = b.types[x].at(1).dims[2:]
    bits = op(0).scale_bits(height, width, b.weight_frac)
    return b.emit(op(bits), x if bits < b.weight_frac else b.as_factor(x))


@dataclass(frozen=True)
class Reshape(ModelOp):
    """flatten, view, reshape, squeeze, unsqueeze: `shape` leaves out the batch."""

    name = "model.reshape"
    aten = (
        "aten.flatten.using_ints",
        "aten.view.default",
        "aten.reshape.default",
        "aten.unflatten.int",
        "aten.unsqueeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
    )

    shape: tuple[int, ...]

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        batch, *rest = graph.result_shape()
        if batch != _N or not all(isinstance(d, int) for d in rest):
            graph.unsupported("a reshape that moves or splits the batch dimension; keep the batch first")
        return graph.emit(cls(tuple(d for d in rest if isinstance(d, int))), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].reshape(args[0].shape[0], *self.shape)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(local.Reshape(self.shape), args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls((12,)), (_real(_N, 3, 2, 2),)),)


@dataclass(frozen=True)
class Add(ModelOp):
    """x + y: two activations, or an activation and a constant tensor. A difference adds the negative."""

    name = "model.add"
    aten = ("aten.add.Tensor", "aten.add_.Tensor", "aten.sub.Tensor", "aten.sub_.Tensor")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, y, sign = k["self"], k["other"], -1.0 if graph.target.startswith("aten.sub") else 1.0
        factor = sign * graph.scalar(k["alpha"])
        if not isinstance(y, str):
            return graph.emit(AddScalar(factor * graph.scalar(y)), x)
        if factor != 1.0:
            y = graph.emit(MulScalar(factor), y)
        return graph.emit(cls(), y, x) if graph.is_weight(x) else graph.emit(cls(), x, y)

    def infer(self, *args: Type) -> Type:
        shape = broadcast(args[0].shape, args[1].shape)
        expect(
            isinstance(shape[0], Batch), f"to broadcast {args[0]} and {args[1]} moves the batch from its first place"
        )
        return Type("real", shape)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] + args[1]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x, y = args
        return b.plus_weight(x, y, tuple(b.real(y).shape)) if isinstance(y, Label) else b.plus(x, y)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_real(_N, 3, 4, 4), _real(_N, 3, 4, 4))), Sample(cls(), (_real(_N, 7), _real(7))))


@dataclass(frozen=True)
class Mul(ModelOp):
    """x times a constant tensor, element by element."""

    name = "model.mul"
    aten = ("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor", "aten.div_.Tensor")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, y = k["self"], k["other"]
        divide = graph.target.startswith("aten.div")
        if not isinstance(y, str):
            return graph.emit(MulScalar(graph.scalar(_inverse(y) if divide else y)), x)
        if divide:
            graph.unsupported("division by a tensor; multiply by the reciprocal constant instead")
        if graph.is_weight(x):
            x, y = y, x
        if not graph.is_weight(y):
            graph.unsupported("the product of two activations; one factor has to be a constant")
        return graph.emit(cls(), x, y)

    def infer(self, *args: Type) -> Type:
        return Add().infer(*args)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * args[1]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        w = b.weight(args[1], b.weight_frac)
        return b.emit(fixed_linear.FixedMul(), b.as_factor(args[0]), w)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_real(_N, 3, 4, 4), _real(3, 1, 1))),)


def _inverse(value: float) -> float:
    return 1 / value if value else math.inf


@dataclass(frozen=True)
class AddScalar(ModelOp):
    """x + value: part of the architecture, and public in the plan."""

    name = "model.add_scalar"
    aten = ("aten.add.Scalar", "aten.sub.Scalar", "aten.rsub.Scalar")

    value: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        value, x, alpha = graph.scalar(k["other"]), k["self"], graph.scalar(k["alpha"])
        if graph.target == "aten.rsub.Scalar":  # other - alpha * self
            return graph.emit(cls(value), graph.emit(MulScalar(-alpha), x))
        value *= alpha
        return graph.emit(cls(-value if graph.target == "aten.sub.Scalar" else value), x)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] + self.value

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(local.AddPublic(b.constant(self.value, b.types[args[0]].frac)), args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(0.5), (_real(_N, 7),)),)


@dataclass(frozen=True)
class MulScalar(ModelOp):
    """x times value: part of the architecture, and public in the plan."""

    name = "model.mul_scalar"
    aten = ("aten.mul.Scalar", "aten.div.Scalar", "aten.neg.default")

    value: float

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if graph.target == "aten.neg.default":
            return graph.emit(cls(-1.0), k["self"])
        value = k["other"]
        return graph.emit(cls(graph.scalar(_inverse(value) if graph.target == "aten.div.Scalar" else value)), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] * self.value

    def expand(self, b: FixedBuilder, *args: str) -> str:
        if self.value == int(self.value):
            return b.emit(local.MulPublic(b.constant(self.value, 0)), args[0])
        return b.emit(local.MulPublic(b.constant(self.value, b.weight_frac), b.weight_frac), b.as_factor(args[0]))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(0.5), (_real(_N, 7),)),)


@dataclass(frozen=True)
class NoOp(ModelOp):
    """Dropout in evaluation, and calls that change nothing: dropped by the first pass."""

    name = "model.no_op"
    aten = (
        "aten.dropout.default",
        "aten.dropout_.default",
        "aten.feature_dropout.default",
        "aten.contiguous.default",
        "aten.alias.default",
        "aten.detach.default",
        "aten.clone.default",
        "aten.detach_.default",
        "aten.lift_fresh_copy.default",
    )

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        if k.get("train"):
            graph.unsupported("dropout in training mode; call model.eval() first")
        return graph.emit(cls(), k["input"] if "input" in k else k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_real(_N, 7),)),)


@dataclass(frozen=True)
class Softmax(ModelOp):
    """softmax and log_softmax over the classes: supported where only the argmax is wanted, and dropped there."""

    name = "model.softmax"
    aten = ("aten.softmax.int", "aten.log_softmax.int")

    dim: int
    log: bool = False

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        rank = len(graph.shape(k["self"]))
        return graph.emit(cls(k["dim"] % rank, "log" in graph.target), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (F.log_softmax if self.log else F.softmax)(args[0], self.dim)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        raise CompileError(
            "softmax is supported directly before an argmax, where it changes nothing: compile with reveal='argmax', "
            "or leave it out of the model and apply it to the revealed logits at the client"
        )

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(1), (_real(_N, 7),)),)


@dataclass(frozen=True)
class Argmax(ModelOp):
    """The index of the largest logit."""

    name = "model.argmax"
    aten = ("aten.argmax.default",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        rank = len(graph.shape(k["self"]))
        if rank != 2 or k["dim"] is None or k["dim"] % rank != 1 or k["keepdim"]:
            graph.unsupported("argmax over anything but the classes of N x classes")
        return graph.emit(cls(), k["self"])

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].argmax(1)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(nonlinear.FixedArgmax(), args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_real(_N, 7),)),)


@dataclass(frozen=True)
class CountCorrect(ModelOp):
    """How many predicted classes of the batch equal the targets."""

    name = "model.count_correct"

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] == args[1]).sum(0, keepdim=True)

    def infer(self, *args: Type) -> Type:
        return _real(1)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(local.SumBatch(), b.emit(nonlinear.FixedEqual(), *args))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_real(_N), _real(_N))),)


def layers() -> dict[str, type[ModelOp]]:
    """The layer that stands for each ATen overload."""
    found = [op for op in Op.registry.values() if issubclass(op, ModelOp)]
    return {target: op for op in found for target in op.aten}
