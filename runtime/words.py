"""The owner's weights as ring integers, kept in half the memory where they fit half a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from tacit.ir.ops.roles import Weight
from tacit.ir.plan import Plan

Tensor = torch.Tensor
_HALF = torch.iinfo(torch.int32)


class Words(Mapping[str, Tensor]):
    """Weights by label, each in words of its ring whenever it is read.

    Nearly all weights of Z_2^64 are smaller than 2^31: they are held as 32-bit integers, and become 64-bit ones one
    tensor at a time, as they are shared or saved.
    """

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor]) -> None:
        self._dtypes = {n.op.label: n.type.dtype for n in plan.find(Weight) if isinstance(n.op, Weight)}
        self._held = {label: _narrow(value) for label, value in weights.items()}

    def __getitem__(self, label: str) -> Tensor:
        value = self._held[label]
        whole = value.dtype in (torch.int32, torch.int64)  # what is none is refused where it is looked at
        return value.to(self._dtypes.get(label, torch.int64)) if whole else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _narrow(value: Tensor) -> Tensor:
    if value.dtype != torch.int64 or not value.numel():
        return value
    low, high = torch.aminmax(value)
    return value.to(torch.int32) if _HALF.min <= low and high <= _HALF.max else value
