"""What a failure of the compiler itself leaves behind: a folder to send with a report, without weights or inputs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tacit.export import module_path, source_line
from tacit.ir.errors import CompilerBug, TacitError
from tacit.ir.files import write_whole
from tacit.ir.plan import Plan
from tacit.tracing import FRACTIONS

_PACKAGES = ("tacit", "torch", "numpy", "numba", "networkx", "cryptography", "safetensors")
_LONGEST = 300
# Text of an exception may hold values; numbers that could be weights, and whatever stands in brackets, are left out.
_VALUES = re.compile(
    r"tensor\([^)]*\)|\[.*\]|[-+]?\d*\.\d[\d.]*(?:[eE][-+]?\d+)?|[-+]?\d{4,}|\d+[eE][-+]?\d+", re.DOTALL
)


class Kept:
    """What the compiler had made by the time it failed; nothing is written unless it does."""

    def __init__(self) -> None:
        self.stages: list[tuple[int, str, Plan]] = []
        self._graph: tuple[torch.fx.GraphModule, Mapping[str, str]] | None = None

    def plan(self, number: int, name: str, plan: Plan) -> None:
        """A plan, by number and the pass that made it."""
        self.stages.append((number, name, plan))

    def exported(self, program: ExportedProgram) -> None:
        """The graph of PyTorch's, and what its inputs are called. Not the program, which would keep its weights."""
        named = program.graph_signature
        labels = {**named.inputs_to_parameters, **named.inputs_to_buffers, **named.inputs_to_lifted_tensor_constants}
        self._graph = program.graph_module, labels

    def files(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Names, and functions that give the contents."""
        if self._graph is not None:
            graph, labels = self._graph
            yield "exported.txt", lambda: _graph_text(graph, labels)
        for number, name, plan in self.stages:
            yield f"{number:02}_{name}.txt", plan.__str__


@contextmanager
def reported(options: Mapping[str, Any]) -> Iterator[Kept]:
    """Errors that the user can mend pass through; any other becomes CompilerBug, and leaves a folder.

    Yields what is told of the graph and of every plan that the compiler makes.
    """
    kept = Kept()
    try:
        yield kept
    except (TacitError, MemoryError):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        after = f" after {kept.stages[-1][1]}" if kept.stages else " before the first pass"
        raise CompilerBug(
            f"the compiler itself failed{after}: {type(error).__name__} in {Path(last.filename).name}:{last.lineno}."
            f" That is a mistake in Tacit, not in the model. {_report(error, kept, options)}"
        ) from error


def _report(error: Exception, kept: Kept, options: Mapping[str, Any]) -> str:
    """Write the folder, and say what to do with it."""
    try:
        folder = _write(error, kept, options)
    except OSError as refused:  # the error itself has to be told all the same
        return f"What a report needs could not be written ({refused}): set TMPDIR to a folder that has room."
    return (
        f"{folder} holds the environment, the exported graph, the plan after every pass and the traceback, without"
        " weights or inputs: please attach it to a report. The graphs show the architecture, so look at them first."
    )


def _write(error: Exception, kept: Kept, options: Mapping[str, Any]) -> Path:
    """All of its files, or nothing."""
    folder = Path(tempfile.mkdtemp(prefix="tacit-bug-"))  # mode 0700
    files: list[tuple[str, Callable[[], str]]] = [
        ("environment.txt", lambda: _environment(options)),
        ("traceback.txt", lambda: _traceback(error)),
        *kept.files(),
    ]
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        for name, content in files:
            write_whole(folder / name, _text(content).encode(errors="backslashreplace"), private=True)
        undo.pop_all()
    return folder


def _text(content: Callable[[], str]) -> str:
    try:
        return content()
    except Exception as error:  # what cannot be printed may be what is wrong
        return f"it cannot be printed: {type(error).__name__}\n"


def _graph_text(module: torch.fx.GraphModule, labels: Mapping[str, str]) -> str:
    """Every call with the shape of its result, its module and source line; of tensors nothing, of numbers integers."""
    parts = []
    for path, graph in module.named_modules():
        if isinstance(graph, torch.fx.GraphModule):
            head = [f"subgraph {path}"] if path else []
            parts.append("\n".join([*head, *(_node_text(node, labels) for node in graph.graph.nodes), ""]))
    return "\n".join(parts)


def _node_text(node: torch.fx.Node, labels: Mapping[str, str]) -> str:
    """One call. Fractions may be a layer's parameters that PyTorch wrote into the graph: they are left out."""
    value = node.meta.get("val")
    results = value if isinstance(value, (list, tuple)) else [value]
    types = [
        f"{x.dtype}[{', '.join(map(str, x.shape))}]" if isinstance(x, torch.Tensor) else type(x).__name__
        for x in results
        if x is not None
    ]
    called = FRACTIONS.sub("#", f"{node.target}{node.args}{node.kwargs or ''}")
    about = (labels.get(node.name, ""), module_path(node) and f"@{module_path(node)}", source_line(node))
    head = f"%{node.name}" + (f" : {', '.join(types)}" if types else "")
    return "  ".join(filter(None, (f"{head} = {node.op} {called}", *about)))


def _environment(options: Mapping[str, Any]) -> str:
    lines = [f"python {platform.python_version()}", f"system {platform.platform()}", f"cores {os.cpu_count()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} not installed as a package")
    return "\n".join([*lines, *(f"option {key}={value!r}" for key, value in options.items()), ""])


def _traceback(error: BaseException) -> str:
    """Files, lines and source; of messages only what cannot be a value."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        told = _VALUES.sub("#", str(cause))[:_LONGEST]
        parts.append("".join([*traceback.format_tb(cause.__traceback__), f"{type(cause).__name__}: {told}\n"]))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\nraised while handling or because of:\n\n".join(parts)
