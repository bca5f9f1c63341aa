"""The command line: what it prints is what the library computes, and errors are one message."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import tacit
from tacit.approximation import curve
from tacit.cli import app
from tacit.ir.ops.spline import SplineOnShares

SOURCE = """
import torch
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


class Sum(nn.Module):
    def forward(self, left, right):
        return (left + right).relu()


def deep():
    torch.manual_seed(0)
    blocks = [layer for _ in range(9) for layer in (nn.Linear(9, 9), nn.ReLU())]
    for layer in blocks[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(nn.Flatten(), *blocks).eval()


ready = network()
total = Sum().eval()
curved = nn.Sigmoid().eval()
training = nn.Dropout()
number = 3


def broken():
    raise ValueError("on purpose")
"""
X = np.random.default_rng(0).random((4, 1, 3, 3), dtype=np.float32)
CLASSES = np.array([0, 1, 2, 0], dtype=np.uint8)


def tacit_command(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeeds(*args: object) -> str:
    result = tacit_command(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*args: object) -> Any:
    return json.loads(succeeds(*args, "--json"))


def fails(*args: object, code: int = 1) -> str:
    """The message of a command that fails: on stderr, without a traceback, with nothing on stdout."""
    result = tacit_command(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in Python, arrays, and two compiled models."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "nets.py").write_text(SOURCE)
    np.save(folder / "x.npy", X)
    np.save(folder / "targets.npy", CLASSES)
    source = f"{folder / 'nets.py'}:ready"
    succeeds("compile", source, "--example", "1x1x3x3", "-o", folder / "logits", "--range", "0", "1")
    succeeds("compile", source, "--example", "1x1x3x3", "-o", folder / "correct", "--reveal", "correct")
    return folder


def plain(folder: Path, x: np.ndarray[Any, Any] = X) -> np.ndarray[Any, Any]:
    """The model in plain torch."""
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    with torch.no_grad():
        answer: np.ndarray[Any, Any] = scope["ready"](torch.from_numpy(x)).numpy()
    return answer


# --- compile ---


def test_the_summary_is_that_of_the_plan(place: Path, tmp_path: Path) -> None:
    options = [
        "--example",
        "2x1x3x3",
        "--range",
        "-1",
        "1",
        "--frac-bits",
        "11",
        "--name",
        "tiny",
        "--protocol",
        "securenn",
    ]
    summary = told("compile", f"{place / 'nets.py'}:network", *options, "-o", tmp_path / "new")
    plan = tacit.load(tmp_path / "new").plan
    cost = plan.cost()
    assert summary["digest"] == plan.digest
    assert (summary["name"], summary["protocol"], summary["reveal"]) == ("tiny", "securenn", "logits")
    assert (summary["rounds"], summary["online_bytes"]) == (cost.rounds, cost.online_bytes)
    assert (summary["offline_bytes"], summary["session_bytes"]) == (cost.offline_bytes, cost.session_bytes)
    assert list(summary["inputs"].values()) == ["secret<Nx1x3x3, f11, b13>"]
    text = succeeds("compile", f"{place / 'nets.py'}:network", *options, "-o", tmp_path / "new")
    assert plan.digest in text
    assert f"{cost.online_bytes:,} online" in text


def test_a_bound_on_errors_changes_the_plan(place: Path, tmp_path: Path) -> None:
    source, segments = f"{place / 'nets.py'}:curved", []
    for bound in ("0.001", "0.1"):
        succeeds("compile", source, "--example", "1x3", "--frac-bits", "12", "--max-error", bound, "-o", tmp_path)
        (line,) = tacit.load(tmp_path).plan.find(SplineOnShares)
        assert isinstance(line.op, SplineOnShares)
        segments.append(len(line.op.spline.segments))
        assert float(curve(line.op).error.abs().max()) < float(bound)
    assert segments[0] > segments[1]
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 30, dtype=np.float32).reshape(10, 3))
    errors = [
        told("diff", source, tmp_path / "x.npy", "--range", "-1", "1", "--frac-bits", "12", "--max-error", bound)
        for bound in ("0.001", "0.1")
    ]
    assert errors[0]["layers"][0]["largest_error"] < 0.001 < errors[1]["layers"][0]["largest_error"] < 0.1
    assert "max_error has to be" in fails("diff", source, tmp_path / "x.npy", "--max-error", "nan")


def test_a_module_by_its_dotted_name_is_looked_up_here(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    by_name = told("compile", "nets:ready", "--example", "1x1x3x3", "-o", tmp_path, "--range", "0", "1")
    assert by_name["digest"] == tacit.load(place / "logits").plan.digest


def test_an_exported_program_brings_its_example(place: Path, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).eval()
    x = torch.rand(2, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "model.pt2")
    succeeds("compile", tmp_path / "model.pt2", "-o", tmp_path / "out")
    torch.testing.assert_close(tacit.load(tmp_path / "out")(x), model(x).detach(), atol=2**-8, rtol=0)


def test_calibration_data_serve_as_example(place: Path, tmp_path: Path) -> None:
    source = f"{place / 'nets.py'}:ready"
    summary = told("compile", source, "--calibration", place / "x.npy", "-o", tmp_path, "--range", "0", "1")
    assert summary["ranges"] == "proved"
    how = ("--range", "0", "1", "--ranges", "measured", "--margin", "2")
    deep = f"{place / 'nets.py'}:deep"
    with pytest.warns(tacit.RangeWarning, match=r"values .* times as large"):
        summary = told("compile", deep, "--calibration", place / "x.npy", "-o", tmp_path, *how)
    assert summary["ranges"] == "measured"
    message = fails("compile", source, "--calibration", place / "x.npy", "--example", "1x9", "-o", tmp_path)
    assert "differ in shape" in message


def test_a_model_of_two_inputs(place: Path, tmp_path: Path) -> None:
    source = f"{place / 'nets.py'}:total"
    succeeds("compile", source, "--example", "1x4", "--example", "1x4", "-o", tmp_path, "--range", "0", "1")
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", X.reshape(9, 4))
    answer = told("run", tmp_path, tmp_path / "a.npy", tmp_path / "b.npy")["answer"]
    np.testing.assert_allclose(answer, 2 * X.reshape(9, 4), atol=2**-8)


# --- show ---


def test_show_prints_the_plan_and_nothing_else(place: Path) -> None:
    text = (place / "logits" / "plan.txt").read_text()
    assert succeeds("show", place / "logits") == text
    assert succeeds("show", place / "logits" / "plan.txt") == text


def test_show_has_colours_on_a_terminal_and_nowhere_else(place: Path) -> None:
    primary, secondary = pty.openpty()
    command = [sys.executable, "-c", "from tacit.cli import main; main()", "show", str(place / "logits")]
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | {
        "TERM": "xterm-256color",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    running = subprocess.Popen(command, stdout=secondary, env=environment)
    os.close(secondary)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that the other side is gone
        while part := os.read(primary, 1 << 16):
            shown += part
    os.close(primary)
    assert running.wait() == 0
    assert b"\x1b[" in shown
    text = re.sub(rb"\x1b\[[0-9;]*m", b"", shown).decode().replace("\r\n", "\n")
    assert text == (place / "logits" / "plan.txt").read_text()
    assert "\x1b" not in succeeds("show", place / "logits")


def test_show_as_objects(place: Path) -> None:
    plan, found = tacit.load(place / "logits").plan, told("show", place / "logits")
    assert found["digest"] == plan.digest
    assert [line["name"] for line in found["lines"]] == [node.name for node in plan.nodes]
    relu = next(line for line in found["lines"] if line["op"] == "relu")
    node = plan.node(relu["name"])
    assert relu["type"] == str(node.type)
    assert relu["args"] == list(node.args)
    assert relu["path"] == "2"
    assert relu["attributes"]["truncate"] == node.op.truncate  # type: ignore[attr-defined]


def test_show_refuses_an_edited_plan(place: Path, tmp_path: Path) -> None:
    text = (place / "logits" / "plan.txt").read_text()
    (tmp_path / "plan.txt").write_text(text.replace("f", "e", 1))
    assert "^^^^" in fails("show", tmp_path)
    (tmp_path / "plan.txt").write_bytes(b"\xff\xfe")
    assert "not a text file" in fails("show", tmp_path / "plan.txt")


# --- cost ---


@pytest.mark.parametrize("batch", [1, 7])
def test_cost_tells_what_the_plan_tells(place: Path, batch: int) -> None:
    plan = tacit.load(place / "correct").plan
    cost, found = plan.cost(batch=batch), told("cost", place / "correct", "--batch", batch, "--requirements")
    assert (found["batch"], found["rounds"]) == (batch, cost.rounds)
    assert found["online_bytes"] == cost.online_bytes
    assert found["offline_bytes"] == cost.offline_bytes
    assert found["session_bytes"] == cost.session_bytes
    assert found["per_party"] == cost.per_party
    assert [row["line"] for row in found["per_op"]] == [node.name for node in plan.nodes]
    assert sum(row["online_bytes"] for row in found["per_op"] if not row["session"]) == cost.online_bytes
    needs = plan.requirements(batch=batch)
    assert [(r["line"], r["kind"], r["count"]) for r in found["requirements"]] == [
        (n.node, n.kind, n.count) for n in needs
    ]


def test_the_table_has_a_row_for_each_line_and_the_totals(place: Path) -> None:
    plan = tacit.load(place / "logits").plan
    text = succeeds("cost", place / "logits", "--batch", "5")
    rows = [line.split()[0] for line in text.split("\n") if line.startswith("%")]
    assert rows == [f"%{node.name}" for node in plan.nodes]
    assert f"{plan.cost(batch=5).online_bytes:,} online" in text
    assert re.search(r"^P1 +[\d,]+ +[\d,]+ +[\d,]+$", text, re.MULTILINE)
    assert "mask" not in text.split("bytes sent by")[1]
    assert "refresh" in succeeds("cost", place / "logits", "--requirements")


# --- run ---


def test_a_run_gives_the_answer_of_the_model_and_the_cost_of_the_plan(place: Path) -> None:
    found = told("run", place / "logits", place / "x.npy", "--check")
    np.testing.assert_allclose(found["answer"], plain(place), atol=2**-8)
    cost = tacit.load(place / "logits").plan.cost(batch=len(X))
    assert found["checked"] is True
    assert (found["batch"], found["rounds"]) == (len(X), cost.rounds)
    assert (found["online_bytes"], found["offline_bytes"]) == (cost.online_bytes, cost.offline_bytes)
    assert found["session_bytes"] == cost.session_bytes
    assert found["online_seconds"] > 0


def test_a_run_writes_its_answer(place: Path, tmp_path: Path) -> None:
    text = succeeds("run", place / "logits", place / "x.npy", "-o", tmp_path / "answer")
    answer = np.load(tmp_path / "answer", allow_pickle=False)
    np.testing.assert_allclose(answer, plain(place), atol=2**-8)
    assert str(tmp_path / "answer") in text
    assert "rounds" in text


def test_a_run_prints_a_short_answer(place: Path) -> None:
    text = succeeds("run", place / "logits", place / "x.npy")
    printed = np.array([float(v) for v in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", text.split("rounds")[0])])
    np.testing.assert_allclose(printed.reshape(4, 3), plain(place), atol=2**-8)


def test_a_run_counts_correct_answers(place: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "right.npy", plain(place).argmax(1))
    found = told("run", place / "correct", place / "x.npy", "--targets", tmp_path / "right.npy")
    assert found["answer"] == len(X)
    expected = int((plain(place).argmax(1) == CLASSES).sum())
    assert told("run", place / "correct", place / "x.npy", "--targets", place / "targets.npy")["answer"] == expected


def test_a_run_in_batches_gives_one_answer(place: Path, tmp_path: Path) -> None:
    found = told("run", place / "logits", place / "x.npy", "--batch", 3)
    np.testing.assert_allclose(found["answer"], plain(place), atol=2**-8)
    plan = tacit.load(place / "logits").plan
    parts = [plan.cost(batch=3), plan.cost(batch=len(X) - 3)]
    assert (found["batch"], found["rounds"]) == (len(X), sum(cost.rounds for cost in parts))
    assert found["online_bytes"] == sum(cost.online_bytes for cost in parts)
    assert "the sums of 2 batches" in succeeds("run", place / "logits", place / "x.npy", "-n", 3)
    expected = int((plain(place).argmax(1) == CLASSES).sum())
    hits = told("run", place / "correct", place / "x.npy", "--targets", place / "targets.npy", "--batch", 1)
    assert hits["answer"] == expected
    np.save(tmp_path / "bad.npy", np.concatenate([X, 9 * X]))
    assert "outside the range" in fails("run", place / "logits", tmp_path / "bad.npy", "--batch", 2)
    np.save(tmp_path / "fewer.npy", CLASSES[:3])
    message = fails("run", place / "correct", place / "x.npy", "--targets", tmp_path / "fewer.npy", "--batch", 2)
    assert "differ in batch size" in message
    assert "give one of them" in fails("run", place / "logits", place / "x.npy", "--batch", 2, "--check")


@pytest.mark.parametrize("layout", [">f4", "<f8", "fortran"])
def test_arrays_of_any_layout_are_read(place: Path, tmp_path: Path, layout: str) -> None:
    np.save(tmp_path / "x.npy", np.asfortranarray(X) if layout == "fortran" else X.astype(layout))
    np.testing.assert_allclose(told("run", place / "logits", tmp_path / "x.npy")["answer"], plain(place), atol=2**-8)


# --- errors ---


class Bomb:
    """What an unpickler would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_in_an_array_file_is_never_executed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", x=X)
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("0.5 0.25")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    for name in ("bomb.npy", "archive.npz", "empty.npy", "text.npy", "words.npy"):
        assert f"{name} is not a .npy file" in fails("run", place / "logits", tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("nothing", "has no attribute 'nothing'"),
        ("number", "is a int, not a torch.nn.Module"),
        ("broken", "calling .*:broken failed: ValueError: on purpose"),
        ("training", r"model.eval\(\)"),
    ],
)
def test_a_model_that_cannot_be_loaded(place: Path, tmp_path: Path, attribute: str, message: str) -> None:
    source = f"{place / 'nets.py'}:{attribute}"
    assert re.search(message, fails("compile", source, "--example", "1x3", "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["nothing.pt2", "nothing.py:net", "no_such_module:net", "nets", "nets:", ":net", ""])
def test_a_model_that_does_not_exist(model: str, tmp_path: Path) -> None:
    assert len(fails("compile", model, "--example", "1x3", "-o", tmp_path / "out").strip().split("\n")) == 1


def test_a_file_that_is_no_exported_program(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("not a program")
    assert "reading" in fails("compile", tmp_path / "model.pt2", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--example"),
        (["--example", "1x5"], "does not run on the example"),
        (["--example", "1x1x3x3", "--reveal", "all"], "reveal"),
        (["--example", "1x1x3x3", "--protocol", "magic"], "protocol"),
        (["--example", "1x1x3x3", "--range", "1", "-1"], "low < high"),
        (["--example", "1x1x3x3", "--range", "nan", "1"], "finite"),
        (["--example", "1x1x3x3", "--frac-bits", "99"], "frac_bits"),
        (["--example", "1x1x3x3", "--max-error", "0.5"], "max_error has to be a number from 2^-20 to 2^-3, not 0.5"),
    ],
)
def test_options_that_do_not_fit_the_model(place: Path, tmp_path: Path, options: list[str], message: str) -> None:
    assert message in fails("compile", f"{place / 'nets.py'}:ready", *options, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "args",
    [
        ["compile", "nets:ready", "--example", "5", "-o", "out"],
        ["compile", "nets:ready", "--example", "1x0", "-o", "out"],
        ["compile", "nets:ready", "--example", "ax3", "-o", "out"],
        ["compile", "nets:ready", "--example", "1x3"],
        ["compile", "nets:ready", "--range", "1", "-o", "out"],
        ["cost", "plan.txt", "--batch", "0"],
        ["cost", "plan.txt", "--batch", "many"],
        ["show"],
        ["run", "folder"],
        ["run", "folder", "x.npy", "--nothing"],
        ["fly"],
    ],
)
def test_bad_usage_exits_with_two(args: list[str]) -> None:
    assert "Usage" in fails(*args, code=2)


def test_missing_files_are_named(place: Path, tmp_path: Path) -> None:
    assert "plan.txt: No such file" in fails("show", tmp_path)
    assert "plan.txt: No such file" in fails("cost", tmp_path)
    assert "plan.txt: No such file" in fails("run", tmp_path, place / "x.npy")
    assert "y.npy: No such file" in fails("run", place / "logits", tmp_path / "y.npy")
    assert "No such file" in fails("run", place / "logits", place / "x.npy", "-o", tmp_path / "no" / "folder.npy")


def test_an_input_that_does_not_fit_is_refused_without_its_values(place: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X + 7.123456)
    message = fails("run", place / "logits", tmp_path / "x.npy")
    assert "outside the range" in message
    assert not re.search(r"\d\.\d{3,}", message)
    assert "targets" in fails("run", place / "correct", place / "x.npy")
    assert "expected 1" in fails("run", place / "logits", place / "x.npy", "--targets", place / "targets.npy")


def test_damaged_weights_are_refused(place: Path, tmp_path: Path) -> None:
    tacit.load(place / "logits").save(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"1234")
    assert "weights.safetensors" in fails("run", tmp_path, place / "x.npy")


def test_as_a_process_of_its_own(place: Path) -> None:
    command = [sys.executable, "-c", "from tacit.cli import main; main()"]

    def process(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=120, check=False)

    good = process("run", place / "logits", place / "x.npy", "--json")
    assert good.returncode == 0, good.stderr
    np.testing.assert_allclose(json.loads(good.stdout)["answer"], plain(place), atol=2**-8)
    bad = process("show", place / "nowhere")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == f"tacit: {place / 'nowhere'}: No such file or directory\n"


class TwoResults(torch.nn.Module):
    """A sum and a difference, by name."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": x + y, "difference": x - y}


def test_several_inputs_and_results_through_files(tmp_path: Path) -> None:
    x, y = torch.full((2, 3), 0.5), torch.full((2, 3), 0.25)
    tacit.compile(TwoResults().eval(), (x, y), input_range=(-1, 1)).save(tmp_path / "model")
    for name, value in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", value.numpy())
    command = ["run", str(tmp_path / "model"), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    succeeds(*command, "-o", str(tmp_path / "out.npz"))
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == {"sum", "difference"}
        assert np.abs(found["sum"] - 0.75).max() < 2**-9
        assert np.abs(found["difference"] - 0.25).max() < 2**-9
    shown = succeeds(*command)
    assert "sum:" in shown
    assert "difference:" in shown
    assert set(json.loads(succeeds(*command, "--json"))["answer"]) == {"sum", "difference"}
