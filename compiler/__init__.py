"""Tacit: a compiler from PyTorch models to secure three-party inference."""

from tacit.diff import diff
from tacit.driver import compile
from tacit.ir import ops as _ops
from tacit.ir.errors import (
    CompileError,
    DivergenceError,
    InputError,
    PlanError,
    ProtocolError,
    RangeError,
    TacitError,
    WeightsError,
)
from tacit.ir.plan import Plan
from tacit.secure import Secure, load

__all__ = [
    "CompileError",
    "DivergenceError",
    "InputError",
    "Plan",
    "PlanError",
    "ProtocolError",
    "RangeError",
    "Secure",
    "TacitError",
    "WeightsError",
    "compile",
    "diff",
    "load",
]
del _ops
