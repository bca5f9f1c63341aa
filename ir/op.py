"""What an op is: one class that knows its types, its meaning, its bounds, its cost and its protocol.

Ops are frozen dataclasses; their fields are the attributes that a plan prints. Subclassing registers
an op under its `name`; the printer, the parser, the verifier, the cost report, the oracle, the
executor and the generic tests all work through this registry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tacit.ir.cost import P0, P1, P2, Cost, Link, Randomness, in_sequence
from tacit.ir.errors import PlanError
from tacit.ir.forms import REALS, Form, mapped
from tacit.ir.seen import Sights, of_randomness, together
from tacit.ir.types import DTYPES, RING_BITS, Batch, Dim, Shape, Type

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
Material = dict[str, Tensor]


class Level(Enum):
    """The stages of a plan. Each op says at which of them it may stand."""

    MODEL = "model"
    FIXED = "fixed"
    PROTOCOL = "protocol"


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that a party expects: known from the plan before it arrives."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Round:
    """What one party sends to whom in one round, and what it expects from whom."""

    send: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    recv: dict[int, tuple[Spec, ...]] = field(default_factory=dict)


Received = dict[int, tuple[Tensor, ...]]
# A party program: yields its rounds, is sent what arrived, returns its result.
Program = Generator[Round, Received, Any]


class Subprotocol:
    """A piece of protocol for operands of fixed shape: what its parties draw, say and compute."""

    def randomness(self) -> tuple[Randomness, ...]:
        """The material that one execution consumes, in the order in which `deal` produces it."""
        return ()

    def cost(self) -> Cost:
        """Rounds and online bytes; the offline bytes follow from `randomness`."""
        raise NotImplementedError

    def seen(self) -> Sights:
        """What each role is sent online, and why that tells it nothing; of what is dealt, `randomness` tells."""
        return {}

    def deal(self, party: Party) -> Material:
        """Offline: what this party draws from its streams, receives from P2, or deals as P2."""
        return {}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        """Online: the program of all parties, branching on `party.rank`."""
        raise NotImplementedError

    def full_cost(self) -> Cost:
        offline: Counter[Link] = Counter()
        for item in self.randomness():
            offline += item.offline
        return self.cost() + Cost(offline=offline)

    def all_seen(self) -> Sights:
        """Online and offline."""
        return together(self.seen(), of_randomness(self.randomness()))


@dataclass(frozen=True)
class Sample:
    """Operands for the generic tests: an op and the types of its arguments."""

    op: Op
    args: tuple[Type, ...]


class Op:
    """Base of all ops. `name` and `levels` are class attributes; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    levels: ClassVar[frozenset[Level]]
    # Evaluated once per session, before the first inference (weights, openings of their masks).
    session: ClassVar[bool] = False
    # The declared type of a line is its only operand (inputs, weights).
    declares: ClassVar[bool] = False
    # Who takes part in the online protocol of this op.
    roles: ClassVar[tuple[int, ...]] = (P0, P1, P2)
    # The rings, in bits, that all operands and the result may live in: one and the same ring, unless `changes_ring`.
    rings: ClassVar[tuple[int, ...]] = (RING_BITS,)
    # The suite of protocols that this op belongs to; "" for one that all have.
    suite: ClassVar[str] = ""
    # Whether `bound` loses nothing: what the operand's interval allows can occur. Measuring such a value tells no more.
    tight: ClassVar[bool] = False
    # Whether the result is one modulo the ring, of which no range is claimed.
    modular: ClassVar[bool] = False
    # Which value of a plan's `reveal` says the truth where the result of this op is what is revealed, beside "logits".
    reveals: ClassVar[str] = ""
    # For the leakage statement: what the client learns where the result of this op is what is revealed.
    answer: ClassVar[str] = "what the model returns for each of its inputs"
    registry: ClassVar[dict[str, type[Op]]] = {}
    # Ops of earlier versions that no plan may have any more, and why.
    retired: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            known = Op.registry.get(cls.name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(f"two ops are called '{cls.name}': {known.__qualname__} and {cls.__qualname__}")
            Op.registry[cls.name] = cls

    def infer(self, *args: Any) -> Type:
        """The type of the result; raises PlanError where the operands do not fit."""
        raise NotImplementedError

    def reference(self, oracle: Any, *args: Any) -> Tensor:
        """The meaning: on float64 tensors at the model level, on ring integers below."""
        raise NotImplementedError

    def bound(self, *args: Any) -> Any:
        """The interval of the result (fixed level), from the intervals of the operands."""
        raise NotImplementedError

    def form(self, *args: Any) -> Any:
        """The affine form of the result (fixed level, see `ir.forms`), from those of the operands, or the values of
        constants; None where the op has none."""
        return None

    def parts(self, *args: Any) -> tuple[Subprotocol, ...]:
        """The subprotocols that one execution runs, one after the other; none for a local op."""
        return ()

    def seen(self, *args: Type) -> Sights:
        """What each role is sent, and why that tells it nothing: what the parts say."""
        return together(*(part.all_seen() for part in self.parts(*args)))

    def discloses(self) -> str:
        """What the attributes make public beyond themselves, for the leakage statement; "" for nothing."""
        return ""

    def randomness(self, *args: Type) -> tuple[Randomness, ...]:
        return tuple(item for part in self.parts(*args) for item in part.randomness())

    def cost(self, *args: Type) -> Cost:
        """For operands without a symbolic batch. Composite costs are sums over the parts, never typed."""
        return in_sequence(part.full_cost() for part in self.parts(*args))

    def run(self, party: Party, *args: Any) -> Program:
        """The party program. A local op yields nothing; the default runs the single part."""
        return (yield from party.part(*args))

    def least_ring(self, *args: Type) -> int:
        """How many bits the ring of the operands needs for this op: a comparison's window, however wide they are."""
        return getattr(self, "window", 1)

    @property
    def changes_ring(self) -> bool:
        """Whether the attribute `ring` says in which ring the result lives, whatever that of the operand is."""
        return False

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        """Operands that every generic test loops over."""
        raise NotImplementedError(f"{cls.__name__} has no samples")

    @classmethod
    def misfits(cls) -> tuple[Sample, ...]:
        """Attributes and operands that the verifier has to refuse, for the generic tests."""
        return ()


class LocalOp(Op):
    """An op that P0 and P1 compute on their shares without a message: `compute` is linear."""

    levels = frozenset({Level.FIXED, Level.PROTOCOL})
    roles = (P0, P1)
    rings = tuple(DTYPES)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        raise NotImplementedError

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return self.compute(oracle.ring, *args)

    def form(self, *args: Form | Tensor) -> Form | None:
        return mapped(lambda *rows: self.reference(REALS, *rows), self.bound, args)

    def run(self, party: Party, *args: Any) -> Program:
        # Sums and public factors may have been computed in more bits: a linear map commutes with the reduction.
        return self.compute(party.ring, *args).to(party.type.dtype)
        yield  # pragma: no cover  (makes this a generator)


def expect(condition: bool, message: str) -> None:
    """A guard of type inference."""
    if not condition:
        raise PlanError(message)


def expect_kind(kind: str, *args: Type) -> None:
    for arg in args:
        expect(arg.kind == kind, f"expected a {kind} operand, found {arg}")


@lru_cache(maxsize=1 << 15)
def inferred(op: Op, args: tuple[Type, ...]) -> Type:
    """`op.infer(*args)`, remembered: a plan is verified after every pass, and most of its lines do not change."""
    _expect_numbers(op)
    for arg in args:
        expect(arg.kind == "real" or arg.ring in op.rings, f"{op.name} has no protocol in Z_2^{arg.ring}: {arg}")
        expect(arg.ring == args[0].ring, f"operands of two rings: {args[0]} and {arg}")
    return op.infer(*args)


_BITS = frozenset({"bits", "drop", "frac", "of", "truncate", "window"})  # attributes that count bits of a word


def _expect_numbers(op: Op) -> None:
    """Attributes are numbers that machines count with; raises PlanError."""
    for name, value in vars(op).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                expect(-(1 << 63) <= number < 1 << 64, f"{name} is not a number of 64 bits")
        expect(name not in _BITS or 0 <= value <= RING_BITS, f"{name} is a number of bits, from 0 to {RING_BITS}")


_PROBES = (3, 5)


def probed_shape(function: Callable[..., Tensor], *args: Type) -> tuple[Dim, ...]:
    """The shape of function(*args), from running it on shapeless tensors at two batch sizes; raises PlanError."""
    shapes = []
    for batch in _PROBES:
        operands = [torch.empty(arg.at(batch).dims, device="meta") for arg in args]
        try:
            shapes.append(function(*operands).shape)
        except (RuntimeError, IndexError, ValueError) as error:
            raise PlanError(f"it does not take {', '.join(map(str, args))}: {str(error).splitlines()[0]}") from None
    return tuple(_symbolic(a, b) for a, b in zip(*shapes, strict=True))


def _symbolic(a: int, b: int) -> Dim:
    """The dimension that is a at the first probe of the batch size and b at the second."""
    if a == b:
        return a
    if a * _PROBES[1] != b * _PROBES[0] or a % _PROBES[0]:
        raise PlanError("a dimension depends on the batch in an unsupported way")
    return Batch(a // _PROBES[0])
