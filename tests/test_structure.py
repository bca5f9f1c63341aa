"""Inputs and results in structures, in-place operators, batches that move, decomposed graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_capture import CLOSE, exact, random, resnet, seeded
from torch import nn

import tacit

Tensor = torch.Tensor
ROWS, IMAGE, TOKENS = random(3, 6), random(2, 4, 6, 5), random(3, 5, 8)
DYNAMIC = torch.export.Dim.DYNAMIC


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


# --- structures ---


class Nested(nn.Module):
    """Takes a tensor, a list and a dictionary; returns a tuple with a dictionary and a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, pair: list[Tensor], named: dict[str, Tensor]) -> Any:
        y = self.fc(x)
        return y, {"b": named["second"] - pair[0], "a": F.relu(pair[1]) * 3}, [named["first"].argmax(1), None]


def test_nested_inputs_and_results() -> None:
    model = seeded(Nested())
    inputs = (ROWS, [random(3, 2, 5), random(3, 1)], {"second": random(3, 2, 5, seed=4), "first": random(3, 7)})
    secure = tacit.compile(model, inputs, input_range=(-1, 1))
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan
    expected = model(*inputs)
    for found in (secure.reference(*inputs), secure.check(*inputs), secure(*inputs)):
        close(found[0], expected[0].detach())
        assert list(found[1]) == ["b", "a"]
        close(found[1], expected[1])
        assert found[2][0].dtype == torch.int64 and torch.equal(found[2][0], expected[2][0])
        assert found[2][1] is None
    run = secure.last_run
    assert run is not None
    assert (run.rounds, run.online_bytes) == (secure.plan.cost(batch=3).rounds, secure.plan.cost(batch=3).online_bytes)
    turned = {"first": inputs[2]["second"], "second": inputs[2]["first"]}  # type: ignore[call-overload]
    with pytest.raises(tacit.InputError, match="shape"):
        secure(inputs[0], inputs[1], turned)


def test_keys_may_come_in_any_order() -> None:
    class Keys(nn.Module):
        def forward(self, named: dict[str, Tensor]) -> Tensor:
            return named["a"] - 2 * named["b"]

    a, b = random(3, 4), random(3, 4, seed=2)
    secure = tacit.compile(Keys().eval(), ({"b": b, "a": a},), input_range=(-1, 1))
    for given in ({"a": a, "b": b}, {"b": b, "a": a}):
        close(secure.check(given), a - 2 * b)


def test_any_number_of_arguments() -> None:
    class Sum(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] + 2 * xs[1] - xs[2].float()

    xs = tuple(random(3, 4, seed=i) for i in range(3))
    secure = tacit.compile(Sum().eval(), xs, input_range=(-1, 1))
    close(secure.check(*xs), xs[0] + 2 * xs[1] - xs[2])


def test_a_saved_plan_returns_the_same_structure(tmp_path: Any) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"twice": 2 * x, "rows": x.reshape(-1, 3) + 1}

    secure = tacit.compile(Two().eval(), ROWS, input_range=(-1, 1))
    secure.save(tmp_path)
    found = tacit.load(tmp_path)(ROWS)
    close(found, {"twice": 2 * ROWS, "rows": ROWS.reshape(-1, 3) + 1})


def test_a_single_result_in_a_tuple_stays_in_it() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * 2,)

    found = tacit.compile(One().eval(), ROWS, input_range=(-1, 1)).reference(ROWS)
    assert isinstance(found, tuple)
    close(found[0], ROWS * 2)


def test_argmax_of_several_results_is_refused() -> None:
    with pytest.raises(tacit.CompileError, match="one tensor"):
        tacit.compile(seeded(Nested()), (ROWS, [ROWS, ROWS], {"first": ROWS, "second": ROWS}), reveal="argmax")


# --- in place ---


