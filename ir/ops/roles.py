"""Where values enter and leave: the client's input, the owner's weights, the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.cost import CLIENT, COMMON, OWNER, P0, P1, P2, PRF, ROLES, Cost, Randomness, links, ring_bytes, small_ring
from tacit.ir.op import Level, Material, Op, Program, Round, Sample, Spec, Subprotocol, expect, expect_kind
from tacit.ir.ranges import Interval
from tacit.ir.seen import Seen, Sights, to_both
from tacit.ir.types import DTYPES, RING_BITS, Batch, Dim, Shape, Type, bits_for

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_SHARED = frozenset({Level.FIXED, Level.PROTOCOL})


@dataclass(frozen=True)
class Sharing(Subprotocol):
    """A role outside shares a value: P0's share comes from a common key, P1 is sent the rest."""

    owner: int
    shape: Shape
    ring: int = RING_BITS

    def cost(self) -> Cost:
        size = ring_bytes(self.ring, self.shape)
        return Cost(1, links(**{f"{ROLES[self.owner]}_p1": size}))

    def seen(self) -> Sights:
        role = ROLES[self.owner]
        what = f"Its share of what the {role} shares."
        return {P1: (Seen(what, f"It is the value minus a stream that only P0 and the {role} have: uniform."),)}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        dtype = DTYPES[self.ring]
        if party.rank == self.owner:
            assert party.value is not None
            yield Round(send={P1: (party.value.to(dtype) - party.prf(P0).words(self.shape, dtype),)})
            return None
        if party.rank == P1:
            got = yield Round(recv={self.owner: (Spec(self.shape, dtype),)})
            return got[self.owner][0]
        yield Round()
        return party.prf(self.owner).words(self.shape, dtype)


