"""Builders: how passes and captures write plans, one line after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from tacit.ir.errors import CompileError, PlanError
from tacit.ir.op import Level, Op, inferred
from tacit.ir.plan import Node, Plan
from tacit.ir.types import DTYPES, RING_BITS, SMALL_RING_BITS, Type, bits_for

Tensor = torch.Tensor


# A factor may carry so many fractional bits too many: the widest products still fit the ring easily.
_TOLERATED_EXCESS = 6
# A weight tensor below 2^-6 is small: it gets more fractional bits, so that as many count as of others. No more than
# 48 with those of what it is multiplied by; and none takes more than 40 bits.
_SMALL, _MOST_WEIGHT_BITS, _HUGE = 6, 48, 40


# How large a value may be of which nothing else is known.
_USUAL_REACH = 2.0**7
# Fractional bits of what is divided by, or looked at on a logarithmic scale: float32 has as many for values around 1.
MOST_FINE = 30
# By so many bits a value is known better than what it is told from: an eps per element, or its own least size.
_FINE = 14


def fine_enough(size: float, frac: int = 0) -> int:
    """Fractional bits of what is divided by its own size, where that is at least so much.

    frac: those that are wanted of the quotient, if it is divided by its own size in turn.
    """
    return min(MOST_FINE, max(_FINE, frac) - math.floor(math.log2(max(size, 2.0**-MOST_FINE))))


class Label(str):
    """The name of a weight, as distinct from the name of a line."""

    __slots__ = ()


class Builder:
    """Collects nodes; infers the type of each from its operands.

    reserved: names that lines to come will bear, and that no line in between may take.
    """

    def __init__(self, level: Level, *, reserved: Iterable[str] = ()) -> None:
        self.level = level
        self.nodes: list[Node] = []
        self.types: dict[str, Type] = {}
        self._reserved = frozenset(reserved)
        self.path = ""
        self.source = ""
        self.origin = ""
        self._count = 0

    @contextmanager
    def at(self, path: str, source: str, origin: str = "") -> Iterator[None]:
        """Lines written inside stem from this module and source line, and from this line of the model level."""
        self.path, self.source, self.origin = path, source, origin
        yield
        self.path, self.source, self.origin = "", "", ""

    def fresh(self, prefix: str = "") -> str:
        """A name that is not taken yet: %0, %1, ... or %w0, %m3."""
        while True:
            name = f"{prefix}{self._count}"
            self._count += 1
            if name not in self.types and name not in self._reserved:
                return name

    def declare(self, op: Op, declared: Type, *, name: str) -> str:
        """A line whose type is declared rather than inferred: an input or a weight."""
        return self._append(Node(name, op, (), op.infer(declared), self.path, self.source, self.origin))

    def emit(self, op: Op, *args: str, name: str = "", width: int | None = None) -> str:
        """`%name = op %args`; raises CompileError, naming the module, where the types do not fit."""
        try:
            found = inferred(op, tuple(self.types[arg] for arg in args))
        except PlanError as error:
            where = f" (module '{self.path}', {self.source})" if self.path or self.source else ""
            raise CompileError(f"{op.name}{where}: {error}") from None
        found = found if width is None else found.with_(width=width)
        return self._append(Node(name or self.fresh(), op, args, found, self.path, self.source, self.origin))

    def copy(self, node: Node) -> str:
        return self._append(node)

    def _append(self, node: Node) -> str:
        if node.name in self.types:
            raise PlanError(f"%{node.name} is defined twice")
        self.nodes.append(node)
        self.types[node.name] = node.type
        return node.name

    def plan(self, like: Plan, result: str) -> Plan:
        """The finished plan, with the header of another one."""
        return like.with_nodes(self.nodes, result=result, level=self.level)


class FixedBuilder(Builder):
    """Writes the fixed level: knows the scales, encodes weights, truncates where a product needs it.

    `frac` are the fractional bits of inputs and activations, `weight_frac` those of weights. A weight's
    precision costs no bit of any comparison, because the truncation after its product drops it again.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        frac: int,
        weight_frac: int,
        max_error: float = 2.0**-10,
        spared: Mapping[str, int] | None = None,
        finer: Mapping[str, int] | None = None,
        sizes: Mapping[str, float] | None = None,
        gains: Mapping[str, float] | None = None,
        outline: bool = False,
    ) -> None:
        """`spared`: by how many bits the weights of a line of the model level have fewer. `finer`: how many fractional
        bits the result of a line has, where it is to have more than others. `sizes`: how large it may become. `gains`:
        how much it may amplify small differences of what it reads. `outline`: the plan alone is wanted, and encoded
        weights hold no data."""
        super().__init__(Level.FIXED)
        self.max_error = max_error
        self._frac = frac
        self._finer = finer or {}
        self._sizes = sizes or {}
        self._gains = gains or {}
        self._origins: dict[str, str] = {}
        self._weight_frac = weight_frac
        self._spared = spared or {}
        self._real = dict(weights)
        self._outline = outline
        self._found_ends: dict[str, tuple[float, float]] = {}
        self.encoded: dict[str, Tensor] = {}
        self._emitted: dict[tuple[Op, tuple[str, ...]], str] = {}
        self._weight_nodes: dict[tuple[str, int, tuple[int, ...]], str] = {}

    @property
    def frac(self) -> int:
        """The fractional bits of activations in the line of the model level that is being written."""
        return max(self._frac, self._finer.get(self.origin, 0))

    @property
    def weight_frac(self) -> int:
        """The fractional bits of weights in the line of the model level that is being written."""
        return self._weight_frac - self._spared.get(self.origin, 0)

    @property
    def gain(self) -> float:
        """How large the factor may become by which the line that is being written amplifies what it reads."""
        return self._gains.get(self.origin, math.inf)

    def bits_of(self, label: str, *beside: str | None) -> int:
        """The fractional bits of a weight tensor: more where all of it is small, fewer where some of it is huge.

        beside: what is added to its product, whose rounding then counts as well.
        """
        ends = [self._ends(one) for one in (label, *beside) if one is not None]
        return self._suited(max(max(-low, high) for low, high in ends))

    def bits_of_number(self, value: float) -> int:
        """As `bits_of`, of a factor that the plan tells."""
        return self._suited(abs(value))

    def _suited(self, largest: float) -> int:
        usual = self.weight_frac
        if not 0 < largest < math.inf:
            return usual
        exponent = math.frexp(largest)[1]  # largest < 2^exponent
        if exponent < -_SMALL:
            return max(usual, min(usual - _SMALL - exponent, _MOST_WEIGHT_BITS - self.frac))
        return min(usual, max(0, _HUGE - exponent))

    def emit(self, op: Op, *args: str, name: str = "", width: int | None = None) -> str:
        """As every builder; what was computed before is not computed again."""
        key = (op, args)
        if key not in self._emitted:
            self._emitted[key] = super().emit(op, *args, name=name, width=width)
            self._origins[self._emitted[key]] = self.origin
        return self._emitted[key]

    def reach(self, x: str) -> float:
        """How large the value may become of whose line of the model level this is the last one."""
        return self._sizes.get(self._origins.get(x, x), _USUAL_REACH)

    def _ends(self, label: str) -> tuple[float, float]:
        """The least and the greatest element of a weight tensor."""
        if label not in self._found_ends:
            value = self._real[label]
            low, high = torch.aminmax(value) if value.numel() else torch.zeros(2)
            self._found_ends[label] = float(low), float(high)
        return self._found_ends[label]

    def real(self, label: str) -> Tensor:
        return self._real[label]

    def new(self, label: str, suffix: str, value: Tensor) -> Label:
        """A weight made of another one, under a label of its own."""
        made = Label(f"{label}.{suffix}")
        self._real[made] = value
        self._found_ends.pop(made, None)
        return made

    def derived(self, label: str, suffix: str, shape: tuple[int, ...]) -> Label:
        """The same weight in another shape."""
        return self.new(label, suffix, self._real[label].reshape(shape))

    def weight(self, label: str, frac: int, shape: tuple[int, ...] | None = None) -> str:
        """The line that holds this weight at this scale, written at its first use."""
        value = self._real[label]
        value = value if shape is None else value.reshape(shape)
        key = (label, frac, tuple(value.shape))
        if key not in self._weight_nodes:
            self._weight_nodes[key] = self._encode(label, value, frac)
        return self._weight_nodes[key]

    def _encode(self, label: str, value: Tensor, frac: int) -> str:
        from tacit.ir.ops.roles import Weight

        low, high = (end * 2.0**frac for end in self._ends(label))
        if not -(2.0**62) < low <= high < 2.0**62:  # NaN is not below anything
            raise CompileError(f"weight '{label}' holds {_misfit(value, frac)}")
        copies = sum(name == label or name.startswith(f"{label}.copy") for name in self.encoded)
        unique = f"{label}.copy{copies}" if copies else str(label)
        # Several drafts are held while scales and rings are tried out: nearly all weights take half of 64 bits.
        small = bits_for(low, high) <= SMALL_RING_BITS
        self.encoded[unique] = _encoded(value, frac, DTYPES[SMALL_RING_BITS if small else RING_BITS], self._outline)
        declared = Type("secret", tuple(value.shape), frac)
        return self.declare(Weight(unique), declared, name=self.fresh("w"))

    def broadcast_to(self, x: str, shape: tuple[int, ...]) -> str:
        """x repeated where a weight of that shape has more elements: a product is as large as its first factor."""
        from tacit.ir.ops.moves import Expand

        rank = len(self.types[x].shape)
        for axis, size in enumerate(shape[::-1]):
            place = rank - 1 - axis
            if size > 1 and self.types[x].at(1).dims[place] == 1:
                x = self.emit(Expand(place, size), x)
        return x

    def relu(self, x: str) -> str:
        """max(x, 0) at the scale of activations: where x has more bits, the truncation is fused."""
        from tacit.ir.ops.nonlinear import FixedReLU

        return self.emit(FixedReLU(max(0, self.types[x].frac - self.frac)), x)

    def function(
        self,
        name: str,
        x: str,
        parameters: tuple[float, ...] = (),
        *,
        frac: int | None = None,
        error: float | None = None,
        relative: bool = False,
    ) -> str:
        """A function of one number, by name (see `ir.functions`), with `frac` fractional bits; of x as it stands."""
        from tacit.ir.ops.spline import FixedFunction

        frac, error = self.frac if frac is None else frac, self.max_error if error is None else error
        return self.emit(FixedFunction(name, self.types[x].frac, frac, error, parameters, relative), x)

    def known(self, x: str, *, low: float = -(2.0**63), high: float = 2.0**63) -> str:
        """x with the claim that its ring integers lie between low and high, roundings included."""
        from tacit.ir.ops.known import Known

        return self.emit(Known(float(low), float(high)), x)

    def plus_scalar(self, x: str, value: float) -> str:
        from tacit.ir.ops.local import AddPublic

        return self.emit(AddPublic(self.constant(value, self.types[x].frac)), x) if value else x

    def minus(self, x: str, y: str) -> str:
        """x - y, at the larger of the two scales."""
        from tacit.ir.ops.local import Sub

        frac = max(self.types[x].frac, self.types[y].frac)
        return self.emit(Sub(), self.aligned(x, frac), self.aligned(y, frac))

    def at_scale(self, x: str) -> str:
        """x with no more than `frac` fractional bits: truncated where it has more."""
        return self.at_precision(x, self.frac)

    def at_precision(self, x: str, frac: int) -> str:
        """x with no more than that many fractional bits."""
        from tacit.ir.ops.nonlinear import Trunc

        excess = self.types[x].frac - frac
        return self.emit(Trunc(excess), x) if excess > 0 else x

    def at_activation_scale(self, x: str) -> str:
        """x with exactly `frac` fractional bits."""
        x = self.at_scale(x)
        return self.aligned(x, self.frac)

    def as_fine(self, x: str) -> str:
        """x with the bits that it has, as far as functions take them, and no fewer than activations."""
        x = self.at_precision(x, max(self.frac, MOST_FINE))
        return self.aligned(x, max(self.frac, self.types[x].frac))

    def as_factor(self, x: str) -> str:
        """x as an operand of a product: a few bits above the scale are left to the next truncation, at no cost."""
        return self.at_scale(x) if self.types[x].frac - self.frac > _TOLERATED_EXCESS else x

    def aligned(self, x: str, frac: int) -> str:
        """x with exactly that many fractional bits, by a shift to the left: no message."""
        from tacit.ir.ops.local import MulPublic

        missing = frac - self.types[x].frac
        return self.emit(MulPublic(1 << missing, missing), x) if missing else x

    def product(self, op: Op, x: str, label: str, bias: str | None, bias_shape: tuple[int, ...]) -> str:
        """op(x, weight) + bias, the bias at the scale of the product: no message, no truncation."""
        out = self.emit(op, self.as_factor(x), self.weight(label, self.bits_of(label, bias)))
        return out if bias is None else self.plus_weight(out, bias, bias_shape)

    def plus_weight(self, x: str, label: str, shape: tuple[int, ...]) -> str:
        from tacit.ir.ops.local import Add

        return self.emit(Add(), x, self.weight(label, self.types[x].frac, shape))

    def plus(self, x: str, y: str) -> str:
        """x + y, at the larger of the two scales."""
        from tacit.ir.ops.local import Add

        frac = max(self.types[x].frac, self.types[y].frac)
        return self.emit(Add(), self.aligned(x, frac), self.aligned(y, frac))

    def constant(self, value: float, bits: int) -> int:
        scaled: int = round(value * 2**bits)
        if abs(scaled) >= 1 << 62:
            raise CompileError(f"the constant {value} is too large for {bits} fractional bits")
        return scaled


def _encoded(value: Tensor, frac: int, dtype: torch.dtype, outline: bool) -> Tensor:
    if outline:
        return torch.empty(value.shape, dtype=dtype, device="meta")
    return value.to(torch.float64, copy=True).mul_(2.0**frac).round_().to(dtype)


def _misfit(value: Tensor, frac: int) -> str:
    """What a constant holds that fixed point has not."""
    if bool(value.isnan().any()):
        return "NaN, which is no number: look for a division by zero or a logarithm where it is made"
    if bool(value.isinf().any()):
        return (
            "infinity, and fixed point has finite numbers. Minus infinity is taken as a mask of scores, in what is "
            "added to them and read by a softmax alone; elsewhere, write a finite number"
        )
    return f"a value too large for {frac} fractional bits: scale it down, or give fewer frac_bits"
