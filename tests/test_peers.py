"""Comparing with other systems: what is handed over, what is made of the reports, and peers that fail in every way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from tacit import CompileError
from tacit.cli import app
from tacit.peers import INTERPRETERS, party
from tacit.peers.compare import LAYERS, PLAINTEXT, SYSTEMS, TACIT, Row, compare, network
from tacit.peers.launch import NotInstalled, PeerError, PeerRun, run_peer

ROOT = Path(__file__).resolve().parent.parent
JOB = {"parties": 2, "batch": 3, "layers": [], "warm_up": 1, "runs": 2}
ARRAYS = {"x": np.arange(6.0, dtype=np.float32).reshape(3, 2)}
HONEST = """
def forward(x):
    for kind, *args in job["layers"]:
        if kind == "flatten":
            x = x.reshape(len(x), -1)
        elif kind == "linear":
            x = x @ arrays[args[0] + ".weight"].T + arrays[args[0] + ".bias"]
        elif kind == "relu":
            x = np.maximum(x, 0)
    return x.argmax(1).tolist()

report(seconds=[0.5, 0.1, 0.3][:job["runs"]], bytes=1000 * (rank + 1), rounds=7 - rank, classes=forward(arrays["x"]))
"""
WRONG = "report(seconds=[1.0] * job['runs'], bytes=None, rounds=1, classes=[0] * job['batch'])"


def interpreter(folder: Path, body: str) -> Path:
    """Something to call in place of a peer's Python, that does `body` instead of being a party."""
    path = folder / "python"
    head = f"""\
        #!{sys.executable}
        import json, os, stat, sys, time
        from pathlib import Path
        import numpy as np

        script, peer, folder, rank = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
        job = json.loads((folder / "job.json").read_text())
        arrays = dict(np.load(folder / "arrays.npz", allow_pickle=False))

        def report(**found):
            written = folder / f"{{rank}}.new"
            written.write_text(json.dumps({{"version": "1.2", **found}}))
            written.rename(folder / f"{{rank}}.json")
            time.sleep(600)
    """
    path.write_text(textwrap.dedent(head) + body)
    path.chmod(0o700)
    return path


def run(python: Path, job: Mapping[str, Any] = JOB, *, processes: int = 2, deadline_s: float = 60.0) -> PeerRun:
    return run_peer(python, "crypten", job, ARRAYS, processes=processes, deadline_s=deadline_s)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- what is measured ---


@pytest.mark.parametrize("model", LAYERS)
def test_layers_describe_the_network(model: str) -> None:
    plain, x = network(model, 5)
    weights = plain.state_dict()
    out, used = x, []
    for kind, *args in LAYERS[model]:
        if kind in ("linear", "conv2d"):
            used += [f"{args[0]}.weight", f"{args[0]}.bias"]
            out = getattr(F, kind)(out, weights[used[-2]], weights[used[-1]])
        else:
            out = {"flatten": lambda v: v.flatten(1), "relu": F.relu}.get(kind, lambda v, a=args: F.max_pool2d(v, *a))(
                out
            )
    with torch.no_grad():
        assert torch.equal(out, plain(x))
    assert used == list(weights)


def test_every_class_occurs() -> None:
    """Else agreement would not tell a right answer from a constant one."""
    for model in ("mlp", "lenet"):
        plain, x = network(model, 200)
        with torch.no_grad():
            counts = torch.bincount(plain(x).argmax(1), minlength=10)
        assert counts.min() >= 5 and counts.max() <= 50


def test_bytes_are_those_of_the_kernel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
        with left, right:
            before = party.sent_bytes()
            left.sendall(bytes(5000))
            right.sendall(bytes(70))
            after = party.sent_bytes()
    if before is None or after is None:
        pytest.skip("this kernel does not count the bytes of a socket")
    assert after - before == 5070


class _Counting:
    """An engine that notes what is asked of it."""

    version = "3"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def infer(self) -> np.ndarray[Any, Any]:
        self.calls.append("infer")
        return np.array([[4], [2]])

    def rounds(self) -> int:
        self.calls.append("rounds")
        return 11

    def barrier(self) -> None:
        self.calls.append("barrier")

    def sent_bytes(self) -> int:
        return 100 * self.calls.count("infer") + 1000 * self.calls.count("rounds")

    def serve(self) -> None:
        raise AssertionError


def test_measure() -> None:
    """The warm-up is not among the seconds; bytes are those of the one inference whose rounds are counted."""
    engine = _Counting()
    found = party.measure(engine, warm_up=2, runs=3)
    assert engine.calls == ["barrier", "infer"] * 5 + ["barrier", "rounds", "barrier"]
    assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
    assert {k: v for k, v in found.items() if k != "seconds"} == {
        "version": "3",
        "bytes": 1000,
        "rounds": 11,
        "classes": [4, 2],
    }


# --- one peer ---