@dataclass(frozen=True)
class Input(Op):
    """What the client brings: real numbers in [low, high], encoded with `frac` fractional bits and shared.

    `integers` says that they are whole numbers, such as indices or the targets of a count: the scale is then 0. Where
    their range is not the same everywhere, as for columns that are looked up in different tables, `along` names the
    axes along which it varies, and `lows` and `highs` list its ends, the last of these axes fastest. `by_name`: the
    model takes it as a keyword argument alone, or behind one that was left out.
    """

    name = "input"
    levels = frozenset(Level)
    roles = (P0, P1, CLIENT)
    declares = True
    rings = tuple(DTYPES)

    label: str
    low: float
    high: float
    owner: str = "client"
    integers: bool = False
    by_name: bool = False
    along: tuple[int, ...] = ()
    lows: tuple[int, ...] = ()
    highs: tuple[int, ...] = ()

    def bounded(self, low: Tensor, high: Tensor) -> Input:
        """With these ends for the elements of one input, as int64 tensors of its shape without the batch."""
        along = []
        for axis in range(low.dim()):
            first = low.narrow(axis, 0, 1), high.narrow(axis, 0, 1)
            if bool((low == first[0]).all() and (high == first[1]).all()):
                low, high = first
            else:
                along.append(axis + 1)
        ends = float(low.min()), float(high.max())
        if not along:
            return replace(self, low=ends[0], high=ends[1])
        lows, highs = (tuple(v.flatten().tolist()) for v in (low, high))
        return replace(self, low=ends[0], high=ends[1], along=tuple(along), lows=lows, highs=highs)

    def ends(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of each element, float64 of that shape, which is without the batch."""
        if not self.along:
            low, high = (torch.tensor(v, dtype=torch.float64).expand(torch.Size(shape)) for v in (self.low, self.high))
            return low, high
        varying = [size if axis in self.along else 1 for axis, size in enumerate(shape, 1)]
        low, high = (torch.tensor(v, dtype=torch.float64).reshape(varying) for v in (self.lows, self.highs))
        return low.expand(torch.Size(shape)), high.expand(torch.Size(shape))

    def infer(self, declared: Type) -> Type:
        expect(self.owner == ROLES[CLIENT], f"an input is the client's, not {self.owner}'s")
        bounds = math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high
        expect(bounds, f"[{self.low}, {self.high}] is not a range")
        self._expect_ends(declared.shape)
        if declared.kind == "real":
            return declared
        expect_kind("secret", declared)
        expect(declared.frac == 0 or not self.integers, f"whole numbers have no fractional bits, found {declared}")
        scale = 2.0**declared.frac
        need = bits_for(self.low * scale, self.high * scale)
        expect(declared.width >= need, f"values in [{self.low}, {self.high}] need {need} bits, found {declared}")
        return declared

    def _expect_ends(self, shape: Sequence[Dim]) -> None:
        """Ends that vary are listed for the places that there are, and lie within those of the whole."""
        rising = all(a < b for a, b in zip((0, *self.along), self.along, strict=False))
        expect(rising and max(self.along, default=0) < len(shape), f"{self.along} are not axes of input {self.label}")
        sizes = [size for axis, size in enumerate(shape) if axis in self.along and isinstance(size, int)]
        count = math.prod(sizes) if self.along else 0
        expect(
            len(self.lows) == len(self.highs) == count, f"input {self.label} has {count} places with ends of their own"
        )
        expect(self.integers or not self.along, f"the range of input {self.label}, which is no integers, does not vary")
        expect(
            all(self.low <= a <= b <= self.high for a, b in zip(self.lows, self.highs, strict=True)),
            f"an end of input {self.label} lies outside of [{self.low}, {self.high}]",
        )

    def discloses(self) -> str:
        varying = ", for some places less" if self.along else ""
        return f"The range of input {self.label}: {self.low:g} to {self.high:g}{varying}."

    def parts(self, declared: Type) -> tuple[Subprotocol, ...]:
        return (Sharing(CLIENT, declared.dims, declared.ring),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (Batch(), 7), 12, 16)
        columns = cls("x", -1.0, 6.0, integers=True, along=(2,), lows=(-1, 0, 0), highs=(6, 5, 0))
        return (
            *(
                Sample(cls(label, -4.0, 4.0, by_name=by_name), (x,))
                for label, by_name in (("x", False), ("mask", True))
            ),
            Sample(columns, (Type("secret", (Batch(), 2, 3), 0, 4),)),
        )

    @classmethod
    def misfits(cls) -> tuple[Sample, ...]:
        x = Type("secret", (Batch(), 7), 12, 16)
        owners = (*(role for role in ROLES if role != ROLES[CLIENT]), "nobody")
        ranges = ((math.nan, 4.0), (-4.0, math.nan), (-math.inf, 4.0), (4.0, -4.0), (-9.0, 9.0))
        three, whole = ((0, 0, 0), (3, 2, 1)), Type("secret", (Batch(), 3), 0, 4)
        ends: list[Any] = [((0,), *three), ((2,), *three), ((1, 1), *three), ((), *three)]
        ends += [((1,), (0, 0), (3, 2)), ((1,), (0, 0, 0), (3, 2, 5)), ((1,), (0, 3, 0), (3, 2, 1))]
        return (
            *(Sample(cls("x", 0.0, 3.0, integers=True, along=a, lows=b, highs=c), (whole,)) for a, b, c in ends),
            Sample(cls("x", 0.0, 3.0, along=(1,), lows=(0, 0, 0), highs=(3, 2, 1)), (whole,)),
            *(Sample(cls("x", -4.0, 4.0, owner), (x,)) for owner in owners),
            *(Sample(cls("x", low, high), (x,)) for low, high in ranges),
            Sample(cls("x", -4.0, 4.0, integers=True), (x,)),
        )


@dataclass(frozen=True)
class Weight(Op):
    """A tensor of the model owner's, shared once per session."""

    name = "weight"
    levels = frozenset(Level)
    session = True
    declares = True
    roles = (P0, P1, OWNER)
    rings = tuple(DTYPES)

    label: str
    owner: str = "owner"

    def infer(self, declared: Type) -> Type:
        expect(self.owner == ROLES[OWNER], f"a weight is the owner's, not {self.owner}'s")
        expect(not any(isinstance(d, Batch) for d in declared.shape), "a weight has no batch dimension")
        expect(declared.kind in ("real", "secret"), f"expected a secret, found {declared}")
        return declared

    def parts(self, declared: Type) -> tuple[Subprotocol, ...]:
        return (Sharing(OWNER, declared.dims, declared.ring),)

    def run(self, party: Party, *values: Any) -> Program:
        share = yield from party.part(*values)
        return None if share is None else party.ring.column_major(share)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls("fc.weight"), (Type("secret", (3, 5), 16, 20),)),)

    @classmethod
    def misfits(cls) -> tuple[Sample, ...]:
        w = Type("secret", (3, 5), 16, 20)
        owners = (*(role for role in ROLES if role != ROLES[OWNER]), "nobody")
        others = (w.with_(shape=(Batch(), 5)), w.with_(kind="client"))
        return (
            *(Sample(cls("fc.weight", owner), (w,)) for owner in owners),
            *(Sample(cls("fc.weight"), (other,)) for other in others),
        )


