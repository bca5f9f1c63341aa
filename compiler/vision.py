"""torchvision beside a build of torch for which its compiled operators do not load: we need none of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

from tacit.ir.errors import CompileError

Result = TypeVar("Result")

# The operators that `import torchvision` wants to describe even where it has none.
_WANTED = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_MISSING = "torchvision::"
_declared: list[torch.library.Library] = []  # a declaration lives as long as its library


def import_torchvision() -> ModuleType:
    """The torchvision module; where the plain import misses its operators, they are declared first."""
    repair_torchvision()
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise CompileError("this needs torchvision: pip install 'tacit[examples]'") from None


def repair_torchvision() -> bool:
    """Make `import torchvision` work from now on, for whatever imports it; whether anything had to be done for it.

    The plain import is tried first: where it works, where torchvision is not installed, and where something else is
    wrong with it, which whoever imports it will see, nothing is declared. What is declared has no implementation:
    calling it is the error that it was.
    """
    try:
        importlib.import_module("torchvision")
        return False
    except Exception as error:
        _forget_halves()
        if not _misses_operators(error):
            return False
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _declared.append(library)
    for name in _WANTED:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
    return True


def with_torchvision(action: Callable[[], Result]) -> Result:
    """What `action` returns; where it fails for want of torchvision's operators, what it returns after the repair."""
    try:
        return action()
    except Exception as error:
        if not _misses_operators(error) or not repair_torchvision():
            raise
    return action()


def _misses_operators(error: BaseException | None) -> bool:
    """Also where whoever imported torchvision says it in an error of its own, as transformers does."""
    while error is not None:
        if isinstance(error, (RuntimeError, ImportError)) and _MISSING in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _forget_halves() -> None:
    """Modules of an import that failed: the next one starts anew."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchvision" and module is not None:
            del sys.modules[name]
