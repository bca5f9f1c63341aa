"""Plots: files that hold what was measured, and a remedy where matplotlib is missing."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import images, seeded
from test_cli import fails, place, succeeds  # noqa: F401  (a fixture)
from torch import nn

import tacit
from tacit.bench import Measured
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


def test_errors_under_their_bound(tmp_path: Path) -> None:
    x = np.linspace(-4, 4, 101)
    plot_errors(x, 1e-3 * np.sin(9 * x), 2e-3, tmp_path / "e.svg", title="tanh")
    assert "largest 1.00e-03" in text_of(tmp_path / "e.svg")
    plot_errors(x, 0 * x, 1e-3 + 0 * x, tmp_path / "zero.png")
    with pytest.raises(tacit.InputError, match="one length"):
        plot_errors(x, x[1:], 1.0, tmp_path / "e.svg")


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
