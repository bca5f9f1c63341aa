"""The compiled model: run it among virtual parties, check it against the oracle, save and load it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tacit.ir.errors import InputError, PlanError, WeightsError
from tacit.ir.given import path_of, shown
from tacit.ir.ops.outputs import Pack
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.progress import log, track, waiting
from tacit.runtime import ring
from tacit.runtime.channel import LinkModel
from tacit.runtime.cores import on_one_core, survive_forks
from tacit.runtime.forks import in_child
from tacit.runtime.overflow import interpret_checked
from tacit.runtime.reference import compare, interpret
from tacit.runtime.session import Run, Session, Trace
from tacit.structure import leaves
from tacit.trace import traced

Tensor = torch.Tensor
PLAN_FILE, WEIGHTS_FILE = "plan.txt", "weights.safetensors"
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}


class Secure:
    """A plan, and the weights of its owner as ring integers.

    Calling it runs one inference of a batch among three virtual parties, with the client and the owner as roles of
    their own: same arguments as the model, plus the targets for reveal="correct". The first call opens a session,
    which shares the weights once; later calls reuse it. Threads may call it side by side, and a call that fails
    disturbs no other; after a fork each process has a session of its own, and so has every copy. A pickle holds the
    weights: it is as secret as the weights file. `last_run` is what the call that ended last has measured.
    """

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.plan = plan
        self.last_run: Run | None = None
        self._weights = dict(weights)
        self._dtype = dtype
        self._session: Session | None = None
        self._opening = threading.Lock()
        survive_forks()
        in_child(self._renew_lock)

    def __repr__(self) -> str:
        return f"<Secure {self.plan!r}>"

    def _renew_lock(self) -> None:
        self._opening = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Plan and weights: a copy opens a session of its own, as two owners of one would use the same masks."""
        return {"plan": self.plan, "weights": self._weights, "dtype": self._dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Secure.__init__(self, state["plan"], state["weights"], state["dtype"])

    def __call__(self, *inputs: Any) -> Any:
        """Encrypted inference; raises InputError before anything is shared if an input does not fit."""
        answer, _ = self._run(inputs, trace=False)
        return answer

    def reference(self, *inputs: Any, check: bool = False) -> Any:
        """The clear oracle: the same fixed-point arithmetic without cryptography, truncations rounded to nearest.

        With `check`, raises RangeError at the first line of which a value leaves the range that the plan states.
        """
        if not isinstance(check, (bool, int)):
            raise InputError(f"check has to be True or False, not {shown(check)}")
        run = interpret_checked if check else interpret

        with waiting("the clear oracle"):
            values = run(self.plan, self._weights, check_inputs(self.plan, inputs))
        return self._decoded(values[self.plan.result])

    def check(self, *inputs: Any) -> Any:
        """A secure run compared with the oracle under the same public truncation offsets, bit for bit at every line.

        Returns the answer; raises DivergenceError naming the first line that differs. It opens every
        intermediate value inside this process: a test, not for a client's data.
        """
        answer, trace = self._run(inputs, trace=True)
        assert trace is not None

        with waiting("the clear oracle"):
            clear = interpret(self.plan, self._weights, check_inputs(self.plan, inputs), trace.offsets)
            compare(self.plan, trace.values, clear)
        return answer

    def _run(self, inputs: tuple[Any, ...], *, trace: bool) -> tuple[Any, Trace | None]:
        encoded = self._encoded(inputs)
        session = self.session()
        with waiting("encrypted inference"):
            answer, run, opened = session.request(encoded, trace=trace)
        self.last_run = run
        log.debug("batch of %d: %s", run.batch, run)
        return self._decoded(answer), opened

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The answers to many batches, in order; the material of each is dealt while the one before it is online.

        An item is a batch as the model takes it, or a tuple of its arguments. One item is read ahead of the answers.
        Raises InputError at the first item that does not fit, before anything of it is shared.
        """
        try:
            items = iter(batches)
        except TypeError:
            raise InputError(f"stream takes several batches, as in a list, not {shown(batches)}") from None
        count = len(batches) if isinstance(batches, Sized) else None
        encoded = (self._encoded(item if isinstance(item, tuple) else (item,)) for item in items)
        for answer, run in track(self.session().stream(encoded), "encrypted inference", total=count):
            self.last_run = run
            yield self._decoded(answer)

    def trace(self, *inputs: Any) -> Any:
        """As a call, with a file name last: writes what each party did when, for chrome://tracing or ui.perfetto.dev.

        `secure.trace(x, "trace.json")`. One track for each party, slices for rounds, ops, sends and waits, arrows for
        messages with their bytes; one online and one offline phase. Nothing secret is in it.
        """
        file = inputs[-1] if inputs else None
        if not isinstance(file, (str, os.PathLike)):
            raise InputError("the last argument of trace is the name of the file to write")
        file = path_of(file, "the last argument of trace")
        encoded = self._encoded(inputs[:-1])
        session = self.session()
        with waiting("encrypted inference, traced"):
            answer, self.last_run = traced(session, encoded, file)
        return self._decoded(answer)

    def session(self, link: LinkModel | None = None) -> Session:
        """The session of this model in this process, opened at first use; `link` emulates a network, and opens a new
        one. Calls of all threads run in it side by side; a forked process opens its own."""
        if link is not None and not isinstance(link, LinkModel):
            raise InputError(f"link has to be a LinkModel of tacit.runtime.channel, not {shown(link)}")
        with self._opening:
            if self._session is None or link is not None or self._session.pid != os.getpid():
                with waiting("sharing the weights; the first use compiles the kernels"):
                    self._session = Session(self.plan, self._weights, link=link)
                log.info("session open: %d bytes for the weights", self._session.weight_meter.bytes)
            return self._session

    def _encoded(self, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
        with on_one_core():
            return encode_inputs(self.plan, check_inputs(self.plan, arguments))

    def _decoded(self, answer: Tensor) -> Any:
        with on_one_core():
            return decode_answer(self.plan, answer, self._dtype)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The owner's weights as ring integers, by label: the secret of this object."""
        return self._weights

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write plan.txt, which is public, and weights.safetensors, the owner's alone (mode 0600)."""
        target = path_of(folder, "what a model is saved to")
        target.mkdir(parents=True, exist_ok=True)
        (target / PLAN_FILE).write_text(str(self.plan))
        with waiting("writing the weights"):
            metadata = {"plan": self.plan.digest, "sha256": _fingerprint(self._weights), "dtype": str(self._dtype)}
            content = save_tensors({k: v.contiguous() for k, v in self._weights.items()}, metadata)
            _write_private(target / WEIGHTS_FILE, content)


def read_plan(path: Path) -> Plan:
    """The plan in a file; raises PlanError."""
    try:
        return Plan.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise PlanError(f"{path.name} is not a plan: it is not even text") from None


def load(folder: str | os.PathLike[str]) -> Secure:
    """What `Secure.save` wrote; raises PlanError or WeightsError where a file was changed or does not belong."""
    source = path_of(folder, "what a model is loaded from")
    with waiting("reading the weights"):
        return _loaded(source)


def _loaded(source: Path) -> Secure:
    plan = read_plan(source / PLAN_FILE)
    path = source / WEIGHTS_FILE
    try:
        weights = load_tensors(path.read_bytes())
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path.name} is not a readable safetensors file: {error}") from None
    if metadata.get("plan") != plan.digest:
        raise WeightsError(f"{path.name} belongs to another plan than {PLAN_FILE}: the digests differ")
    if metadata.get("sha256") != _fingerprint(weights):
        raise WeightsError(f"{path.name} was changed after it was written: its fingerprint does not match")
    expected = {n.op.label: (n.type.dims, n.type.dtype) for n in plan.find(Weight)}  # type: ignore[attr-defined]
    found = {label: (tuple(value.shape), value.dtype) for label, value in weights.items()}
    if expected != found:
        names = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise WeightsError(f"{path.name} does not hold the weights of the plan: {', '.join(names)}")
    dtype = _DTYPES.get(metadata.get("dtype", ""))
    if dtype is None:
        raise WeightsError(f"{path.name} names no type for the answer: {' or '.join(_DTYPES)}")
    return Secure(plan, weights, dtype)


