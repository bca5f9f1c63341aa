"""CrypTen: two parties, and with provider TTP a third process that deals the randomness while they compute."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
CLIENT, OWNER = 0, 1


def _import_crypten() -> Any:
    """CrypTen 0.4.1 on today's PyTorch: its ONNX converter, which is not used here, imports a module that has moved."""
    registration = types.ModuleType("torch.onnx._internal.registration")
    vars(registration)["registry"] = None
    sys.modules.setdefault(registration.__name__, registration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("crypten")


crypten = _import_crypten()


class Engine:
    """One party of two, or the dealer after them. Weights are shared once; they are the second party's."""

    version = importlib.metadata.version("crypten")

    def __init__(
        self, job: dict[str, Any], arrays: dict[str, Array], rank: int, folder: Path, sent: Callable[[], int | None]
    ) -> None:
        os.environ |= {
            "WORLD_SIZE": str(job["parties"]),
            "RANK": str(rank),
            "RENDEZVOUS": f"file://{folder.resolve()}/rendezvous",
            "DISTRIBUTED_BACKEND": "gloo",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
        }
        crypten.cfg.mpc.provider = job["provider"]
        self._sent = sent
        self._layers, self._rank = job["layers"], rank
        self._provider = importlib.import_module("crypten.mpc.provider.ttp_provider")
        if rank == job["parties"]:
            return
        crypten.init()
        self._x = torch.from_numpy(arrays.pop("x"))
        self._weights = {name: self._shared(torch.from_numpy(a), OWNER) for name, a in arrays.items()}

    def serve(self) -> None:
        """Deal until the first party leaves; one request more than CrypTen's, for the bytes this process has sent."""
        sent = self._sent

        class Dealer(self._provider.TTPServer):  # type: ignore[misc, name-defined]
            def sent(self) -> torch.Tensor:
                return torch.tensor([sent() or 0])

        Dealer()

    def _shared(self, value: torch.Tensor, source: int) -> Any:
        """Shares of a value that only the source puts in."""
        return crypten.cryptensor(value if self._rank == source else torch.zeros_like(value), src=source)

    def infer(self) -> Array | None:
        with crypten.no_grad():
            x = self._shared(self._x, CLIENT)
            for kind, *args in self._layers:
                x = getattr(self, f"_{kind}")(x, *args)
            classes = x.argmax(dim=1, one_hot=False).get_plain_text(dst=CLIENT)
        return classes.numpy() if self._rank == CLIENT else None

    def _flatten(self, x: Any) -> Any:
        return x.flatten(1)

    def _linear(self, x: Any, name: str) -> Any:
        return x.matmul(self._weights[f"{name}.weight"].t()).add(self._weights[f"{name}.bias"])

    def _conv2d(self, x: Any, name: str) -> Any:
        return x.conv2d(self._weights[f"{name}.weight"]).add(self._weights[f"{name}.bias"].view(1, -1, 1, 1))

    def _relu(self, x: Any) -> Any:
        return x.relu()

    def _max_pool2d(self, x: Any, size: int) -> Any:
        return x.max_pool2d(size)

    def barrier(self) -> None:
        crypten.communicator.get().barrier()

    def sent_bytes(self) -> int | None:
        """What this party has sent and, at the first party, the dealer too: it talks to no other."""
        own = self._sent()
        if own is None or self._rank != CLIENT or not crypten.mpc.ttp_required():
            return own
        return own + int(self._provider.TTPClient.get().ttp_request("sent", None).item())

    def rounds(self) -> int:
        """CrypTen's own count: every collective call and every message to or from the dealer."""
        crypten.cfg.communicator.verbose = True
        crypten.reset_communication_stats()
        self.infer()
        crypten.cfg.communicator.verbose = False
        return int(crypten.communicator.get().get_communication_stats()["rounds"])
