"""Functions of one number that are approximated: what each one is, in float64, for the fit and for the tests.

Adding one from outside is `register_function("name", f)` with f of a tensor and the
parameters; a layer then writes it with `graph.emit(Function("name", (parameters,)), x)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tacit.ir.errors import CompileError

Tensor = torch.Tensor
Scalar = Callable[..., Tensor]


@dataclass(frozen=True)
class Known:
    """A function, and from where on it is defined: above `least` alone, or from it on if `closed`.

    mirrored: below -least as well, but not in between.
    """

    function: Scalar
    least: float = -math.inf
    closed: bool = False
    mirrored: bool = False

    @property
    def singular(self) -> bool:
        """Whether it is steep at the end of where it is defined: its operand should then be known precisely there."""
        return self.least > -math.inf

    def check(self, name: str, low: float, high: float) -> None:
        """Raise CompileError where the range holds a point at which the function is not defined."""
        if low > self.least or (self.closed and low == self.least) or (self.mirrored and high < -self.least):
            return
        raise CompileError(
            f"{name} is not defined everywhere in [{low:.4g}, {high:.4g}], where its operand may lie. Keep the operand "
            f"{'at or ' if self.closed else ''}above {self.least:g}: add a constant of at least a few units of the "
            "scale (2^-12 or so), clamp it from below, or square it first; where it is small, give more frac_bits"
        )


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x, threshold=50.0))


def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def _celu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0) / alpha))


FUNCTIONS: dict[str, Known] = {
    "sigmoid": Known(lambda x: torch.sigmoid(x)),
    "tanh": Known(lambda x: torch.tanh(x)),
    "silu": Known(lambda x: F.silu(x)),
    "gelu": Known(lambda x: F.gelu(x)),
    "gelu_tanh": Known(lambda x: F.gelu(x, approximate="tanh")),
    "elu": Known(_elu),
    "celu": Known(_celu),
    "selu": Known(lambda x: F.selu(x)),
    "mish": Known(lambda x: _mish(x)),
    "softplus": Known(lambda x: F.softplus(x, threshold=50.0)),
    "logsigmoid": Known(lambda x: -F.softplus(-x, threshold=50.0)),
    "hardswish": Known(lambda x: F.hardswish(x)),
    "erf": Known(lambda x: torch.erf(x)),
    "exp": Known(lambda x: torch.exp(x)),
    "sin": Known(lambda x: torch.sin(x)),
    "cos": Known(lambda x: torch.cos(x)),
    "sinh": Known(lambda x: torch.sinh(x)),
    "cosh": Known(lambda x: torch.cosh(x)),
    "asinh": Known(lambda x: torch.asinh(x)),
    "atan": Known(lambda x: torch.atan(x)),
    "log": Known(lambda x: torch.log(x), 0.0),
    "reciprocal": Known(lambda x: 1 / x, 0.0, mirrored=True),
    "sqrt": Known(lambda x: torch.sqrt(x), 0.0, True),
    "rsqrt": Known(lambda x: torch.rsqrt(x), 0.0),
    # what a norm divides by, of the sum of `count` squares, which is known no better than down to a floor
    "rsqrt_of_mean": Known(lambda x, count, eps, floor=0.0: torch.rsqrt(x.clamp(min=floor) / count + eps), 0.0, True),
    # one over a length to which eps was added, of the sum of squares
    "inverse_length": Known(lambda x, eps, floor: 1 / (x.clamp(min=floor).sqrt() + eps), 0.0, True),
    # the same two; and 0 below -gap / 2, where another form of the row is looked at
    "rsqrt_of_mean_or_none": Known(
        lambda x, count, eps, floor, gap: torch.where(x < -gap / 2, 0, torch.rsqrt(x.clamp(min=floor) / count + eps))
    ),
    "inverse_length_or_none": Known(
        lambda x, eps, floor, gap: torch.where(x < -gap / 2, 0, 1 / (x.clamp(min=floor).sqrt() + eps))
    ),
    "integer_power": Known(lambda x, exponent: torch.pow(x, exponent)),  # of a positive exponent
    "power": Known(lambda x, exponent: torch.pow(x, exponent), 0.0, True),  # of a positive exponent
    "inverse_power": Known(lambda x, exponent: torch.pow(x, -exponent), 0.0),  # of a positive exponent
}


def register_function(name: str, function: Scalar, *, least: float = -math.inf, closed: bool = False) -> None:
    """Add a function of (x, *parameters), elementwise on float64 tensors; raises CompileError for a taken name."""
    if name in FUNCTIONS and FUNCTIONS[name].function is not function:
        raise CompileError(f"there is a function '{name}' already")
    FUNCTIONS[name] = Known(function, least, closed)


def known_function(name: str) -> Known:
    if name not in FUNCTIONS:
        raise CompileError(f"there is no function '{name}'; known: {', '.join(FUNCTIONS)}")
    return FUNCTIONS[name]