class ViewWritten(nn.Module):
    """Writes to a view of a value that is read afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y[:, :2].add_(1)
        y[:, 2:4] *= 0.5
        y[:, 4] = y[:, 0] - 1
        y[:, 5] = 0.25
        return F.relu(y)


class ReadAfterWrite(nn.Module):
    """The value before and after an in-place operator: both names are the same tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.view(-1, 2, 3)
        y.relu_()
        return z.flatten(1) + y


class MaskMade(nn.Module):
    """A constant written piece by piece."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(1, 6)
        mask[:, 2:4] = 1
        mask[:, 5] = -1
        return x * mask


@pytest.mark.parametrize("network", [ViewWritten, ReadAfterWrite, MaskMade])
def test_in_place_operators_mean_what_they_mean_in_pytorch(network: type[nn.Module]) -> None:
    model = network().eval()
    secure = tacit.compile(model, ROWS, input_range=(-1, 1))
    close(secure.check(ROWS), model(ROWS.clone()))


def test_a_model_that_writes_to_its_input_is_refused() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1) * 2

    with pytest.raises(tacit.CompileError, match=r"test_structure\.py:\d+: the model writes to 'x'"):
        tacit.compile(Writes().eval(), ROWS)


# --- batches that move ---


class SequenceFirst(nn.Module):
    """The batch in second place, as torch.nn.MultiheadAttention has it inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.scale = nn.Parameter(random(5, 1, 1, seed=3))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inner(x.transpose(0, 1)) * self.scale)  # length x batch x 12
        first, second, third = x.unflatten(-1, (3, 4)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        heads = (first - second).reshape(5, -1, 2).transpose(0, 1)  # batch * 2 x length x 2
        heads = (heads * 2).transpose(0, 1).reshape(5, -1, 4) + third.flip(-1)
        flat = self.out(heads.reshape(-1, 4))  # length * batch x 3
        return flat.view(5, -1, 3).transpose(0, 1).sum(1)


class Windows(nn.Module):
    """Windows of an image joined to the batch, and taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bias = nn.Parameter(random(6, 1, 4, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        x = x[..., :4].permute(0, 2, 3, 1)
        x = x.view(n, 3, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n * 6, 4, c)
        x = F.relu(self.fc(x)).roll(1, 1)
        x = (x.view(n, 6, 4, c) + self.bias).view(-1, 4, c)
        x = x.view(n, 3, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 6, 4, c)
        return x.mean((1, 2))


@pytest.mark.parametrize(("network", "x"), [(SequenceFirst, TOKENS), (Windows, IMAGE)])
def test_the_batch_may_move(network: type[nn.Module], x: Tensor) -> None:
    model = seeded(network())
    secure = tacit.compile(model, x, input_range=(-1, 1))
    close(secure.check(x).double(), exact(model, x))
    wide = torch.cat([x, x.flip(0), x])
    close(secure.reference(wide).double(), exact(model, wide))


def test_images_of_a_sequence_go_through_a_convolution() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
            self.fc = nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            frames = self.body(x.flatten(0, 1))
            return self.fc(frames.view(-1, 9))

    model, x = seeded(Frames()), random(2, 3, 2, 4, 8)
    secure = tacit.compile(model, x, input_range=(-1, 1))
    close(secure.check(x).double(), exact(model, x))


# --- decomposed graphs ---


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (resnet(), random(2, 4, 7, 6)),
        (nn.Sequential(nn.Conv1d(4, 3, 3), nn.BatchNorm1d(3), nn.ReLU6(), nn.MaxPool1d(2), nn.Flatten()),
         random(2, 4, 9)),
        (nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2), nn.Hardtanh(), nn.Upsample(scale_factor=2)), IMAGE),
        (nn.Sequential(nn.Linear(6, 5, bias=False), nn.LeakyReLU(), nn.Dropout(), nn.Linear(5, 4), nn.PReLU()), ROWS),
    ],
)  # fmt: skip
def test_a_decomposed_program_compiles_to_the_same_answers(model: nn.Module, x: Tensor) -> None:
    model = seeded(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: DYNAMIC},)).run_decompositions()
    secure = tacit.compile(program, x, input_range=(-1, 1))
    close(secure.check(x).double(), exact(model, x))
