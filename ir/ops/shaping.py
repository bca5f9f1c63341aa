"""Operators of PyTorch that move elements, written as the moves of `moves`. Indices are part of the architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tacit.ir.ops.arithmetic import AddScalar
from tacit.ir.ops.layer import WHOLE, Layer
from tacit.ir.ops.moves import Expand, Pad, Permute, Take, permuted, reshaped, taken

if TYPE_CHECKING:
    from tacit.capture import Capture


class Select(Layer):
    """One element along an axis, which goes."""

    aten = ("aten.select.int",)
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        return _one(graph, k["self"], k["dim"], k["index"])


class Unbind(Layer):
    """All elements along an axis, one by one."""

    aten = ("aten.unbind.int",)
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        return [_one(graph, k["self"], k["dim"], i) for i in range(graph.fixed_shape(k["self"])[k["dim"]])]


def _one(graph: Capture, x: str, axis: int, index: int) -> str:
    shape = graph.fixed_shape(x)
    index %= shape[axis]
    return reshaped(graph, taken(graph, x, axis, [index]), [*shape[1:axis], *shape[axis + 1 :]])


class Split(Layer):
    """Consecutive pieces along an axis."""

    aten = (
        "aten.split.Tensor",
        "aten.split.sizes",
        "aten.split_with_sizes.default",
        "aten.chunk.default",
        "aten.tensor_split.sections",
        "aten.tensor_split.indices",
    )
    axes = ("dim",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> list[str]:
        x, axis = k["self"], k["dim"]
        size = graph.fixed_shape(x)[axis]
        ends = cls._ends(graph, k, size)
        return [taken(graph, x, axis, range(a, b)) for a, b in zip([0, *ends], ends, strict=False)]

    @staticmethod
    def _ends(graph: Capture, k: dict[str, Any], size: int) -> list[int]:
        if "indices" in k:
            ends = [*k["indices"], size]
        elif "sections" in k:
            each, more = divmod(size, k["sections"])
            ends = [(i + 1) * each + min(i + 1, more) for i in range(k["sections"])]
        elif "chunks" in k:
            step = -(-size // k["chunks"])
            ends = [min(end, size) for end in range(step, size + step, step)]
        else:
            pieces: Any = k.get("split_sizes", k.get("split_size"))
            if isinstance(pieces, int):
                pieces = [min(pieces, size - begin) for begin in range(0, size, pieces)]
            ends = [sum(pieces[: i + 1]) for i in range(len(pieces))]
        if any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
            graph.unsupported("a piece without any element")
        return ends


class Reordered(Layer):
    """roll, flip, index_select, repeat_interleave with constants: elements by index."""

    aten = (
        "aten.roll.default",
        "aten.flip.default",
        "aten.index_select.default",
        "aten.repeat_interleave.self_int",
    )
    axes = ("dim", "dims")
    batch_anywhere = True

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x: str = k["self"]
        dims = k["dims"] if "dims" in k else [k["dim"]]
        if not dims or dims == [None]:
            graph.unsupported(WHOLE)
        shifts = k["shifts"] if isinstance(k.get("shifts"), (list, tuple)) else [k.get("shifts")] * len(dims)
        for axis, shift in zip(dims, shifts, strict=True):
            size = graph.fixed_shape(x)[axis]
            if shift is not None:
                indices = [(i - shift) % size for i in range(size)]
            elif "index" in k:
                indices = graph.static_indices(k["index"], size)
            elif "repeats" in k:
                indices = [i for i in range(size) for _ in range(k["repeats"])]
            else:
                indices = list(range(size))[::-1]
            x = taken(graph, x, axis, indices)
        return x


class Repeat(Layer):
    """expand, expand_as, repeat, tile: never along the batch."""

    aten = (
        "aten.expand.default",
        "aten.expand_as.default",
        "aten.repeat.default",
        "aten.tile.default",
        "aten.broadcast_to.default",
    )

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x: str = k["self"]
        wanted = graph.result_shape()
        shape = graph.fixed_shape(x)
        if len(wanted) != len(shape) or wanted[0] != graph.shape(x)[0]:
            graph.unsupported("it puts a dimension before the batch, or repeats the batch")
        for axis, size in enumerate(wanted):
            if axis and size != shape[axis]:
                assert isinstance(size, int)
                times = size // shape[axis]
                op = Expand(axis, size) if shape[axis] == 1 else Take(axis, tuple(range(shape[axis])) * times)
                x = graph.emit(op, x)
        return x


class Padding(Layer):
    """torch.nn.functional.pad and the padding modules: constant, reflect, replicate, circular."""

    aten = (
        "aten.pad.default",
        "aten.constant_pad_nd.default",
        "aten.reflection_pad1d.default",
        "aten.reflection_pad2d.default",
        "aten.reflection_pad3d.default",
        "aten.replication_pad1d.default",
        "aten.replication_pad2d.default",
        "aten.replication_pad3d.default",
    )

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x: str = k["self"]
        pads = [int(p) for p in (k["pad"] if "pad" in k else k["padding"])]
        mode = k.get("mode") or graph.target.split(".")[1].split("_")[0]
        if len(pads) // 2 >= len(graph.shape(x)) and any(pads[2 * len(graph.shape(x)) - 2 :]):
            graph.unsupported("it pads the batch")
        pads = pads[: 2 * len(graph.shape(x)) - 2]
        if mode == "constant":
            value = graph.scalar(k.get("value") or 0.0)
            inner = graph.emit(AddScalar(-value), x) if value else x
            padded = graph.emit(Pad(tuple(pads)), inner) if any(pads) else inner
            return graph.emit(AddScalar(value), padded) if value else padded
        for i in range(len(pads) // 2):
            axis = len(graph.shape(x)) - 1 - i
            x = taken(graph, x, axis, cls._indices(graph, mode, graph.fixed_shape(x)[axis], *pads[2 * i : 2 * i + 2]))
        return x

    @staticmethod
    def _indices(graph: Capture, mode: str, size: int, before: int, after: int) -> list[int]:
        places = range(-before, size + after)
        if mode == "replicate" or mode == "replication":
            return [min(max(i, 0), size - 1) for i in places]
        if mode in ("reflect", "reflection"):
            period = max(1, 2 * size - 2)
            return [min(i % period, period - i % period) for i in places]
        if mode == "circular":
            return [i % size for i in places]
        graph.unsupported(f"padding mode '{mode}'")


class PixelShuffle(Layer):
    """Channels to pixels, and back."""

    aten = ("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x = k["self"]
        c, h, w = graph.fixed_shape(x)[1:]
        if "upscale_factor" in k:
            r = k["upscale_factor"]
            parts = graph.emit(Permute((0, 1, 4, 2, 5, 3)), reshaped(graph, x, (c // r**2, r, r, h, w)))
            return reshaped(graph, parts, (c // r**2, h * r, w * r))
        r = k["downscale_factor"]
        parts = graph.emit(Permute((0, 1, 3, 5, 2, 4)), reshaped(graph, x, (c, h // r, r, w // r, r)))
        return reshaped(graph, parts, (c * r**2, h // r, w // r))


class ChannelShuffle(Layer):
    """Channels of groups in turn."""

    aten = ("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")

    @classmethod
    def capture(cls, graph: Capture, **k: Any) -> str:
        x, groups = k["self"], k["groups"]
        c, *rest = graph.fixed_shape(x)[1:]
        order = [0, 2, 1, *range(3, 3 + len(rest))]
        return reshaped(graph, permuted(graph, reshaped(graph, x, (groups, c // groups, *rest)), order), (c, *rest))
