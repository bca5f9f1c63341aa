"""SPU: every party is a process; the first is also the client and the owner, and compiles the network through JAX."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

spu = importlib.import_module("spu")
lib = importlib.import_module("spu.libspu")

Array = np.ndarray[Any, Any]
CLIENT = 0
_INPUT, _ANSWER = "x", "classes"
_LOG_SECONDS = 10.0  # how long to wait for SPU to flush its log


class Engine:
    """One party. Weights are shared once, inputs for every batch, both from the first party over SPU's own links."""

    version = importlib.metadata.version("spu")

    def __init__(
        self, job: dict[str, Any], arrays: dict[str, Array], rank: int, folder: Path, sent: Callable[[], int | None]
    ) -> None:
        self.sent_bytes = sent
        self._rank, self._parties = rank, job["parties"]
        self._log = folder / f"spu.{rank}.log"
        _log_to(self._log)
        description = lib.link.Desc()
        for i, port in enumerate(job["ports"]):
            description.add_party(f"party{i}", f"127.0.0.1:{port}")
        description.recv_timeout_ms = int(1000 * job["deadline_s"])
        link = lib.link.create_brpc(description, rank)
        self._data = link.spawn()  # shares and barriers, beside the runtime's own messages
        config = lib.RuntimeConfig(protocol=getattr(lib.ProtocolKind, job["protocol"]), field=lib.FieldType.FM64)
        self._io = spu.Io(self._parties, config)
        self._runtime = spu.Runtime(link, config)
        traced = lib.RuntimeConfig(config)
        traced.enable_pphlo_profile = True  # logs what was sent
        self._traced = spu.Runtime(link.spawn(), traced)
        self._x = arrays.pop(_INPUT)
        self._program = self._compiled(job["layers"], arrays)
        for name, array in arrays.items():
            share = self._share(array)
            self._runtime.set_var(name, share)
            self._traced.set_var(name, share)

    def _compiled(self, layers: list[list[Any]], weights: dict[str, Array]) -> Any:
        """The executable, compiled by the first party for this shape of batch."""
        names = [_INPUT, *weights]
        if self._rank == CLIENT:
            code = _compile(layers, names, [self._x, *weights.values()])
            for other in range(1, self._parties):
                self._data.send(other, code)
        else:
            code = self._data.recv(CLIENT)
        return lib.Executable(name="network", input_names=names, output_names=[_ANSWER], code=code)

    def _share(self, array: Array) -> Any:
        """This party's share of an array that only the first party puts in."""
        if self._rank != CLIENT:
            return self._received(CLIENT)
        shares = self._io.make_shares(array, lib.Visibility.VIS_SECRET)
        for other in range(1, self._parties):
            self._send(other, shares[other])
        return shares[CLIENT]

    def _send(self, other: int, share: Any) -> None:
        for part in (str(len(share.share_chunks)), share.meta, *share.share_chunks):
            self._data.send(other, part)

    def _received(self, other: int) -> Any:
        share = lib.Share()
        count = int(self._data.recv(other))
        share.meta = self._data.recv(other)
        share.share_chunks = [self._data.recv(other) for _ in range(count)]
        return share

    def infer(self) -> Array | None:
        return self._inferred(self._runtime)

    def _inferred(self, runtime: Any) -> Array | None:
        runtime.set_var(_INPUT, self._share(self._x))
        runtime.run(self._program)
        share = runtime.get_var(_ANSWER)
        if self._rank != CLIENT:
            self._send(CLIENT, share)
            return None
        answer: Array = self._io.reconstruct([share, *(self._received(i) for i in range(1, self._parties))])
        return answer

    def barrier(self) -> None:
        self._data.barrier()

    def rounds(self) -> int:
        """Messages that this party sends one after another in one inference, as SPU logs them when it profiles."""
        self._inferred(self._traced)
        give_up = time.monotonic() + _LOG_SECONDS
        while time.monotonic() < give_up:
            found = re.findall(r"send actions (\d+)", self._log.read_text(errors="replace"))
            if found:
                return int(found[-1])
            time.sleep(0.05)
        raise RuntimeError("SPU did not log how many messages it sent")


def _log_to(path: Path) -> None:
    options = lib.logging.LogOptions()
    options.enable_console_logger = False
    options.system_log_path = str(path)
    lib.logging.setup_logging(options)


def _compile(layers: list[list[Any]], names: list[str], arrays: list[Array]) -> bytes:
    """The network as a JAX function, compiled by SPU; all inputs are secret."""
    import jax
    import jax.numpy as jnp
    from spu.utils import frontend

    def network(*values: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        x = given[_INPUT]
        for kind, *args in layers:
            if kind == "flatten":
                x = x.reshape(len(x), -1)
            elif kind == "linear":
                x = x @ given[f"{args[0]}.weight"].T + given[f"{args[0]}.bias"]
            elif kind == "conv2d":
                x = jax.lax.conv(x, given[f"{args[0]}.weight"], (1, 1), "VALID")
                x = x + given[f"{args[0]}.bias"].reshape(1, -1, 1, 1)
            elif kind == "relu":
                x = jnp.maximum(x, 0)
            elif kind == "max_pool2d":
                window = (1, 1, args[0], args[0])
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
            else:
                raise ValueError(f"no layer is called '{kind}'")
        return jnp.argmax(x, axis=1)

    executable, _ = frontend.compile(
        frontend.Kind.JAX,
        network,
        arrays,
        {},
        names,
        [lib.Visibility.VIS_SECRET] * len(names),
        lambda outputs: [_ANSWER],
    )
    code: bytes = executable.code
    return code
