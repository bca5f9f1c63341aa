"""Models that PyTorch's exporter or the compiler refuses: the reason holds, the remedy works, stderr stays silent."""

from __future__ import annotations

import copy
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_capture import CLOSE, Model, agrees, random, seeded
from test_integers import whole
from torch import nn
from torch.utils.checkpoint import checkpoint

import tacit

Tensor = torch.Tensor
ROWS, STEPS, IMAGE = random(3, 6), random(4, 3, 6), random(2, 3, 8, 8)
Maker = Callable[[], nn.Module]


def told(model: object, x: object = ROWS, **options: object) -> str:
    with pytest.raises(tacit.CompileError) as caught:
        tacit.compile(model, x, **options)  # type: ignore[arg-type]
    assert caught.value.__cause__ is None  # the message is all that a user sees
    return str(caught.value)


def close(model: nn.Module, *inputs: Tensor, **options: object) -> None:
    """Compiled, a checked run is close to the model; no stray warning, the plan can be read back."""
    secure = tacit.compile(model.eval(), inputs, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(secure.check(*inputs), model(*inputs), atol=2 * CLOSE, rtol=0)
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan


# --- models that cannot be exported as they are ---


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(6, 2))).eval()


def observed(*, trained: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so is this way of quantising
        from torch.ao import quantization

        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).train(trained)
        model.qconfig = (quantization.get_default_qat_qconfig if trained else quantization.get_default_qconfig)("x86")
        prepared: nn.Module = (quantization.prepare_qat if trained else quantization.prepare)(model).eval()
        return prepared


