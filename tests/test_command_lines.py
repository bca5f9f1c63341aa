"""Command lines that people type: what a model file does, what arrays hold, numbers and places out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from test_cli import fails, succeeds, tacit_command
from torch import nn

import tacit
from tacit import machine
from tacit.cli_shared import MOST_BATCH, clear_errors

SOURCE = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
ready = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
table = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 2)).eval()
BATCH = {0: torch.export.Dim("n")}


class Scaled(nn.Module):
    def forward(self, x, *, by):
        return x * by


class Odd(BaseException):
    pass


def program(): return torch.export.export(ready, (torch.rand(3, 6),), dynamic_shapes=(BATCH,))
def double():
    return torch.export.export(nn.Linear(6, 2).double(), (torch.rand(3, 6).double(),), dynamic_shapes=(BATCH,))
def fixed(): return torch.export.export(ready, (torch.rand(3, 6),))
def lookup(): return torch.export.export(table, (torch.randint(0, 7, (3, 2)),), dynamic_shapes=(BATCH,))
def scaled():
    shapes = {"x": BATCH, "by": BATCH}
    return torch.export.export(Scaled(), (torch.rand(3, 6),), {"by": torch.rand(3, 6)}, dynamic_shapes=shapes)


def leaves(): sys.exit(0)
def leaves_silently(): sys.exit()
def leaves_with_a_text(): sys.exit("all done")
def interrupts(): raise KeyboardInterrupt
def is_odd(): raise Odd("odd")


class Leaves(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        self.how()


leaves_later, odd_later = Leaves(leaves).eval(), Leaves(is_odd).eval()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    (folder / "lines.py").write_text(SOURCE)
    succeeds("compile", f"{folder / 'lines.py'}:ready", "--example", "1x6", "-o", folder / "saved")
    return folder


def scope() -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(SOURCE, found)
    return found


# --- models ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("leaves", "leaves failed: its code called sys.exit(0) before the model was there"),
        ("leaves_silently", "called sys.exit() before"),
        ("leaves_with_a_text", "called sys.exit('all done') before"),
        ("is_odd", "Odd: odd"),
        ("leaves_later", "the model's code called sys.exit(0)"),
        ("odd_later", "the model's code raised Odd: odd"),
    ],
)
def test_a_model_that_ends_python_is_told_of(place: Path, tmp_path: Path, name: str, said: str) -> None:
    np.save(place / "x.npy", np.zeros((2, 6), np.float32))
    for command in (["compile", "--example", "1x6", "-o", tmp_path / "o"], ["diff", place / "x.npy"]):
        message = fails(command[0], f"{place / 'lines.py'}:{name}", *command[1:])
        assert said in message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("line", ["sys.exit(0)", "sys.exit()", "sys.exit('text')", "raise GeneratorExit"])
def test_a_file_that_ends_python_is_told_of(tmp_path: Path, line: str) -> None:
    (tmp_path / "ends.py").write_text(f"import sys\nprint('its own')\n{line}\n")
    result = tacit_command("compile", f"{tmp_path / 'ends.py'}:f", "--example", "1x6", "-o", tmp_path / "o")
    assert result.exit_code == 1 and result.stdout == "its own\n"
    assert "importing" in result.stderr and "failed" in result.stderr and "Traceback" not in result.stderr


def test_an_interrupt_has_an_exit_code_of_its_own(place: Path, tmp_path: Path) -> None:
    target = f"{place / 'lines.py'}:interrupts"
    assert "interrupted" in fails("compile", target, "--example", "1x6", "-o", tmp_path / "o", code=130)


@pytest.mark.parametrize("name", ["program", "double", "scaled"])
def test_exported_programs(place: Path, tmp_path: Path, name: str) -> None:
    """From a file and from a function, with the inputs they carry and with shapes."""
    program = scope()[name]()
    torch.export.save(program, tmp_path / "m.pt2")
    shapes = ["--example", "2x6"] * (2 if name == "scaled" else 1)
    x = [torch.rand(2, 6) for _ in shapes[::2]]
    for target in (tmp_path / "m.pt2", f"{place / 'lines.py'}:{name}"):
        for example in ([], shapes):
            succeeds("compile", target, *example, "-o", tmp_path / "o")
    secure = tacit.load(tmp_path / "o")
    typed = [value.double() if name == "double" else value for value in x]
    files = [tmp_path / f"{i}.npy" for i in range(len(typed))]
    for file, value in zip(files, typed, strict=True):
        np.save(file, value.numpy())
    for options in (["--check"], ["--batch", "1"], ["--trace", tmp_path / "t.json"]):
        succeeds("run", tmp_path / "o", *files, *options)
    named = {"by": typed.pop()} if name == "scaled" else {}
    wanted = program.module()(*typed, **named)
    assert (secure.check(*typed, **named) - wanted).abs().max() < 2**-7


def test_an_exported_program_that_does_not_fit(place: Path, tmp_path: Path) -> None:
    source = place / "lines.py"
    assert "symbolic batch" in fails("compile", f"{source}:fixed", "--example", "2x6", "-o", tmp_path / "o")
    assert "indices.npy" in fails("compile", f"{source}:lookup", "--example", "2x2", "-o", tmp_path / "o")
    assert "indices.npy" in fails("compile", f"{source}:table", "--example", "2x2", "-o", tmp_path / "o")


def test_integers_are_given_as_a_file(place: Path, tmp_path: Path) -> None:
    ids = np.array([[0, 6], [3, 2]])
    for dtype in ("<i8", ">i4", "u1"):
        np.save(tmp_path / "ids.npy", ids.astype(dtype))
        target = f"{place / 'lines.py'}:table"
        succeeds("compile", target, "--example", tmp_path / "ids.npy", "-o", tmp_path / "o")
    answer = tacit.load(tmp_path / "o").check(torch.from_numpy(ids))
    assert (answer - scope()["table"](torch.from_numpy(ids))).abs().max() < 2**-7


class Trap:
    """Reading a pickle of it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_of_other_kinds_are_told_apart_and_not_run(tmp_path: Path) -> None:
    model, trap = nn.Linear(6, 2).eval(), tmp_path / "sprung"
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save({"model": model, "trap": Trap(trap)}, tmp_path / "pickle.pth")
    torch.save({"trap": Trap(trap)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.trace(model, torch.rand(2, 6)).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(model, (torch.rand(3, 6),)), tmp_path / "m.pt2")
    whole = (tmp_path / "m.pt2").read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt2").touch()
    for name, said in (
        ("state.pt", "file of torch.save"),
        ("pickle.pth", "file of torch.save"),
        ("old.bin", "not a file of torch.export.save"),
        ("script.pt", "TorchScript"),
        ("cut.pt2", "damaged"),
        ("empty.pt2", "damaged"),
    ):
        for path in (tmp_path / name, (tmp_path / name).with_suffix(".pt2")):
            path.write_bytes((tmp_path / name).read_bytes())
            message = fails("compile", path, "--example", "2x6", "-o", tmp_path / "o")
            assert said in message and str(path) in message
    assert not trap.exists()


# --- numbers and places ---


@pytest.mark.parametrize(
    "text",
    [
        "99999999999x6",
        "2x" + "9" * 40,
        "9" * 5000 + "x6",
        "99999x99999x99999",
        "0x6",
        "-1x6",
        "2x",
        "x",
        "",
        "6",
        "1e3x6",
    ],
)
def test_shapes_that_are_none(place: Path, tmp_path: Path, text: str) -> None:
    arguments = ["compile", f"{place / 'lines.py'}:ready", f"--example={text}", "-o", tmp_path / "o"]
    assert "--example" in fails(*arguments, code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        "run saved x.npy --batch 0",
        "cost saved --batch -5",
        f"bench mlp --batch {MOST_BATCH + 1}",
        "bench mlp --runs 0",
        "bench peers --batch 99999999999999999999",
        "bench peers --deadline nan",
        "diff lines.py:ready x.npy --tolerance -1",
        "diff lines.py:ready x.npy --tolerance nan",
        "deploy init d --clients 0",
        "deploy init d --metrics-port 65535",
        "client predict x.npy --deployment d --identity i --timeout 0",
        "deal --deployment d --identity i --count 99999999999999999999",
    ],
)
def test_numbers_out_of_range(place: Path, arguments: str) -> None:
    fails(*arguments.split(), code=2)


