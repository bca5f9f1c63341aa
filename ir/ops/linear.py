"""Products with secret weights: Beaver's multiplication with a dealt triple and a mask opened once.

With A fresh for every inference and B fixed for the session, P0 and P1 open E = X - A and hold
F = W - B: X W = E W + A F + A B. The last two terms do not depend on the input and are ready before it
arrives; online is one opening and one product at each party (SecureNN, Algorithm 1, with Beaver's
openings hoisted). Convolutions use triples of the convolution's own shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tacit.ir.cost import DEALT, P2, PRF, Cost, Randomness, links, ring_bytes, small_ring
from tacit.ir.forms import Form, mapped
from tacit.ir.op import Level, Material, Op, Program, Sample, Subprotocol, expect, expect_kind
from tacit.ir.ranges import Interval
from tacit.ir.seen import OPENED, Sights
from tacit.ir.types import DTYPES, RING_BITS, Batch, Shape, Type, broadcast
from tacit.ir.windows import inside, output_size

if TYPE_CHECKING:
    from tacit.runtime.party import Party

Tensor = torch.Tensor
_N = Batch()
# Multiply-adds that finding the bounds of one convolution may take.
_CHEAP = 1 << 26


@dataclass(frozen=True)
class Product(Op):
    """Base of the products x * w: a bilinear map, with the scale of both factors in the result."""

    levels = frozenset({Level.FIXED})

    def product(self, ring: Any, x: Tensor, w: Tensor) -> Tensor:
        """The bilinear map on ring integers."""
        raise NotImplementedError

    def real_product(self, x: Tensor, w: Tensor) -> Tensor:
        """The same map on float64, for intervals."""
        raise NotImplementedError

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return self.product(oracle.ring, args[0], args[1])

    def bound(self, x: Interval, w: Interval) -> Interval:
        """Centre and radius: |W| maps the radius. Exact for each element up to rounding."""
        centre = self.real_product(x.centre[None], w.low)[0]
        radius, size = self.real_product(torch.stack([x.radius, x.magnitude]), w.low.abs())
        return Interval.around(centre, radius, size)

    def form(self, *args: Form | Tensor) -> Form | None:
        return mapped(self.real_product, self.bound, args)

    def work(self, out: Type, w: Type) -> int:
        """Multiply-adds for one input, from the types of the result and of the second factor."""
        return out.numel * w.numel // w.dims[0]


@dataclass(frozen=True)
class FixedLinear(Product):
    """x (N, ..., I) times the transpose of w (O, I); or w (I, O) itself, if it is `rows`: those of a table."""

    name = "fixed.linear"

    rows: bool = False

    def infer(self, x: Type, w: Type) -> Type:
        expect_kind("secret", x, w)
        expect(len(w.shape) == 2, f"{x} does not fit a weight {w}")
        out, inner = w.shape[::-1] if self.rows else w.shape
        expect(x.shape[-1] == inner, f"{x} does not fit a weight {w}")
        return x.with_(shape=(*x.shape[:-1], out), frac=x.frac + w.frac, width=x.ring)

    def product(self, ring: Any, x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = ring.linear(x, w.t() if self.rows else w)
        return out

    def real_product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w.t() if self.rows else w)

    def work(self, out: Type, w: Type) -> int:
        return out.numel * w.dims[0 if self.rows else 1]

    def bound(self, x: Interval, w: Interval) -> Interval:
        """Features are bounded one by one; for large values, alike at all places of the other dimensions."""
        shape = (*x.shape[:-1], w.low.shape[1 if self.rows else 0])
        return super().bound(x.per_channel(-1).narrowed(keep=(-1,)), w).expand(shape)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        w = Type("secret", (5, 7), 16, 20)
        shapes = ((_N, 7), False), ((_N, 3, 7), False), ((_N, 5), True)
        return tuple(s for shape, rows in shapes for s in _samples(cls(rows), Type("secret", shape, 12, 16), w))


@dataclass(frozen=True)
class FixedConv2d(Product):
    """Cross-correlation of x (N, C, H, W) with w (O, C / groups, KH, KW)."""

    name = "fixed.conv2d"

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def infer(self, x: Type, w: Type) -> Type:
        expect_kind("secret", x, w)
        expect(len(x.shape) == 4 and len(w.shape) == 4, f"expected N x C x H x W and four weight dimensions: {x}, {w}")
        kernel = w.dims
        expect(
            x.shape[1] == kernel[1] * self.groups and kernel[0] % self.groups == 0,
            f"{x} does not fit a weight {w} in {self.groups} groups",
        )
        out = [
            output_size(*args, ceil_mode=False)
            for args in zip(x.at(1).dims[2:], kernel[2:], self.stride, self.padding, self.dilation, strict=True)
        ]
        return x.with_(shape=(x.shape[0], kernel[0], *out), frac=x.frac + w.frac, width=x.ring)

    def product(self, ring: Any, x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = ring.conv2d(x, w, self.stride, self.padding, self.dilation, self.groups)
        return out

    def real_product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def bound(self, x: Interval, w: Interval) -> Interval:
        """Element by element where that is cheap, else channel by channel: see `_channels`."""
        sizes = [
            output_size(*args, ceil_mode=False)
            for args in zip(x.shape[1:], w.low.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        ]
        if math.prod(sizes) * w.low.numel() <= _CHEAP:
            return super().bound(x, w)
        narrow = x.hull((1, 2)).narrowed(keep=(0,))
        return self._channels(narrow, w.low, x.shape[1:]).expand((len(w.low), *sizes))

    def _channels(self, x: Interval, weight: Tensor, size: Sequence[int]) -> Interval:
        """Bounds of each channel of the result, (O, 1, 1): over all sets of taps that lie inside the image somewhere.

        Each tap contributes its own interval, the same at every place; where it hangs over the edge, nothing.
        """
        kernel = weight.shape[2:]
        taps = weight.reshape(self.groups, -1, weight.shape[1], kernel.numel())
        centre, radius, reach = (v.reshape(self.groups, -1) for v in (x.centre, x.radius, x.magnitude))
        found = [torch.einsum("gock,gc->gok", taps, centre)]
        taps = taps.abs()
        found += [torch.einsum("gock,gc->gok", taps, v) for v in (radius, reach)]
        ranges = [inside(*args) for args in zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)]
        places = [(slice(a, b), slice(c, d)) for a, b in ranges[0] for c, d in ranges[1]]
        tapwise = [t.reshape(-1, *kernel) for t in found]
        sums = [torch.stack([t[:, rows, columns].sum((1, 2)) for rows, columns in places]) for t in tapwise]
        all_places = Interval.around(*sums)
        return Interval(all_places.low.amin(0).view(-1, 1, 1), all_places.high.amax(0).view(-1, 1, 1))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 4, 6, 5), 12, 16)
        return _samples(cls(), x, Type("secret", (3, 4, 3, 2), 16, 20)) + _samples(
            cls((2, 1), (1, 2), (2, 1), 2), x, Type("secret", (6, 2, 2, 3), 16, 20)
        )


@dataclass(frozen=True)
class FixedMul(Product):
    """x times w element by element, with numpy's broadcasting of w."""

    name = "fixed.mul"

    def infer(self, x: Type, w: Type) -> Type:
        expect_kind("secret", x, w)
        shape = broadcast(x.shape, w.shape)
        expect(shape == x.shape, f"{w} is larger than {x}")
        return x.with_(shape=shape, frac=x.frac + w.frac, width=x.ring)

    def product(self, ring: Any, x: Tensor, w: Tensor) -> Tensor:
        return x * w

    def real_product(self, x: Tensor, w: Tensor) -> Tensor:
        return x * w

    def work(self, out: Type, w: Type) -> int:
        return out.numel

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return _samples(cls(), Type("secret", (_N, 4, 3, 2), 12, 16), Type("secret", (4, 1, 1), 16, 20))