class Two(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


class Named(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return x * scale


class Kept(nn.Module):
    """What a call leaves in an attribute is read by the next."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(6, 6), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


class Answer:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def written(m: Any, x: Tensor) -> Tensor:
    m.fc.weight.data = m.fc.weight.data * 2
    return m.fc(x)


def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.fc(x)


def of(forward: Callable[[Any, Tensor], Any], **members: object) -> Maker:
    return lambda: Model(forward, fc=nn.Linear(6, 6), **members).eval()


CONDITIONAL = "branch .torch.cond.*torch.where"
LOOP = "is a call with a program of its own"
SHAPE = r"the shape of its result depends on values.*torch\.where"
WHOLE = "takes in the batch with all other dimensions"
VALUES = "control flow that depends on values"

REFUSED: dict[str, tuple[Maker, Any, str]] = {
    "a part in TorchScript": (scripted, ROWS, r"module '1' is TorchScript.*load_state_dict"),
    "weights without values": (
        lambda: nn.Linear(6, 2, device="meta").eval(),
        ROWS,
        "'weight' has no values.*assign=True",
    ),
    "a lazy layer": (
        lambda: nn.Sequential(nn.LazyLinear(4)).eval(),
        ROWS,
        r"'0\.weight' is not init.*model\(example\)",
    ),
    "a lazy norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.LazyBatchNorm2d()).eval(),
        IMAGE,
        r"'1\.\w+' is not init",
    ),
    "a sparse weight": (
        of(lambda m, x: x * m.w.sum(), w=torch.eye(6).to_sparse()),
        ROWS,
        r"'w' is sparse.*to_dense\(\)",
    ),
    "training of a quantised model": (
        lambda: observed(trained=True),
        ROWS,
        r"module '0.*' belongs to quantisation.*strict=False",
    ),
    "observers": (lambda: observed(trained=False), ROWS, "belongs to quantisation"),
    "an example of another width": (
        lambda: nn.Sequential(nn.Linear(5, 2)).eval(),
        ROWS,
        r"module '0' \(Linear\).*Nx6 float32",
    ),
    "an example of other channels": (lambda: nn.Conv2d(4, 2, 3).eval(), IMAGE, "does not run on the example.*Nx3x8x8"),
    "a kernel larger than the image": (lambda: nn.Conv2d(3, 2, 9).eval(), IMAGE, "does not run on the example"),
    "an argument too few": (lambda: Two().eval(), ROWS, r"takes \(left.*right.*holds 1 arguments"),
    "an argument too many": (lambda: nn.ReLU().eval(), (ROWS, ROWS), r"takes \(input.*holds 2 arguments"),
    "an argument by name": (lambda: Named().eval(), ROWS, r"takes \(x.*scale.*\)"),
    "floats as indices": (lambda: nn.Embedding(9, 2).eval(), ROWS, "whole numbers.*torch.int64"),
    "floats as indices of bags": (
        lambda: nn.Sequential(nn.EmbeddingBag(9, 2)).eval(),
        ROWS,
        "whole numbers.*torch.int64",
    ),
    "floats as classes": (of(lambda m, x: F.one_hot(x, 3)), ROWS, "compute them of integers alone"),
    "what raises by itself": (of(lambda m, x: m.fc(x) + m.nothing), ROWS, "does not run on the example"),
    "the sequence before the batch": (
        lambda: nn.LSTM(6, 4).eval(),
        STEPS,
        "LSTM takes the batch in second place.*batch_first",
    ),
    "the same inside of a model": (
        of(lambda m, x: m.gru(x)[0], gru=nn.GRU(6, 4)),
        STEPS,
        "GRU takes the batch in second place",
    ),
    "attention over the batch": (
        of(lambda m, x: m.mha(x, x, x)[0], mha=nn.MultiheadAttention(6, 2)),
        STEPS,
        "batch_first=True",
    ),
    "a state of layers first": (
        lambda: nn.GRU(6, 4, batch_first=True).eval(),
        (STEPS, random(1, 4, 4)),
        r"layers x batch x features.*transpose\(0, 1\)",
    ),
    "a state that happens to fit": (
        lambda: nn.GRU(6, 4, 4, batch_first=True).eval(),
        (STEPS, random(4, 4, 4)),
        "start state",
    ),
    "NumPy": (of(lambda m, x: torch.from_numpy(np.sin(x.numpy()))), ROWS, "code outside of PyTorch.*NumPy"),
    "a class of the user's": (of(lambda m, x: Answer(m.fc(x))), ROWS, "tuples, lists, dictionaries"),
    "gradients": (
        of(lambda m, x: torch.autograd.grad(m.fc(x.requires_grad_()).sum(), x)[0]),
        ROWS,
        "computes gradients",
    ),
    "gradients of functions": (of(lambda m, x: torch.func.grad(lambda y: (y * y).sum())(x)), ROWS, "has no values"),
    "an assignment to data": (of(written), ROWS, "keeps a tensor of one call"),
    "a number read off": (of(lambda m, x: x * int(x[0, 0])), ROWS, VALUES),
    "a check of values": (of(lambda m, x: torch._assert((x > -9).all(), "small") or x), ROWS, r"is_exporting\(\)"),
    "classes without a number": (of(lambda m, x: F.one_hot(x.argmax(1))), ROWS, "num_classes of one_hot"),
    "nonzero": (of(lambda m, x: x.nonzero().float()), ROWS, SHAPE),
    "unique": (of(lambda m, x: torch.unique(x)), ROWS, SHAPE),
    "masked_select": (of(lambda m, x: torch.masked_select(x, x > 0)), ROWS, SHAPE),
    "largest of all": (of(lambda m, x: x / x.amax()), ROWS, WHOLE),
    "length of all": (of(lambda m, x: x / x.norm()), ROWS, WHOLE),
    "spread of all": (of(lambda m, x: x / x.std()), ROWS, WHOLE),
    "a norm of another order": (of(lambda m, x: x.norm(1, dim=1)), ROWS, "a norm of order 1"),
    "torch.cond": (
        of(lambda m, x: torch.cond(m.w.sum() > 0, torch.sin, torch.cos, (x,)), w=torch.ones(2)),
        ROWS,
        CONDITIONAL,
    ),
    "torch.cond by the batch": (
        of(lambda m, x: torch.cond(x.shape[0] > 9, torch.sin, torch.cos, (x,))),
        ROWS,
        CONDITIONAL,
    ),
    "vmap": (of(lambda m, x: torch.vmap(lambda row: row * 2)(x)), ROWS, LOOP),
    "map": (of(lambda m, x: torch._higher_order_ops.map(lambda row: row * 2, x)), ROWS, LOOP),
    "autocast": (of(under_autocast), ROWS, "module 'fc', .*computes in torch.bfloat16.*enabled=False"),
    "dropout as it is called": (of(lambda m, x: F.dropout(x)), ROWS, "training=self.training"),
    "a random slope": (of(lambda m, x: F.rrelu(x, training=True)), ROWS, "training=self.training"),
    "NumPy's chance": (of(lambda m, x: m.fc(x) * np.random.rand()), ROWS, "different results for the same input"),
    "calls that are counted": (lambda: Kept().eval(), ROWS, "different results for the same input"),
    "a written parameter": (of(lambda m, x: m.fc.weight.mul_(2) + x), ROWS, "writes to 'fc.weight'.*if self.training"),
    "statistics of the batch": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False).eval(),
        ROWS,
        "track_running_stats=False.*GroupNorm",
    ),
    "integers for a layer": (of(lambda m, x: m.fc(x)), whole(5, 3, 6), r"computes with fractions.*x\.float\(\)"),
    "fractions for a table": (lambda: nn.Embedding(6, 2).eval(), ROWS, "takes whole numbers.*torch.int64"),
    "a table that shortens its rows": (
        lambda: nn.Embedding(6, 2, max_norm=1.0).eval(),
        whole(6, 3, 2),
        r"max_norm.*torch\.renorm",
    ),
    "minus infinity that is no mask": (
        of(lambda m, x: torch.relu(x + m.w), w=torch.full((6,), -torch.inf)),
        ROWS,
        "infinity.*read by a softmax alone",
    ),
    "a loop over the batch": (
        of(lambda m, x: torch.stack([m.fc(row) for row in x])),
        ROWS,
        "without a loop over its rows",
    ),
    "an index from the input": (of(lambda m, x: x.index_select(1, x.argmax(1))), ROWS, r"F\.one_hot\(index, n\)"),
    "a power of a negative": (of(lambda m, x: (-2.0) ** x), ROWS, "bases are positive"),
}


@pytest.mark.filterwarnings("ignore:.*non-leaf Tensor.*")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_gives_a_reason_and_a_remedy(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, x, pattern = REFUSED[name]
    message = " ".join(told(make(), x).split())
    assert re.search(pattern, message), message
    assert capfd.readouterr() == ("", "")


# --- what the refusals advise ---


def test_a_module_with_the_weights_of_torchscript_is_compiled() -> None:
    script, model = scripted(), nn.Sequential(nn.ReLU(), nn.Linear(6, 2))
    model.load_state_dict(script.state_dict())
    close(model, ROWS)


def test_a_lazy_model_is_compiled_once_it_was_called() -> None:
    model = nn.Sequential(nn.LazyLinear(4)).eval()
    model(ROWS)
    close(model, ROWS)


def test_weights_that_are_assigned_have_values() -> None:
    model = nn.Linear(6, 2, device="meta").eval()
    model.load_state_dict(nn.Linear(6, 2).state_dict(), assign=True)
    close(model, ROWS)


def test_the_float_model_takes_the_weights_of_a_quantised_one() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.load_state_dict(observed(trained=True).state_dict(), strict=False)
    close(model, ROWS)


class Stepwise(nn.Module):
    """The state of a recurrent layer as an input, the batch first; its last output, and the state that it ends in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> Tensor:
        turned = tuple(h.transpose(0, 1) for h in states)
        out, _ = self.layer(x, turned if len(turned) > 1 else turned[0])
        return out[:, -1]


@pytest.mark.parametrize(
    ("layer", "count", "states"),
    [
        (nn.RNN(6, 4, nonlinearity="relu", batch_first=True), 1, 1),
        (nn.RNN(6, 4, num_layers=2, bidirectional=True, nonlinearity="relu", batch_first=True), 4, 1),
        (nn.GRU(6, 3, batch_first=True), 1, 1),
        (nn.LSTM(6, 3, batch_first=True), 1, 2),
    ],
    ids=["rnn", "two layers", "gru", "lstm"],
)
def test_a_state_may_be_an_input(layer: Any, count: int, states: int) -> None:
    inputs = [random(3, count, layer.hidden_size, seed=i) for i in range(states)]
    close(seeded(Stepwise(layer)), random(3, 2, 6), *inputs, input_range=(-1, 1))


def test_a_recurrent_layer_with_the_sequence_first_takes_what_is_transposed() -> None:
    layer = nn.RNN(6, 4, nonlinearity="relu")
    agrees(Model(lambda m, x: m.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=layer), random(3, 2, 6))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_is_shortened_once(kind: Any) -> None:
    torch.manual_seed(0)
    model, ids = kind(6, 4, max_norm=1.0).eval(), whole(6, 3, 2)
    with pytest.raises(tacit.CompileError) as caught:
        tacit.compile(model, ids)
    before = model.weight.detach().clone()
    exec(str(caught.value).partition("before: ")[2], {"torch": torch, "module": model})
    expected = kind(6, 4, max_norm=1.0, _weight=before)(ids).detach()
    assert (tacit.compile(model, ids)(ids) - expected).abs().max() < 2**-8


# --- what changes nothing, is not asked, or is known ---


def without_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = m.fc(x)
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            z = y.relu() + x
    with torch.autocast("cuda", enabled=False):
        return m.fc(z) + y


def with_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = m.fc(x)
    return checkpoint(m.fc, y.relu(), use_reentrant=False).detach()  # type: ignore[no-any-return]


def checked(m: Any, x: Tensor) -> Tensor:
    torch._assert_async((x.abs() < 9).all())
    if not torch.compiler.is_exporting():
        assert float(x.abs().max()) < 9
    return m.fc(x)


TRANSPARENT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "autocast that is off": without_autocast,
    "gradients on, a checkpoint": with_gradients,
    "checks": checked,
    "a class as a vector": lambda m, x: F.one_hot(x.argmax(1), 6).to(x.dtype) @ m.fc.weight,
    "no NaN": lambda m, x: torch.where(torch.isnan(x), 0.0, m.fc(x)).masked_fill(x != x, 5.0),
    "no infinity": lambda m, x: torch.where(torch.isfinite(x) & (x < torch.inf), m.fc(x), 0.0),
    "a question as a number": lambda m, x: x + torch.isinf(x).sum(1, keepdim=True) + (x > -torch.inf),
    "what a rule asks": lambda m, x: torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_or_known_is_compiled(name: str) -> None:
    agrees(Model(TRANSPARENT[name], fc=nn.Linear(6, 6)), ROWS)


def test_a_mask_of_minus_infinity_keeps_its_answer() -> None:
    """Where an infinity goes into a value, a question about it is no longer answered for it."""
    mask = torch.zeros(6)
    mask[2] = -torch.inf
    for forward in (
        lambda m, x: torch.where(torch.isneginf(x + m.mask), 0.5, x),
        lambda m, x: torch.isinf(torch.where(x > 0, torch.inf, x)).float() + x,
    ):
        with pytest.raises(tacit.CompileError):
            tacit.compile(Model(forward, mask=mask).eval(), ROWS)  # type: ignore[arg-type]


def test_the_user_s_program_is_not_changed() -> None:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Model(without_autocast, fc=nn.Linear(6, 6)).eval(), (ROWS,), dynamic_shapes=dynamic)
    before = str(program.graph_module.print_readable(print_output=False))
    tacit.compile(program, ROWS)
    assert str(program.graph_module.print_readable(print_output=False)) == before


def test_a_model_that_is_otherwise_while_it_is_exported_is_warned_of() -> None:
    model = Model(lambda m, x: m.fc(x) * (1 if torch.compiler.is_exporting() else 3), fc=nn.Linear(6, 6)).eval()
    with pytest.warns(UserWarning, match="gives other results than the model"):
        tacit.compile(model, ROWS)


# --- numbers in the place of tensors ---

ATEN = torch.ops.aten
NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "number - x": lambda m, x: ATEN.sub.Tensor(1, x, alpha=2),
    "number + x": lambda m, x: ATEN.add.Tensor(0.25, x, alpha=3),
    "number - x, the batch moved": lambda m, x: ATEN.sub.Tensor(1, x.t(), alpha=2).t(),
    "number * truth": lambda m, x: ATEN.mul.Tensor(3, x > 0).float(),
    "truth + x": lambda m, x: ATEN.add.Tensor(True, x),
    "number / x": lambda m, x: ATEN.div.Tensor(2, x + 2),
    "number ** x": lambda m, x: 2**x + torch.pow(0.5, x),
    "tensor of no dimension": lambda m, x: torch.maximum(torch.tensor(0.25), x) - torch.tensor(1.0),
    "where": lambda m, x: torch.where(x > 0, 1.0, torch.where(x > 0.5, 2.0, x)),
    "logit": lambda m, x: torch.logit(x * 0.25 + 0.5),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_stand_where_a_tensor_does(name: str) -> None:
    agrees(Model(NUMBERS[name]), ROWS)


@pytest.mark.parametrize("eps", [2.0**-4, 1e-3])
def test_logit_with_a_margin(eps: float) -> None:
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(3))
    x[0, :2] = torch.tensor([0.0, 1.0])
    close(Model(lambda m, x: torch.logit(x, eps)), x, input_range=(-0.5, 1))


