"""Networked parties for the suites: in this process where that is enough, as processes where they have to die."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import net_recorder
import torch
from forked import Forked
from torch import nn

import tacit
from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import TacitError
from tacit.runtime.net.certificates import init_deployment
from tacit.runtime.net.client import ask
from tacit.runtime.net.deployment import Deployment, Limits, StoreSettings, load_deployment, load_identity
from tacit.runtime.net.server import PartyServer

PARTIES = ("P0", "P1", "P2")


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for sock in held:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in held]
    finally:
        for sock in held:
            sock.close()


@cache
def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def images(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.rand((batch, 1, 3, 3), generator=torch.Generator().manual_seed(seed))


def compiled(folder: Path, *, reveal: str = "logits", protocol: str = "fused") -> tacit.Secure:
    """The small model, saved in folder/model."""
    secure = tacit.compile(small_model(), images(4), input_range=(0, 1), reveal=reveal, protocol=protocol)
    secure.save(folder / "model")
    return secure


def close_to(answer: torch.Tensor, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return answer.shape == (len(x), 3) and bool((answer - small_model()(x)).abs().max() < 2**-8)


def written(ledger: Path) -> str:
    """The lines of a ledger, whose file is longer while a party has it."""
    return ledger.read_bytes().rstrip(b"\0").decode()


class Place:
    """A deployment on loopback, in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        clients: int = 2,
        limits: Limits | None = None,
        store: StoreSettings | None = None,
        network: str = "virtual",
        metrics: bool = False,
        plan: str = "",
        recorded: bool = False,
    ) -> None:
        """`recorded`: the parties write down what they send, for `assert_nothing_used_twice`."""
        ports = free_ports(6)
        self.folder = folder
        self.recorded = recorded
        self.file = folder / "deployment.toml"
        made = init_deployment(
            folder,
            [("127.0.0.1", port) for port in ports[:3]],
            metrics=[("127.0.0.1", port) if metrics else None for port in ports[3:]],
            clients=clients,
            limits=limits,
            network=network,
            plan=plan,
        )
        if store is not None:
            made = replace(made, store=store)
            self.file.write_text(made.text())
        self.deployment: Deployment = load_deployment(self.file)

    def connect(self, name: str = "client", **options: Any) -> tacit.Remote:
        return tacit.connect(self.file, self.folder / name, **options)

    def push(self) -> int:
        return tacit.push(self.file, self.folder / "owner", self.folder / "model")

    def ask(self, who: str, rank: int, what: str, **fields: Any) -> dict[str, Any]:
        identity = load_identity(self.deployment, self.folder / who)
        return ask(self.deployment, identity, rank, what, 60.0, **fields).body

    def status(self, rank: int) -> dict[str, Any]:
        return self.ask("owner", rank, "status")

    def sent(self) -> Counter[tuple[str, str, str]]:
        """Payload bytes by (phase, sender, receiver), from the metrics of the three parties."""
        out: Counter[tuple[str, str, str]] = Counter()
        for rank in (P0, P1, P2):
            for key, value in self.status(rank)["figures"].items():
                if found := re.fullmatch(r"tacit_payload_bytes_total\{phase=(\w+),target=(\w+)\}", key):
                    out[found[1], ROLES[rank], found[2]] += int(value)
        return out

    def wait_serving(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        state = ""
        while time.monotonic() < deadline:
            try:
                if (state := self.ask("owner", P0, "status")["state"]) == "serving":
                    return
            except TacitError as error:
                state = str(error)
            time.sleep(0.05)
        raise AssertionError(f"P0 does not serve within {seconds} s: {state}")

    def ledger(self, role: str) -> list[tuple[str, int]]:
        """(session nonce, batch id) of every line but those that open a session, which are of batch 0."""
        lines = [line.split() for line in written(self.folder / role / "state" / "ledger").splitlines()]
        return [(line[0], int(line[1])) for line in lines if int(line[1])]

    def assert_nothing_used_twice(self) -> None:
        """By what each party sent in all its lives, and by what its ledger said when it did."""
        assert self.recorded
        for role in PARTIES:
            found = self.ledger(role)
            assert len(found) == len(set(found)), f"{role} used a batch twice"
            assert net_recorder.assert_used_once(role, self.folder / role / net_recorder.FILE) > 0


class Trio(Place):
    """The three parties in this process: real sockets and TLS, one interpreter."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.servers: dict[int, PartyServer] = {}
        for rank in (P0, P1, P2):
            self.start(rank)

    def start(self, rank: int, deployment: Deployment | None = None) -> PartyServer:
        """`deployment`: what this party alone believes, where that is another one."""
        identity = load_identity(self.deployment, self.folder / ROLES[rank])
        server = self.servers[rank] = PartyServer(deployment or self.deployment, identity)
        if self.recorded:
            net_recorder.watch(server, identity.folder / net_recorder.FILE)
        server.start()
        return server

    def stop(self, rank: int) -> None:
        self.servers.pop(rank).stop()

    def close(self) -> None:
        for rank in list(self.servers):
            self.stop(rank)


class Processes(Place):
    """The three parties as processes of the command line; `wrapper` is Python to run before it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.running: dict[str, Forked] = {}
        for role in PARTIES:
            self.start(role)

    def start(self, role: str, wrapper: str = "") -> None:
        self.running[role] = Forked(
            ["party", role, *self.options(role)],
            self.folder / f"{role}.log",
            wrapper=(net_recorder.WRAPPER if self.recorded else "") + wrapper,
        )

    def options(self, who: str) -> list[object]:
        return ["--deployment", self.file, "--identity", self.folder / who]

    def command(self, who: str, *arguments: object) -> bytes:
        """What a command of the owner or a client writes, as a process of its own that has to succeed."""
        said = self.folder / "command.log"
        said.unlink(missing_ok=True)
        assert Forked([*arguments, *self.options(who)], said).wait(120) == 0, said.read_text()
        return said.read_bytes()

    def kill(self, role: str) -> None:
        process = self.running.pop(role)
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    def logs(self, role: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{role}.log").read_text().splitlines()]

    def wait_listening(self, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        for rank, role in enumerate(PARTIES):
            while True:
                assert self.running[role].poll() is None, (self.folder / f"{role}.log").read_text()
                assert time.monotonic() < deadline, f"{role} does not listen within {seconds} s"
                try:
                    if len(self.status(rank)["connected"]) == 2:
                        break
                except TacitError:
                    pass
                time.sleep(0.1)

    def close(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.running.values():
            process.wait(10)
