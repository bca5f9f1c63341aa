"""A draft: the plan under construction, with what only the model owner has, the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from tacit.ir.plan import Plan

Tensor = torch.Tensor
Values = Mapping[str, Tensor]
# interpret(plan, weights, inputs): the value of every line, by the clear oracle.
Interpret = Callable[[Plan, Values, Values], dict[str, Tensor]]


@dataclass(frozen=True)
class Draft:
    """What passes hand on. Weights are float64 at the model level, ring integers below.

    The plan alone is public. It and the weights travel together, because folding a batch norm or choosing a
    scale changes both.
    """

    plan: Plan
    weights: Values
    probes: Values  # inputs on which scales are tried out
    interpret: Interpret
    calibration: Values = field(default_factory=dict)  # inputs that tighten the ranges; empty for none
    frac_bits: int | None = None  # fractional bits of activations; None: to be chosen

    def with_(self, plan: Plan, weights: Values | None = None, frac_bits: int | None = None) -> Draft:
        return replace(
            self,
            plan=plan,
            weights=self.weights if weights is None else weights,
            frac_bits=self.frac_bits if frac_bits is None else frac_bits,
        )
