"""A TCP proxy between members: it records what passes, and cuts, holds up or spoils connections on demand."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from dataclasses import replace

from net_harness import Place

from tacit.runtime.net.deployment import Deployment


class Proxy:
    """Listens on a port of its own in front of one address."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.recorded = bytearray()
        self.mode = "pass"
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.address = ("127.0.0.1", self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                far = socket.create_connection(self._target, timeout=2)
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            thread = threading.Thread(target=self._pump, args=(near, far))
            thread.start()
            self._threads.append(thread)

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self._stop.is_set():
                ready, _, _ = select.select([near, far], [], [], 0.05)
                if self.mode == "stall":
                    self._stop.wait(0.05)
                    continue
                for source in ready:
                    raw = source.recv(1 << 16)
                    if not raw:
                        return self._end(near, far)
                    self.recorded += raw
                    if self.mode == "half":
                        raw = raw[: len(raw) // 2]
                    if self.mode == "garbage":
                        raw = bytes(b ^ 0x55 for b in raw)
                    (far if source is near else near).sendall(raw)
                    if self.mode == "half":
                        self.mode = "pass"
                        return self._end(near, far)
        return self._end(near, far)

    @staticmethod
    def _end(near: socket.socket, far: socket.socket) -> None:
        near.close()
        far.close()

    def reset(self) -> None:
        """RST on all connections."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for pair in self._pairs:
            self._end(*pair)
        self._listener.close()


def through(deployment: Deployment, rank: int, proxy: Proxy) -> Deployment:
    """The deployment of those who reach party `rank` through the proxy."""
    return replace(
        deployment,
        members=tuple(replace(m, address=proxy.address) if m.role == rank else m for m in deployment.members),
    )


def in_front_of(place: Place, rank: int) -> Proxy:
    address = place.deployment.party(rank).address
    assert address is not None
    return Proxy(address)
