"""How a plan does on a data set: measured against the float model, in the clear, before anybody relies on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram

from tacit.arguments import arguments_of
from tacit.fit import require_fit
from tacit.ir.errors import CompileError, InputError
from tacit.ir.given import shown
from tacit.ir.plan import Node, Plan
from tacit.passes.draft import elements
from tacit.passes.trial import PROMISED, wanted_of
from tacit.runtime.overflow import RangeWatch
from tacit.runtime.reference import interpret
from tacit.structure import leaves, taken_apart
from tacit.tables import aligned
from tacit.tensors import plain_tensor, unreadable

Tensor = torch.Tensor
QUANTILES = 0.5, 0.9, 0.99, 1.0
# Elements over all lines that are looked at at once.
_ELEMENTS = 1 << 26
_NAMED_ROWS = 10


@dataclass(frozen=True)
class Left:
    """A line whose range was left: on how many rows, and by how many times it at most."""

    line: str
    module: str
    op: str
    measured: bool
    rows: int
    times: float


@dataclass(frozen=True)
class Accuracy:
    """What a plan makes of a data set, beside what the float model makes of it.

    rows: inputs. same_class: of how many the class is that of the float model; None where the answer is no row of
    logits. correct, float_correct: how many are of their true class, where those were given. errors: for each of
    `quantiles`, how far the answers of so many rows are from the float model's at most, in the model's units; None
    where classes are revealed. beyond: the rows that are further off than promised, which is 2^-8 for ordinary logits.
    left_range: the rows on which a value left the range of its line, see `left`: the answer to them is computed as if
    none had, and a run may give another one. ranges: proved or measured.
    """

    rows: int
    ranges: str
    same_class: int | None = None
    correct: int | None = None
    float_correct: int | None = None
    errors: tuple[float, ...] | None = None
    beyond: tuple[int, ...] = ()
    left_range: tuple[int, ...] = ()
    left: tuple[Left, ...] = ()
    quantiles: tuple[float, ...] = QUANTILES

    @staticmethod
    def read(told: Mapping[str, Any]) -> Accuracy:
        """From what `dataclasses.asdict` makes of it, which JSON holds; raises TypeError, KeyError or ValueError."""
        whole: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
        whole["left"] = tuple(Left(**line) for line in told["left"])
        return Accuracy(**whole)

    def lines(self) -> list[tuple[str, str]]:
        """For people: what was found, and of what."""
        rows = [("inputs", f"{self.rows:,}")]
        for what, count in (
            ("same class as float", self.same_class),
            ("true class", self.correct),
            ("true class, float", self.float_correct),
        ):
            if count is not None:
                rows.append((what, f"{count:,} of {self.rows:,} ({100 * count / self.rows:.2f}%)"))
        if self.errors is not None:
            found = zip(self.quantiles, self.errors, strict=True)
            rows.append(("off by at most", ", ".join(f"{error:.2g} ({100 * q:g}%)" for q, error in found)))
            rows.append(("further than promised", _listed(self.beyond)))
        rows.append((f"left a range ({self.ranges})", _listed(self.left_range)))
        for one in self.left:
            where = f"{one.module}, " if one.module else ""
            rows.append(
                (f"  %{one.line} {one.op}", f"{where}{one.rows} rows, up to {one.times:.3g} times what it may be")
            )
        return rows

    def __str__(self) -> str:
        return "\n".join(aligned(self.lines(), numbers=range(0)))


def _listed(rows: Sequence[int]) -> str:
    if not rows:
        return "none"
    more = ", ..." if len(rows) > _NAMED_ROWS else ""
    return f"{len(rows):,}: row {', '.join(map(str, rows[:_NAMED_ROWS]))}{more}"


@contextmanager
def _as_input() -> Iterator[None]:
    """What the compiler would refuse is an input that does not fit here."""
    try:
        yield
    except CompileError as error:
        raise InputError(str(error)) from None


class FloatModel:
    """What was compiled, as PyTorch runs it."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, (torch.nn.Module, ExportedProgram)):
            raise InputError(f"model has to be the module or ExportedProgram that was compiled, not {shown(model)}")
        if isinstance(model, torch.nn.Module):
            with _as_input():
                require_fit(model)
        self._model = model
        self._run: Any = model.module() if isinstance(model, ExportedProgram) else model

    def arguments(self, x: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """By position and by name."""
        with _as_input():
            found = arguments_of(self._model, x, kwargs)
        return found.args, dict(found.kwargs)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            return self._run(*args, **kwargs)


def parts(plan: Plan, rows: int) -> Iterator[slice]:
    """The rows in batches that are affordable."""
    size = max(1, _ELEMENTS // max(1, elements(plan)))
    return (slice(begin, min(rows, begin + size)) for begin in range(0, rows, size))


def sliced(values: Any, part: slice) -> Any:
    """These rows of all tensors in a structure."""
    apart = taken_apart(values, absent=True)
    return apart.built([leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in apart.leaves])


def require_classes(y: Any, rows: int) -> Tensor | None:
    """One whole number for each row, or None; raises InputError."""
    if y is None:
        return None
    if reason := unreadable(y):
        raise InputError(f"y {reason}")
    value = plain_tensor(y)
    if value.is_floating_point() or value.is_complex() or tuple(value.shape) != (rows,):
        raise InputError(
            f"y has to hold {rows} classes as integers, one for each input: it is {value.dtype} of shape "
            f"{tuple(value.shape)}"
        )
    return value.long()


@dataclass
class Tally:
    """What batches have shown so far."""

    plan: Plan
    targets: Tensor | None = None
    rows: int = 0
    _same: int = 0
    _right: int = 0
    _float_right: int = 0
    _classes: bool = True
    _errors: list[Tensor] = field(default_factory=list)
    _sizes: list[Tensor] = field(default_factory=list)
    _left: dict[str, tuple[Node, set[int], float]] = field(default_factory=dict)

    def run(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """The answer to a batch by the clear oracle, as ring integers; truncations round by chance, as in a run."""
        size = len(next(iter(inputs.values())))

        def tell(node: Node, times: Tensor) -> None:
            of_rows = times.reshape(size, -1).amax(1) if node.type.batched else times.max().expand(size)
            rows = {self.rows + int(row) for row in (of_rows > 1).nonzero().flatten()}
            _, before, most = self._left.get(node.name, (node, set[int](), 0.0))
            self._left[node.name] = node, before | rows, max(most, float(of_rows.max()))

        chance = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))
        values = interpret(self.plan, weights, inputs, visit=RangeWatch(self.plan, tell), chance=chance)
        self.rows += size
        return values[self.plan.result]

    def compare(self, answer: Any, floats: Any, part: slice) -> None:
        """A batch's answer beside the float model's, both as the model returns it."""
        targets = None if self.targets is None else self.targets[part]
        exact = [x.double() for x in leaves(floats) if isinstance(x, Tensor)]
        logits = exact[0] if len(exact) == 1 and exact[0].dim() == 2 and exact[0].shape[1] > 1 else None
        if self.plan.reveal == "correct":
            self._right += int(answer)
            self._classes = False
            mine = None
        elif self.plan.reveal == "argmax":
            mine = answer
        else:
            found = [x.double() for x in leaves(answer) if isinstance(x, Tensor)]
            mine = found[0].argmax(1) if logits is not None else None
            off = [(a - b).abs().flatten(1) for a, b in zip(found, exact, strict=True)]
            self._errors.append(torch.cat(off, 1).nan_to_num(nan=torch.inf).amax(1))
            self._sizes.append(torch.cat([x.abs().flatten(1) for x in exact], 1).nan_to_num().amax(1))
        if logits is None:
            if targets is not None:
                raise InputError("y holds classes, and what the model returns is not one row of logits for each input")
            self._classes = False
            return
        theirs = logits.argmax(1)
        if mine is not None:
            self._same += int((mine == theirs).sum())
        if targets is not None:
            self._float_right += int((theirs == targets).sum())
            self._right += 0 if mine is None else int((mine == targets).sum())

    def found(self) -> Accuracy:
        errors: tuple[float, ...] | None = None
        beyond: tuple[int, ...] = ()
        if self._errors:
            off, size = torch.cat(self._errors), torch.cat(self._sizes)
            errors = tuple(float(v) for v in torch.quantile(off, torch.tensor(QUANTILES, dtype=off.dtype)))
            too_far = off > PROMISED * wanted_of(size, float(size.max()))
            beyond = tuple(int(row) for row in too_far.nonzero().flatten())
        counted = self.targets is not None and (self._classes or self.plan.reveal == "correct")
        return Accuracy(
            rows=self.rows,
            ranges=self.plan.ranges,
            same_class=self._same if self._classes else None,
            correct=self._right if counted else None,
            float_correct=self._float_right if counted else None,
            errors=errors,
            beyond=beyond,
            left_range=tuple(sorted(set().union(*(rows for _, rows, _ in self._left.values())))),
            left=tuple(
                Left(node.name, node.path, node.op.name, bool(node.margin), len(rows), most)
                for node, rows, most in self._left.values()
            ),
        )
