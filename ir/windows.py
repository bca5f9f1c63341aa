"""The windows of pooling layers: which rows and columns an output looks at, as PyTorch defines it."""

from __future__ import annotations

from tacit.ir.errors import PlanError

Span = tuple[int, int]  # half open
_MOST = 1 << 20  # places of a window along one dimension, where they are listed


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, *, ceil_mode: bool) -> int:
    """Number of windows along one dimension; raises PlanError."""
    if kernel < 1 or stride < 1 or padding < 0 or dilation < 1:
        raise PlanError(f"no window: size {kernel}, stride {stride}, padding {padding}, dilation {dilation}")
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    if reach < 0:
        raise PlanError(f"a window of {kernel} (dilation {dilation}) does not fit {size} with padding {padding}")
    count = -(-reach // stride) + 1 if ceil_mode else reach // stride + 1
    # The last window has to start inside the input or its left padding.
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def average_spans(
    size: int, kernel: int, stride: int, padding: int, *, ceil_mode: bool, count_include_pad: bool
) -> tuple[list[Span], list[int]]:
    """The spans of an average pool, clipped to the input, and the length each is divided by."""
    spans, lengths = [], []
    for i in _places(output_size(size, kernel, stride, padding, 1, ceil_mode=ceil_mode)):
        start, end = i * stride - padding, min(i * stride - padding + kernel, size + padding)
        span = (max(start, 0), min(end, size))
        spans.append(span)
        lengths.append(end - start if count_include_pad else span[1] - span[0])
    return spans, lengths


def adaptive_spans(size: int, outputs: int) -> tuple[list[Span], list[int]]:
    """The spans of an adaptive average pool, and their lengths."""
    spans = [((i * size) // outputs, -(-((i + 1) * size) // outputs)) for i in _places(outputs)]
    return spans, [end - start for start, end in spans]


def inside(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Span]:
    """The different sets of taps of a window that lie inside the input, over all its places: as spans of taps."""
    spans = set()
    for i in _places(output_size(size, kernel, stride, padding, dilation, ceil_mode=False)):
        start = i * stride - padding
        first = max(0, -(start // dilation))
        last = min(kernel, -((start - size) // dilation))
        spans.add((min(first, kernel), max(last, min(first, kernel))))
    return sorted(spans)


def _places(count: int) -> range:
    if not 1 <= count <= _MOST:
        raise PlanError(f"{count} places of a window, where there are from 1 to {_MOST}")
    return range(count)
