"""topk, sort, argsort, kthvalue, median: one-hot vectors that say which element is how many-eth largest.

Of equal elements the one with the lower index comes first, where PyTorch leaves the order open. Elements are compared
exactly, as they stand at the scale of activations. One of two ways is taken, by their cost:

By ranks: all pairs are compared at once; the rank of an element is how many beat it, and `embedding.OneHot` makes a
one-hot vector of it: five rounds with the product that fetches the values, for n (n - 1) / 2 comparisons.

By tournaments: the losers of each meet in the next, as many times as elements are asked for. The winners are
thresholds, and [element >= threshold], for all at once, says which element is among the first so many. That the index
breaks ties is part of what is compared: 2^bits X - index - 1 are different numbers, in the order of the integers X.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.op import Sample
from tacit.ir.ops import bilinear, local
from tacit.ir.ops.arithmetic import MulScalar, rows
from tacit.ir.ops.choice import FixedPositive
from tacit.ir.ops.embedding import OneHot
from tacit.ir.ops.known import Among
from tacit.ir.ops.layer import Layer, real
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.moves import Concat, Expand, Permute, Reshape, Slice, Take, reshaped
from tacit.ir.ops.nonlinear import FixedReLU
from tacit.ir.ops.recurrent import RunningSum
from tacit.ir.types import Batch

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()
# About what a comparison takes, offline and online, and how many bytes a round is worth (as `passes.lower` has it).
_COMPARISON_BYTES, _ROUND_BYTES = 64, 1024


def _tournaments(n: int, last: int) -> list[int]:
    """How many elements take part in each, where the places up to `last` are asked for."""
    return [n - i for i in range(last)]


def by_ranks(lines: int, n: int, last: int) -> bool:
    """Whether ranks cost less than tournaments, for so many lines of n elements."""
    sizes, one_hot = _tournaments(n, last), 8 * (n * (1 << (n - 1).bit_length()))
    pairs = _COMPARISON_BYTES * n * (n - 1) // 2 + one_hot
    matches = _COMPARISON_BYTES * (sum(size - 1 for size in sizes) + n * last)
    rounds = 3 * sum((size - 1).bit_length() for size in sizes) + 3
    return lines * pairs + 4 * _ROUND_BYTES <= lines * matches + rounds * _ROUND_BYTES


@dataclass(frozen=True)
class Places(ModelOp):
    """Where the elements of N x lines x n stand whose ranks, 0 for the largest, are `first` to `last` - 1.

    The result, N x lines x ranks x n, is 1 where an element has the rank, else 0.
    """

    name = "model.places"

    first: int
    last: int

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        order = args[0].argsort(dim=-1, descending=True, stable=True)[..., self.first : self.last]
        return (order[..., None] == torch.arange(args[0].shape[-1], device=order.device)).to(args[0].dtype)

    def margin(self, *args: Tensor) -> Tensor:
        if args[0].shape[-1] == 1:
            return torch.full_like(args[0], torch.inf)
        return args[0].sort(dim=-1).values.diff(dim=-1)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = b.at_scale(args[0])
        lines, n = b.types[x].at(1).dims[1:]
        if n == 1:
            return b.emit(Reshape((lines, 1, 1)), b.emit(FixedPositive(), b.emit(local.MulPublic(0), x)))
        return self._by_ranks(b, x, lines, n) if by_ranks(lines, n, self.last) else self._by_matches(b, x, lines, n)

    def _by_ranks(self, b: FixedBuilder, x: str, lines: int, n: int) -> str:
        pairs = list(combinations(range(n), 2))
        left, right = (b.emit(Take(2, tuple(pair[side] for pair in pairs)), x) for side in (0, 1))
        wins = b.emit(FixedPositive(), b.minus(left, right))
        loses = b.emit(local.AddPublic(1), b.emit(local.MulPublic(-1), wins))
        number = {pair: i for i, pair in enumerate(pairs)}
        beaten = [number[j, i] if j < i else len(pairs) + number[i, j] for i in range(n) for j in range(n) if j != i]
        each = b.emit(Take(2, tuple(beaten)), b.emit(Concat(2), wins, loses))
        ranks = b.emit(local.Sum((3,)), b.emit(Reshape((lines, n, n - 1)), each))
        ranks = b.known(b.emit(Reshape((lines, n)), ranks), low=0, high=n - 1)
        found = b.emit(OneHot(n), ranks)
        if self.last - self.first < n:
            found = b.emit(Slice(3, self.first, self.last), found)
        return b.emit(Permute((0, 1, 3, 2)), found)

    def _by_matches(self, b: FixedBuilder, x: str, lines: int, n: int) -> str:
        bits, count = (n - 1).bit_length(), self.last - max(0, self.first - 1)
        minus_one = b.emit(local.AddPublic(-1), b.emit(local.MulPublic(0, bits), x))
        keys = b.emit(local.Add(), b.emit(local.MulPublic(1 << bits, bits), x), b.emit(RunningSum(2), minus_one))
        winners, rest = [], keys
        for size in _tournaments(n, self.last):
            best, rest = self._tournament(b, rest, keys, size)
            winners.append(best)
        winners = winners[-count:]
        thresholds = b.emit(Reshape((lines, count, 1)), b.emit(Concat(2), *winners) if count > 1 else winners[0])
        mine = b.emit(Expand(2, count), b.emit(Reshape((lines, 1, n)), keys))
        within = b.emit(FixedPositive(), b.minus(mine, b.emit(Expand(3, n), thresholds)))
        if count == 1:
            return within
        above, upto = b.emit(Slice(2, 0, count - 1), within), b.emit(Slice(2, 1, count), within)
        steps = b.known(b.minus(upto, above), low=0, high=1)
        return steps if self.first else b.emit(Concat(2), b.emit(Slice(2, 0, 1), within), steps)

    @staticmethod
    def _tournament(b: FixedBuilder, level: str, keys: str, size: int) -> tuple[str, str]:
        """The largest of each line of `size` numbers, all of which are keys, and the others in some order."""
        losers = []
        while size > 1:
            even, odd = (b.emit(Slice(2, side, size // 2 * 2, 2), level) for side in (0, 1))
            gain = b.emit(FixedReLU(), b.minus(even, odd))
            losers.append(b.emit(Among(), b.minus(even, gain), keys))
            winners = b.emit(Among(), b.plus(odd, gain), keys)
            level = b.emit(Concat(2), winners, b.emit(Slice(2, size - 1, size), level)) if size % 2 else winners
            size -= size // 2
        return level, b.emit(Concat(2), *losers) if len(losers) > 1 else (losers or [""])[0]

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls(0, 2), (real(_N, 1, 5),)), Sample(cls(1, 3), (real(_N, 2, 40),))


@dataclass(frozen=True)
class Placed(ModelOp):
    """The elements at those places: operands places (N x lines x ranks x n), x (N x lines x n)."""

    name = "model.placed"

    def is_whole(self, *operands: bool) -> bool:
        return operands[1]

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return (args[0] @ args[1][..., None]).squeeze(-1)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        x = b.at_scale(args[1])
        lines, ranks, n = b.types[args[0]].at(1).dims[1:]
        fetched = b.emit(bilinear.MatMul(), args[0], b.emit(Reshape((lines, n, 1)), x))
        return b.emit(Among(), b.emit(Reshape((lines, ranks)), fetched), x)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 2, 3, 5), real(_N, 2, 5))),)


@dataclass(frozen=True)
class PlacedIndices(ModelOp):
    """The indices of those places (N x lines x ranks x n), without a message: sums of the ends of each line."""

    name = "model.placed_indices"

    def is_whole(self, *operands: bool) -> bool:
        return True

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0] @ torch.arange(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        lines, ranks, n = b.types[args[0]].at(1).dims[1:]
        if n == 1:
            return b.emit(Reshape((lines, ranks)), b.emit(local.MulPublic(0), args[0]))
        ends = b.emit(RunningSum(3), b.emit(Take(3, tuple(range(n - 1, 0, -1))), args[0]))
        index = b.emit(Reshape((lines, ranks)), b.emit(local.Sum((3,)), ends))
        return b.known(index, low=0, high=n - 1)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (real(_N, 2, 3, 5),)),)


class Ordered(Layer):
    """topk, sort, argsort, kthvalue and median along a dimension; of equals the first comes first."""

    aten = (
        "aten.topk.default",
        "aten.sort.default",
        "aten.sort.stable",
        "aten.argsort.default",
        "aten.argsort.stable",
        "aten.kthvalue.default",
        "aten.median.dim",
    )
    axes = ("dim",)

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str | list[str]:
        axis = k["dim"]
        line, shape = rows(graph, k["self"], [axis], True)
        n = graph.fixed_shape(line)[-1]
        first, last, largest = cls._wanted(graph, k, n)
        x = line if largest else graph.emit(MulScalar(-1.0), line)
        places = graph.emit(Places(first, last), x)

        def laid(found: str) -> str:
            """From N x lines x ranks to where the dimension was."""
            kept = [size for i, size in enumerate(shape, 1) if i != axis]
            wide = reshaped(graph, found, (*kept, last - first))
            rank = len(shape) + 1
            order = [*range(1, axis), rank - 1, *range(axis, rank - 1)]
            wide = wide if axis == rank - 1 else graph.emit(Permute((0, *order)), wide)
            return wide if k.get("keepdim", True) else reshaped(graph, wide, kept)

        indices = laid(graph.emit(PlacedIndices(), places))
        if "argsort" in graph.target:
            return indices
        values = graph.emit(Placed(), places, x)
        return [laid(values if largest else graph.emit(MulScalar(-1.0), values)), indices]

    @staticmethod
    def _wanted(graph: Capture, k: dict[str, Any], n: int) -> tuple[int, int, bool]:
        """Which ranks, from `first` to below `last`, counted from the largest element or from the smallest."""
        if "median" in graph.target:
            return (n - 1) // 2, (n - 1) // 2 + 1, False
        if "k" not in k:
            return 0, n, bool(k["descending"])
        count = k["k"]
        if not isinstance(count, int) or not 1 <= count <= n:
            graph.unsupported(f"k = {count}; it has to be a number from 1 to the {n} elements of the dimension")
        return (0, count, bool(k["largest"])) if "topk" in graph.target else (count - 1, count, False)
