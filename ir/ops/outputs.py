"""Several results as one: what the client needs to take them apart again stands in the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir import tree as trees
from tacit.ir.errors import PlanError
from tacit.ir.op import Level, LocalOp, Sample, expect
from tacit.ir.ops.layer import Layer
from tacit.ir.ranges import Interval
from tacit.ir.tree import Tree
from tacit.ir.types import Batch, Type, dim_at

if TYPE_CHECKING:
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class Pack(Layer, LocalOp):
    """All results of a model side by side, N x elements, at one scale; revealed together.

    tree: the structure, as in (Nx10;[Nx3x4;{name:N:bool}];Pair(left:N;right:N)): tuples, lists, dictionaries, named
    tuples and records of shapes, with the dtype of what is no float32. A single tensor is packed for its dtype alone.
    """

    name = "pack"
    levels = frozenset(Level)
    answer = "all results of the model for each of its inputs"

    tree: str

    @staticmethod
    def of(graph: Any, tree: Tree, lines: Sequence[str], dtypes: Sequence[str]) -> Pack:
        """For these lines, in that structure; a dtype is "" for the floats of the model."""
        strange = [dtype for dtype in dtypes if dtype and dtype not in trees.DTYPES]
        if strange:
            graph.unsupported(f"a result is torch.{strange[0]}; results are {', '.join(trees.DTYPES)}")
        leaves = (trees.Leaf(graph.shape(line), dtype) for line, dtype in zip(lines, dtypes, strict=True))
        try:
            return Pack(trees.text_of(trees.with_leaves(tree, leaves)))
        except PlanError as error:
            raise graph.unsupported(f"the structure of the results: {error}") from None

    @property
    def structure(self) -> Tree:
        """What the text describes; raises PlanError where it is none."""
        return trees.parse(self.tree)

    def infer(self, *args: Type) -> Type:
        expect(len(args) > 0, "there is nothing to pack")
        for arg in args:
            expect(arg.kind in ("real", "secret") and arg.kind == args[0].kind, f"cannot pack {arg} with {args[0]}")
            expect(arg.frac == args[0].frac and arg.batched, f"cannot pack {arg} with {args[0]}: shift it first")
        shapes = [arg.at(1).dims for arg in args]
        expect(self._shapes(1) == shapes, f"{self.tree} does not describe {', '.join(map(str, args))}")
        total = sum(math.prod(shape) for shape in shapes)
        return args[0].with_(shape=(_N, total), width=max(arg.width for arg in args))

    def _shapes(self, batch: int) -> list[tuple[int, ...]]:
        return [tuple(dim_at(d, batch) for d in shape) for shape in self._typed()]

    def together(self, *args: Tensor) -> Tensor:
        rows = len(args[0]) // dim_at(self._typed()[0][0], 1)
        return torch.cat([x.reshape(rows, -1) for x in args], 1)

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        kind = max((x.dtype for x in args), key=lambda t: t.is_floating_point)
        return self.together(*(x.to(kind) for x in args))

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return self.together(*shares)

    def bound(self, *args: Interval) -> Interval:
        rows = [dim_at(shape[0], 1) for shape in self._typed()]
        parts = [
            Interval(*(v.expand(n, *v.shape).reshape(-1) for v in (x.low, x.high)))
            for n, x in zip(rows, args, strict=True)
        ]
        return Interval(torch.cat([x.low for x in parts]), torch.cat([x.high for x in parts]))

    def _typed(self) -> list[tuple[Any, ...]]:
        return [leaf.shape for leaf in trees.leaves_of(self.structure)]

    def expand(self, b: FixedBuilder, *args: str) -> str:
        frac = max(b.types[arg].frac for arg in args)
        return b.emit(self, *(b.aligned(arg, frac) for arg in args))

    def split(self, packed: Tensor, floats: torch.dtype) -> Iterator[Tensor]:
        """The results one by one, from the revealed numbers (N x elements, float64); `floats`: the default dtype."""
        begin = 0
        for leaf in trees.leaves_of(self.structure):
            size = math.prod(dim_at(d, 1) for d in leaf.shape)
            piece, dtype = packed[:, begin : begin + size], trees.DTYPES[leaf.dtype] if leaf.dtype else floats
            begin += size
            exact = piece if dtype.is_floating_point else piece.round()
            yield exact.reshape([dim_at(d, len(packed)) for d in leaf.shape]).to(dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, y = Type("secret", (_N, 3), 12, 20), Type("secret", (Batch(2), 2, 2), 12, 22)
        return (
            Sample(cls("(Nx3;{a:2Nx2x2})"), (x, y)),
            Sample(cls("[Nx3]"), (x,)),
            Sample(cls("Pair(left:Nx3:int64;right:Side{a:2Nx2x2;b:None})"), (x, y)),
        )

    @classmethod
    def misfits(cls) -> tuple[Sample, ...]:
        x = Type("secret", (_N, 3), 12, 20)
        names = ("class(a:Nx3)", "Pair(_a:Nx3)", "Pair(def:Nx3)", "Pair(a:Nx3;a:Nx3)", "{a:Nx3;a:Nx3}", "A.b{a:Nx3}")
        others = ("Nx3:complex64", "Nx3:", "(Nx3", "Nx3)", "Pair(Nx3)", "Pair[a:Nx3]", "(" * 99 + "Nx3" + ")" * 99)
        return tuple(Sample(cls(tree), (x, x) if ";" in tree else (x,)) for tree in names + others)
