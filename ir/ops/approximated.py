"""Functions of one number that piecewise polynomials stand for, at the model level; powers, division."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.build import MOST_FINE
from tacit.ir.functions import known_function
from tacit.ir.op import Sample
from tacit.ir.ops.arithmetic import Add, AddScalar, MulScalar
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.products import Times
from tacit.ir.types import Batch

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Function(ModelOp):
    """A function of `ir.functions`, element by element, to the error that the compiler was given."""

    name = "model.function"
    batch_anywhere = True

    function: str
    parameters: tuple[float, ...] = ()

    def wants(self, frac: int) -> int:
        return MOST_FINE if known_function(self.function).singular else 0

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return known_function(self.function).function(args[0], *self.parameters)

    def gain(self, *args: Tensor) -> Tensor:
        """The slope, of functions that are singular where they end; of others it is bounded."""
        known = known_function(self.function)
        if known.least == -math.inf:
            return torch.zeros(())
        with torch.enable_grad():
            x = args[0].detach().double().requires_grad_()
            (slope,) = torch.autograd.grad(known.function(x, *self.parameters).sum(), x)
        return slope.abs()

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = b.as_fine(args[0]) if self.wants(0) else b.at_activation_scale(args[0])
        return b.function(self.function, x, self.parameters)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls("sigmoid"), (real(_N, 7),)), Sample(cls("elu", (0.5,)), (real(_N, 7),))


# ATen operators without options that are a function by another name, or the same one.
_PLAIN = {
    "sigmoid": "sigmoid",
    "special_expit": "sigmoid",
    "tanh": "tanh",
    "silu": "silu",
    "mish": "mish",
    "selu": "selu",
    "log_sigmoid": "logsigmoid",
    "hardswish": "hardswish",
    "erf": "erf",
    "special_erf": "erf",
    "exp": "exp",
    "log": "log",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "sin": "sin",
    "cos": "cos",
    "sinh": "sinh",
    "cosh": "cosh",
    "asinh": "asinh",
    "atan": "atan",
}


class PlainFunction(Layer):
    """sigmoid, tanh, exp, ... as PyTorch has them."""

    aten = tuple(f"aten.{name}{end}.default" for name in _PLAIN for end in ("", "_"))
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return graph.emit(Function(_PLAIN[graph.target.split(".")[1].rstrip("_")]), k["self"])


class LogSigmoidForward(Layer):
    """As decompositions have it; the second result, a buffer for training, may not be used."""

    aten = ("aten.log_sigmoid_forward.default",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        return [graph.emit(Function("logsigmoid"), k["self"])]


class OtherBase(Layer):
    """Logarithms and powers to the bases 2 and 10, log(1 + x), exp(x) - 1."""

    aten = tuple(f"aten.{name}.default" for name in ("log2", "log10", "log1p", "exp2", "expm1"))
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.arithmetic import AddScalar

        x, name = k["self"], graph.target.split(".")[1]
        if name == "log1p":
            return graph.emit(Function("log"), graph.emit(AddScalar(1.0), x))
        if name == "expm1":
            return graph.emit(AddScalar(-1.0), graph.emit(Function("exp"), x))
        if name == "exp2":
            return graph.emit(Function("exp"), graph.emit(MulScalar(math.log(2)), x))
        return graph.emit(MulScalar(1 / math.log(2 if name == "log2" else 10)), graph.emit(Function("log"), x))


class Gelu(Layer):
    """torch.nn.GELU, by the error function or by tanh."""

    aten = ("aten.gelu.default", "aten.gelu_.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return graph.emit(Function("gelu_tanh" if k["approximate"] == "tanh" else "gelu"), k["self"])


class Elu(Layer):
    """torch.nn.ELU and CELU, with their alpha."""

    aten = ("aten.elu.default", "aten.elu_.default", "aten.celu.default", "aten.celu_.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        alpha = graph.scalar(k["alpha"])
        if (k.get("scale", 1), k.get("input_scale", 1)) == (1, 1):
            return graph.emit(Function("celu" if "celu" in graph.target else "elu", (alpha,)), k["self"])
        # scale elu(input_scale x): what SELU is decomposed into
        scale, inner = graph.scalar(k["scale"]), graph.scalar(k["input_scale"])
        if inner != 1:
            graph.unsupported("elu with an input_scale; scale the input by a product")
        return graph.emit(MulScalar(scale), graph.emit(Function("elu", (alpha,)), k["self"]))


class Softplus(Layer):
    """log(1 + exp(beta x)) / beta; from the threshold on PyTorch returns x, which is within exp(-threshold) of it."""

    aten = ("aten.softplus.default",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        beta, threshold = graph.scalar(k["beta"]), graph.scalar(k["threshold"])
        if threshold < 10:
            graph.unsupported(
                f"a softplus that is cut off at {threshold}, where it has a jump; thresholds are 10 or more"
            )
        if beta == 1:
            return graph.emit(Function("softplus"), k["self"])
        return graph.emit(MulScalar(1 / beta), graph.emit(Function("softplus"), graph.emit(MulScalar(beta), k["self"])))


class LogAddExp(Layer):
    """log(exp(x) + exp(y)), and that to the base 2, as y + softplus(x - y): no exponential can overflow."""

    aten = ("aten.logaddexp.default", "aten.logaddexp2.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.compare import difference

        x, y = k["self"], k["other"]
        if graph.is_weight(x):
            x, y = y, x
        base = math.log(2) if "logaddexp2" in graph.target else 1.0
        apart = difference(graph, x, y)
        apart = apart if base == 1 else graph.emit(MulScalar(base), apart)
        above = graph.emit(Function("softplus"), apart)
        above = above if base == 1 else graph.emit(MulScalar(1 / base), above)
        return graph.emit(Add(), above, y)


_ROOTS = {-1.0: "reciprocal", 0.5: "sqrt", -0.5: "rsqrt"}


class Power(Layer):
    """x to a constant exponent: a polynomial where it is a small positive integer; of x > 0 where it is no integer."""

    aten = ("aten.pow.Tensor_Scalar", "aten.pow_.Scalar", "aten.square.default", "aten.reciprocal.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        name = graph.target.split(".")[1]
        if name == "reciprocal":
            return graph.emit(Function("reciprocal"), k["self"])
        return cls.of(graph, k["self"], 2.0 if name == "square" else graph.scalar(k["exponent"]))

    @classmethod
    def of(cls, graph: Capture, x: str, exponent: float) -> str:
        if exponent == 1:
            return x
        if exponent in _ROOTS:
            return graph.emit(Function(_ROOTS[exponent]), x)
        if exponent == 0:
            graph.unsupported("the power 0, which is 1 for every input")
        if exponent < 0:
            return graph.emit(Function("inverse_power", (-exponent,)), x)
        if exponent % 2 == 0:  # never negative, which no polynomial near it promises
            half = cls.of(graph, x, exponent / 2)
            return graph.emit(Times(), half, half)
        return graph.emit(Function("integer_power" if exponent.is_integer() else "power", (exponent,)), x)


class Exponential(Layer):
    """A positive number to the power x: exp(x log(number))."""

    aten = ("aten.pow.Scalar",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        base = graph.scalar(k["self"])
        if base <= 0:
            graph.unsupported(f"a power of {base}, which is no real number for most exponents; bases are positive")
        return graph.emit(Function("exp"), graph.emit(MulScalar(math.log(base)), k["exponent"]))


class Logit(Layer):
    """log(x) - log(1 - x), of x between eps and 1 - eps: side by side, without the quotient's wide range."""

    aten = ("aten.logit.default", "aten.logit_.default", "aten.special_logit.default")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        from tacit.ir.ops.activation import Confined

        x = k["self"]
        if k["eps"] is not None:
            eps = graph.scalar(k["eps"])
            x = graph.emit(Confined(min(eps, 1 - eps), 1 - eps), x)  # where they cross, PyTorch's clamp takes the high
        rest = graph.emit(AddScalar(1.0), graph.emit(MulScalar(-1.0), x))
        minus = graph.emit(MulScalar(-1.0), graph.emit(Function("log"), rest))
        return graph.emit(Add(), graph.emit(Function("log"), x), minus)
