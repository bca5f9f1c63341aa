"""Plots: files that hold what was measured, and a remedy where matplotlib is missing."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import images, seeded
from test_capture import Model
from test_cli import fails, place, succeeds  # noqa: F401  (a fixture)
from torch import nn

import tacit
from tacit.approximation import Curve, curves
from tacit.bench import Measured
from tacit.ir.functions import FUNCTIONS
from tacit.peers.compare import Row
from tacit.plots import plot_bench, plot_diff, plot_errors, plot_peers

ROW = Measured(
    "mlp", 1, "virtual", "fused", "argmax", 3, 1e-4, 8e-3, 5e-3, 3e-3, 6e-3, (7e-3, 9e-3), 0.1, 19, 10, 20, 1 << 30
)


def text_of(path: Path) -> str:
    """The SVG, in which text stays text where the test asks for it."""
    return path.read_text()


@pytest.fixture(autouse=True)
def readable() -> None:
    import matplotlib

    matplotlib.rcParams["svg.fonttype"] = "none"


def test_time_against_batch_and_network(tmp_path: Path) -> None:
    rows = [replace(ROW, batch=b, network=n) for n in ("virtual", "wan") for b in (1, 8, 200)]
    plot_bench(rows, tmp_path / "bench.svg")
    told = text_of(tmp_path / "bench.svg")
    for word in ("virtual", "wan", "plaintext float32", "200", "8 ms", "offline", "19 rounds"):
        assert f"{word}" in told
    plot_bench(rows[:1], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[1:4] == b"PNG"


def test_systems_beside_one_another(tmp_path: Path) -> None:
    rows = [
        Row(model, batch, system, ms_per_image=None if problem else 3.0 * batch, problem=problem)
        for model in ("mlp", "lenet")
        for batch in (1, 200)
        for system, problem in (("Tacit 3PC", ""), ("SPU ABY3 3PC", "not installed"))
    ]
    plot_peers(rows, tmp_path / "peers.svg")
    told = text_of(tmp_path / "peers.svg")
    assert "Tacit 3PC" in told and "lenet, encrypted argmax" in told


def test_the_heat_strip_has_a_cell_for_each_layer(tmp_path: Path) -> None:
    x = images(4, 6)
    found = tacit.diff(seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))), x, tolerance=1e-9)
    plot_diff(found, tmp_path / "diff.svg")
    told = text_of(tmp_path / "diff.svg")
    for row in found.layers:
        assert re.search(rf">{row.module}\s+{row.op}<" if row.module else f">{row.op}<", told)
    assert told.count(">!<") == sum(row.largest_error > 1e-9 for row in found.layers) > 0


def a_curve(name: str = "tanh", worst: float = 1e-3, bound: float = 2e-3) -> Curve:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    found = x.tanh() + worst * torch.sin(9 * x) / torch.sin(9 * x).abs().max()
    return Curve(name, "7", x, x.tanh(), found, torch.full_like(x, bound), module="encoder.layers.10.feed_forward.act")


def test_errors_under_their_bound(tmp_path: Path) -> None:
    plot_errors([a_curve(), a_curve("unlimited", bound=math.inf), a_curve("exact", worst=0.0)], tmp_path / "e.svg")
    told = text_of(tmp_path / "e.svg")
    for words in ("tanh  ...ers.10.feed_forward.act", "1.0e-03 at most, 50% of the bound", "0.0e+00 at most, 0% of"):
        assert words in told
    assert re.search("unlimited.*1.0e-03 at most<", told, re.DOTALL)
    with pytest.raises(tacit.InputError, match="no approximated function"):
        plot_errors([], tmp_path / "none.svg")


def test_of_many_panels_those_nearest_to_their_bound_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tacit.plots._MOST_PANELS", 6)
    plot_errors([a_curve(f"f{i}", worst=1e-5 * i) for i in range(9)], tmp_path / "many.svg")
    told = text_of(tmp_path / "many.svg")
    assert "the 6 of 9 that come closest to their bound" in told
    assert [i for i in range(9) if f"f{i}  " not in told] == list(range(3))


def test_the_errors_of_a_plan(tmp_path: Path) -> None:
    def forward(m: Model, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(m.norm(torch.nn.functional.gelu(m.fc(x))), -1)

    model = seeded(Model(forward, fc=nn.Linear(6, 8), norm=nn.LayerNorm(8)))
    secure = tacit.compile(model, images(4, 6), input_range=(-1, 1))
    secure.save(tmp_path)
    for curve in curves(secure.plan):  # as the plan says
        assert float((curve.error.abs() / curve.bound).max()) <= 1.02
    assert succeeds("show", tmp_path, "--errors", tmp_path / "e.svg") == f"written   {tmp_path / 'e.svg'}\n"
    told = text_of(tmp_path / "e.svg")
    for panel in ("gelu  %", "rsqrt_of_mean  norm", "exp  %", "reciprocal  %"):
        assert panel in told
    assert len(re.findall("of the bound<", told)) == 4
    assert "has to end in" in fails("show", tmp_path, "--errors", tmp_path / "e.xyz")


def test_a_function_from_elsewhere_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid()))
    tacit.compile(model, images(4, 6)).save(tmp_path)
    known = {name: function for name, function in FUNCTIONS.items() if name != "tanh"}
    monkeypatch.setattr("tacit.approximation.FUNCTIONS", known)
    told = succeeds("show", tmp_path, "--errors", tmp_path / "e.png")
    assert "left out  tanh: no function of that name is registered here" in told
    del known["sigmoid"]
    assert "nothing to draw" in fails("show", tmp_path, "--errors", tmp_path / "e.png")


def test_commands_draw(place: Path, tmp_path: Path) -> None:  # noqa: F811
    source = f"{place / 'nets.py'}:ready"
    succeeds("diff", source, place / "x.npy", "--range", "0", "1", "--plot", tmp_path / "d.png")
    succeeds("bench", "mlp", "--runs", 1, "--batch", 2, "--plot", tmp_path / "b.png")
    for name in ("d.png", "b.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"
    assert "has to end in" in fails("bench", "mlp", "--runs", 10_000_000, "--plot", tmp_path / "b")  # before it runs
    assert "has to end in" in fails("diff", source, place / "x.npy", "--range", "0", "1", "--plot", tmp_path / "d.xyz")


def test_without_matplotlib_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'tacit[plot]'" in fails("bench", "mlp", "--plot", tmp_path / "b.png")
    tacit.compile(seeded(nn.Sequential(nn.Linear(6, 3), nn.Tanh())), images(4, 6)).save(tmp_path)
    assert "pip install 'tacit[plot]'" in fails("show", tmp_path, "--errors", tmp_path / "b.png")
