"""Plots, by matplotlib: an extra, `pip install tacit[plot]`. The ending of the file decides the format."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tacit.bench import Measured, bench
from tacit.diff import Diff
from tacit.ir.errors import InputError
from tacit.ir.files import require_place, write_whole
from tacit.ir.view.page import time_text
from tacit.progress import track

if TYPE_CHECKING:
    from tacit.approximation import Curve
    from tacit.peers.compare import Row

_BATCHES = (1, 2, 8, 32, 128, 512)
NETWORKS = ("virtual", "lan", "wan")
# Told apart by people who see colours differently (Okabe and Ito), and by their markers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vPX"
_MOST_PANELS = 60


def require_matplotlib(file: Path | None = None) -> Any:
    """matplotlib's figure; raises InputError with the remedy where it is missing, or cannot write such a file.

    And OSError where nothing can be written to that place.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'tacit[plot]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if file is not None and file.suffix.lstrip(".").lower() not in known:
        raise InputError(f"{file} has to end in one of .{', .'.join(sorted(known))}")
    if file is not None:
        require_place(file)
    return Figure


def _save(figure: Any, file: Path) -> None:
    require_matplotlib(file)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix[1:].lower(), dpi=160)
    write_whole(file, drawn.getvalue())


def _style(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def sweep(model: str, *, most: int = 1, protocol: str, reveal: str, runs: int) -> list[Measured]:
    """One measurement for each network and batch up to `most`."""
    batches = [*(b for b in _BATCHES if b < most), most]
    places = [(network, batch) for network in NETWORKS for batch in batches]
    return [
        bench(model, batch=batch, network=network, protocol=protocol, reveal=reveal, runs=runs)
        for network, batch in track(places, f"measuring {model}")
    ]


def plot_bench(rows: Sequence[Measured], file: Path) -> None:
    """Time of an image against the batch, and of the largest batch against the network, offline and online apart."""
    figure = require_matplotlib()(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    networks = list(dict.fromkeys(row.network for row in rows))
    for i, network in enumerate(networks):
        mine = [row for row in rows if row.network == network]
        times = [1e3 * row.total_s / row.batch for row in mine]
        low, high = ([1e3 * row.spread_s[k] / row.batch for row in mine] for k in (0, 1))
        left.plot([r.batch for r in mine], times, marker=_MARKERS[i], color=_COLOURS[i], label=network)
        left.fill_between([r.batch for r in mine], low, high, color=_COLOURS[i], alpha=0.15, linewidth=0)
    plain = [row for row in rows if row.network == networks[0]]
    times = [1e3 * row.plaintext_s / row.batch for row in plain]
    left.plot([r.batch for r in plain], times, color="#777777", linestyle="--", label="plaintext float32")
    _logarithmic(left, sorted({row.batch for row in rows}))
    name = f"{rows[0].model}, {rows[0].protocol} protocol, reveal {rows[0].reveal}"
    _style(left, name, "batch", "ms per image, offline and online")
    last = [max((row for row in rows if row.network == network), key=lambda row: row.batch) for network in networks]
    offline, online = ([1e3 * getattr(row, key) for row in last] for key in ("offline_s", "online_s"))
    right.bar(networks, offline, color=_COLOURS[4], label="offline", width=0.6)
    right.bar(networks, online, bottom=offline, color=_COLOURS[0], label="online", width=0.6)
    for i, row in enumerate(last):
        right.annotate(time_text(row.total_s), (i, offline[i] + online[i]), ha="center", va="bottom")
    right.margins(y=0.12)
    right.grid(False, axis="x")
    _style(right, f"batch {last[0].batch}, {last[0].rounds} rounds", "network", "ms per batch")
    handles, labels = (
        a + b for a, b in zip(*(axes.get_legend_handles_labels() for axes in (left, right)), strict=True)
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, file)


def plot_peers(rows: Sequence[Row], file: Path) -> None:
    """Time of an image against the batch: a panel for each network, a line for each system that gave an answer."""
    models = list(dict.fromkeys(row.model for row in rows))
    systems = list(dict.fromkeys(row.system for row in rows))
    figure = require_matplotlib()(figsize=(1.5 + 4.2 * len(models), 4.4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        for i, system in enumerate(systems):
            mine = [row for row in rows if (row.model, row.system) == (model, system) and row.ms_per_image is not None]
            style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
            times = [row.ms_per_image for row in mine]
            axes.plot(
                [row.batch for row in mine], times, label=system, linewidth=2.6 if "Tacit" in system else 1.4, **style
            )
        _logarithmic(axes, sorted({row.batch for row in rows if row.model == model}))
        _style(axes, f"{model}, encrypted argmax", "batch", "ms per image")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(figure, file)


def _logarithmic(axes: Any, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def plot_diff(found: Diff, file: Path) -> None:
    """A row for each layer, first on top, its largest and its mean error; the tolerance parts the colours."""
    labels = [f"{row.module}  {row.op}".strip() for row in found.layers]
    size = (4.4 + 0.075 * max(map(len, labels)), max(3.4, 1.1 + 0.24 * len(labels)))
    figure = require_matplotlib()(figsize=size, layout="constrained")
    axes = figure.subplots()
    floor = found.tolerance * 2.0**-12
    errors = np.array([[r.largest_error, r.mean_error] for r in found.layers])
    shade = np.log2(np.maximum(errors, floor) / found.tolerance)
    image = axes.imshow(shade, aspect="auto", cmap="RdBu_r", vmin=-12, vmax=12)
    axes.set_xticks([0, 1], ["largest", "mean"])
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for i, row in enumerate(found.layers):
        if row.overflowed or row.largest_error > found.tolerance:
            axes.annotate("!", (0, i), ha="center", va="center", fontweight="bold")
    bar = figure.colorbar(image, ax=axes, ticks=[-12, -6, 0, 6, 12], pad=0.02, shrink=min(1.0, 4.0 / size[1]))
    bar.ax.set_yticklabels(["tolerance / 4096", "/ 64", f"tolerance, {found.tolerance:.2g}", "x 64", "x 4096"])
    figure.suptitle(f"error by layer, {found.frac_bits} fractional bits, ranges {found.ranges}", fontsize=11)
    axes.set_xticks([0.5], minor=True)
    axes.set_yticks(np.arange(len(labels)) - 0.5, minor=True)
    axes.tick_params(which="both", length=0)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.spines[:].set_visible(False)
    _save(figure, file)


def plot_errors(curves: Sequence[Curve], file: Path) -> None:
    """A panel for each function that is approximated: its error over the range of the fit, under the bound.

    Of more than 60, those that come closest to their bound. Raises InputError where there is none.
    """
    if not curves:
        raise InputError("there is no approximated function to draw")
    shown = sorted(sorted(curves, key=_share, reverse=True)[:_MOST_PANELS], key=curves.index)
    columns = min(len(shown), 3 if len(shown) <= 9 else 5)
    rows = -(-len(shown) // columns)
    figure = require_matplotlib()(figsize=(3.6 * columns, 0.8 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, found in zip(panels, shown, strict=False):
        _error_panel(axes, found)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if len(shown) < len(curves):
        figure.suptitle(f"the {len(shown)} of {len(curves)} that come closest to their bound", fontsize=11)
    _save(figure, file)


def _share(found: Curve) -> float:
    """How much of what its bound allows is used, at most."""
    return float((found.error.abs() / found.bound).max())


def _error_panel(axes: Any, found: Curve) -> None:
    x, errors, bounds = found.x.numpy(), found.error.abs().numpy(), found.bound.numpy()
    limited = bool(np.isfinite(bounds).all())
    least = float(bounds.min()) * 1e-3 if limited else float(errors.max()) * 1e-6 or 1e-18
    axes.plot(x, np.maximum(errors, least), color=_COLOURS[0], linewidth=0.8, rasterized=True, label="|error|")
    if limited:
        axes.plot(x, bounds, color=_COLOURS[1], linestyle="--", label="bound")
    axes.set_yscale("log")
    axes.set_ylim(bottom=least)
    if x[0] >= 0 and x[-1] > 64 * x[0]:
        axes.set_xscale("log", base=2)
    share = f", {_share(found):.0%} of the bound" if limited else ""
    name = f"{found.function}  {_shortened(found.module) or '%' + found.line}"
    _style(axes, f"{name}\n{errors.max():.1e} at most{share}", "x", "absolute error")
    axes.title.set_fontsize(9)
    axes.tick_params(labelsize=8)


def _shortened(path: str, most: int = 26) -> str:
    """The end of a module's path, which tells more than its beginning."""
    return path if len(path) <= most else f"...{path[3 - most :]}"
