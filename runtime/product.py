"""The matrix product in Z_2^64 and Z_2^32, tiled in registers.

Integer products have no library of their own: torch's reaches some 14 G multiply-adds a second on a core with
AVX-512 (16 of 32-bit words), this one 21 (40). A tile of 4 rows by 32 (64) columns is accumulated in vector
registers while it runs along the inner dimension. Vectors are LLVM's, so that the same code compiles for other
processors, only slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[np.generic]
_ROWS, _VECTORS, _VECTOR_BYTES = 4, 4, 64
_TILE_BYTES = _VECTORS * _VECTOR_BYTES
# With so few rows, copying a panel of w costs more than reading it at its stride.
_PACK_FROM_ROWS = 64


@intrinsic
def _tile(
    typing: Any, word: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, out: Any, out_stride: Any, inner: Any
) -> Any:
    """out = x w for x (4, inner), w (inner, 256 bytes), out (4, 256 bytes), in words of the type of `word`.

    Addresses, and strides of rows, in bytes; inner is at least 1.
    """
    signature = types.void(word, types.uintp, types.intp, types.uintp, types.intp, types.uintp, types.intp, types.intp)
    return signature, _generate


def _generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    _, x, x_stride, w, w_stride, out, out_stride, inner = args
    size = signature.args[0].bitwidth // 8
    address, word, lanes = ir.IntType(64), ir.IntType(8 * size), _VECTOR_BYTES // size
    vector = ir.VectorType(word, lanes)
    entry, loop, end = builder.block, builder.append_basic_block("inner"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(address)
    k.add_incoming(ir.Constant(address, 0), entry)
    sums = [[builder.phi(vector) for _ in range(_VECTORS)] for _ in range(_ROWS)]
    row = builder.add(w, builder.mul(k, w_stride))
    right = [_load(builder, builder.add(row, address(_VECTOR_BYTES * c)), vector, size) for c in range(_VECTORS)]
    for r in range(_ROWS):
        place = builder.add(builder.add(x, builder.mul(address(r), x_stride)), builder.mul(k, address(size)))
        left = _broadcast(builder, _load(builder, place, word, size), vector, lanes)
        for c in range(_VECTORS):
            total = builder.add(sums[r][c], builder.mul(left, right[c]))
            sums[r][c].add_incoming(ir.Constant(vector, [0] * lanes), entry)
            sums[r][c].add_incoming(total, loop)
            sums[r][c] = total
    following = builder.add(k, address(1))
    k.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, inner), loop, end)
    builder.position_at_end(end)
    for r in range(_ROWS):
        for c in range(_VECTORS):
            row = builder.add(out, builder.mul(address(r), out_stride))
            place = builder.add(row, address(_VECTOR_BYTES * c))
            builder.store(sums[r][c], builder.inttoptr(place, vector.as_pointer())).align = size
    return context.get_dummy_value()


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def _broadcast(builder: Any, scalar: Any, vector: Any, lanes: int) -> Any:
    nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(nothing, scalar, first), nothing, places)


@njit(nogil=True, cache=True)
def tiled(x: Array, w: Array, out: Array) -> None:
    """out = x w for x (M, K), w (K, N), out (M, N), all contiguous by rows and of one dtype; M at least 4, K 1."""
    rows, inner = x.shape
    columns, size, word = w.shape[1], out.itemsize, out.dtype.type(0)
    width = _TILE_BYTES // size
    panel = np.empty((inner, width), out.dtype)
    edge = np.empty((_ROWS, width), out.dtype)
    for j in range(0, columns, width):
        count = min(width, columns - j)
        packed = count < width or rows >= _PACK_FROM_ROWS
        if packed:
            for k in range(inner):
                panel[k, :count] = w[k, j : j + count]
                panel[k, count:] = 0
        source, stride = (panel.ctypes.data, _TILE_BYTES) if packed else (w.ctypes.data + size * j, columns * size)
        for i in range(0, rows, _ROWS):
            first = min(i, rows - _ROWS)  # the last tile may overlap the one before it
            left = x.ctypes.data + size * inner * first
            if count == width:
                target = out.ctypes.data + size * (columns * first + j)
                _tile(word, left, size * inner, source, stride, target, size * columns, inner)  # type: ignore[call-arg]
            else:
                target = edge.ctypes.data
                _tile(word, left, size * inner, source, stride, target, _TILE_BYTES, inner)  # type: ignore[call-arg]
                out[first : first + _ROWS, j : j + count] = edge[:, :count]
