"""The model level: real-valued ops as PyTorch has them, and how each becomes fixed point.

A layer is one class: the ATen overloads it stands for (`aten`), how it is read off the exported graph
(`capture`), its meaning on floats (`reference`, from which types follow), and its expansion into fixed-point ops
(`expand`). Adding a layer to the compiler is adding such a class. The families have files of their own: `affine`,
`pooling`, `arithmetic`, `activation`, `moves`; here are their base, and what stands at the end of a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.op import Level, Op, Sample, probed_shape
from tacit.ir.ops import local, moves, nonlinear
from tacit.ir.ops.layer import WHOLE, Layer, real
from tacit.ir.types import Batch, Type

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class ModelOp(Layer, Op):
    """Base of the layers that are ops of the model level. Values are tensors whose first dimension is the batch."""

    levels = frozenset({Level.MODEL})

    def infer(self, *args: Type) -> Type:
        """Shapes from running `reference` on shapeless data, at two batch sizes."""
        return Type("real", probed_shape(lambda *operands: self.reference(None, *operands), *args))

    def margin(self, *args: Tensor) -> Tensor:
        """How far the operands are from where the result jumps; only ops that are not continuous have one."""
        raise NotImplementedError

    def gain(self, *args: Tensor) -> Tensor:
        """With what small differences of the operand are multiplied; only where it grows with what the operand is:
        a division by data, or a root of it."""
        raise NotImplementedError

    @classmethod
    def jumps(cls) -> bool:
        return cls.margin is not ModelOp.margin

    @classmethod
    def amplifies(cls) -> bool:
        return cls.gain is not ModelOp.gain


@dataclass(frozen=True)
class NoOp(ModelOp):
    """Dropout in evaluation, and calls that change nothing: dropped by the first pass."""

    name = "model.no_op"
    aten = (
        "aten.dropout.default",
        "aten.dropout_.default",
        "aten.feature_dropout.default",
        "aten.feature_dropout_.default",
        "aten.alpha_dropout.default",
        "aten.feature_alpha_dropout.default",
        "aten.native_dropout.default",
        "aten.contiguous.default",
        "aten.alias.default",
        "aten.detach.default",
        "aten.clone.default",
        "aten.detach_.default",
        "aten.lift_fresh_copy.default",
        "aten.positive.default",
        "aten.nan_to_num.default",  # every fixed-point value is a number
    )
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str | list[str]:
        if k.get("train"):
            graph.unsupported(
                "dropout whose call says training=True, as F.dropout does by itself; pass training=self.training"
            )
        out = graph.emit(cls(), k["input"] if "input" in k else k["self"])
        return [out] if "native" in graph.target else out

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def wants(self, frac: int) -> int:
        return frac

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7),)),)


@dataclass(frozen=True)
class AsReal(ModelOp):
    """Whole numbers, truth values among them, as numbers with the fractional bits of activations."""

    name = "model.as_real"
    batch_anywhere = True

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.aligned(args[0], b.frac) if b.types[args[0]].frac < b.frac else args[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7),)),)


class Conversion(Layer):
    """x.float(), x.to(...), x.long(): nothing between types of one kind; whole numbers gain fractional bits."""

    aten = (
        "aten.to.dtype",
        "aten.to.device",
        "aten.to.dtype_layout",
        "aten.to.other",
        "aten.type_as.default",
        "aten._to_copy.default",
    )
    batch_anywhere = True
    choosers = ("self",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.compare import unequal

        x, wanted = k["self"], graph.result_dtype()
        if wanted in (torch.float32, torch.float64):
            return graph.emit(AsReal() if graph.is_whole(x) else NoOp(), x)
        if wanted.is_complex or wanted.is_floating_point:
            graph.unsupported(f"a conversion to {wanted}; values are float32 or float64: leave it out")
        if wanted == torch.bool and not graph.is_truth(x):
            return unequal(graph, x)
        if not graph.is_whole(x):
            graph.unsupported(
                f"a conversion of floats to {wanted}, which rounds; compare them, as in x > 0.5, or pass integers as "
                "an input of their own"
            )
        return graph.emit(NoOp(), x)


@dataclass(frozen=True)
class Argmax(ModelOp):
    """The index of the largest logit of N x classes."""

    name = "model.argmax"
    aten = ("aten.argmax.default", "aten.argmin.default")
    axes = ("dim",)

    def is_whole(self, *operands: bool) -> bool:
        return True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.arithmetic import MulScalar, rows

        if k["dim"] is None:
            graph.unsupported(WHOLE)
        x = graph.emit(MulScalar(-1.0), k["self"]) if "argmin" in graph.target else k["self"]
        if len(graph.shape(x)) == 2 and not k["keepdim"]:
            return graph.emit(cls(), x)
        line, shape = rows(graph, x, [k["dim"]], k["keepdim"])
        kept, count = graph.fixed_shape(line)[1:]
        each = graph.emit(cls(), graph.emit(moves.Reshape((count,), kept * graph.batches(line)), line))
        return graph.emit(moves.Reshape(shape, graph.batches(line)), each)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].argmax(1).to(args[0].dtype)

    def margin(self, *args: Tensor) -> Tensor:
        best = args[0].topk(min(2, args[0].shape[1]), 1).values
        return best[:, 0] - best[:, -1]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(nonlinear.FixedArgmax(), args[0])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 7),)),)


@dataclass(frozen=True)
class CountCorrect(ModelOp):
    """How many predicted classes of the batch equal the targets."""

    name = "model.count_correct"

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] == args[1]).sum(0, keepdim=True)

    def infer(self, *args: Type) -> Type:
        return real(1)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(local.SumBatch(), b.emit(nonlinear.FixedEqual(), *args))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N), real(_N))),)
