"""All three parties on this machine, as processes of their own: for examples and benchmarks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from tacit.ir.cost import OWNER, P0, P1, P2, ROLES
from tacit.ir.errors import PartyError, TacitError
from tacit.runtime.net.certificates import init_deployment
from tacit.runtime.net.client import everywhere
from tacit.runtime.net.deployment import DEPLOYMENT_FILE, Limits, load_identity

_START_SECONDS = 120.0


class LocalParties:
    """A fresh deployment in a folder; inside `with`, its parties run and are connected with one another."""

    def __init__(
        self, folder: Path, *, network: str = "virtual", clients: int = 1, limits: Limits | None = None
    ) -> None:
        self.folder = folder
        self.file = folder / DEPLOYMENT_FILE
        places = [("127.0.0.1", port) for port in _free_ports(3)]
        self.deployment = init_deployment(folder, places, clients=clients, network=network, limits=limits)
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalParties:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        for rank in (P0, P1, P2):
            role = ROLES[rank]
            options = ["--deployment", str(self.file), "--identity", str(self.folder / role)]
            with (self.folder / f"{role}.log").open("ab") as log:
                self._running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", "from tacit.cli import main; main()", "party", role, *options],
                        env=environment,
                        stderr=log,
                    )
                )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def _wait(self) -> None:
        """Until each party is connected with the two others; raises PartyError."""
        owner = load_identity(self.deployment, self.folder / ROLES[OWNER])
        deadline, last = time.monotonic() + _START_SECONDS, ""
        while time.monotonic() < deadline:
            for rank, process in enumerate(self._running):
                if process.poll() is not None:
                    raise PartyError(f"{ROLES[rank]} ended; its log is {self.folder / ROLES[rank]}.log")
            answers = everywhere(self.deployment, owner, "status", self.deployment.limits.handshake_seconds)
            if all(not isinstance(a, TacitError) and len(a.body["connected"]) == 2 for a in answers.values()):
                return
            last = next((str(a) for a in answers.values() if isinstance(a, TacitError)), "not connected")
            time.sleep(0.1)
        raise PartyError(f"the parties were not ready within {_START_SECONDS:g} s: {last}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(self.deployment.limits.drain_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for sock in held:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in held]
    finally:
        for sock in held:
            sock.close()
