"""A draft: the plan under construction, with what only the model owner has, the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tacit.ir.plan import Node, Plan
from tacit.ir.tree import Tree
from tacit.passes.seen import Looks

Tensor = torch.Tensor
Values = Mapping[str, Tensor]
# interpret(plan, weights, inputs, visit=..., estimate=...): the value of every line, by the clear oracle.
Interpret = Callable[..., dict[str, Tensor]]
LEAST_FRAC_BITS, MOST_FRAC_BITS = 4, 20  # of activations, where they are chosen here
# A network with so many values is large: each input takes a while.
_LARGE = 1 << 20
# Above so many elements over all lines, inputs are tried out in fewer or smaller batches.
_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Draft:
    """What passes hand on. Weights are as the model has them at the model level, ring integers below: in the
    words of the smaller ring where they fit, and in those of their own once it is chosen.

    The plan alone is public. It and the weights travel together, because folding a batch norm or choosing a
    scale changes both.
    """

    plan: Plan
    weights: Values
    probes: Values  # inputs on which scales are tried out: what the caller showed, and some from all over the range
    interpret: Interpret
    calibration: tuple[Values, ...] = ()  # inputs on which ranges are measured, where they are
    ranges: str = "auto"  # "proved", "measured", or measured where the proved ones do not fit
    margin: tuple[int, int] = (4, 16)  # of measured ranges: the least, and the one that is wanted
    margins: Mapping[str, int] = field(default_factory=dict)  # less than is wanted, for lines of the fixed level
    rows: tuple[int, int, int] = (0, 0, 0)  # of the calibration: shown as an example, as such, and drawn at random
    looks: Looks = field(default_factory=Looks)  # what inputs have shown so far
    answers: dict[Any, Any] = field(default_factory=dict)  # of the float network, by the inputs: see `trial`
    most: int = MOST_FRAC_BITS  # fractional bits with which values fit the ring
    frac_bits: int | None = None  # fractional bits of activations; None: to be chosen
    max_error: float | None = None  # of the polynomials that stand for functions such as sigmoid; None: by the scale
    spared: Mapping[str, int] = field(default_factory=dict)  # by how many bits the weights of a line have fewer
    finer: Mapping[str, int] = field(default_factory=dict)  # fractional bits of lines that have more than others
    sizes: Mapping[str, float] = field(default_factory=dict)  # how large lines may become, for what is divided by data
    gains: Mapping[str, float] = field(default_factory=dict)  # of layers that divide by data, how much they amplify it
    answer: Tree = None  # the structure of the results in the model's own classes; None for a lone tensor
    model: Draft | None = None  # below the model level: the draft that was written in fixed point
    edges: Values = field(default_factory=dict)  # as `probes`: blank and nearly blank inputs
    kinds: tuple[str, ...] = ()  # of the edges: blank, faint (around a value) or dim (around zero)
    floats: Callable[[Values], Tensor | None] = lambda inputs: None  # what PyTorch itself answers, if it can tell
    usual: float = 0.0  # the largest number that the network answers to what was shown
    searched: bool = False  # whether the scale was chosen here
    free: bool = False  # and how far polynomials may be off, as the caller has not said
    doubts: tuple[Warning, ...] = ()  # of what the caller has to be warned
    faithful: bool = False  # whether the edges are to be tried out bit for bit, with truncations as they are dealt
    close: tuple[int, ...] = ()  # the probes that are to be tried out with many draws of the truncations

    def with_(self, plan: Plan, weights: Values | None = None, frac_bits: int | None = None) -> Draft:
        return replace(
            self,
            plan=plan,
            weights=self.weights if weights is None else weights,
            frac_bits=self.frac_bits if frac_bits is None else frac_bits,
        )

    def estimate(
        self,
        inputs: Values,
        visit: Callable[[Node, Tensor], None] | None = None,
        *,
        faithful: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        """The result of the plan as it stands, in float32 where that is faster; `visit` is shown every value.

        faithful: in float64 or ring integers instead, and truncations round up or down by chance, as they do among the
        parties. Rounding to the nearest makes equal elements equal again, which hides what a norm of them does.
        seed: of that chance; without it, they round to the nearest, unless the estimate is faithful.
        """
        how: dict[str, Any] = {} if faithful else {"estimate": True}
        if faithful or seed is not None:
            how["chance"] = torch.Generator().manual_seed(seed or 0)
        found = self.interpret(self.plan, self.weights, inputs, visit=visit or _look_away, **how)
        return found[self.plan.result]

    def chunks(self, inputs: Values) -> Iterator[Values]:
        """The inputs in batches that are affordable."""
        rows, size = len(next(iter(inputs.values()))) if inputs else 0, self.affordable
        for i in range(0, rows, size):
            yield {label: x[i : i + size] for label, x in inputs.items()}

    @property
    def large(self) -> bool:
        return is_large(self.plan)

    @property
    def affordable(self) -> int:
        """How many inputs may go through the network at once: memory and time stay in proportion to the model."""
        return max(1, _ELEMENTS // max(elements(self.plan), 1))


def is_large(plan: Plan) -> bool:
    """Whether each input takes a while."""
    return elements(plan) > _LARGE


def elements(plan: Plan) -> int:
    """Values that one input has in the network."""
    return sum(node.type.at(1).numel for node in plan.nodes if node.type.batched)


def _look_away(node: Node, value: Tensor) -> None:
    """Nobody wants the values in between."""
