"""Inputs that do not fit: refused before anything is shared, without quoting a value, and without lasting damage."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import tacit

Tensor = torch.Tensor
GOOD = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2])
ODD = 7.123456  # outside the range, and easy to find in a message


class Difference(nn.Module):
    """Two inputs."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.relu(left - right)


@pytest.fixture(scope="module")
def secure() -> tacit.Secure:
    torch.manual_seed(0)
    return tacit.compile(nn.Linear(4, 3).eval(), GOOD, input_range=(-2, 2))


@pytest.fixture(scope="module")
def counting() -> tacit.Secure:
    torch.manual_seed(0)
    return tacit.compile(nn.Linear(4, 3).eval(), GOOD, input_range=(-2, 2), reveal="correct")


def changed(value: float) -> Tensor:
    x = GOOD.clone()
    x[1, 2] = value
    return x


UNFIT = {
    "too few features": (torch.rand(3, 5), "shape"),
    "too many dimensions": (torch.rand(3, 4, 1), "shape"),
    "no batch": (torch.rand(4), "shape"),
    "a scalar": (torch.tensor(0.5), "shape"),
    "an empty batch": (torch.rand(0, 4), "N at least 1"),
    "integers": (torch.ones(3, 4, dtype=torch.int64), "takes floats"),
    "bytes": (torch.ones(3, 4, dtype=torch.uint8), "takes floats"),
    "booleans": (torch.ones(3, 4, dtype=torch.bool), "takes floats"),
    "complex numbers": (torch.ones(3, 4, dtype=torch.complex64), "real and imaginary parts"),
    "NaN": (changed(float("nan")), "NaN or infinity"),
    "infinity": (changed(float("inf")), "NaN or infinity"),
    "minus infinity": (changed(float("-inf")), "NaN or infinity"),
    "above the range": (changed(ODD), "1 of 12 values lie outside"),
    "below the range": (changed(-ODD), "1 of 12 values lie outside"),
    "just above the range": (changed(2.0000005), "outside"),
    "a list": ([[0.1, 0.2, 0.3, 0.4]], "tensor"),
    "an array": (GOOD.numpy(), "tensor"),
    "nothing": (None, "tensor"),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("call", ["__call__", "reference", "check"])
def test_an_unfit_input_is_refused_and_the_model_still_works(secure: tacit.Secure, case: str, call: str) -> None:
    value, told = UNFIT[case]
    secure(GOOD)
    session, run = secure.session(), secure.last_run
    with pytest.raises(tacit.InputError, match=told):
        getattr(secure, call)(value)
    assert secure.session() is session
    assert secure.last_run is run
    torch.testing.assert_close(secure(GOOD), secure.reference(GOOD), atol=2**-8, rtol=0)


def test_a_message_quotes_no_value(secure: tacit.Secure) -> None:
    for value in (ODD, -ODD, float("nan")):
        with pytest.raises(tacit.InputError) as caught:
            secure(changed(value))
        told = re.findall(r"\d+\.\d{3,}|\bnan\b", str(caught.value))
        assert told == []


def test_the_ends_of_the_range_are_inside(secure: tacit.Secure) -> None:
    for value in (-2.0, 2.0):
        x = torch.full((2, 4), value)
        torch.testing.assert_close(secure.check(x), secure.reference(x), atol=2**-8, rtol=0)


@pytest.mark.parametrize("count", [0, 2, 3])
def test_the_number_of_inputs_counts(secure: tacit.Secure, count: int) -> None:
    with pytest.raises(tacit.InputError, match=rf"expected 1 .*found {count}"):
        secure(*[GOOD] * count)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (torch.tensor([0, 1]), "shape|batch"),
        (torch.tensor([0, 1, 2, 0]), "shape|batch"),
        (torch.tensor([[0], [1], [2]]), "shape"),
        (torch.tensor([0.0, 1.0, 2.0]), "takes integers"),
        (torch.tensor([True, False, True]), "takes integers"),
        (torch.tensor([0, 1, 3]), "1 of 3 values lie outside"),
        (torch.tensor([-1, 1, 2]), "1 of 3 values lie outside"),
    ],
)
def test_unfit_targets_are_refused(counting: tacit.Secure, targets: Tensor, told: str) -> None:
    with pytest.raises(tacit.InputError, match=told):
        counting(GOOD, targets)
    assert 0 <= int(counting(GOOD, CLASSES)) <= 3


def test_missing_targets_are_asked_for(counting: tacit.Secure) -> None:
    with pytest.raises(tacit.InputError, match="targets"):
        counting(GOOD)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_targets_may_be_integers_of_any_size(counting: tacit.Secure, dtype: torch.dtype) -> None:
    assert counting(GOOD, CLASSES.to(dtype)) == counting.reference(GOOD, CLASSES)


def test_inputs_agree_in_batch_size_and_keep_their_own_ranges() -> None:
    secure = tacit.compile(Difference().eval(), (GOOD, GOOD), input_range=[(-1, 1), (0, 4)])
    torch.testing.assert_close(secure(GOOD, GOOD * 4), torch.relu(GOOD - GOOD * 4), atol=2**-8, rtol=0)
    with pytest.raises(tacit.InputError, match="batch"):
        secure(GOOD, GOOD[:2])
    with pytest.raises(tacit.InputError, match="'left'"):
        secure(GOOD * 4, GOOD)
    with pytest.raises(tacit.InputError, match="'right'"):
        secure(GOOD, -GOOD)


def test_strided_and_differentiable_inputs_are_taken_as_they_are(secure: tacit.Secure) -> None:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).t()[::2]
    expected = secure.reference(x.contiguous())
    assert torch.equal(secure.reference(x), expected)
    assert torch.equal(secure.reference(x.clone().requires_grad_()), expected)
    assert torch.equal(secure.reference(x.double()), expected)
    assert not secure(x.clone().requires_grad_()).requires_grad


def test_the_batch_size_is_free(secure: tacit.Secure) -> None:
    x = torch.rand(17, 4, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([secure.reference(row[None]) for row in x])
    assert torch.equal(secure.reference(x), alone)
    torch.testing.assert_close(secure(x), alone, atol=2**-8, rtol=0)
