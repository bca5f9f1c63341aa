"""Many requests, real digits, three hosts: what takes processes and time. The long versions are marked `slow`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data import Digits, load
from few_digits import few
from net_harness import PARTIES, Place, Processes, close_to, compiled, images
from training import trained

import tacit
from tacit import networks
from tacit.ir.cost import P0, ROLES
from tacit.runtime.net.certificates import init_deployment
from tacit.runtime.net.deployment import Limits, StoreSettings, load_deployment
from tacit.runtime.net.flow import traffic

CLIENTS = 8
NAMES = ["client", *(f"client{i}" for i in range(2, CLIENTS + 1))]


def resident(place: Processes, role: str) -> int:
    """Resident memory of a party in bytes."""
    status = Path(f"/proc/{place.running[role].pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def held(place: Processes) -> dict[str, tuple[int, int, int]]:
    """Memory, file descriptors and threads of each party."""
    return {
        role: (resident(place, role), place.status(rank)["descriptors"], place.status(rank)["threads"])
        for rank, role in enumerate(PARTIES)
    }


def soak(folder: Path, requests: int, warm_up: int) -> None:
    compiled(folder)
    store = StoreSettings(low_water=4, target=8, batches=(1, 2))
    place = Processes(folder, clients=CLIENTS, store=store, limits=Limits(queue=64, per_client=4), recorded=True)
    wrong: list[str] = []
    done = 0
    lock = threading.Lock()

    def client(name: str, first: int, count: int) -> None:
        nonlocal done
        with place.connect(name) as remote:
            for seed in range(first, first + count):
                x = images(1 + seed % 2, seed)  # an input of its own: another's answer would be wrong
                try:
                    if not close_to(remote.predict(x), x):
                        wrong.append(f"{name}, request {seed}: another's answer")
                except tacit.TacitError as error:
                    wrong.append(f"{name}, request {seed}: {error}")
                with lock:
                    done += 1

    def batch(first: int, total: int) -> None:
        share = total // CLIENTS
        threads = [
            threading.Thread(target=client, args=(name, first + i * share, share)) for i, name in enumerate(NAMES)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    try:
        place.wait_listening()
        place.push()
        batch(0, warm_up)
        before = held(place)
        batch(warm_up, requests)
        time.sleep(1.0)
        after = held(place)
        assert not wrong, wrong[:5]
        assert done == requests + warm_up
        for role in PARTIES:
            assert after[role][0] < before[role][0] + (24 << 20), (role, before[role], after[role])
            assert after[role][1] <= before[role][1] + 2
            assert after[role][2] <= before[role][2] + 8
        material = place.folder / "P1/state/session/material"
        assert len(list(material.iterdir())) <= 2 * store.target + 2
        place.assert_nothing_used_twice()
        assert len(place.ledger("P0")) == len(place.ledger("P1")) == len(place.ledger("P2")) == done
    finally:
        place.close()


def test_a_short_soak(tmp_path: Path) -> None:
    soak(tmp_path, 160, 80)


@pytest.mark.slow
def test_ten_thousand_requests_from_eight_clients(tmp_path: Path) -> None:
    soak(tmp_path, 10_000, 1_000)


# --- real digits ---


def classify(folder: Path, network: type[torch.nn.Module], digits: Digits, count: int) -> None:
    """Parties, owner and client as processes; classes as in the virtual run, bytes and rounds as in the plan."""
    secure = tacit.compile(
        trained(network, digits, quiet=True), digits.train_images[:64], reveal="argmax", input_range=(0, 1)
    )
    secure.save(folder / "model")
    x = digits.test_images[:count]
    np.save(folder / "x.npy", x[:200].numpy())
    place = Processes(folder, store=StoreSettings(low_water=0, target=0))
    try:
        place.wait_listening()
        place.command("owner", "owner", "push", folder / "model")
        place.command("client", "client", "predict", folder / "x.npy", "-o", folder / "y.npy")
        classes = torch.from_numpy(np.load(folder / "y.npy"))
        assert torch.equal(classes, secure(x[:200]))
        time.sleep(0.3)
        before, wanted, found = place.sent(), 0, []
        with place.connect() as remote:
            for part in x[200:].split(200):
                found.append(remote.predict(part))
                assert remote.last_run is not None
                assert remote.last_run.rounds == secure.plan.cost(batch=len(part)).rounds
                book = traffic(secure.plan, len(part))
                wanted += sum(n for links in book.values() for (a, _), n in links.items() if ROLES[a] in PARTIES)
        time.sleep(0.5)
        assert sum((place.sent() - before).values()) == wanted
        if found:
            virtual = torch.cat([secure(part) for part in x[200:].split(200)])
            assert (torch.cat(found) == virtual).float().mean() > 0.9999
    finally:
        place.close()


def test_digits_through_processes(tmp_path: Path) -> None:
    classify(tmp_path, networks.MLP, few(), 400)


@pytest.mark.slow
@pytest.mark.parametrize("network", [networks.MLP, networks.LeNet], ids=["mlp", "lenet"])
def test_all_digits_through_processes(tmp_path: Path, network: type[torch.nn.Module]) -> None:
    classify(tmp_path, network, load(), 10_000)


# --- three hosts ---


# A process without threads moves into a network namespace.
IN_NAMESPACE = """
import ctypes, os
place = os.open("{}", os.O_RDONLY)
assert ctypes.CDLL(None, use_errno=True).setns(place, 0x40000000) == 0, os.strerror(ctypes.get_errno())
os.close(place)
"""


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Three network namespaces with an address each, on a bridge that this one is on too."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces take root and iproute2")
    tag = f"{os.getpid() % 10000}"
    bridge, made = f"tac{tag}", list[tuple[str, str]]()
    try:
        try:
            ip("link", "add", bridge, "type", "bridge")
            ip("addr", "add", "10.213.7.1/24", "dev", bridge)
            ip("link", "set", bridge, "up")
            for i in range(3):
                name, near, far = f"tacit{tag}p{i}", f"tn{tag}p{i}", f"tf{tag}p{i}"
                ip("netns", "add", name)
                made.append((name, f"10.213.7.{10 + i}"))
                ip("link", "add", near, "type", "veth", "peer", "name", far)
                ip("link", "set", near, "master", bridge, "up")
                ip("link", "set", far, "netns", name)
                ip("-n", name, "addr", "add", f"{made[-1][1]}/24", "dev", far)
                ip("-n", name, "link", "set", far, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield made
    finally:
        for name, _ in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)


def test_three_hosts(hosts: list[tuple[str, str]], tmp_path: Path) -> None:
    compiled(tmp_path)
    place = Processes.__new__(Processes)
    place.folder, place.file, place.running, place.recorded = tmp_path, tmp_path / "deployment.toml", {}, False
    init_deployment(tmp_path, [(address, 7600) for _, address in hosts])
    place.deployment = load_deployment(place.file)
    try:
        for role, (namespace, _) in zip(PARTIES, hosts, strict=True):
            place.start(role, IN_NAMESPACE.format(f"/run/netns/{namespace}"))
        place.wait_listening()
        Place.push(place)
        with place.connect() as remote:
            assert close_to(remote.predict(images(5)), images(5))
        # A host that drops off the network, without a word.
        namespace = hosts[1][0]
        ip("-n", namespace, "link", "set", f"tf{namespace[5:-2]}p1", "down")
        begin = time.monotonic()
        with place.connect() as remote, pytest.raises(tacit.TacitError, match="P1"):
            remote.predict(images(1), timeout=5.0)
        assert time.monotonic() - begin < 12
        ip("-n", namespace, "link", "set", f"tf{namespace[5:-2]}p1", "up")
        place.wait_serving(40)
        deadline = time.monotonic() + 20
        with place.connect() as remote:
            while True:
                try:
                    assert close_to(remote.predict(images(2)), images(2))
                    break
                except tacit.TacitError:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
        assert place.status(P0)["state"] == "serving"
    finally:
        place.close()