def test_reports_become_one(tmp_path: Path) -> None:
    """And the weights are in files that nobody else can read, which are gone afterwards."""
    private = """
assert stat.S_IMODE(folder.stat().st_mode) == 0o700
assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}, list(folder.iterdir())
assert os.environ["OMP_NUM_THREADS"] == "1" and "PYTHONPATH" not in os.environ
assert (peer, len(job["ports"]), Path(script).name) == ("crypten", 2, "party.py")
(Path(__file__).parent / "folder").write_text(str(folder))
"""
    found = run(interpreter(tmp_path, private + HONEST))
    assert found == PeerRun("1.2", (0.5, 0.1), 3000, 7, (1, 1, 1))
    assert not Path((tmp_path / "folder").read_text()).exists()


def test_missing_interpreter_and_missing_package(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match=r"there is no .*nowhere"):
        run(tmp_path / "nowhere")
    with pytest.raises(NotInstalled, match="not in that environment"):
        run_peer(Path(sys.executable), "no_such_peer", JOB, ARRAYS, processes=2, deadline_s=60.0)


def test_interpreter_that_cannot_be_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_bytes(b"\x00 not a program")
    python.chmod(0o700)
    with pytest.raises(PeerError, match="cannot be run: Exec format error"):
        run(python)


def test_crash_ends_the_other_parties(tmp_path: Path) -> None:
    """The reason is the last line of what the party said, and no party is left."""
    body = """
if rank == 0:
    (Path(__file__).parent / "waiting").write_text(str(os.getpid()))
    time.sleep(600)
while not (Path(__file__).parent / "waiting").exists():
    time.sleep(0.01)
raise RuntimeError("link lost")
"""
    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"^party 1 ended with status 1: RuntimeError: link lost$"):
        run(interpreter(tmp_path, body))
    assert time.monotonic() - begin < 30
    assert not is_alive(int((tmp_path / "waiting").read_text()))


def test_signal_and_silence(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"^party 0 ended with signal 9$"):
        run(interpreter(tmp_path, "os.kill(os.getpid(), 9) if rank == 0 else time.sleep(600)"))
    with pytest.raises(PeerError, match=r"^party [01] ended with status 0$"):
        run(interpreter(tmp_path, ""))


def test_hang_ends_at_the_deadline(tmp_path: Path) -> None:
    """With everything that the parties have started."""
    body = """
child = os.fork()
if child:
    (Path(__file__).parent / f"child{rank}").write_text(str(child))
time.sleep(600)
"""
    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"^no result within 3 s$"):
        run(interpreter(tmp_path, body), deadline_s=3.0)
    assert time.monotonic() - begin < 30
    children = [int(path.read_text()) for path in tmp_path.glob("child*")]
    assert len(children) == 2
    patience = time.monotonic() + 10
    while any(map(is_alive, children)) and time.monotonic() < patience:
        time.sleep(0.05)  # until init has reaped them
    assert not any(map(is_alive, children))


def test_party_ends_with_the_one_who_started_it(tmp_path: Path) -> None:
    """A party that waits for the others does not outlive this process: its standard input closes."""
    (tmp_path / "slow_peer.py").write_text("")
    (tmp_path / "slow_peer_engine.py").write_text("import time\ntime.sleep(600)\n")
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    np.savez(tmp_path / "arrays.npz", **ARRAYS)  # type: ignore[arg-type]
    command = [sys.executable, party.__file__, "slow_peer", str(tmp_path), "0"]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(1.0)
    started.communicate()
    assert started.returncode == 1


@pytest.mark.parametrize(
    "change",
    [
        "seconds=[0.1]",
        "seconds=[0.1, -0.1]",
        "seconds=[0.1, float('nan')]",
        "seconds=['a', 'b']",
        "rounds=-1",
        "rounds=None",
        "bytes=1.5",
        "classes=[0]",
        "classes=[0, 0, 'x']",
        "classes=None",
        "version=None",
    ],
)
def test_report_that_cannot_be_used(tmp_path: Path, change: str) -> None:
    body = f"report(**(dict(seconds=[1.0, 1.0], bytes=1, rounds=1, classes=[0, 0, 0]) | dict({change})))"
    with pytest.raises(PeerError, match=r"^party 0 left no usable report$"):
        run(interpreter(tmp_path, body))


# --- the comparison ---


