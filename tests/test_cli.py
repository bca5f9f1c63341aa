"""The command line, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import images, seeded
from torch import nn

import tacit
from tacit.cli import main

SOURCE = """
import torch
from torch import nn

def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)).eval()

number = 3
"""


def tacit_cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tacit", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    return lambda *args: tacit_cli(capsys, monkeypatch, *args)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def test_compile_show_cost_run(call, source: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "out"
    code, out, _ = call("compile", f"{source}:network", "--example", "1x1x4x4", "-o", folder, "--range", 0, 1, "--json")
    summary = json.loads(out)
    plan = tacit.load(folder).plan
    assert (code, summary["digest"], summary["rounds"]) == (0, plan.digest, plan.cost().rounds)

    assert call("show", folder)[1] == str(plan)
    shown = json.loads(call("show", folder / "plan.txt", "--json")[1])
    assert [line["name"] for line in shown["lines"]] == [node.name for node in plan.nodes]

    cost = json.loads(call("cost", folder, "--batch", 7, "--json", "--requirements")[1])
    expected = plan.cost(batch=7)
    assert cost["online_bytes"] == expected.online_bytes == sum(p["online"] for p in cost["per_party"].values())
    assert cost["session_bytes"] == expected.session_bytes
    assert len(cost["requirements"]) == len(plan.requirements(batch=7))
    assert f"{expected.online_bytes:,} bytes online" in call("cost", folder, "-n", 7)[1]

    x = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    run = json.loads(call("run", folder, tmp_path / "x.npy", "--check", "--json")[1])
    assert (run["rounds"], run["online_bytes"]) == (expected.rounds, expected.online_bytes)
    call("run", folder, tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    scope: dict[str, object] = {}
    exec(SOURCE, scope)
    logits = scope["network"]()(x).detach().numpy()  # type: ignore[operator]
    for answer in (np.array(run["answer"]), np.load(tmp_path / "y.npy")):
        assert np.abs(answer - logits).max() < 2**-8


def test_exported_program_and_correct(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, x = seeded(nn.Linear(6, 5)), images(4, 6)
    torch.export.save(
        torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), tmp_path / "m.pt2"
    )
    code, _, err = call("compile", tmp_path / "m.pt2", "-o", tmp_path / "out", "--reveal", "correct", "--range", -1, 1)
    assert (code, err) == (0, "")
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "t.npy", model(x).argmax(1).numpy())
    run = call("run", tmp_path / "out", tmp_path / "x.npy", "--targets", tmp_path / "t.npy", "--json")
    assert json.loads(run[1])["answer"] == 4


def test_errors_are_one_message_on_stderr(call, source: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "out"
    call("compile", f"{source}:network", "--example", "1x1x4x4", "-o", folder)
    np.save(tmp_path / "bad.npy", np.full((1, 1, 4, 4), np.nan, np.float32))
    (tmp_path / "noise.npy").write_bytes(b"noise")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    for words, args in {
        "training|no attribute": ("compile", f"{source}:missing", "--example", "1x2", "-o", folder),
        "not a torch.nn.Module": ("compile", f"{source}:number", "--example", "1x2", "-o", folder),
        "neither a .pt2": ("compile", "nothing", "--example", "1x2", "-o", folder),
        "not a shape": ("compile", f"{source}:network", "--example", "ax2", "-o", folder),
        "--example": ("compile", f"{source}:network", "-o", folder),
        "reveal": ("compile", f"{source}:network", "--example", "1x1x4x4", "-o", folder, "--reveal", "x"),
        "No such file": ("show", tmp_path / "nowhere"),
        "NaN": ("run", folder, tmp_path / "bad.npy"),
        "not a .npy file of numbers": ("run", folder, tmp_path / "noise.npy"),
        "objects.npy is not": ("run", folder, tmp_path / "objects.npy"),
    }.items():
        code, out, err = call(*args)
        assert (code, out) == (1, ""), args
        assert err.startswith("tacit: ")
        assert "Traceback" not in err
        assert any(word in err for word in words.split("|")), err


def test_as_a_program(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from tacit.cli import main; main()"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("compile", "show", "cost", "run"))
    failed = subprocess.run([*command, "show", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("tacit: ")
