"""Arguments of users' calls: what means the same is taken, everything else is refused by what it has to be."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tacit
from tacit.ir.ops.roles import Input

Tensor = torch.Tensor
X = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
MODEL = nn.Linear(6, 4).eval()
ODD = (
    5, -1, 2.5, float("nan"), True, np.bool_(True), "odd", b"odd", "", [], (), {"a": 1}, {1, 2}, [[0, 1, 2]], ..., 1j,
    object(), range(3), np.array(["odd"]), np.zeros((2, 3)), torch.zeros(2, 3, 4), int, Path(), lambda: 1, 10**400,
)  # fmt: skip


def compiled(**options: Any) -> tacit.Secure:
    return tacit.compile(MODEL, X, **options)


@pytest.fixture(scope="module")
def secure() -> tacit.Secure:
    return compiled()


# --- tacit.compile ---


@pytest.mark.parametrize(
    "option", ["name", "reveal", "protocol", "frac_bits", "max_error", "input_range", "calibration"]
)
def test_odd_options_are_refused_by_what_they_have_to_be(option: str) -> None:
    fit = {"name": ("odd",), "frac_bits": (5,)}
    for value in ODD:
        if not any(value is one or (type(value) is type(one) and value == one) for one in fit.get(option, ())):
            with pytest.raises(tacit.CompileError, match=option):
                compiled(**{option: value})


@pytest.mark.parametrize("value", ODD)
def test_odd_examples_and_models_are_refused(value: Any) -> None:
    with pytest.raises(tacit.CompileError):
        tacit.compile(MODEL, value)
    with pytest.raises(tacit.CompileError, match=r"torch\.nn\.Module"):
        tacit.compile(value, X)


@pytest.mark.parametrize(
    "pair",
    [
        (-2, 2),
        [-2.0, 2.0],
        (np.float32(-2), np.int8(2)),
        (torch.tensor(-2.0), torch.tensor(2)),
        np.array([-2, 2]),
        torch.tensor([-2.0, 2.0]),
        [(-2, 2)],
        (np.array([-2.0, 2.0]),),
        np.array([[-2, 2]]),
        (Fraction(-2), torch.tensor(2.0, dtype=torch.float16)),
    ],
)
def test_a_range_is_two_numbers_of_any_kind(pair: Any) -> None:
    (node,) = compiled(input_range=pair).plan.find(Input)
    assert (node.op.low, node.op.high) == (-2.0, 2.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "pair",
    [
        ("-2", "2"),
        (False, True),
        (None, 1),
        (0, 1, 2),
        [[[0, 1]]],
        (torch.tensor([-2.0]), torch.tensor([2.0])),
        (np.nan, 1),
    ],
)
def test_what_is_no_range_is_refused(pair: Any) -> None:
    with pytest.raises(tacit.CompileError, match="input_range has to be"):
        compiled(input_range=pair)


def test_numbers_of_any_kind_are_options() -> None:
    for bits in (np.int64(9), np.array(9), torch.tensor(9)):
        assert compiled(frac_bits=bits).plan.digest == compiled(frac_bits=9).plan.digest
    for error in (np.float32(0.01), torch.tensor(0.01), Fraction(1, 100)):
        compiled(max_error=error)


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (torch.rand(3, 0), "no element"),
        (torch.rand(0, 6), "no element"),
        (torch.rand(3, 6, 0), "no element"),
        (torch.rand(6), r"x\[None\]"),
        (X.numpy(), "torch.as_tensor"),
        ([0.5, 0.5], r"torch\.tensor\(x\)"),
        ((X, None), "give it by name"),
        ((X, "mode"), "give it by name"),
        ((X, True), "give it by name"),
        (X.to(torch.complex64), "real and imaginary"),
        (X.half(), r"x\.float\(\)"),
        (X * torch.inf, "NaN or infinity"),
        (X.to_sparse(), "to_dense"),
        (X.to("meta"), "without values"),
        (X.to(torch.uint8), "Byte and Float"),
        (X * 1e13, "divide them by a constant"),
        (X.double() * 1e300, "divide them by a constant"),
        ((X, X[:2]), "differ in batch size"),
    ],
)
def test_examples_that_do_not_do_are_refused_with_a_remedy(example: Any, told: str) -> None:
    with pytest.raises(tacit.CompileError, match=told):
        tacit.compile(MODEL, example)


def test_indices_have_to_lie_in_the_table() -> None:
    for index in (-1, 4):
        with pytest.raises(tacit.CompileError, match=r"outside of \[0, 3\]"):
            tacit.compile(nn.Embedding(4, 2).eval(), torch.tensor([[0, index]]))


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_a_dump_that_cannot_be_written_is_told(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TACIT_DUMP", str(tmp_path / place))
    with pytest.raises(tacit.CompileError, match="TACIT_DUMP"):
        compiled()


# --- what is done with a compiled model ---

CALLS: dict[str, Callable[[tacit.Secure, Any], Any]] = {
    "call": lambda s, value: s(value),
    "reference": lambda s, value: s.reference(value),
    "check": lambda s, value: s.check(value),
    "stream": lambda s, value: next(s.stream(value)),
    "streamed": lambda s, value: next(s.stream([value])),
    "trace": lambda s, value: s.trace(value, "never.json"),
    "session": lambda s, value: s.session(value),
}
NO_FILE = tuple(value for value in ODD if not isinstance(value, (str, bytes, Path)))
NO_BATCH = tuple(value for value in ODD if not (type(value) is int and value > 0))


@pytest.mark.parametrize("call", CALLS)
def test_odd_inputs_are_refused(call: str, secure: tacit.Secure) -> None:
    for value in ODD:
        if not (call == "stream" and isinstance(value, (list, tuple, dict, set, str, bytes)) and not value):
            with pytest.raises(tacit.InputError):
                CALLS[call](secure, value)


def test_nothing_is_no_input(secure: tacit.Secure) -> None:
    for call in (secure, secure.reference, secure.check, secure.trace):
        with pytest.raises(tacit.InputError):
            call()
    assert list(secure.stream([])) == []
    with pytest.raises(tacit.InputError, match="diff takes"):
        tacit.diff(MODEL)


def test_odd_files_are_refused(secure: tacit.Secure) -> None:
    calls = (
        secure.save,
        tacit.load,
        lambda value: secure.trace(X, value),
        lambda value: tacit.connect(value, "identity"),
        lambda value: tacit.push(value, "identity", "model"),
    )
    for call in calls:
        for value in (*NO_FILE, "", "a\0b"):
            with pytest.raises(tacit.InputError, match=r"name of|file to write"):
                call(value)


def test_odd_batches_networks_and_texts_are_refused(secure: tacit.Secure) -> None:
    plan = secure.plan
    for value in NO_BATCH:
        for call in (plan.cost, plan.layers, plan.requirements):
            with pytest.raises(tacit.InputError, match="batch has to be an integer of at least 1"):
                call(batch=value)
    assert plan.cost(batch=np.int64(3)) == plan.cost(batch=3)
    for value in ODD:
        with pytest.raises(tacit.InputError, match="network has to be"):
            plan.cost(network=value)
        with pytest.raises(tacit.PlanError):
            tacit.Plan.parse(value)
    for value in (-1, float("nan"), True, "odd", None, [1], np.zeros(2)):
        with pytest.raises(tacit.InputError, match="tolerance"):
            tacit.diff(MODEL, X, tolerance=value)
    with pytest.raises(TypeError, match="'banana'"):
        tacit.diff(MODEL, X, banana=1)


class Scaled(nn.Module):
    def forward(self, x: Tensor, by: Tensor, power: int = 1) -> Tensor:
        return x * by**power


def test_a_diff_takes_arguments_by_name() -> None:
    found = tacit.diff(Scaled().eval(), X, kwargs={"by": torch.rand(len(X), 1), "power": 2})
    assert found.layers[-1].largest_error < 2**-8


def test_messages_quote_no_elements(secure: tacit.Secure) -> None:
    value = torch.full((2, 3), 7.123456)
    for call in (secure.save, secure.session, lambda v: compiled(input_range=v), lambda v: compiled(name=v)):
        with pytest.raises(tacit.TacitError) as caught:
            call(value)
        assert "7.12" not in str(caught.value)
