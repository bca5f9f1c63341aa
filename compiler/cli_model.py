"""What a command line names: a model, and examples of its inputs."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import math
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from tacit.arguments import in_order, slots_of_program
from tacit.cli_shared import Failure, read_array
from tacit.ir.errors import shortened
from tacit.vision import with_torchvision

Tensor = torch.Tensor
Model = torch.nn.Module | ExportedProgram
Example = tuple[int, ...] | Path
_MOST_ELEMENTS = 1 << 28  # of an example that is made here: two gigabytes
_LOOKED_UP = torch.nn.Embedding, torch.nn.EmbeddingBag
_NAMED = "give module:attribute or path/to/file.py:attribute, a module or a function that returns one"
_HUGE = 1e38
_INDICES = (
    " --example with a shape stands for floats: for an input that holds integers, as indices of an embedding, give the"
    " file of an array, --example indices.npy"
)
_EXPORTED = "write it by torch.export.save to a .pt2 file, with a dynamic batch"


def load_model(target: str) -> Model:
    """The model that MODEL names: an exported program, a module, or what a function of no arguments returns."""
    path = Path(target)
    if path.suffix == ".pt2" or (path.suffix != ".py" and path.is_file()):
        return _load_program(path)
    place, colon, attribute = target.rpartition(":")
    if not colon or not attribute.isidentifier():
        raise Failure(f"'{target}' is neither a .pt2 file nor module:attribute nor path/to/file.py:attribute")
    module = _guarded(f"importing {place}", lambda: _import(place))
    if not hasattr(module, attribute):
        raise Failure(f"{place} has no attribute '{attribute}'")
    found = getattr(module, attribute)
    if not isinstance(found, torch.nn.Module) and callable(found):
        found = _guarded(f"calling {target}", found)
    if not isinstance(found, (torch.nn.Module, ExportedProgram)):
        raise Failure(f"{target} is a {type(found).__name__}, not a torch.nn.Module or a function that returns one")
    return found


def _load_program(path: Path) -> ExportedProgram:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if (reason := _no_program(path)) is not None:
        raise Failure(f"reading {path} failed: it {reason}")
    with _without_log():
        program: ExportedProgram = _guarded(f"reading {path}", lambda: torch.export.load(path))
    return program


def _no_program(path: Path) -> str | None:
    """Why the file is none of torch.export.save, by the names in it alone: of a stranger's pickle nothing is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
            scripted = any("/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, UnicodeDecodeError, ValueError):
        return f"is not a file of torch.export.save, or a damaged one: {_EXPORTED}, or {_NAMED}"
    if scripted or "constants.pkl" in names:
        return f"is TorchScript, which has no graph to compile: of the original module, {_EXPORTED}, or {_NAMED}"
    if "data.pkl" in names:
        return (
            f"is a file of torch.save. A state dict has no layers, and a pickled module runs code when it is read: "
            f"build the model, load the file into it, and {_EXPORTED}, or {_NAMED}"
        )
    return None


@contextmanager
def _without_log() -> Iterator[None]:
    """What PyTorch logs of a damaged file is a traceback; the exception that follows is told."""
    log = logging.getLogger("torch.export")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _guarded(what: str, action: Callable[[], Any]) -> Any:
    """The result of code that is not ours; whatever it raises becomes one line, but for an interrupt."""
    try:
        return with_torchvision(action)
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        code = "" if error.code is None else shortened(repr(error.code))
        raise Failure(f"{what} failed: its code called sys.exit({code}) before the model was there") from None
    except BaseException as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise Failure(f"{what} failed: {type(error).__name__}: {first}") from None


def _import(place: str) -> ModuleType:
    """A module by its dotted name, from the working directory first, or a file beside which imports are looked up."""
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.exists():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def parse_example(text: str) -> Example:
    """A shape, or the file of an array."""
    if text.endswith(".npy"):
        return Path(text)
    sizes = text.lower().split("x")
    if len(sizes) < 2 or not all(size.isascii() and size.isdigit() and size.strip("0") for size in sizes):
        raise typer.BadParameter(
            f"'{shortened(text)}' is not a shape with the batch first, as in 1x1x28x28, nor a .npy file",
            param_hint="--example",
        )
    if sum(map(len, sizes)) > 100 or math.prod(map(int, sizes)) > _MOST_ELEMENTS:
        raise typer.BadParameter(
            f"'{shortened(text)}' is an example of more than {_MOST_ELEMENTS:,} numbers; a batch of 1 is enough, "
            "whatever batches are run later",
            param_hint="--example",
        )
    return tuple(map(int, sizes))


def examples_of(model: Model, given: Sequence[Example], span: tuple[float, float] | None) -> tuple[Any, ...]:
    """Those given, where only a shape is known random ones: uniform over the range, or from -1 to 1.

    Without any, those that a program carries.
    """
    carried = _carried(model)
    if not given and carried:
        return carried
    if not given:
        raise Failure("give an example of each input, its shape (--example 1x1x28x28) or a file, or calibration data")
    for one, known in zip(given, tree_leaves(carried), strict=False):
        if not isinstance(one, Path) and not known.is_floating_point():
            raise Failure(f"the program takes {known.dtype} where --example has a shape.{_INDICES}")
    low, high = span if span is not None and -_HUGE < span[0] < span[1] < _HUGE else (-1.0, 1.0)
    tensors = model.state_dict.values() if isinstance(model, ExportedProgram) else model.state_dict().values()
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in tensors) else torch.float32
    generator = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...]) -> Tensor:
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return uniform.mul_(high - low).add_(low).to(dtype)

    return tuple(read_array(one) if isinstance(one, Path) else made(one) for one in given)


def as_arguments(model: Model, given: Sequence[Tensor]) -> tuple[Any, ...]:
    """Inputs in the order in which the program, or forward, takes them."""
    return in_order(slots_of_program(model), given) if isinstance(model, ExportedProgram) else tuple(given)


def _carried(model: Model) -> tuple[Any, ...]:
    """The inputs that a program was exported with."""
    if not isinstance(model, ExportedProgram) or model.example_inputs is None:
        return ()
    arguments, keywords = model.example_inputs
    return (*arguments, *keywords.values())


def advice_of_indices(model: Model, given: Sequence[Example], said: str) -> str:
    """What to do where a shape was given for an input that holds indices: an example made of it is of floats."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    looked_up = "indices" in said or any(isinstance(module, _LOOKED_UP) for module in modules)
    if not looked_up or all(isinstance(one, Path) for one in given):
        return ""
    return f"\n{_INDICES.strip()}"
