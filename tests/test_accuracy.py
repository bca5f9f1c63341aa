"""What a plan does on a data set, beside the float model: agreement, errors, values that left a range."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_capture import Model, random
from torch import nn
from typer.testing import CliRunner

import tacit
from tacit import cli

Tensor = torch.Tensor


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"sum": a + self.inner(b), "pair": (a, b)}


@pytest.mark.parametrize("reveal", ["logits", "argmax", "correct"])
def test_agreement_is_that_of_runs(reveal: str) -> None:
    model, x = classifier(), random(200, 6)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    y[::4] = (y[::4] + 1) % 3  # a quarter of the classes are others
    secure = tacit.compile(model, x[:4], input_range=(-4, 4), reveal=reveal)
    found = secure.accuracy(x, y)
    assert (found.rows, found.ranges, found.left_range, found.left) == (200, "proved", (), ())
    assert found.float_correct == 150 and found.correct is not None and abs(found.correct - 150) <= 1
    assert (found.same_class is None) == (reveal == "correct")
    if found.same_class is not None:
        assert found.same_class >= 199
    if reveal == "logits":
        assert found.errors is not None and 0 < found.errors[0] <= found.errors[-1] < 2**-8
        run = (secure(x) - logits).abs().amax(1)
        assert found.errors[0] == pytest.approx(float(run.median()), rel=0.5)
        assert found.beyond == ()
    else:
        assert found.errors is None
    assert "200" in str(found) and "left a range (proved)  none" in str(found)


def test_rows_that_are_not_as_promised_are_named() -> None:
    """A model that is another one than was compiled, on some rows."""
    secure = tacit.compile(classifier(), random(4, 6), input_range=(-4, 4))
    model = classifier()
    other = Model(lambda m, x: m.inner(x) + 0.1 * (x[:, :1] > 0.5), inner=model).eval()
    x = random(300, 6)
    found = secure.accuracy(x, model=other)
    assert found.beyond == tuple(int(i) for i in (x[:, 0] > 0.5).nonzero().flatten())
    assert f"{len(found.beyond)}: row {found.beyond[0]}, " in str(found)


def test_rows_that_leave_a_measured_range_are_named() -> None:
    """Sums of many random signs are small; of those of the weights themselves, as large as can be."""
    signs = torch.tensor([1.0, -1.0] * 2048)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(signs)
    x = random(64, 4096).clamp(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tacit.RangeWarning)
        secure = tacit.compile(model, x[:4], input_range=(-1, 1), ranges="measured", margin=2, frac_bits=7)
    assert secure.accuracy(x).left_range == ()
    x[[3, 40]] = signs
    found = secure.accuracy(x)
    assert found.left_range == (3, 40)
    assert {line.module for line in found.left} >= {"0"}
    for line in found.left:
        assert line.times > 1 and line.rows == 2
        assert f"%{line.line} {line.op}" in str(found)
    with pytest.raises(tacit.RangeError):
        secure.reference(x[[3]], check=True)
    secure.reference(x[4:40], check=True)


def test_structures_and_arguments_by_name() -> None:
    model = Two().eval()
    inputs = random(30, 6), random(30, 6, seed=1)
    secure = tacit.compile(model, inputs)
    found = secure.accuracy(inputs)
    assert found.rows == 30 and found.same_class is None and found.errors is not None
    assert found.errors[-1] < 2**-8
    with pytest.raises(tacit.InputError, match="one row of logits"):
        secure.accuracy(inputs, torch.zeros(30, dtype=torch.int64))


def test_a_model_that_is_not_at_hand_has_to_be_given(tmp_path: Path) -> None:
    model, x = classifier(), random(8, 6)
    secure = tacit.compile(model, x)
    secure.save(tmp_path / "saved")
    again = tacit.load(tmp_path / "saved")
    with pytest.raises(tacit.InputError, match="model=model"):
        again.accuracy(x)
    assert again.accuracy(x, model=model).rows == 8
    del model
    gc.collect()
    with pytest.raises(tacit.InputError, match="not at hand"):
        secure.accuracy(x)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": torch.zeros(7, dtype=torch.int64)}, "8 classes"),
        ({"y": torch.zeros(8)}, "as integers"),
        ({"y": [0] * 8}, "y has to be a tensor"),
        ({"model": "network"}, "ExportedProgram that was compiled"),
        ({"model": nn.Dropout()}, r"model\.eval"),
        ({"x": torch.full((8, 6), 99.0)}, "outside the range"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], match: str) -> None:
    model, x = classifier(), random(8, 6)
    secure = tacit.compile(model, x, input_range=(-4, 4))
    options: dict[str, Any] = {"x": x, "y": None, "model": model} | change
    with pytest.raises(tacit.InputError, match=match):
        secure.accuracy(options["x"], options["y"], model=options["model"])
    counting = tacit.compile(model, x, input_range=(-4, 4), reveal="correct")
    with pytest.raises(tacit.InputError, match="counts right classes"):
        counting.accuracy(x)


@pytest.mark.parametrize("reveal", ["logits", "correct"])
def test_the_command(reveal: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef network():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()\n"
    )
    x = random(50, 6)
    with torch.no_grad():
        classes = classifier()(x).argmax(1)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", classes.numpy())
    model, folder = f"{tmp_path / 'nets.py'}:network", str(tmp_path / "plan")
    options = ["--example", "2x6", "--range", "-4", "4", "--reveal", reveal, "-o", folder]
    assert CliRunner().invoke(cli.app, ["compile", model, *options]).exit_code == 0
    asked = ["accuracy", folder, model, str(tmp_path / "x.npy"), "--targets", str(tmp_path / "y.npy")]
    shown = CliRunner().invoke(cli.app, asked)
    assert shown.exit_code == 0, shown.output
    assert "50 of 50 (100.00%)" in shown.output
    told = json.loads(CliRunner().invoke(cli.app, [*asked, "--json"]).output)
    assert told["rows"] == told["correct"] == told["float_correct"] == 50
    (tmp_path / "accuracy.json").write_text(json.dumps(told))
    report = ["show", folder, "--html", str(tmp_path / "report.html"), "--accuracy"]
    assert CliRunner().invoke(cli.app, [*report, str(tmp_path / "accuracy.json")]).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "id=accuracy" in page and "50 of 50 (100.00%)" in page and "href='#accuracy'" in page
    refused = CliRunner().invoke(cli.app, [*report, str(tmp_path / "nets.py")])
    assert refused.exit_code == 1 and "tacit accuracy --json" in refused.output