@dataclass(frozen=True)
class Triple(Subprotocol):
    """One product by a triple (A, B, A B) whose second mask belongs to the session."""

    op: Product
    x_shape: Shape
    out_shape: Shape
    ring: int = RING_BITS

    def randomness(self) -> tuple[Randomness, ...]:
        words = small_ring(self.ring)
        return (Randomness("triple a", self.x_shape, words, PRF), Randomness("triple ab", self.out_shape, words, DEALT))

    def cost(self) -> Cost:
        size = ring_bytes(self.ring, self.x_shape)
        return Cost(1, links(p0_p1=size, p1_p0=size))

    def seen(self) -> Sights:
        return OPENED

    def deal(self, party: Party) -> Material:
        a = party.mask("triple a", self.x_shape, bits=self.ring)
        known = self.op.product(party.ring, a, party.operands[2])  # A B at P2, A_i F at P0 and P1
        ab = party.share("triple ab", self.out_shape, known, bits=self.ring)
        return {} if ab is None else {"a": a, "ready": known.add_(ab)}

    def run(self, party: Party, material: Material, *values: Any) -> Program:
        x, w, _ = values
        (e,) = yield from party.open(None if party.rank == P2 else x - material["a"])
        return None if party.rank == P2 else self.op.product(party.ring, e, w).add_(material["ready"])


class _Beaver(Product):
    """The protocol of a product: operands x, w and the mask line of w."""

    levels = frozenset({Level.PROTOCOL})
    suite = "fused"
    rings = tuple(DTYPES)

    def infer(self, *args: Type) -> Type:
        expect(len(args) == 3, f"{self.name} takes x, w and the mask of w")
        x, w, m = args
        expect_kind("masked", m)
        expect(m.shape == w.shape and m.frac == w.frac, f"{m} is not a mask of {w}")
        return super().infer(x, w)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return self.product(oracle.ring, args[0], args[1])

    def parts(self, x: Type, w: Type, m: Type) -> tuple[Subprotocol, ...]:
        return (Triple(self, x.dims, self.infer(x, w, m).dims, x.ring),)


class Linear(_Beaver, FixedLinear):
    """[X][W]^T with a Beaver triple dealt by P2 (SecureNN, Algorithm 1)."""

    name = "linear"


class Conv2d(_Beaver, FixedConv2d):
    """Convolution with a Beaver triple of the convolution's shapes."""

    name = "conv2d"


class Mul(_Beaver, FixedMul):
    """Element-wise product with a Beaver triple."""

    name = "mul"


def _samples(op: Product, x: Type, w: Type) -> tuple[Sample, ...]:
    masked = (w.with_(kind="masked", width=w.ring),) if isinstance(op, _Beaver) else ()
    return (Sample(op, (x, w, *masked)),)