def test_an_infinite_number_is_refused() -> None:
    assert "not finite" in told(Model(lambda m, x: ATEN.sub.Tensor(torch.inf, x)).eval())


# --- names, logs ---


@pytest.mark.parametrize("names", [("a@b", "a b"), ("a=b", 'a"b', "a,b"), ("a%b", "a~25b", "ä\n", "\u202e", "</b>")])
def test_modules_may_be_called_nearly_anything(names: tuple[str, ...], tmp_path: Any) -> None:
    layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})
    model = Model(lambda m, x: nn.Sequential(*m.layers.values())(x), layers=layers).eval()
    secure = tacit.compile(model, ROWS)
    secure.save(tmp_path / "saved")
    loaded = tacit.load(tmp_path / "saved")
    assert loaded.plan == secure.plan and loaded.weights.keys() == secure.weights.keys()
    torch.testing.assert_close(loaded(ROWS), model(ROWS).detach(), atol=CLOSE, rtol=0)


def test_what_pytorch_says_is_for_the_log_alone(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("torch", "torch.export", "torch.fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in names]

    def state() -> list[object]:
        return [(g.level, g.propagate, list(g.handlers), g.isEnabledFor(logging.INFO)) for g in loggers]

    before = state()
    branching = Model(lambda m, x: x * 0.73519 if x.sum() > 0 else x).eval()
    fixed = Model(lambda m, x: x.view(3, -1) if len(x) > 2 else x).eval()
    with caplog.at_level(logging.DEBUG, logger="tacit"):
        for model in (branching, fixed):
            told(copy.deepcopy(model))
            assert state() == before
    text = "\n".join(record.getMessage() for record in caplog.records if record.name == "tacit")
    assert "torch says: " in text and "Traceback" in text and "data-dependent" in text
    assert "0.73519" not in text
    assert capfd.readouterr() == ("", "")


def test_stderr_is_the_model_s_own_where_it_is_exported(capsys: pytest.CaptureFixture[str]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        print("on the way", file=sys.stderr)
        return x * 2

    tacit.compile(Model(forward).eval(), ROWS)
    assert "on the way" in capsys.readouterr().err