@dataclass(frozen=True)
class OpenMasked(Subprotocol):
    """P0 and P1 open W - B for a mask B that P2 dealt and keeps: uniform, so it tells them nothing."""

    shape: Shape
    ring: int = RING_BITS

    def randomness(self) -> tuple[Randomness, ...]:
        return (Randomness("weight mask", self.shape, small_ring(self.ring), PRF),)

    def cost(self) -> Cost:
        size = ring_bytes(self.ring, self.shape)
        return Cost(1, links(p0_p1=size, p1_p0=size))

    def seen(self) -> Sights:
        return to_both(
            Seen(
                "Weights minus a mask, opened once per session.",
                "P2 draws a mask for each weight, uniform in the whole ring, and it never hides another weight.",
            )
        )

    def deal(self, party: Party) -> Material:
        return {"b": party.mask("weight mask", self.shape, bits=self.ring)}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == P2:
            yield Round()
            return material["b"]
        (f,) = yield from party.open(values[0] - material["b"])
        return f


@dataclass(frozen=True)
class Mask(Op):
    """F = W - B, opened to P0 and P1 once per session; P2 keeps B (Beaver 1991, with a dealer).

    One mask serves one weight for the whole session, with fresh masks of the other factor each time.
    Under the same B a second weight W' would reveal W - W'; so every mask line draws a B of its own.
    """

    name = "mask"
    suite = "fused"
    levels = frozenset({Level.PROTOCOL})
    session = True
    rings = tuple(DTYPES)

    def infer(self, w: Type) -> Type:
        expect_kind("secret", w)
        return w.with_(kind="masked", width=w.ring)

    def reference(self, oracle: Any, w: Tensor) -> Tensor:
        return w

    def parts(self, w: Type) -> tuple[Subprotocol, ...]:
        return (OpenMasked(w.dims, w.ring),)

    def run(self, party: Party, *values: Any) -> Program:
        return party.ring.column_major((yield from party.part(*values)))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Type("secret", (3, 5), 16, 20),)),)


@dataclass(frozen=True)
class RevealTo(Subprotocol):
    """P0 and P1 send their shares to the client, refreshed by a common zero-sharing.

    Without the refresh the client would see shares that depend on how the answer was computed.
    """

    shape: Shape
    ring: int = RING_BITS

    def randomness(self) -> tuple[Randomness, ...]:
        return (Randomness("refresh", self.shape, small_ring(self.ring), COMMON),)

    def cost(self) -> Cost:
        size = ring_bytes(self.ring, self.shape)
        return Cost(1, links(p0_client=size, p1_client=size))

    def seen(self) -> Sights:
        return {
            CLIENT: (
                Seen(
                    "Both shares of the answer.",
                    "They are refreshed by a common random value before they are sent, so they say no more than their "
                    "sum.",
                ),
            )
        }

    def deal(self, party: Party) -> Material:
        words, dtype = small_ring(self.ring), DTYPES[self.ring]
        z = party.common("refresh", self.shape, words, lambda stream: stream.words(self.shape, dtype))
        return {} if z is None else {"z": z}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        if party.rank == CLIENT:
            spec = (Spec(self.shape, DTYPES[self.ring]),)
            got = yield Round(recv={P0: spec, P1: spec})
            return got[P0][0] + got[P1][0]
        (y,) = values
        yield Round(send={CLIENT: (y + material["z"] if party.first else y - material["z"],)})
        return None


@dataclass(frozen=True)
class Reveal(Op):
    """The client, and nobody else, learns the value."""

    name = "reveal"
    levels = _SHARED
    roles = (P0, P1, CLIENT)
    rings = tuple(DTYPES)

    to: str = "client"

    def infer(self, x: Type) -> Type:
        expect_kind("secret", x)
        expect(self.to == ROLES[CLIENT], f"an answer is for the client alone, not for {self.to}")
        return x.with_(kind="client")

    def reference(self, oracle: Any, x: Tensor) -> Tensor:
        return x

    def bound(self, x: Interval) -> Interval:
        return x

    def parts(self, x: Type) -> tuple[Subprotocol, ...]:
        return (RevealTo(x.dims, x.ring),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Type("secret", (Batch(), 10), 28, 40),)),)

    @classmethod
    def misfits(cls) -> tuple[Sample, ...]:
        x = Type("secret", (Batch(), 10), 28, 40)
        others = (*(role for role in ROLES if role != ROLES[CLIENT]), "everybody")
        return (*(Sample(cls(to), (x,)) for to in others), Sample(cls(), (x.with_(kind="client"),)))
