"""Random small networks of the supported layers: PyTorch, the oracle and a secure run agree."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from random_networks import Network, of_images, of_sequences
from test_capture import CLOSE
from torch import nn
from torch.utils import _pytree as pytree

import tacit

Tensor = torch.Tensor
MAX_ERROR = 2.0**-10  # of an approximated function, by default
# Six hundred in ten parts, each begun anew six times: hypothesis stays near what it drew before.
PARTS, BEGINNINGS, EACH = 10, 6, 10


def exact(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The model's answer in float64."""
    with torch.no_grad():
        answer = model.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
        model.float()
    return answer


def compiled(model: nn.Module, inputs: tuple[Tensor, ...], protocol: str) -> tacit.Secure:
    """By default options; where ranges are measured, that is said, and a doubt of the scale would fail the test."""
    examples: Any = inputs if len(inputs) > 1 else inputs[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tacit.RangeWarning)
        secure = tacit.compile(model, examples, input_range=(-1, 1), protocol=protocol)
    event(secure.plan.ranges)
    return secure


def agree(network: Network, protocol: str = "fused") -> None:
    model, inputs = network
    expected = exact(model, inputs)
    secure = compiled(model, inputs, protocol)
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan
    found = secure.check(*inputs)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    exactly = pytree.tree_leaves(expected)
    # Logits are promised to 2^-8. Each function is off by up to 2^-10, relative to what is above 1; that adds up, and
    # grows with the body's weights.
    functions = sum(node.op.name == "spline" for node in secure.plan.nodes)
    largest = max(1.0, *(float(x.abs().max()) for x in exactly))
    close = (CLOSE + functions * MAX_ERROR) * largest * model.gain if functions else CLOSE
    for answer in (found, secure.reference(*inputs, check=True)):
        for mine, torchs in zip(pytree.tree_leaves(answer), exactly, strict=True):
            torch.testing.assert_close(mine.double(), torchs, atol=close, rtol=0)
    run, cost = secure.last_run, secure.plan.cost(batch=len(inputs[0]))
    assert run is not None
    assert (run.rounds, run.online_bytes, run.offline_bytes) == (cost.rounds, cost.online_bytes, cost.offline_bytes)


def networks(part: int = 0, parts: int = 1) -> st.SearchStrategy[Network]:
    """Of all layers; of the functions, every part has its own share."""
    return st.one_of(of_images((part, parts)), of_sequences((part, parts)))


QUIET = settings(
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@seed(0)
@settings(QUIET, max_examples=3)
@given(networks())
def test_a_few_random_networks(network: Network) -> None:
    agree(network)


@seed(1)
@settings(QUIET, max_examples=3)
@given(networks())
def test_a_few_by_the_textbook_suite(network: Network) -> None:
    agree(network, "securenn")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_six_hundred_random_networks(part: int) -> None:
    for beginning in range(BEGINNINGS):

        @seed(100 * part + beginning)
        @settings(QUIET, max_examples=EACH)
        @given(networks(part, PARTS))
        def some(network: Network) -> None:
            agree(network)

        some()
