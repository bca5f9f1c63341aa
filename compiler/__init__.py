"""Tacit: a compiler from PyTorch models to secure three-party inference."""

from tacit.diff import diff
from tacit.driver import compile
from tacit.ir import ops as _ops
from tacit.ir.errors import (
    CompileError,
    CompilerBug,
    DeploymentError,
    DivergenceError,
    InputError,
    PartyError,
    PlanError,
    PrecisionWarning,
    ProtocolError,
    RangeError,
    RangeWarning,
    RefusedError,
    TacitError,
    WeightsError,
)
from tacit.ir.plan import Plan
from tacit.machine import find as _find
from tacit.progress import configure_log as _configure_log
from tacit.remote import Remote, connect, push
from tacit.secure import Secure, load

__all__ = [
    "CompileError",
    "CompilerBug",
    "DeploymentError",
    "DivergenceError",
    "InputError",
    "PartyError",
    "Plan",
    "PlanError",
    "PrecisionWarning",
    "ProtocolError",
    "RangeError",
    "RangeWarning",
    "RefusedError",
    "Remote",
    "Secure",
    "TacitError",
    "WeightsError",
    "compile",
    "connect",
    "diff",
    "load",
    "push",
]
_configure_log()
del _configure_log, _find, _ops
