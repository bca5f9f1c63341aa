"""Several results as one: what the client needs to take them apart again stands in the plan."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.errors import PlanError
from tacit.ir.op import Level, LocalOp, Sample, expect
from tacit.ir.ops.layer import Layer
from tacit.ir.ranges import Interval
from tacit.ir.types import Batch, Type, dim_at, shape_text

if TYPE_CHECKING:
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()
_TOKEN = re.compile(r"[()\[\]{};:]|[\w.\-]+")


@dataclass(frozen=True)
class Pack(Layer, LocalOp):
    """All results of a model side by side, N x elements, at one scale; revealed together.

    tree: the structure, as in (Nx10;[Nx3x4;{name:N}]): tuples, lists and dictionaries of shapes.
    """

    name = "pack"
    levels = frozenset(Level)
    answer = "all results of the model for each of its inputs"

    tree: str

    @staticmethod
    def of(graph: Any, lines: Sequence[str | None], spec: Any) -> Pack:
        """For these lines, structured as a pytree specification of PyTorch says."""
        return Pack(_written(graph, iter(lines), spec))

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
        shapes: list[tuple[Any, ...]] = []
        self.unpacked(shapes.append)
        return shapes

    def expand(self, b: FixedBuilder, *args: str) -> str:
        frac = max(b.types[arg].frac for arg in args)
        return b.emit(self, *(b.aligned(arg, frac) for arg in args))

    def split(self, packed: Tensor) -> Any:
        """The results in their structure, from the revealed tensor (N, elements)."""
        begin = 0

        def leaf(shape: tuple[Any, ...]) -> Tensor:
            nonlocal begin
            size = math.prod(dim_at(d, 1) for d in shape)
            piece = packed[:, begin : begin + size]
            begin += size
            return piece.reshape([dim_at(d, len(packed)) for d in shape])

        return self.unpacked(leaf)

    def unpacked(self, leaf: Callable[[tuple[Any, ...]], Any]) -> Any:
        """The structure with leaf(shape) at its leaves; raises PlanError where the text is none."""
        tokens = _TOKEN.findall(self.tree)
        expect("".join(tokens) == self.tree, f"'{self.tree}' is no structure of results")
        try:
            found = _read(tokens, leaf)
        except IndexError:
            raise PlanError(f"'{self.tree}' is no structure of results") from None
        expect(not tokens, f"'{self.tree}' is no structure of results")
        return found

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, y = Type("secret", (_N, 3), 12, 20), Type("secret", (Batch(2), 2, 2), 12, 22)
        return (Sample(cls("(Nx3;{a:2Nx2x2})"), (x, y)), Sample(cls("[Nx3]"), (x,)))


def _read(tokens: list[str], leaf: Callable[[tuple[Any, ...]], Any]) -> Any:
    first = tokens.pop(0)
    if first not in "([{":
        return None if first == "None" else leaf(Type.parse(f"real<{first}>").shape)
    closing = {"(": ")", "[": "]", "{": "}"}[first]
    items: list[tuple[str, Any]] = []
    while tokens[0] != closing:
        if items and tokens.pop(0) != ";":
            raise PlanError("items of a structure are separated by ';'")
        key = tokens.pop(0) if first == "{" else ""
        if first == "{" and tokens.pop(0) != ":":
            raise PlanError("a key is followed by ':'")
        items.append((key, _read(tokens, leaf)))
    tokens.pop(0)
    if first == "{":
        return dict(items)
    values = [value for _, value in items]
    return tuple(values) if first == "(" else values


def _written(graph: Any, lines: Any, spec: Any) -> str:
    if spec.is_leaf():
        line = next(lines)
        return "None" if line is None else shape_text(graph.shape(line))
    children = [_written(graph, lines, child) for child in spec.children()]
    if issubclass(spec.type, tuple):
        return f"({';'.join(children)})"
    if issubclass(spec.type, list):
        return f"[{';'.join(children)}]"
    keys = spec.context[0] if isinstance(spec.context, tuple) else spec.context
    if not isinstance(keys, list) or not all(isinstance(k, str) and re.fullmatch(r"[\w.\-]+", k) for k in keys):
        graph.unsupported(f"results inside a {spec.type.__name__}; return tensors, tuples, lists or dictionaries")
    return "{" + ";".join(f"{k}:{v}" for k, v in zip(keys, children, strict=True)) + "}"
