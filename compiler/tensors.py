"""Tensors whose numbers can be read as they stand, and what is to be done with others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

Tensor = torch.Tensor
_LEAST_BYTES = 4  # of floats: PyTorch does little with those of fewer


def unreadable(value: Any) -> str:
    """Why the numbers of an input cannot be read, and the remedy; "" where they can."""
    if not isinstance(value, Tensor):
        return f"has to be a tensor, not {_kind(value)}"
    with torch._C.DisableTorchFunctionSubclass():
        return _unreadable(value)


def _unreadable(value: Tensor) -> str:
    if value.is_nested:
        return "is a nested tensor: make its rows equally long by torch.nested.to_padded_tensor(x, 0.0)"
    if value.device.type == "meta" or isinstance(value, (UninitializedBuffer, UninitializedParameter)):
        return "is a tensor without values (of device meta, or not initialised yet)"
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {type(value).__name__}, which only stands for a tensor: give the tensor itself"
    if value.layout != torch.strided:
        return f"is not dense ({value.layout}): convert it by x.to_dense()"
    if value.is_quantized:
        return f"is quantised ({value.dtype}): convert it by x.dequantize()"
    if value.is_complex():
        return f"is {value.dtype}, no float: give real and imaginary parts as two tensors"
    return ""


def plain_tensor(value: Tensor) -> Tensor:
    """The numbers alone, on the CPU: no gradient, and no class of its own."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.detach().as_subclass(Tensor).cpu()


def comparable(value: Tensor) -> Tensor:
    """The same numbers as floats of at least 32 bits, or as integers."""
    return value.float() if value.is_floating_point() and value.element_size() < _LEAST_BYTES else value


def _kind(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic)):
        return "an array of numpy: convert it by torch.as_tensor(x)"
    if isinstance(value, (bool, int, float)):
        return f"{type(value).__name__}: make tensors of numbers and lists of them by torch.tensor(x)"
    return "None: leave it out, and give what follows it by name" if value is None else type(value).__name__
