"""Tacit: a compiler from PyTorch models to secure three-party inference."""

from tacit.driver import compile
from tacit.ir import ops as _ops
from tacit.ir.errors import (
    CompileError,
    DivergenceError,
    InputError,
    PlanError,
    ProtocolError,
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
    "Secure",
    "TacitError",
    "WeightsError",
    "compile",
    "load",
]
del _ops
