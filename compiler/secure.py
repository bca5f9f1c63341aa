"""The compiled model: run it among virtual parties, check it against the oracle, save and load it."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tacit.accuracy import Accuracy, FloatModel, Tally, parts, require_classes, sliced
from tacit.arguments import CONSTANTS, bind, slots_of
from tacit.ir.errors import InputError, WeightsError
from tacit.ir.files import require_place
from tacit.ir.given import path_of, shown
from tacit.ir.ops.outputs import Pack
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.ir.tree import Tree, built
from tacit.progress import log, track, waiting
from tacit.runtime import ring
from tacit.runtime.channel import LinkModel
from tacit.runtime.cores import on_one_core, survive_forks
from tacit.runtime.forks import in_child
from tacit.runtime.leaving import each, stops_at_exit
from tacit.runtime.overflow import interpret_checked
from tacit.runtime.reference import compare, interpret
from tacit.runtime.session import Run, Session, Trace
from tacit.runtime.words import Words
from tacit.saved import PLAN_FILE, WEIGHTS_FILE, metadata, read_model, save_model
from tacit.tensors import comparable, plain_tensor, unreadable
from tacit.trace import traced

Tensor = torch.Tensor
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}


class Secure:
    """A plan, and the weights of its owner as ring integers.

    Calling it runs one inference of a batch among three virtual parties, with the client and the owner as roles of
    their own: same arguments as the model, by position or by name, plus the targets for reveal="correct". The first
    call opens a session, which shares the weights once; later calls reuse it. Threads may call it side by side, and a
    call that fails disturbs no other; after a fork each process has a session of its own, and so has every copy. A
    pickle holds the weights: it is as secret as the weights file. `last_run` is what the call that ended last has
    measured.

    Results come as the model returns them. Where it has been loaded or unpickled, the plan alone tells their structure:
    named tuples are then of a class of that name with the same fields, and dataclasses dictionaries whose entries are
    attributes too.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        *,
        answer: Tree = None,
        model: Any = None,
    ) -> None:
        """dtype: of results of which the plan says nothing else. answer: the model's own containers of its results.
        model: what was compiled, as long as somebody else keeps it: see `accuracy`."""
        self.plan = plan
        self.last_run: Run | None = None
        self._weights: Mapping[str, Tensor] = weights if isinstance(weights, Words) else Words(plan, weights)
        self._dtype = dtype
        self._answer = answer
        self._model: Callable[[], Any] = (lambda: None) if model is None else weakref.ref(model)
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

    def __copy__(self) -> Secure:
        return Secure(self.plan, self._weights, self._dtype, answer=self._answer, model=self._model())

    def __deepcopy__(self, memo: dict[int, Any]) -> Secure:
        return Secure(
            self.plan, copy.deepcopy(self._weights, memo), self._dtype, answer=self._answer, model=self._model()
        )

    @stops_at_exit
    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Encrypted inference; raises InputError before anything is shared if an input does not fit."""
        answer, _ = self._run(inputs, named, trace=False)
        return answer

    @stops_at_exit
    def reference(self, *inputs: Any, check: bool = False, **named: Any) -> Any:
        """The clear oracle: the same fixed-point arithmetic without cryptography, truncations rounded to nearest.

        With `check`, raises RangeError at the first line of which a value leaves the range that the plan states.
        """
        if not isinstance(check, (bool, int)):
            raise InputError(f"check has to be True or False, not {shown(check)}")
        run = interpret_checked if check else interpret

        with waiting("the clear oracle"):
            values = run(self.plan, self._weights, check_inputs(self.plan, inputs, named))
        return self._decoded(values[self.plan.result])

    @stops_at_exit
    def check(self, *inputs: Any, **named: Any) -> Any:
        """A secure run compared with the oracle under the same public truncation offsets, bit for bit at every line.

        Returns the answer; raises DivergenceError naming the first line that differs. It opens every
        intermediate value inside this process: a test, not for a client's data.
        """
        answer, trace = self._run(inputs, named, trace=True)
        assert trace is not None

        with waiting("the clear oracle"):
            clear = interpret(self.plan, self._weights, check_inputs(self.plan, inputs, named), trace.offsets)
            compare(self.plan, trace.values, clear)
        return answer

    @stops_at_exit
    def accuracy(
        self, x: Any, y: Tensor | None = None, *, model: Any = None, kwargs: Mapping[str, Any] | None = None
    ) -> Accuracy:
        """How this plan does on a data set, beside the float model, in the clear: what to run before going live.

        x: inputs as `tacit.compile` takes an example, any number of rows. y: their classes, int64, one for each row;
        reveal="correct" needs them. model: the float model, where this was loaded, or the model is gone. kwargs: as
        given to compile. Truncations round by chance, as they do in a run; values that leave the range of their line,
        on which a run may answer otherwise, are told by row.

        The float model runs as it is now, in batches. Raises InputError where inputs, classes or model do not fit.
        """
        float_model = self._model() if model is None else model
        if float_model is None:
            raise InputError("the float model is not at hand any more: give it, as in secure.accuracy(x, model=model)")
        with waiting("comparing with float"):
            return self._compared(FloatModel(float_model), x, y, kwargs)

    def _compared(self, model: FloatModel, x: Any, y: Tensor | None, kwargs: Mapping[str, Any] | None) -> Accuracy:
        args, named = model.arguments(x, kwargs)
        inputs = {name: value for name, value in named.items() if not isinstance(value, CONSTANTS)}
        counted = self.plan.reveal == "correct"
        if counted and y is None:
            raise InputError("this plan counts right classes: give them, as in secure.accuracy(x, y)")
        checked = check_inputs(self.plan, (*args, y) if counted else args, inputs)
        rows = len(next(iter(checked.values())))
        tally = Tally(self.plan, require_classes(y, rows))
        for part in parts(self.plan, rows):
            answer = tally.run(self._weights, {label: value[part] for label, value in checked.items()})
            tally.compare(self._decoded(answer), model(sliced(args, part), sliced(named, part)), part)
        return tally.found()

    def _run(self, inputs: tuple[Any, ...], named: Mapping[str, Any], *, trace: bool) -> tuple[Any, Trace | None]:
        encoded = self._encoded(inputs, named)
        session = self.session()
        with waiting("encrypted inference"):
            answer, run, opened = session.request(encoded, trace=trace)
        self.last_run = run
        log.debug("batch of %d: %s", run.batch, run)
        return self._decoded(answer), opened

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The answers to many batches, in order; the material of each is dealt while the one before it is online.

        An item is a batch as the model takes it, a tuple of its arguments, or a dictionary of them by name. One item is
        read ahead of the answers.
        Raises InputError at the first item that does not fit, before anything of it is shared.
        """
        try:
            items = iter(batches)
        except TypeError:
            raise InputError(f"stream takes several batches, as in a list, not {shown(batches)}") from None
        count = len(batches) if isinstance(batches, Sized) else None
        yield from track(each(self._answers(items)), "encrypted inference", total=count)

    def _answers(self, batches: Iterable[Any]) -> Iterator[Any]:
        encoded = (self._encoded(item if isinstance(item, tuple) else (item,)) for item in batches)
        for answer, run in self.session().stream(encoded):
            self.last_run = run
            yield self._decoded(answer)

    @stops_at_exit
    def trace(self, *inputs: Any, **named: Any) -> Any:
        """As a call, with a file name last: writes what each party did when, for chrome://tracing or ui.perfetto.dev.

        `secure.trace(x, "trace.json")`. One track for each party, slices for rounds, ops, sends and waits, arrows for
        messages with their bytes; one online and one offline phase. Nothing secret is in it.
        """
        arguments, file = inputs[:-1], inputs[-1] if inputs else None
        if not isinstance(file, (str, os.PathLike)):
            raise InputError("the last argument of trace without a name is the file to write")
        file = path_of(file, "the last argument of trace")
        require_place(file)
        encoded = self._encoded(arguments, named)
        session = self.session()
        with waiting("encrypted inference, traced"):
            answer, self.last_run = traced(session, encoded, file)
        return self._decoded(answer)

    @stops_at_exit
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

    def _encoded(self, arguments: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        with on_one_core():
            return encode_inputs(self.plan, check_inputs(self.plan, arguments, named))

    def _decoded(self, answer: Tensor) -> Any:
        with on_one_core():
            return decode_answer(self.plan, answer, self._dtype, self._answer)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The owner's weights as ring integers, by label: the secret of this object."""
        return self._weights

    @stops_at_exit
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write plan.txt, which is public, and weights.safetensors, the owner's alone (mode 0600).

        Both or none: if that fails, a model that was there before is still there. Raises OSError, which names the file.
        """
        target = path_of(folder, "what a model is saved to")
        with waiting("writing the weights"):
            told = {"plan": self.plan.digest, "sha256": _fingerprint(self._weights), "dtype": str(self._dtype)}
            content = save_tensors({k: v.contiguous() for k, v in self._weights.items()}, told)
            save_model(target, str(self.plan), content)


@stops_at_exit
def load(folder: str | os.PathLike[str]) -> Secure:
    """What `Secure.save` wrote; raises PlanError or WeightsError where a file was changed or does not belong."""
    source = path_of(folder, "what a model is loaded from")
    with waiting("reading the weights"):
        return _loaded(source)


def _loaded(source: Path) -> Secure:
    plan, content = read_model(source)
    path = source / WEIGHTS_FILE
    try:
        weights = load_tensors(content)
    except SafetensorError as error:
        raise WeightsError(f"{path.name} is not a readable safetensors file: {error}") from None
    told = metadata(content)
    if told.get("plan") != plan.digest:
        raise WeightsError(f"{path.name} belongs to another plan than {PLAN_FILE}: the digests differ")
    if told.get("sha256") != _fingerprint(weights):
        raise WeightsError(f"{path.name} was changed after it was written: its fingerprint does not match")
    expected = {n.op.label: (n.type.dims, n.type.dtype) for n in plan.find(Weight)}  # type: ignore[attr-defined]
    found = {label: (tuple(value.shape), value.dtype) for label, value in weights.items()}
    if expected != found:
        names = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise WeightsError(f"{path.name} does not hold the weights of the plan: {', '.join(names)}")
    dtype = _DTYPES.get(told.get("dtype", ""))
    if dtype is None:
        raise WeightsError(f"{path.name} names no type for the answer: {' or '.join(_DTYPES)}")
    return Secure(plan, weights, dtype)


def check_inputs(plan: Plan, arguments: Sequence[Any], named: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The inputs by label, out of the model's own arguments, each found fit for the plan; raises InputError."""
    found = bind(slots_of(plan), arguments, named)
    out = {}
    for node in plan.find(Input):
        assert isinstance(node.op, Input)
        out[node.op.label] = check_input(node, found[node.op.label])
    if len({len(value) for value in out.values()}) != 1:
        raise InputError("the inputs differ in batch size")
    return out


def encode_inputs(plan: Plan, checked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by label as ring integers."""
    return {
        node.op.label: ring.encode(checked[node.op.label], node.type.frac)  # type: ignore[attr-defined]
        for node in plan.find(Input)
    }


def decode_answer(plan: Plan, answer: Tensor, dtype: torch.dtype, own: Tree = None) -> Any:
    """What the model would have returned, from ring integers: a tensor, or the structure it has tensors in.

    dtype: of floats of which the plan says nothing. own: the structure in the model's own classes, where it is known.
    """
    result, answer = plan.node(plan.result).type, answer.to(torch.int64)
    packs = plan.find(Pack)
    if packs:
        pack = packs[-1].op
        assert isinstance(pack, Pack)
        return built(own or pack.structure, pack.split(ring.decode(answer, result.frac), dtype))
    if plan.reveal == "correct":
        return answer[0]
    if plan.reveal == "argmax" or result.frac == 0:
        return answer
    return ring.decode(answer, result.frac).to(dtype)


def check_input(node: Node, value: Tensor) -> Tensor:
    """The value, if it is one that the input line takes; raises InputError, without quoting any of its elements."""
    op = node.op
    assert isinstance(op, Input)
    if reason := unreadable(value):
        raise InputError(f"input '{op.label}' {reason}")
    value = comparable(plain_tensor(value))
    wanted = node.type.at(max(1, len(value) if value.dim() else 1)).dims
    if tuple(value.shape) != wanted:
        shape = "x".join(str(d) for d in node.type.shape)
        raise InputError(f"input '{op.label}' has shape {tuple(value.shape)}, the plan takes {shape}, N at least 1")
    truths = op.integers and op.low >= 0 and op.high <= 1
    if value.is_floating_point() == op.integers or (value.dtype == torch.bool and not truths):
        takes = "floats, as torch.float32" if not op.integers else "integers, as torch.int64"
        raise InputError(f"input '{op.label}' is {value.dtype}, the plan takes {takes}{' or torch.bool' * truths}")
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"input '{op.label}' holds NaN or infinity")
    ends = op.ends(value.shape[1:]) if op.along else (op.low, op.high)
    found = value.double() if op.integers else value  # exact, as every range ends below 2^53
    outside = int(((found < ends[0]) | (found > ends[1])).sum())
    if outside:
        remedy = "compile with a wider input_range"
        raise InputError(
            f"input '{op.label}': {outside} of {value.numel()} values lie outside the range "
            f"{'of their place, within ' if op.along else ''}[{op.low}, {op.high}] for which the plan was compiled; "
            f"{f'indices end with their tables, else {remedy}' if op.integers else remedy}"
        )
    return value


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for label in sorted(weights):
        value = weights[label].contiguous()
        digest.update(f"{label} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
