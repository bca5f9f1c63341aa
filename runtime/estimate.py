"""Ring arithmetic as the compiler tries it out: products in float32, rounded back to integers.

Choosing a scale and measuring ranges need no exact bits, and float32 convolutions are many times faster than those
of 64-bit integers. A product of values below 2^53 comes out to about 2^-22 of the largest sum of its terms: far below
the rounding that is being measured, and below the margin that measured ranges get.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tacit.ir.types import Shape
from tacit.runtime import ring

Tensor = torch.Tensor


class EstimatedRing:
    """`runtime.ring`, but for its products."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ring, name)

    @staticmethod
    def matmul(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        found = (x.float() @ w.float()).round_().to(torch.int64)
        return found if out is None else out.copy_(found)

    @staticmethod
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.float(), weight.float()).round_().to(torch.int64)

    @staticmethod
    def conv2d(x: Tensor, weight: Tensor, stride: Shape, padding: Shape, dilation: Shape, groups: int) -> Tensor:
        return F.conv2d(x.float(), weight.float(), None, stride, padding, dilation, groups).round_().to(torch.int64)