def test_rows(tmp_path: Path) -> None:
    """An honest peer and one whose answer is constant, beside Tacit and plaintext."""
    for name in ("honest", "constant"):
        (tmp_path / name).mkdir()
    peers = {
        "crypten": interpreter(tmp_path / "honest", HONEST),
        "spu": interpreter(tmp_path / "constant", WRONG),
    }
    seen: list[Row] = []
    rows = compare(["mlp"], batches=[20], runs=3, interpreters=peers, deadline_s=120.0, report=seen.append)
    assert rows == seen
    assert [row.system for row in rows] == [PLAINTEXT, TACIT, *(system.name for system in SYSTEMS)]
    plain, ours, third, first, aby3, semi2k = rows
    assert plain.ms_per_image and ours.ms_per_image and plain.ratio == plain.ms_per_image / ours.ms_per_image
    assert ours.ratio == 1.0 and ours.agreement == 1.0 and not ours.problem
    assert ours.rounds and ours.bytes_per_image and ours.bytes_per_image > 784 * 8
    for row in (third, first):
        assert row.ms_per_image == pytest.approx(15.0) and row.spread_ms == pytest.approx((5.0, 25.0))
        assert row.ratio == row.ms_per_image / ours.ms_per_image
        assert (row.bytes_per_image, row.rounds, row.agreement, row.version) == (150.0, 7, 1.0, "1.2")
        assert not row.problem
    assert third.includes != first.includes
    for row in (aby3, semi2k):
        assert row.ms_per_image == 50.0 and row.bytes_per_image is None
        assert row.agreement is not None and row.agreement < 0.5
        assert row.problem == f"wrong classes: only {row.agreement:.1%} are those of plaintext"


def bench_peers(*args: object) -> Any:
    return CliRunner().invoke(app, ["bench", "peers", *(str(arg) for arg in args)])


def test_command_without_any_peer_is_no_error(tmp_path: Path) -> None:
    nowhere = ("--crypten", tmp_path / "a", "--spu", tmp_path / "b")
    done = bench_peers("--models", "mlp", "-n", 1, "--runs", 1, *nowhere, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert set(figures) == {"runs", "cores", "rows"} and figures["runs"] == 1
    rows = {row["system"]: row for row in figures["rows"]}
    assert set(rows) == {PLAINTEXT, TACIT, *(system.name for system in SYSTEMS)}
    for system in SYSTEMS:
        row = rows[system.name]
        assert row["ms_per_image"] is None and row["includes"] == system.includes
        assert (
            row["problem"].startswith("not installed") and f"`make peers`, or --{system.peer} PYTHON" in row["problem"]
        )
    assert rows[TACIT]["ms_per_image"] > 0


def test_command_prints_one_table(tmp_path: Path) -> None:
    options = ("--models", "mlp", "--batch", "1,2", "--runs", 2, "--spu", tmp_path / "nowhere")
    done = bench_peers(*options, "--crypten", interpreter(tmp_path, HONEST))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 2 * (2 + len(SYSTEMS))
    assert lines[0].split()[:5] == ["model", "batch", "system", "ms/image", "from"]
    crypten = next(line for line in lines if "CrypTen 2PC, TTP" in line and line.split()[1] == "2")
    assert crypten.split()[5:8] == ["150.000", "50.000", "250.000"]  # of 0.5 s and 0.1 s for two images
    assert "100.0%" in crypten and "dealing by a third process" in crypten
    assert sum("not installed" in line for line in lines) == 4
    assert "mlp, batch 2, SPU ABY3 3PC: not installed" in done.stderr


def test_command_refuses_bad_options() -> None:
    for batch in ("0", "x", "1,,2", "-1"):
        done = bench_peers("--batch", batch)
        assert done.exit_code == 2 and "is not a number of images" in done.stderr
    done = bench_peers("--models", "vgg16")
    assert done.exit_code == 1 and done.stderr == "tacit: there is no 'vgg16' to compare; there are mlp, a, b, lenet\n"
    with pytest.raises(CompileError, match="there is no ''"):
        compare([""])


def test_models_are_still_benchmarked_by_name() -> None:
    for args in (["a", "--batch", "2"], ["--batch", "2", "a"], ["model", "a", "--batch", "2"]):
        done = CliRunner().invoke(app, ["bench", *args, "--runs", "1", "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["batch"] == 2
    help_text = CliRunner().invoke(app, ["bench", "--help"])
    assert help_text.exit_code == 0 and "peers" in help_text.stdout
    unknown = CliRunner().invoke(app, ["bench", "none"])
    assert unknown.exit_code == 1 and "there is no benchmark model 'none'" in unknown.stderr


# --- the peers themselves ---


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_real_peer(system: Any) -> None:
    """Where `make peers` has installed it: right classes, and as many bytes as its two products must cost."""
    python = ROOT / INTERPRETERS[system.peer]
    if not python.exists():
        pytest.skip(f"{system.peer} is not installed: `make peers`")
    plain, x = network("a", 8)
    with torch.no_grad():
        classes = plain(x).argmax(1).tolist()
    arrays = {"x": x.numpy(), **{name: value.numpy() for name, value in plain.state_dict().items()}}
    job = {**system.setting, "parties": system.parties, "batch": 8, "layers": LAYERS["a"], "warm_up": 0, "runs": 2}
    found = run_peer(python, system.peer, job, arrays, processes=system.processes, deadline_s=120.0)
    assert list(found.classes) == classes
    assert found.rounds > 20
    assert found.bytes is None or found.bytes > 8 * x.numel()
    with pytest.raises(PeerError, match=r"^party . ended with status 1: \w+Error: .*gelu"):
        run_peer(
            python,
            system.peer,
            {**job, "layers": [["flatten"], ["gelu"]]},
            arrays,
            processes=system.processes,
            deadline_s=120.0,
        )