def check_inputs(plan: Plan, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """The inputs by label, out of the model's own arguments, each found fit for the plan; raises InputError."""
    inputs, nodes = leaves(arguments), plan.find(Input)
    odd = {type(x).__name__ for x in inputs if not isinstance(x, torch.Tensor)}
    if odd:
        raise InputError(f"an input has to be a tensor, or a structure of tensors, not {', '.join(sorted(odd))}")
    if len(inputs) != len(nodes):
        names = ", ".join(n.name for n in nodes)
        raise InputError(f"expected {len(nodes)} inputs ({names}), found {len(inputs)}")
    out = {}
    for node, value in zip(nodes, inputs, strict=True):
        assert isinstance(node.op, Input)
        out[node.op.label] = check_input(node, value)
    if len({len(value) for value in out.values()}) != 1:
        raise InputError("the inputs differ in batch size")
    return out


def encode_inputs(plan: Plan, checked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by label as ring integers."""
    return {
        node.op.label: ring.encode(checked[node.op.label], node.type.frac)  # type: ignore[attr-defined]
        for node in plan.find(Input)
    }


def decode_answer(plan: Plan, answer: Tensor, dtype: torch.dtype) -> Any:
    """What the model would have returned, from ring integers: a tensor, or the structure it has tensors in."""
    result, answer = plan.node(plan.result).type, answer.to(torch.int64)
    packs = plan.find(Pack)
    if packs:
        assert isinstance(packs[-1].op, Pack)
        return packs[-1].op.split(ring.decode(answer, result.frac).to(dtype))
    if plan.reveal == "correct":
        return answer[0]
    if plan.reveal == "argmax" or result.frac == 0:
        return answer
    return ring.decode(answer, result.frac).to(dtype)


def check_input(node: Node, value: Tensor) -> Tensor:
    """The value, if it is one that the input line takes; raises InputError, without quoting any of its elements."""
    op = node.op
    assert isinstance(op, Input)
    if not isinstance(value, torch.Tensor):
        raise InputError(f"input '{op.label}' has to be a tensor, not {type(value).__name__}")
    wanted = node.type.at(max(1, len(value) if value.dim() else 1)).dims
    if tuple(value.shape) != wanted:
        shape = "x".join(str(d) for d in node.type.shape)
        raise InputError(f"input '{op.label}' has shape {tuple(value.shape)}, the plan takes {shape}, N at least 1")
    if value.is_floating_point() == op.integers or value.is_complex() or value.dtype == torch.bool:
        raise InputError(
            f"input '{op.label}' is {value.dtype}, the plan takes {'integers' if op.integers else 'floats'}"
        )
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"input '{op.label}' holds NaN or infinity")
    outside = int(((value < op.low) | (value > op.high)).sum())
    if outside:
        raise InputError(
            f"input '{op.label}': {outside} of {value.numel()} values lie outside the range [{op.low}, {op.high}] "
            "for which the plan was compiled; compile with a wider input_range"
        )
    return value.detach().cpu()


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for label in sorted(weights):
        value = weights[label].contiguous()
        digest.update(f"{label} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_private(path: Path, content: bytes) -> None:
    """Replace the file in one step; nobody but the owner can read it at any moment."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(content)
    os.replace(temporary, path)
