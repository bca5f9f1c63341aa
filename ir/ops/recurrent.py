"""Recurrent layers, unrolled; running sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.op import Level, LocalOp, Sample, expect
from tacit.ir.ops.activation import ReLU
from tacit.ir.ops.affine import Linear
from tacit.ir.ops.approximated import Function
from tacit.ir.ops.arithmetic import Add, MulScalar
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.local import grown
from tacit.ir.ops.moves import Concat, Slice, taken
from tacit.ir.ops.products import Times
from tacit.ir.ranges import Interval
from tacit.ir.types import Batch, Type

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

Tensor = torch.Tensor
_N = Batch()


@dataclass(frozen=True)
class RunningSum(Layer, LocalOp):
    """Sums of all elements up to each one along an axis: the same at all levels."""

    name = "running_sum"
    levels = frozenset(Level)
    aten = ("aten.cumsum.default",)
    axes = ("dim",)
    batch_anywhere = True

    axis: int

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return graph.emit(cls(k["dim"]), k["self"])

    def is_whole(self, *operands: bool) -> bool:
        return all(operands)

    def infer(self, x: Type) -> Type:
        expect(x.kind in ("real", "secret"), f"expected a real or secret operand, found {x}")
        expect(0 < self.axis < len(x.shape), f"axis {self.axis} is not one of {x}, or is the batch")
        if x.kind == "real":
            return x
        return x.with_(width=grown(x, x.width + (x.at(1).dims[self.axis] - 1).bit_length()))

    def reference(self, oracle: Any, *args: Tensor) -> Tensor:
        return args[0].cumsum(self.axis)

    def compute(self, ring: Any, *shares: Tensor) -> Tensor:
        return shares[0].cumsum(self.axis)

    def bound(self, x: Interval) -> Interval:
        low, high, size = (v.cumsum(self.axis - 1) for v in (x.low, x.high, x.magnitude))
        return Interval.around((low + high) / 2, (high - low) / 2, size).not_below_zero(x)

    def expand(self, b: FixedBuilder, *args: str) -> str:
        return b.emit(self, *args)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(1), (Type("secret", (_N, 4, 3), 12, 20),)),)


class Recurrent(Layer):
    """torch.nn.LSTM, GRU and RNN in evaluation, from zeros, a constant or a secret state, in both directions."""

    aten = ("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
    batch_anywhere = True
    own_shapes = ("hx", "params")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        kind = graph.target.split(".")[1]
        states = k["hx"] if isinstance(k["hx"], list) else [k["hx"]]
        states = [cls._checked(graph, state, k["input"]) for state in states]
        directions, biased = 1 + k["bidirectional"], k["has_biases"]
        each = 4 if biased else 2
        if len(k["params"]) != each * directions * k["num_layers"]:
            graph.unsupported("a recurrent layer with projections")
        x, finals = k["input"], ([], [])  # type: tuple[Any, tuple[list[str], list[str]]]
        steps = graph.fixed_shape(x)[1]
        for layer in range(k["num_layers"]):
            outputs = []
            for direction in range(directions):
                place = each * (layer * directions + direction)
                order = range(steps) if direction == 0 else range(steps - 1, -1, -1)
                start = [cls._started(graph, state, layer * directions + direction) for state in states]
                run = _Run(graph, kind, [*k["params"][place : place + each]], start)
                found = run.unrolled(x, order)
                outputs.append(graph.emit(Concat(1), *found) if steps > 1 else found[0])
                finals[0].append(run.h)
                finals[1].append(run.c)
            x = graph.emit(Concat(2), *outputs) if directions > 1 else outputs[0]
        last = [graph.emit(Concat(1), *lines) if len(lines) > 1 else lines[0] for lines in finals if lines[0]]
        return [x, *last]

    @staticmethod
    def _checked(graph: Capture, state: str, x: str) -> str:
        """A start state: a constant, or N x (layers x directions) x features."""
        fits = graph.is_weight(state) or (len(graph.shape(state)) == 3 and graph.shape(state)[0] == graph.shape(x)[0])
        if not fits:
            graph.unsupported("a start state whose batch is not that of the input, in second place")
        return state

    @staticmethod
    def _started(graph: Capture, state: str, place: int) -> str:
        """The state of one layer in one direction, out of those of all; "" for zeros, of which nothing is computed."""
        if not graph.is_weight(state):
            return taken(graph, state, 1, [place])
        value = graph.value(state)[place]
        return graph.valued(graph.constant("start", value.reshape(1, 1, -1))) if bool(value.any()) else ""


class _Run:
    """One layer in one direction; h and c are N x 1 x features."""

    def __init__(self, graph: Capture, kind: str, params: list[str], start: list[str]) -> None:
        self.graph, self.kind = graph, kind
        self.inputs, self.states = params[0], params[1]
        self.biases = params[2:]
        self.size = graph.fixed_shape(params[1])[1]
        self.h, self.c = start[0], start[1] if len(start) > 1 else ""

    def start(self, states: Sequence[str], index: int) -> None:
        """Begin from this one of several layers and directions, where the states are not zeros."""
        self.h, self.c = ([taken(self.graph, state, 1, [index]) if state else "" for state in states] + [""])[:2]

    def unrolled(self, x: str, order: range) -> list[str]:
        """The outputs in the order of the sequence."""
        # What comes from the input is one product for all steps.
        projected = self.graph.emit(Linear(), x, self.inputs, *self.biases[:1])
        found = {}
        for t in order:
            self._step(taken(self.graph, projected, 1, [t]))
            found[t] = self.h
        return [found[t] for t in sorted(found)]

    def _step(self, x: str) -> None:
        g = self.graph
        recurrent = g.emit(Linear(), self.h, self.states, *self.biases[1:2]) if self.h else None
        if recurrent is None and self.biases:  # W 0 + b
            recurrent = self.biases[1]
        if self.kind == "gru":
            self._gated(x, recurrent)
            return
        total = x if recurrent is None else g.emit(Add(), x, recurrent)
        if self.kind == "lstm":
            i, f, z, o = (self._part(total, j) for j in range(4))
            gain = self._times(self._sigmoid(i), g.emit(Function("tanh"), z))
            self.c = g.emit(Add(), self._times(self._sigmoid(f), self.c), gain) if self.c else gain
            self.h = self._times(self._sigmoid(o), g.emit(Function("tanh"), self.c))
            return
        self.h = g.emit(ReLU() if self.kind == "rnn_relu" else Function("tanh"), total)

    def _gated(self, x: str, recurrent: str | None) -> None:
        """A step of a GRU: h' = n + z (h - n) with n = tanh(x_n + r (W h + b)_n)."""
        g = self.graph

        def summed(j: int) -> str:
            part = self._part(x, j)
            return part if recurrent is None else g.emit(Add(), part, self._part(recurrent, j))

        r, z, n = self._sigmoid(summed(0)), self._sigmoid(summed(1)), self._part(x, 2)
        if recurrent is not None:
            other = self._part(recurrent, 2)
            n = g.emit(Add(), n, self._weighted(r, other) if g.is_weight(other) else self._times(r, other))
        n = g.emit(Function("tanh"), n)
        minus = g.emit(MulScalar(-1.0), n)
        step = g.emit(Add(), self.h, minus) if self.h else minus
        self.h = g.emit(Add(), n, self._times(z, step))

    def _part(self, x: str, j: int) -> str:
        """The j-th gate."""
        g = self.graph
        if g.is_weight(x):
            return g.constant("gate", g.value(x)[j * self.size : (j + 1) * self.size])
        return g.emit(Slice(2, j * self.size, (j + 1) * self.size), x)

    def _sigmoid(self, x: str) -> str:
        return self.graph.emit(Function("sigmoid"), x)

    def _times(self, x: str, y: str) -> str:
        return self.graph.emit(Times(), x, y)

    def _weighted(self, x: str, w: str) -> str:
        from tacit.ir.ops.arithmetic import Mul

        return self.graph.emit(Mul(), x, w)
