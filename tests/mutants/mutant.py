"""A mutant: named changes of functions, found by their qualified names, and the tests that should notice."""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass

# In a copy, the environment names a file in which a mutation notes that it was reached, or that the code it was made
# for is no longer what runs: `mark(STALE)`.
MARKS, REACHED, STALE = "TACIT_MUTANT", "reached", "stale"


class NotApplied(Exception):
    """The code is no longer what the mutant was written for; says what is missing."""


@dataclass(frozen=True)
class Wrap:
    """Calls of a function go to `mutant(plain, ...)` instead; `source` defines it in the names of the module.

    Its parameters are those of the function, so that it follows no other function by accident.
    """

    path: str
    function: str
    source: str


@dataclass(frozen=True)
class Edit:
    """One piece of a function's text is replaced; it has to occur there exactly once."""

    path: str
    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Rebind:
    """A constant of a module has another value."""

    path: str
    name: str
    value: str


Change = Wrap | Edit | Rebind


@dataclass(frozen=True)
class Mutant:
    """`loses` says what the mutant gives away; `tests` are files or patterns of files, the likeliest first.

    One that is equivalent, so that there is nothing to catch, has a `proof` in words instead of tests.
    """

    name: str
    loses: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...] = ()
    proof: str = ""


def applied(source: str, change: Change) -> str:
    """The text of the module with the change; raises NotApplied."""
    made = {Wrap: _wrapped, Edit: _edited, Rebind: _rebound}[type(change)](source, change)  # type: ignore[operator]
    if made == source:
        raise NotApplied(f"{change.path} stays as it is")
    compile(made, change.path, "exec")
    return str(made)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def find(source: str, path: str, qualified: str) -> Function:
    """The definition of a function, by its qualified name."""
    place: ast.Module | ast.ClassDef = ast.parse(source)
    *classes, name = qualified.split(".")
    for wanted in classes:
        found = [n for n in place.body if isinstance(n, ast.ClassDef) and n.name == wanted]
        if len(found) != 1:
            raise NotApplied(f"{path} has no class {wanted}")
        place = found[0]
    functions = [n for n in place.body if isinstance(n, Function) and n.name == name]
    if len(functions) != 1:
        raise NotApplied(f"{path} has no function {qualified}")
    return functions[0]


def _parameters(function: Function) -> list[str]:
    """Names and defaults; what is written about types is left out."""
    for arg in ast.walk(function.args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    return ast.unparse(function.args).split(", ")


def _wrapped(source: str, change: Wrap) -> str:
    target = find(source, change.path, change.function)
    mutant = find(textwrap.dedent(change.source), "the mutation", "mutant")
    first, *parameters = _parameters(mutant)
    if first != "plain" or parameters != _parameters(target):
        raise NotApplied(f"{change.function} takes {_parameters(target)}, the mutation is for {parameters}")
    decorators = {d.id for d in target.decorator_list if isinstance(d, ast.Name)}
    if decorators & {"property", "cached_property", "classmethod"}:
        raise NotApplied(f"{change.function} is a {', '.join(decorators)}")
    wrap = "staticmethod(_mutation()({0}))" if "staticmethod" in decorators else "_mutation()({0})"
    return source + _TEMPLATE.format(
        source=textwrap.indent(textwrap.dedent(change.source).strip(), "    "),
        function=change.function,
        wrapped=wrap.format(change.function),
        marks=MARKS,
        reached=REACHED,
    )


_TEMPLATE = """

def _mutation():
    def mark(word):
        import os

        if "{marks}" in os.environ:
            with open(os.environ["{marks}"], "a") as out:
                out.write(word + "\\n")

{source}

    def calling(plain):
        import functools

        @functools.wraps(plain)
        def call(*args, **kwargs):
            if not call.reached:
                call.reached = True
                mark("{reached}")
            return mutant(plain, *args, **kwargs)

        call.reached = False
        return call

    return calling


{function} = {wrapped}
"""


def _edited(source: str, change: Edit) -> str:
    function = find(source, change.path, change.function)
    lines = source.splitlines(keepends=True)
    begin, end = function.lineno - 1, function.end_lineno
    text = "".join(lines[begin:end])
    if (count := text.count(change.old)) != 1:
        raise NotApplied(f"{change.function} has the text to be replaced {count} times, not once")
    return "".join(lines[:begin]) + text.replace(change.old, change.new) + "".join(lines[end:])


def _rebound(source: str, change: Rebind) -> str:
    assigned = [t for n in ast.parse(source).body if isinstance(n, ast.Assign) for t in n.targets]
    if not any(isinstance(t, ast.Name) and t.id == change.name for t in assigned):
        raise NotApplied(f"{change.path} assigns no {change.name}")
    return f"{source}\n{change.name} = {change.value}\n"