def test_too_much_for_the_memory_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for attempt in (lambda: torch.empty(1 << 60), lambda: bytearray(1 << 62)):
        with pytest.raises(typer.Exit), clear_errors():
            attempt()
        assert "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "saved", "none.npy", "-o", "@"],
        ["run", "saved", "none.npy", "--trace", "@"],
        ["show", "saved", "--html", "@"],
        ["show", "saved", "--errors", "@"],
        ["diff", "none.py:f", "none.npy", "--plot", "@"],
        ["bench", "mlp", "--plot", "@"],
        ["bench", "peers", "--plot", "@"],
        ["compile", "none.py:f", "-o", "@"],
        ["deploy", "init", "@"],
        ["client", "predict", "none.npy", "--deployment", "none", "--identity", "none", "-o", "@"],
    ],
)
def test_a_place_is_looked_at_before_anything_is_done(
    place: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before what does not exist is read, and before this machine is measured."""
    monkeypatch.setattr(machine, "measure", lambda: pytest.fail("measured"))
    bad = place / "lines.py" / "out.png"
    filled = [str(bad) if word == "@" else word.replace("saved", str(place / "saved")) for word in arguments]
    assert f"{bad}: Not a directory" in fails(*filled)


def test_a_batch_is_looked_at_before_the_machine_is_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: None)
    monkeypatch.setattr(machine, "measure", lambda: pytest.fail("measured"))
    for command in (["show", "--html", place / "r.html"], ["cost", "--network", "lan"]):
        assert "2^40" in fails(command[0], place / "saved", *command[1:], "--batch", 10**30)
        assert "network has to be" in fails(command[0], place / "saved", *command[1:3], "--network", "moon")


# --- arrays ---

X = np.random.default_rng(0).random((3, 6), dtype=np.float32)


@pytest.mark.parametrize("dtype", ["f2", ">f2", ">f4", "f8", ">f8", "g"])
def test_arrays_of_floats(place: Path, tmp_path: Path, dtype: str) -> None:
    for order in ("C", "F"):
        np.save(tmp_path / "x.npy", X.astype(dtype, order=order))  # type: ignore[call-overload]
        succeeds("run", place / "saved", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
        wanted = scope()["ready"](torch.from_numpy(X)).detach().numpy()
        assert np.abs(np.load(tmp_path / "y.npy") - wanted).max() < 2**-7


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (X.astype(complex), "complex128"),
        (np.array([["a"]]), "<U1"),
        (np.zeros(3, "M8[s]"), "datetime64"),
        (np.zeros(3, [("a", "f4")]), "real numbers"),
        (np.full((3, 6), 2**64 - 1, np.uint64), "2^63"),
        (X > 0.5, "bool"),
        (X[:0], "(0, 6)"),
        (np.float32(1), "()"),
        (X * np.nan, "NaN"),
    ],
)
def test_arrays_that_do_not_fit(place: Path, tmp_path: Path, array: Any, said: str) -> None:
    np.save(tmp_path / "x.npy", array)
    assert said in fails("run", place / "saved", tmp_path / "x.npy")


def test_files_that_are_no_arrays(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, X)
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:20], b"", b"\x93NUMPY\x01\x00" + b"\xff" * 200, b"1 2 3", b"\x80\x04N."):
        path.write_bytes(content)
        assert "is not a .npy file with an array of numbers, or a damaged one" in fails("run", place / "saved", path)
    np.savez(tmp_path / "x.npz", x=X)
    assert "archive" in fails("run", place / "saved", tmp_path / "x.npz")
    np.save(path, np.array([object()]), allow_pickle=True)
    assert "is not a .npy file" in fails("run", place / "saved", path)
