"""The compiler as a list of small rewrites. Each is a function from draft to draft, verified after it ran."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tacit.ir.errors import CompileError
from tacit.ir.files import write_whole
from tacit.ir.plan import Plan
from tacit.passes.activations import recognise_gelu
from tacit.passes.draft import Draft
from tacit.passes.finer import choose_finer
from tacit.passes.lower import hoist_weight_openings, lower_to_protocol, number_lines, reveal_result, schedule_rounds
from tacit.passes.norms import recognise_norms
from tacit.passes.quantise import expand_to_fixed_point, fuse_truncation_into_relu
from tacit.passes.ranges import bound_ranges
from tacit.passes.rings import choose_rings, fit_small_ring
from tacit.passes.scale import choose_scale
from tacit.passes.simplify import drop_no_ops, drop_softmax_before_argmax, fold_batch_norm, move_max_pool_before_relu

Pass = Callable[[Draft], Draft]
log = logging.getLogger("tacit")

PIPELINE: tuple[Pass, ...] = (
    drop_no_ops,
    drop_softmax_before_argmax,
    fold_batch_norm,
    move_max_pool_before_relu,
    recognise_gelu,
    recognise_norms,
    choose_finer,
    choose_scale,
    expand_to_fixed_point,
    fuse_truncation_into_relu,
    bound_ranges,
    fit_small_ring,
    lower_to_protocol,
    reveal_result,
    hoist_weight_openings,
    choose_rings,
    schedule_rounds,
    number_lines,
)


def run_pipeline(draft: Draft, keep: Callable[[int, str, Plan], None] = lambda number, name, plan: None) -> Draft:
    """Run all passes, verifying the plan after each; with TACIT_DUMP=dir, write it there as NN_pass.txt.

    `keep` is shown the plan after capture and after every pass.
    """
    _dump(0, "capture", draft)
    keep(0, "capture", draft.plan)
    begin = time.perf_counter()
    for i, (name, found) in enumerate(stages(draft), 1):
        draft = found
        _dump(i, name, draft)
        keep(i, name, draft.plan)
        log.debug("%s: %d lines, %.3f s", name, len(draft.plan.nodes), time.perf_counter() - begin)
        begin = time.perf_counter()
    return draft


def stages(draft: Draft) -> Iterator[tuple[str, Draft]]:
    """The draft after each pass, with the pass's name; verified."""
    for one in PIPELINE:
        draft = one(draft)
        draft.plan.verify()
        yield one.__name__, draft


def _dump(number: int, name: str, draft: Draft) -> None:
    folder = os.environ.get("TACIT_DUMP")
    if not folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder, f"{number:02}_{name}.txt"), str(draft.plan).encode())
    except OSError as error:
        raise CompileError(f"TACIT_DUMP names a folder that cannot be written, {folder}: {error.strerror}") from None


__all__ = ["PIPELINE", "Draft", "Pass", "run_pipeline", "stages"]
