"""Up- and down-sampling: nearest by index, linear and cubic as a public linear map that P0 and P1 apply to shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.op import LocalOp, Sample, expect, expect_kind
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import taken
from tacit.ir.ranges import Interval
from tacit.ir.types import Batch, Type

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()
_MOST = 1 << 25  # coefficients of a matrix, which is made


def interpolation(size: int, output: int, *, kind: str, align_corners: bool, scale: float) -> Tensor:
    """The matrix (output, size) of an interpolation along one axis, as PyTorch defines it; scale 0: from the sizes."""
    eye = torch.eye(size, dtype=torch.float64)[None]
    if kind == "cubic":
        sizes, factors = (None, [scale, 1.0]) if scale else ([output, 1], None)
        return F.interpolate(eye[..., None], sizes, factors, "bicubic", align_corners)[0, :, :, 0].t()
    options = {"size": None if scale else output, "scale_factor": scale or None}
    if kind == "linear":
        return F.interpolate(eye, mode="linear", align_corners=align_corners, **options)[0].t()  # type: ignore[arg-type]
    return F.interpolate(eye, mode=kind, **options)[0].t()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Interpolate(LocalOp):
    """The linear map along one axis, its coefficients times 2^bits and rounded; public, so no message is needed."""

    name = "interpolate"

    axis: int
    output: int
    kind: str = "linear"
    align_corners: bool = False
    scale: float = 0.0
    bits: int = 0

    def coefficients(self, size: int) -> Tensor:
        options = {"kind": self.kind, "align_corners": self.align_corners, "scale": self.scale}
        exact = interpolation(size, self.output, **options)  # type: ignore[arg-type]
        return torch.round(exact * 2.0**self.bits).to(torch.int64)

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(0 < self.axis < len(x.shape), f"axis {self.axis} is not one of {x}, or is the batch")
        expect(self.kind in ("linear", "cubic"), f"'{self.kind}' is no kind of interpolation")
        size = x.at(1).dims[self.axis]
        expect(self.output >= 1 and size * max(size, self.output) <= _MOST, f"{size} to {self.output}: no such matrix")
        expect(self.scale == 0 or int(size * self.scale) == self.output, f"{self.scale} of {size} is not {self.output}")
        shape = tuple(self.output if i == self.axis else d for i, d in enumerate(x.shape))
        most = int(self.coefficients(size).abs().sum(1).max())
        return x.with_(shape=shape, frac=x.frac + self.bits, width=min(x.ring, x.width + most.bit_length()))

    def _map(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Sums over the few taps that each output has."""
        taps = max(1, int((matrix != 0).sum(1).max()))
        places = matrix.abs().topk(taps, dim=1).indices
        factors = matrix.gather(1, places)
        shape = [-1 if i == self.axis else 1 for i in range(x.dim())]
        out = x.index_select(self.axis, places[:, 0]) * factors[:, 0].reshape(shape)
        for tap in range(1, taps):
            out += x.index_select(self.axis, places[:, tap]) * factors[:, tap].reshape(shape)
        return out

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return self._map(shares[0], self.coefficients(shares[0].shape[self.axis]))

    def bound(self, x: Interval) -> Interval:
        matrix = self.coefficients(x.shape[self.axis - 1]).double()
        narrow = x.narrowed(keep=(self.axis - 1,))
        shape = list(x.shape)
        shape[self.axis - 1] = self.output
        centre = self._map(narrow.centre[None], matrix)[0]
        radius, size = (self._map(v[None], matrix.abs())[0] for v in (narrow.radius, narrow.magnitude))
        return Interval.around(centre, radius, size).expand(tuple(shape))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 2, 3, 4), 12, 20)
        return Sample(cls(2, 6, bits=2), (x,)), Sample(cls(3, 7, "cubic", True, 0.0, 12), (x,))


@dataclass(frozen=True)
class InterpolateReal(ModelOp):
    """One axis of a linear or cubic up-sampling."""

    name = "model.interpolate"

    axis: int
    output: int
    kind: str = "linear"
    align_corners: bool = False
    scale: float = 0.0

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        options = {"kind": self.kind, "align_corners": self.align_corners, "scale": self.scale}
        matrix = interpolation(args[0].shape[self.axis], self.output, **options)  # type: ignore[arg-type]
        matrix = matrix.to(args[0].dtype).to(args[0].device)
        return torch.movedim(torch.movedim(args[0], self.axis, -1) @ matrix.t(), -1, self.axis)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        options = (self.axis, self.output, self.kind, self.align_corners, self.scale)
        matrix = Interpolate(*options, 40).coefficients(b.types[args[0]].at(1).dims[self.axis])
        # The fewest bits with which the coefficients are exact, but no more than weights have.
        exact = next((n for n in range(b.weight_frac) if not (matrix % (1 << (40 - n))).any()), b.weight_frac)
        return b.emit(Interpolate(*options, exact), args[0] if exact < b.weight_frac else b.as_factor(args[0]))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(2, 6), (real(_N, 2, 3, 4),)), Sample(cls(3, 9, "cubic"), (real(_N, 2, 3, 4),)))


class Upsample(Layer):
    """torch.nn.Upsample and functional.interpolate, along one axis after the other."""

    aten = tuple(
        f"aten.upsample_{kind}.{overload}"
        for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d")
        for overload in ("default", "vec")
    ) + tuple(f"aten._upsample_nearest_exact{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "vec"))

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x: str = k["input"] if "input" in k else k["self"]
        wanted = graph.result_shape()[2:]
        size = graph.fixed_shape(x)[2:]
        given = k.get("scale_factors") or [k.get(f"scales_{d}") for d in "dhw"[3 - len(size) :]]
        if len(size) == 1 and not k.get("scale_factors"):
            given = [k.get("scales")]
        name = graph.target.split(".")[1]
        for i, (old, new) in enumerate(zip(size, wanted, strict=True)):
            assert isinstance(new, int)
            scale = float(given[i] or 0.0) if given else 0.0
            if old == new and not scale % 1:
                continue
            if "nearest" in name:
                kind = "nearest-exact" if "exact" in name else "nearest"
                matrix = interpolation(old, new, kind=kind, align_corners=False, scale=scale)
                x = taken(graph, x, i + 2, matrix.argmax(1).tolist())
                continue
            kind = "cubic" if "cubic" in name else "linear"
            x = graph.emit(InterpolateReal(i + 2, new, kind, bool(k.get("align_corners")), scale), x)
        return x
