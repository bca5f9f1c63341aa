"""Logs, signs of life, and what a failure of the compiler leaves behind."""

from __future__ import annotations

import io
import logging
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import images, seeded
from torch import nn

import tacit
from tacit import passes, progress
from tacit.capture import Capture
from tacit.ir.plan import Plan
from tacit.passes import Draft

SMALL = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception, at: int = 6) -> str:
    """A pipeline in which one pass fails; its name."""

    def faulty(draft: Draft) -> Draft:
        raise error

    monkeypatch.setattr(passes, "PIPELINE", (*passes.PIPELINE[:at], faulty, *passes.PIPELINE[at + 1 :]))
    return passes.PIPELINE[at - 1].__name__


def numbers(model: nn.Module, *tensors: torch.Tensor) -> set[str]:
    """The digits of every weight and input, as any way of printing them would begin."""
    values = [v for t in [*model.state_dict().values(), *tensors] for v in t.double().flatten().tolist()]
    scaled = [round(abs(v) * 2**f) for v in values for f in range(10, 24)]
    return {f"{abs(v):.4f}" for v in values} | {str(v) for v in scaled if v > 9999}


def test_a_failure_of_the_compiler_leaves_a_folder_without_weights(bugs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(SMALL), images(4, 6)
    weight = model[0].weight.detach()
    ring = int(weight[0, 0] * 2**20)
    error = KeyError(f"w {weight[0, 0].item()} {weight} {ring} {weight[0].tolist()} {weight[1, 0].item():.3e} line7")
    before = broken(monkeypatch, error)
    with pytest.raises(tacit.CompilerBug) as raised:
        tacit.compile(model, x, input_range=(-1, 1))
    (folder,) = bugs.glob("tacit-bug-*")
    assert str(folder) in str(raised.value)
    assert f"after {before}" in str(raised.value)
    assert isinstance(raised.value.__cause__, KeyError)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert {"environment.txt", "traceback.txt", "exported.txt", "00_capture.txt", f"06_{before}.txt"} <= texts.keys()
    assert "faulty" in texts["traceback.txt"] and "KeyError" in texts["traceback.txt"]
    assert "line7" in texts["traceback.txt"]
    assert re.search(r"^torch \d", texts["environment.txt"], re.MULTILINE)
    assert "option reveal='logits'" in texts["environment.txt"]
    assert "model.linear" in texts["00_capture.txt"]
    assert len([name for name in texts if name[:2].isdigit()]) == 7
    everything = "\n".join(texts.values())
    assert not [value for value in numbers(model, x) if value in everything]
    assert len([value for value in numbers(model, x) if value in str(error)]) > 20  # the search finds what is there


class Constants(nn.Module):
    """Weights in all the ways in which a model may have them: parameter, buffer, tensor, literal, number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.register_buffer("shift", torch.rand(5))
        self.scales = torch.rand(5)
        self.factor = 0.73519 + float(torch.rand(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        literal = torch.tensor([0.81325, 0.17219, 0.55613, 0.93471, 0.36287])
        return (self.first(x).relu() * self.factor + self.shift) * self.scales + literal * 1.93157e-3


def test_a_failure_of_capture_leaves_the_exported_graph(bugs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*args: object) -> None:
        raise AttributeError("on purpose")

    monkeypatch.setattr(Capture, "_call", faulty)
    model, x = seeded(Constants()), images(4, 6)
    with pytest.raises(tacit.CompilerBug, match="before the first pass"):
        tacit.compile(model, x, input_range=(-1, 1))
    (folder,) = bugs.glob("tacit-bug-*")
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts.keys() == {"environment.txt", "traceback.txt", "exported.txt"}
    graph = texts["exported.txt"]
    assert re.search(
        r"%linear : torch.float32\[s\d+, 5\] = call_function aten.linear.default\(x, p_first_weight", graph
    )
    assert "first.weight" in graph and "@first" in graph and "test_diagnostics.py:" in graph
    assert re.search(r"aten.mul.Tensor\(relu, #\)", graph)  # a number in the code may be a weight
    everything = "\n".join(texts.values())
    written = {f"{model.factor:.4f}", "0.8132", "0.1721", "0.5561", "0.9347", "0.3628", "1.93", "0.00193"}
    assert not [v for v in numbers(model, x, model.scales) | written if v in everything]
    exported = torch.export.export(model, (x,))
    shown = f"{exported}{exported.state_dict}{exported.constants}"
    assert len([v for v in numbers(model, model.scales) if v in shown]) > 30  # the search finds what is there


def test_what_cannot_be_printed_does_not_hide_the_rest(bugs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, KeyError("on purpose"))
    monkeypatch.setattr(Plan, "__str__", lambda self: 1 // 0)
    with pytest.raises(tacit.CompilerBug):
        tacit.compile(seeded(SMALL), images(4, 6))
    (folder,) = bugs.glob("tacit-bug-*")
    assert "cannot be printed: ZeroDivisionError" in (folder / "00_capture.txt").read_text()
    assert "aten.linear" in (folder / "exported.txt").read_text()


def test_causes_are_told_and_shortened(bugs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError("outer " * 200)
    error.__cause__ = RuntimeError("inner reason 0.12345")
    broken(monkeypatch, error)
    with pytest.raises(tacit.CompilerBug):
        tacit.compile(seeded(SMALL), images(4, 6))
    (folder,) = bugs.glob("tacit-bug-*")
    told = (folder / "traceback.txt").read_text()
    assert "RuntimeError: inner reason #" in told
    assert told.count("outer") < 100


@pytest.mark.parametrize("error", [tacit.CompileError("mend this"), MemoryError()])
def test_what_a_user_can_mend_is_no_bug(bugs: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    broken(monkeypatch, error)
    with pytest.raises(type(error)):
        tacit.compile(seeded(SMALL), images(4, 6))
    assert not list(bugs.glob("tacit-bug-*"))


# --- logs ---


def test_the_log_tells_of_passes_and_sessions_and_of_no_value(caplog: pytest.LogCaptureFixture) -> None:
    model, x = seeded(SMALL), images(4, 6)
    with caplog.at_level(logging.DEBUG, logger="tacit"):
        tacit.compile(model, x, input_range=(-1, 1))(x)
    told = "\n".join(record.getMessage() for record in caplog.records if record.name == "tacit")
    for word in ("choose_scale", "compiled", "session open", "batch of 4"):
        assert word in told
    assert not [value for value in numbers(model, x) if value in told]


@pytest.mark.parametrize(
    ("level", "expected"),
    [("info", "tacit INFO compiled"), ("", None)],
)
def test_the_environment_sets_the_level(level: str, expected: str | None) -> None:
    program = "import tacit, torch; tacit.compile(torch.nn.Linear(2, 2).eval(), torch.ones(1, 2))"
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin", "TACIT_LOG": level}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert expected in done.stderr if expected else done.stderr == ""


def test_a_level_that_does_not_exist_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, level = list(progress.log.handlers), progress.log.level
    monkeypatch.setenv("TACIT_LOG", "loud")
    progress.configure_log()
    try:
        progress.log.info("told")
        progress.log.debug("not told")
    finally:
        progress.log.handlers[:] = before
        progress.log.setLevel(level)
    told = capsys.readouterr().err
    assert "has to be DEBUG, INFO" in told and "INFO told" in told and "not told" not in told


# --- signs of life ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.05)
    monkeypatch.setenv("TERM", "xterm")


def long_work() -> list[int]:
    with progress.waiting("dealing"):
        time.sleep(0.4)
        with progress.waiting("inner"):
            time.sleep(0.1)
    out = []
    for i in progress.track(range(3), "measuring"):
        time.sleep(0.1)
        out.append(i)
    return out


def test_a_terminal_sees_what_takes_its_time(patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert long_work() == [0, 1, 2]
    assert "dealing" in screen.getvalue() and "measuring" in screen.getvalue()
    assert "inner" not in screen.getvalue()


def test_what_is_quick_or_not_on_a_terminal_is_silent(
    patience: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert long_work() == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_PATIENCE", 5.0)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert long_work() == [0, 1, 2]
    assert "dealing" not in screen.getvalue() and "measuring" not in screen.getvalue()
    with pytest.raises(ValueError, match="on purpose"), progress.waiting("failing"):
        raise ValueError("on purpose")
    assert not progress._showing.locked()


def test_a_display_appears_during_the_first_item(patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    for _ in progress.track(iter(range(1)), "one long item", total=1):
        time.sleep(0.4)
        seen = screen.getvalue()
    assert "one long item" in seen and "0/1" in seen


def test_what_is_printed_into_a_file_stays_there(
    patience: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress.waiting("printing"):
        time.sleep(0.2)
        print("a result")
        time.sleep(0.2)
    assert capsys.readouterr().out == "a result\n"
    assert "printing" in screen.getvalue() and "a result" not in screen.getvalue()


def test_streams_show_how_far_they_are(
    patience: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secure = tacit.compile(seeded(SMALL), images(4, 6), input_range=(-1, 1))
    secure(images(2, 6))

    def answers(batches: object) -> int:
        found = 0
        for _ in secure.stream(batches):  # type: ignore[arg-type]
            time.sleep(0.15)
            found += 1
        return found

    assert answers([images(2, 6)] * 3) == 3
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert answers([images(2, 6)] * 3) == 3
    assert "encrypted inference" in screen.getvalue() and "/3" in screen.getvalue()
    screen.truncate(0)
    assert answers(images(2, 6) for _ in range(3)) == 3  # how many there are is not known
    assert "/?" in screen.getvalue()
    for _ in secure.stream([images(2, 6)] * 3):
        break  # given up
    assert not progress._showing.locked()
