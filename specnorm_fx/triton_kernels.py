"""Spectral norm of many weights in a handful of CUDA launches, whatever their number.

The mathematics and its guards are those of `specnorm_fx.reference`. Here a weight is a matrix ``W`` of
shape ``[p, q]`` and one power iteration is ``t = W y, x = t / |t|, s = W^T x, y = s / |s|``. In the
order ``"uv"`` x is u, y is v and p counts the rows; in the order ``"vu"`` x is v, y is u and p counts
the columns: one kernel serves both, with the strides exchanged. Three launches, each over all weights:

1. pass: a program owns some of the p. It computes their t and at once adds ``W^T t`` of its own part,
   which is still in cache, to a partial sum: W comes from memory once.
2. reduce: the partial sums give s; |t| is known by now, so x is written, too.
3. finish: ``sigma = x^T W y = |s|`` (of the new x and y, so no third product over W), y, ``W / sigma``.

A further iteration is a further pass and reduce. Without iteration the pass computes ``x^T W y`` only.

Rules that everything below follows:

- The pointers travel by value, as kernel arguments, so a call has no state and may be recorded in a
  CUDA graph. What depends on shapes alone is in a small table on the device, built by the first call
  with these shapes. That first call also compiles the kernels and must come before a recording.
- Partial sums are added in a fixed order that depends on the weight's own shape alone: two runs, and
  a weight alone or among others, give the same bits.
- t and s are kept in fp32 (fp64 for fp64 weights) and never squared there: partial sums carry a power
  of two, the sums of squares are fp64. So sigma may be anything that fp32 can hold as a normal
  number, beside some room for the single entries: 1e-30 to 1e+37.
- A dimension of the matrix is below 2^31, the weight as a whole need not be.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specnorm_fx import reference

__all__ = ["normalize", "normalize_backward", "power_iteration", "start"]

# CUDA takes 4 KB of kernel arguments; three pointers a weight make 1.5 KB. More weights: more chunks.
MAX_WEIGHTS = 64
# A kernel is compiled for 8, 16, 32 and 64 weights; fewer are filled up. An address too many costs less than
# a microsecond in a launch, compiling the kernels some seconds.
MIN_WEIGHTS = 8

# Tiles [p, q] of 4096 elements for 256 threads. WIDE is for long rows: a warp reads 512 bytes of one
# row, and the sum over p stays within a thread. TALL is for short rows, and for weights that are
# contiguous along p, of which it takes full lines of 128 bytes. Where the pass reads 16-byte vectors
# its tiles are twice as long along q: then 32 KB of W are on their way per program, and one program on
# each SM, which is what its registers allow, keeps the memory busy.
WIDE_P, WIDE_Q = tl.constexpr(8), tl.constexpr(512)
TALL_P, TALL_Q = tl.constexpr(32), tl.constexpr(128)

# A weight is cut into at most 256 blocks along p, about two for each of an H200's 132 SMs. The partial
# sums (one row of q per block) are then at most 1/16 of a weight of 4096 p or more, and at most 1/8 of
# a smaller one, where programs count for more; being small, those stay in the 50 MB of L2.
MAX_BLOCKS = 256

REDUCE_P, REDUCE_Q = tl.constexpr(32), tl.constexpr(128)  # narrow in q: more programs for few columns
VECTOR = tl.constexpr(1024)  # elements of x or y that a program writes at once
WRITERS = tl.constexpr(1024)  # programs that do so
COPY = tl.constexpr(8192)  # elements of W that a program divides
TOTAL = tl.constexpr(512)  # partial sums added at once

# How to read a weight. PLAIN: aligned for 16-byte loads along q. P_UNIT: contiguous along p.
WIDE, TALL, WIDE_PLAIN, TALL_PLAIN, TALL_P_UNIT = (tl.constexpr(i) for i in range(5))

# An axis of the matrix has at most two strides: index i lies at (i // INNER) * OUTER_STRIDE +
# (i % INNER) * INNER_STRIDE in W and at the same sum of PLACEs in u or v. The index runs in the order
# of W's memory, u and v keep the logical one: a ConvTranspose or channels_last weight is not copied.
SIZE, INNER, OUTER_STRIDE, INNER_STRIDE, OUTER_PLACE, INNER_PLACE = (tl.constexpr(i) for i in range(6))
AXIS = tl.constexpr(6)

# A row of the table, after the two axes: what a weight has in the vectors, the workspace, the sums,
# and where its programs start in each launch.
(
    KIND,
    ITERATIONS,
    BLOCK_SIZE,  # p of one block
    BLOCKS,
    TILES,  # of REDUCE_Q
    CHUNKS,  # programs of the finish
    NUMEL,
    SIGMA,
    X,
    Y,
    T,
    S,
    PARTIAL,
    BLOCK_SUMS,  # |t|^2 and the scale of the partial sum; without iteration x.t and |x|^2
    TILE_SUMS,  # |s|^2 and s.y; without iteration |y|^2
    PASS_START,
    REDUCE_START,
    FINISH_START,
) = (tl.constexpr(i) for i in range(12, 30))

# Of the backward, beside the axes, KIND, SIGMA, X and Y.
(
    G_P_OUTER,
    G_P_INNER,
    G_Q_OUTER,
    G_Q_INNER,
    Q_TILES,  # tiles side by side along q
    ALL_TILES,
    DOTS,  # partial sums of <G, W / sigma>
    DOT_TILES,  # tiles of one partial sum
    DOT_SUMS,
    DOT_START,
    TILE_START,
) = (tl.constexpr(i) for i in range(30, 41))
FIELDS = tl.constexpr(41)

NEVER = 2**62  # start of the programs of a row that fills the table up to a power of two


# ---------------------------------------------------------------- kernels: parts


@triton.jit
def _find(table, start, L: tl.constexpr):
    """Which weight this program serves, its row of the table, and which of its programs this is."""
    program = tl.program_id(0)
    starts = tl.load(table + tl.arange(0, L) * FIELDS + start)
    layer = tl.sum((starts <= program).to(tl.int32), 0) - 1
    row = table + layer * FIELDS
    return layer, row, (program - tl.load(row + start)).to(tl.int32)


@triton.jit
def _address(addresses, layer, L: tl.constexpr):
    address = addresses[0]
    for i in tl.static_range(1, L):
        address = tl.where(layer == i, addresses[i], address)
    return address.to(tl.int64) - 1  # see _addresses


@triton.jit
def _pointer(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(T))
    if ALIGNED:
        # Said of a pointer that only this branch has: the hint would hold for the others as well.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _axis(row, first: tl.constexpr):
    return (
        tl.load(row + first + SIZE).to(tl.int32),
        tl.load(row + first + INNER).to(tl.int32),
        tl.load(row + first + OUTER_STRIDE),
        tl.load(row + first + INNER_STRIDE),
        tl.load(row + first + OUTER_PLACE).to(tl.int32),
        tl.load(row + first + INNER_PLACE).to(tl.int32),
    )


@triton.jit
def _offset(index, axis):
    return (index // axis[INNER]) * axis[OUTER_STRIDE] + (index % axis[INNER]) * axis[INNER_STRIDE]


@triton.jit
def _place(index, axis):
    return (index // axis[INNER]) * axis[OUTER_PLACE] + (index % axis[INNER]) * axis[INNER_PLACE]


@triton.jit
def _kind(row, aligned):
    """How to read the weight, given where it really lies."""
    kind = tl.load(row + KIND)
    plain = (kind == WIDE_PLAIN) | (kind == TALL_PLAIN)
    return tl.where(plain & (aligned == 0), kind - WIDE_PLAIN, kind)


@triton.jit
def _total(sums, count):
    total = tl.zeros([TOTAL], tl.float64)
    for start in range(0, count, TOTAL):
        index = start + tl.arange(0, TOTAL)
        total += tl.load(sums + index, mask=index < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _directed(length, eps):
    # NaN and inf are no direction either: one bad step of the weights must not poison the vectors.
    return (length > eps) & (length < float("inf"))


@triton.jit
def _scale(x, inverse, C: tl.constexpr):
    # By a reciprocal in fp64: for fp32 that rounds as a division does (which is exact only as a call
    # of a slow routine, and two units off as Triton's operator), for fp64 it is at most a unit off.
    return (x.to(tl.float64) * inverse).to(C)


@triton.jit
def _exponent(x):
    """The exponent field of x >= 0, so far from both ends that its negative exists, too."""
    if x.dtype == tl.float64:
        return tl.minimum(tl.maximum((x.to(tl.int64, bitcast=True) >> 52) & 2047, 1), 2045).to(tl.int32)
    else:
        return tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)


@triton.jit
def _power(exponent, C: tl.constexpr):
    """The power of two with this exponent field, 0 below the first."""
    exponent = tl.maximum(exponent, 0)
    if C == tl.float64:
        return (exponent.to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        return (exponent << 23).to(tl.float32, bitcast=True)


# ---------------------------------------------------------------- kernels: power iteration


@triton.jit
def _block(
    at,
    row,
    block,
    eps,
    x_from,
    y_from,
    vectors,
    workspace,
    sums,
    FIRST: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    VEC: tl.constexpr,  # elements of 16 bytes where W is read in such vectors along q, else 0
    P_UNIT: tl.constexpr,
):
    """One block of p: its t and, if the weight iterates, its part of W^T t."""
    BIAS: tl.constexpr = 1023 if C == tl.float64 else 127
    p_axis = _axis(row, 0)
    q_axis = _axis(row, AXIS)
    w = _pointer(at, W, VEC > 0)
    q_size = q_axis[SIZE]
    if VEC > 0:
        q_size = q_size // VEC * VEC  # true by the choice of KIND; here for the compiler to see
    begin = block * tl.load(row + BLOCK_SIZE).to(tl.int32)
    end = tl.minimum(begin + tl.load(row + BLOCK_SIZE).to(tl.int32), p_axis[SIZE])
    iterations = tl.load(row + ITERATIONS)
    x_to = vectors + tl.load(row + X)
    y_to = vectors + tl.load(row + Y)
    t_to = workspace + tl.load(row + T)
    s = workspace + tl.load(row + S)
    partial = workspace + tl.load(row + PARTIAL) // 32 * 32 + block.to(tl.int64) * q_size
    block_sums = sums + tl.load(row + BLOCK_SUMS) + block
    written = tl.where(block == 0, q_size, 0)  # the y that this program writes: all or none
    if not FIRST:
        # y of the last iteration is s / |s|, or what it was before; nobody has written it yet. Where
        # it stays, others read it and nobody writes; where it is renewed, nobody reads it.
        length = tl.sqrt(_total(sums + tl.load(row + TILE_SUMS), tl.load(row + TILES).to(tl.int32)))
        renewed = _directed(length, eps)
        inverse = (1.0 / tl.where(renewed, length, 1.0)).to(C)
        renewed_size = tl.where(renewed, q_size, 0)
        written = tl.minimum(written, renewed_size)

    exponent = 1
    square = tl.full([], 0.0, tl.float64)
    other = tl.full([], 0.0, tl.float64)
    for p_start in range(begin, end, P):
        p = p_start + tl.arange(0, P)
        p_in = p < end
        if VEC > 0:
            p_offset = p * (p_axis[INNER_STRIDE] // VEC * VEC)
        elif P_UNIT:
            p_offset = p.to(tl.int64)
        else:
            p_offset = _offset(p, p_axis)

        products = tl.zeros([P, Q], C)
        for q_start in range(0, q_size, Q):
            q = q_start + tl.arange(0, Q)
            q_in = q < q_size
            q_offset = q.to(tl.int64) if VEC > 0 else _offset(q, q_axis)
            inside = p_in[:, None] & q_in[None, :]
            tile = tl.load(w + (p_offset[:, None] + q_offset[None, :]), mask=inside, other=0.0).to(C)
            place = _place(q, q_axis)
            if FIRST:
                y = tl.load(y_from + place, mask=q_in, other=0.0)
            else:
                y = tl.load(s + q, mask=q < renewed_size, other=0.0) * inverse
                y += tl.load(y_to + place, mask=q_in & (q >= renewed_size), other=0.0)
            tl.store(y_to + place, y, mask=(q < written) & (p_start == begin))
            products += tile * y[None, :]
        t = tl.sum(products, 1)
        tl.store(t_to + p, t, mask=p_in)
        if FIRST:
            place = _place(p, p_axis)
            x = tl.load(x_from + place, mask=p_in, other=0.0)
            tl.store(x_to + place, x, mask=p_in)
            if iterations <= 0:
                square += tl.sum(x.to(tl.float64) * t.to(tl.float64), 0)
                other += tl.sum(x.to(tl.float64) * x.to(tl.float64), 0)

        if iterations > 0:
            square += tl.sum(t.to(tl.float64) * t.to(tl.float64), 0)
            # The partial sum is scaled down by a power of two, else it would be of the size sigma^2.
            larger = tl.maximum(exponent, _exponent(tl.max(tl.abs(t), 0)))
            ratio = _power(BIAS + exponent - larger, C)
            scaled = t * _power(2 * BIAS - larger, C)
            for q_start in range(0, q_size, Q):
                q = q_start + tl.arange(0, Q)
                q_in = q < q_size
                q_offset = q.to(tl.int64) if VEC > 0 else _offset(q, q_axis)
                inside = p_in[:, None] & q_in[None, :]
                tile = tl.load(w + (p_offset[:, None] + q_offset[None, :]), mask=inside, other=0.0).to(C)
                z = tl.sum(tile * scaled[:, None], 0)
                z += tl.load(partial + q, mask=q_in & (p_start > begin), other=0.0) * ratio
                tl.store(partial + q, z, mask=q_in)
            exponent = larger
            # The next tile of p adds to what other threads of this program may have stored.
            tl.debug_barrier()
    scale = tl.where(iterations > 0, _power(exponent, C).to(tl.float64), other)
    tl.store(block_sums, square)
    tl.store(block_sums + tl.load(row + BLOCKS), scale)


@triton.jit(do_not_specialize=["step"])
def _pass_kernel(
    weights,
    xs,
    ys,
    table,
    epsilons,
    vectors,
    workspace,
    sums,
    step,
    FIRST: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    L: tl.constexpr,
):
    # Longer tiles where 16-byte vectors save address registers, a shorter one where nothing does.
    PLAIN: tl.constexpr = 1 if C == tl.float64 else 2
    WIDER: tl.constexpr = PLAIN * WIDE_Q
    LONGER: tl.constexpr = PLAIN * TALL_Q
    SHORT: tl.constexpr = TALL_Q // 2
    layer, row, block = _find(table, PASS_START, L)
    if step < tl.maximum(tl.load(row + ITERATIONS), 1):
        eps = tl.load(epsilons + layer)
        at = _address(weights, layer, L)
        kind = _kind(row, at % 16 == 0)
        x = _pointer(_address(xs, layer, L), C, False)
        y = _pointer(_address(ys, layer, L), C, False)
        if kind == WIDE_PLAIN:
            _block(
                at, row, block, eps, x, y, vectors, workspace, sums, FIRST, W, C, WIDE_P, WIDER, VEC, False
            )
        elif kind == TALL_PLAIN:
            _block(
                at, row, block, eps, x, y, vectors, workspace, sums, FIRST, W, C, TALL_P, LONGER, VEC, False
            )
        elif kind == TALL_P_UNIT:
            _block(at, row, block, eps, x, y, vectors, workspace, sums, FIRST, W, C, TALL_P, TALL_Q, 0, True)
        elif kind == TALL:
            _block(at, row, block, eps, x, y, vectors, workspace, sums, FIRST, W, C, TALL_P, SHORT, 0, False)
        else:
            _block(at, row, block, eps, x, y, vectors, workspace, sums, FIRST, W, C, WIDE_P, WIDE_Q, 0, False)


@triton.jit
def _write_vector(source, to, axis, inverse, program, programs, PLACED: tl.constexpr, C: tl.constexpr):
    """This program's share of a vector over its length; the source in memory's order or in place."""
    writers = tl.minimum(programs, WRITERS)
    if program < writers:
        for start in range(program * VECTOR, axis[SIZE], writers * VECTOR):
            index = start + tl.arange(0, VECTOR)
            inside = index < axis[SIZE]
            place = _place(index, axis)
            value = tl.load(source + (place if PLACED else index), mask=inside, other=0.0)
            tl.store(to + place, _scale(value, inverse, C), mask=inside)


@triton.jit(do_not_specialize=["step"])
def _reduce_kernel(
    weights,
    table,
    epsilons,
    vectors,
    workspace,
    sums,
    step,
    W: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
):
    layer, row, tile = _find(table, REDUCE_START, L)
    iterations = tl.load(row + ITERATIONS).to(tl.int32)
    if step < tl.maximum(iterations, 1):
        p_axis = _axis(row, 0)
        q_axis = _axis(row, AXIS)
        q = tile * REDUCE_Q + tl.arange(0, REDUCE_Q)
        q_in = q < q_axis[SIZE]
        tiles = tl.load(row + TILES).to(tl.int32)
        tile_sums = sums + tl.load(row + TILE_SUMS) + tile
        y = tl.load(vectors + tl.load(row + Y) + _place(q, q_axis), mask=q_in, other=0.0).to(tl.float64)
        if iterations <= 0:
            tl.store(tile_sums, tl.sum(y * y, 0))
        else:
            block_sums = sums + tl.load(row + BLOCK_SUMS)
            blocks = tl.load(row + BLOCKS).to(tl.int32)
            length = tl.sqrt(_total(block_sums, blocks))
            x_to = vectors + tl.load(row + X)
            s = tl.zeros([REDUCE_P, REDUCE_Q], tl.float64)
            if _directed(length, tl.load(epsilons + layer)):
                inverse = 1.0 / length
                partial = workspace + tl.load(row + PARTIAL)
                for start in range(0, blocks, REDUCE_P):
                    block = start + tl.arange(0, REDUCE_P)
                    block_in = block < blocks
                    scale = tl.load(block_sums + blocks + block, mask=block_in, other=0.0) * inverse
                    offset = block.to(tl.int64)[:, None] * q_axis[SIZE] + q[None, :]
                    inside = block_in[:, None] & q_in[None, :]
                    s += tl.load(partial + offset, mask=inside, other=0.0).to(tl.float64) * scale[:, None]
                # The programs of a weight share the writing of x.
                t = workspace + tl.load(row + T)
                _write_vector(t, x_to, p_axis, inverse, tile, tiles, False, C)
            else:
                # x stays and the partial sums are of no use: W^T x anew, slow, but all but never.
                w = _pointer(_address(weights, layer, L), W, False)
                q_offset = _offset(q, q_axis)
                for start in range(0, p_axis[SIZE], REDUCE_P):
                    p = start + tl.arange(0, REDUCE_P)
                    p_in = p < p_axis[SIZE]
                    x = tl.load(x_to + _place(p, p_axis), mask=p_in, other=0.0)
                    inside = p_in[:, None] & q_in[None, :]
                    offset = _offset(p, p_axis)[:, None] + q_offset[None, :]
                    part = tl.load(w + offset, mask=inside, other=0.0).to(C) * x[:, None]
                    s += part.to(tl.float64)
            s_q = tl.sum(s, 0)
            tl.store(workspace + tl.load(row + S) + q, s_q.to(C), mask=q_in)
            tl.store(tile_sums, tl.sum(s_q * s_q, 0))
            tl.store(tile_sums + tiles, tl.sum(s_q * y, 0))


@triton.jit
def _length(square, eps):
    """What to divide a vector by for unit length."""
    length = tl.sqrt(square)
    return tl.where(_directed(length, eps), length, 1.0)


@triton.jit
def _finish_kernel(
    weights,
    outputs,
    table,
    epsilons,
    vectors,
    sigmas,
    workspace,
    sums,
    DIVIDE: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
):
    layer, row, chunk = _find(table, FINISH_START, L)
    eps = tl.load(epsilons + layer)
    chunks = tl.load(row + CHUNKS).to(tl.int32)
    tiles = tl.load(row + TILES).to(tl.int32)
    tile_sums = sums + tl.load(row + TILE_SUMS)
    y_to = vectors + tl.load(row + Y)
    iterations = tl.load(row + ITERATIONS)
    if iterations <= 0:
        blocks = tl.load(row + BLOCKS).to(tl.int32)
        block_sums = sums + tl.load(row + BLOCK_SUMS)
        x_to = vectors + tl.load(row + X)
        # Below 0 they are to stay as they are, of whatever length.
        stays = iterations < 0
        x_length = tl.where(stays, 1.0, _length(_total(block_sums + blocks, blocks), eps))
        y_length = tl.where(stays, 1.0, _length(_total(tile_sums, tiles), eps))
        sigma = _total(block_sums, blocks) / (x_length * y_length)
        _write_vector(x_to, x_to, _axis(row, 0), 1.0 / x_length, chunk, chunks, True, C)
        _write_vector(y_to, y_to, _axis(row, AXIS), 1.0 / y_length, chunk, chunks, True, C)
    else:
        length = tl.sqrt(_total(tile_sums, tiles))
        if _directed(length, eps):
            sigma = length
            s = workspace + tl.load(row + S)
            _write_vector(s, y_to, _axis(row, AXIS), 1.0 / length, chunk, chunks, False, C)
        else:
            sigma = _total(tile_sums + tiles, tiles)  # y stayed, so it is no longer s / |s|

    divides = _directed(tl.abs(sigma), eps)
    if chunk == 0:
        tl.store(sigmas + tl.load(row + SIGMA), tl.where(divides, sigma, 0.0))

    if DIVIDE:
        inverse = 1.0 / tl.where(divides, sigma, 1.0)
        address = _address(weights, layer, L)
        numel = tl.load(row + NUMEL)
        start = chunk.to(tl.int64) * COPY
        out = _pointer(_address(outputs, layer, L), W, True) + start  # a fresh tensor is aligned
        index = tl.arange(0, COPY)
        if (address % 16 == 0) & (start + COPY <= numel):
            w = _pointer(address, W, True) + start
            tl.store(out + index, _scale(tl.load(w + index), inverse, C).to(W))
        else:
            w = _pointer(address, W, False) + start
            inside = start + index < numel
            tile = tl.load(w + index, mask=inside, other=0.0)
            tl.store(out + index, _scale(tile, inverse, C).to(W), mask=inside)


# ---------------------------------------------------------------- kernels: backward


@triton.jit
def _tile_offsets(tile, row, p_axis, q_axis, P: tl.constexpr, Q: tl.constexpr, VEC: tl.constexpr):
    """Where a tile lies in W and in G, and its p and q."""
    q_tiles = tl.load(row + Q_TILES).to(tl.int32)
    p = (tile // q_tiles) * P + tl.arange(0, P)
    q = (tile % q_tiles) * Q + tl.arange(0, Q)
    if VEC > 0:
        inside = (p < p_axis[SIZE])[:, None] & (q < q_axis[SIZE] // VEC * VEC)[None, :]
        w_offset = (p * (p_axis[INNER_STRIDE] // VEC * VEC))[:, None] + q[None, :]
        g_offset = (p * (tl.load(row + G_P_INNER) // VEC * VEC))[:, None] + q[None, :]
    else:
        inside = (p < p_axis[SIZE])[:, None] & (q < q_axis[SIZE])[None, :]
        w_offset = _offset(p, p_axis)[:, None] + _offset(q, q_axis)[None, :]
        p_offset = (p // p_axis[INNER]) * tl.load(row + G_P_OUTER)
        p_offset += (p % p_axis[INNER]) * tl.load(row + G_P_INNER)
        q_offset = (q // q_axis[INNER]) * tl.load(row + G_Q_OUTER)
        q_offset += (q % q_axis[INNER]) * tl.load(row + G_Q_INNER)
        g_offset = p_offset[:, None] + q_offset[None, :]
    return w_offset, g_offset, inside, p, q


@triton.jit
def _dot(
    w_at,
    g_at,
    row,
    begin,
    end,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    VEC: tl.constexpr,
):
    p_axis = _axis(row, 0)
    q_axis = _axis(row, AXIS)
    w = _pointer(w_at, W, VEC > 0)
    g = _pointer(g_at, W, VEC > 0)
    products = tl.zeros([P, Q], C)
    for tile in range(begin, end):
        w_offset, g_offset, inside, _p, _q = _tile_offsets(tile, row, p_axis, q_axis, P, Q, VEC)
        w_tile = tl.load(w + w_offset, mask=inside, other=0.0).to(C)
        products += w_tile * tl.load(g + g_offset, mask=inside, other=0.0).to(C)
    return tl.sum(tl.sum(products.to(tl.float64), 1), 0)


@triton.jit
def _dot_kernel(
    weights,
    grads,
    table,
    sums,
    W: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    L: tl.constexpr,
):
    layer, row, dot = _find(table, DOT_START, L)
    w_at = _address(weights, layer, L)
    g_at = _address(grads, layer, L)
    kind = _kind(row, (w_at % 16 == 0) & (g_at % 16 == 0))
    size = tl.load(row + DOT_TILES).to(tl.int32)
    begin = dot * size
    end = tl.minimum(begin + size, tl.load(row + ALL_TILES).to(tl.int32))
    if kind == WIDE_PLAIN:
        total = _dot(w_at, g_at, row, begin, end, W, C, WIDE_P, WIDE_Q, VEC)
    elif kind == TALL_PLAIN:
        total = _dot(w_at, g_at, row, begin, end, W, C, TALL_P, TALL_Q, VEC)
    elif kind == TALL:
        total = _dot(w_at, g_at, row, begin, end, W, C, TALL_P, TALL_Q, 0)
    else:
        total = _dot(w_at, g_at, row, begin, end, W, C, WIDE_P, WIDE_Q, 0)
    tl.store(sums + tl.load(row + DOT_SUMS) + dot, total)


@triton.jit
def _gradient(
    g_at,
    out,
    x,
    y,
    factor,
    inverse,
    row,
    tile,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    VEC: tl.constexpr,
):
    p_axis = _axis(row, 0)
    q_axis = _axis(row, AXIS)
    g = _pointer(g_at, W, VEC > 0)
    w_offset, g_offset, inside, p, q = _tile_offsets(tile, row, p_axis, q_axis, P, Q, VEC)
    g_tile = tl.load(g + g_offset, mask=inside, other=0.0).to(C)
    x_p = tl.load(x + _place(p, p_axis), mask=p < p_axis[SIZE], other=0.0) * factor
    y_q = tl.load(y + _place(q, q_axis), mask=q < q_axis[SIZE], other=0.0)
    dw = _scale(g_tile - x_p[:, None] * y_q[None, :], inverse, C)
    tl.store(out + w_offset, dw.to(W), mask=inside)


@triton.jit
def _gradient_kernel(
    grads,
    outputs,
    table,
    vectors,
    sigmas,
    sums,
    W: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    L: tl.constexpr,
):
    layer, row, tile = _find(table, TILE_START, L)
    g_at = _address(grads, layer, L)
    kind = _kind(row, g_at % 16 == 0)
    out = _pointer(_address(outputs, layer, L), W, True)
    x = vectors + tl.load(row + X)
    y = vectors + tl.load(row + Y)
    sigma = tl.load(sigmas + tl.load(row + SIGMA))
    inverse = 1.0 / tl.where(sigma != 0.0, sigma, 1.0)
    total = _total(sums + tl.load(row + DOT_SUMS), tl.load(row + DOTS).to(tl.int32))
    # Selected, not multiplied: a weight that was left as it is may hold NaN.
    factor = tl.where(sigma != 0.0, total, 0.0).to(C)
    if kind == WIDE_PLAIN:
        _gradient(g_at, out, x, y, factor, inverse, row, tile, W, C, WIDE_P, WIDE_Q, VEC)
    elif kind == TALL_PLAIN:
        _gradient(g_at, out, x, y, factor, inverse, row, tile, W, C, TALL_P, TALL_Q, VEC)
    elif kind == TALL:
        _gradient(g_at, out, x, y, factor, inverse, row, tile, W, C, TALL_P, TALL_Q, 0)
    else:
        _gradient(g_at, out, x, y, factor, inverse, row, tile, W, C, WIDE_P, WIDE_Q, 0)


# ---------------------------------------------------------------- tables: what depends on shapes alone


class _Axis(NamedTuple):
    """How an index of the matrix becomes an offset in W, in G, and a place in u or v."""

    size: int
    inner: int
    stride: tuple[int, int]  # outer, inner
    grad_stride: tuple[int, int]
    place: tuple[int, int]

    @property
    def flat(self) -> bool:
        """The inner stride alone does, in W and in G."""
        strides = (self.stride, self.grad_stride)
        return self.inner == self.size or all(outer == self.inner * inner for outer, inner in strides)

    def fields(self) -> tuple[int, ...]:
        return (self.size, self.inner, *self.stride, *self.place)


class _Weight(NamedTuple):
    """What a table is made from; hashable."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dim: int
    iterations: int = 0
    order: str = "uv"
    eps: float = 0.0
    grad_stride: tuple[int, ...] | None = ()  # (): as the weight's; None: there is no gradient

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """The sides m and n of the matrix."""
        return self.shape[self.dim], self.numel // self.shape[self.dim]

    def axes(self) -> tuple[_Axis, _Axis] | None:
        """Rows and columns, or None if the columns have more than two strides."""
        grad_stride = self.grad_stride or self.stride
        others = [d for d in range(len(self.shape)) if d != self.dim]
        places = [math.prod(self.shape[e] for e in others if e > d) for d in range(len(self.shape))]
        groups: list[tuple[int, tuple[int, int, int]]] = []  # size; step in W, in G, in v; outer first
        for d in sorted((d for d in others if self.shape[d] > 1), key=lambda d: -self.stride[d]):
            size, steps = self.shape[d], (self.stride[d], grad_stride[d], places[d])
            if groups and groups[-1][1] == tuple(step * size for step in steps):
                size *= groups.pop()[0]
            groups.append((size, steps))
        if len(groups) > 2:
            return None
        groups = [(1, (0, 0, 0))] * (2 - len(groups)) + groups
        (a, outer_steps), (b, inner_steps) = groups
        columns = _Axis(a * b, b, *zip(outer_steps, inner_steps, strict=True))
        m = self.shape[self.dim]
        step, grad_step = (self.stride[self.dim], grad_stride[self.dim]) if m > 1 else (0, 0)
        return _Axis(m, m, (0, step), (0, grad_step), (0, 1)), columns

    def contiguous(self) -> "_Weight":
        stride = tuple(math.prod(self.shape[d + 1 :]) for d in range(len(self.shape)))
        return self._replace(stride=stride, grad_stride=stride)


class _Chunk(NamedTuple):
    """The table of the weights with these indices, at most `MAX_WEIGHTS`."""

    indices: list[int]
    swapped: list[bool]  # x is v
    table: Tensor  # [L, FIELDS] int64
    epsilons: Tensor  # [L] fp64
    padded: int  # L: how many weights, filled up to a power of two, at least `MIN_WEIGHTS`
    iterations: int
    workspace: int
    sums: int
    programs: tuple[int, ...]  # of each launch


class _Plan(NamedTuple):
    chunks: list[_Chunk]
    copied: frozenset[int]  # weights (and gradients) to be read from a contiguous copy
    relaid: frozenset[int]  # gradients to be read from a copy with the strides of the weight


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _row_kind(p: _Axis, q: _Axis, vec: int) -> int:
    tall = q.size <= 2 * TALL_Q.value
    steps = (p.stride[1], p.grad_stride[1], q.size)
    if p.flat and q.flat and q.stride[1] == q.grad_stride[1] == 1 and all(step % vec == 0 for step in steps):
        return int((TALL_PLAIN if tall else WIDE_PLAIN).value)
    if p.flat and p.stride[1] == 1 and q.stride[1] != 1:
        return int(TALL_P_UNIT.value)
    return int((TALL if tall else WIDE).value)


def _columns_inside(rows: _Axis, columns: _Axis) -> bool:
    """The columns are what is contiguous, not the rows."""
    return rows.size == 1 or (columns.size > 1 and columns.stride[1] < rows.stride[1])


def _tile_shape(kind: int) -> tuple[int, int]:
    if kind in (WIDE.value, WIDE_PLAIN.value):
        return WIDE_P.value, WIDE_Q.value
    return TALL_P.value, TALL_Q.value


class _Table:
    """Rows of one chunk under construction; running totals become offsets."""

    def __init__(self) -> None:
        self.rows: list[dict[int, int]] = []
        self.weights: list[_Weight] = []
        self.swapped: list[bool] = []
        self.totals = {"workspace": 0, "sums": 0}
        self.programs: dict[int, int] = {}

    def take(self, what: str, count: int) -> int:
        offset = self.totals[what]
        self.totals[what] += _ceil(count, 32) * 32  # keeps 16-byte vectors aligned
        return offset

    def add(
        self,
        weight: _Weight,
        oriented: tuple[_Axis, _Axis, bool],
        fields: dict[Any, int],
        programs: dict[Any, int],
    ) -> None:
        p, q, swapped = oriented
        row = dict(enumerate(p.fields() + q.fields()))
        row |= {field.value: value for field, value in fields.items()}
        for field, count in programs.items():
            row[field.value] = self.programs.get(field.value, 0)
            self.programs[field.value] = row[field.value] + count
        self.rows.append(row)
        self.weights.append(weight)
        self.swapped.append(swapped)

    def chunk(self, indices: list[int], device: torch.device) -> _Chunk:
        count = max(MIN_WEIGHTS, 1 << (len(indices) - 1).bit_length())
        rows = self.rows + [dict.fromkeys(self.programs, NEVER)] * (count - len(indices))
        numbers = [[row.get(field, 0) for field in range(FIELDS.value)] for row in rows]
        return _Chunk(
            indices=indices,
            swapped=self.swapped,
            table=_kept(numbers, torch.int64, device),
            epsilons=_kept([w.eps for w in self.weights], torch.float64, device),
            padded=count,
            iterations=max(w.iterations for w in self.weights),
            workspace=self.totals["workspace"],
            sums=self.totals["sums"],
            programs=tuple(self.programs.values()),
        )


def _kept(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that stays, made on a thread of its own.

    Before torch.compile records a CUDA graph it runs the model, with all that this thread allocates in a
    pool, and raises if anything but its outputs is still alive there. The copy to the device is over on
    return, so every stream may read it.
    """
    with ThreadPoolExecutor(1) as own_thread:
        return own_thread.submit(torch.tensor, values, dtype=dtype, device=device).result()


def _vector_starts(weights: Sequence[_Weight]) -> tuple[list[int], list[int]]:
    """Where each u and each v starts: u and v of each weight in turn, without gaps."""
    starts = list(itertools.accumulate((size for weight in weights for size in weight.sides), initial=0))
    return starts[:-1:2], starts[1::2]


def _chunks(indices: Sequence[int]) -> list[list[int]]:
    return [list(indices[i : i + MAX_WEIGHTS]) for i in range(0, len(indices), MAX_WEIGHTS)]


def _oriented(weight: _Weight) -> tuple[_Axis, _Axis, bool]:
    """The axes p and q, and whether p counts the columns, so that x is v."""
    axes = weight.axes()
    assert axes is not None
    rows, columns = axes
    # Without iteration both orders give the same: take the one in which q runs along memory.
    swapped = weight.order == "vu" if weight.iterations > 0 else not _columns_inside(rows, columns)
    p, q = (columns, rows) if swapped else (rows, columns)
    assert max(p.size, q.size) < 2**31
    return p, q, swapped


# For good: a recorded CUDA graph reads the tables again at every replay. They are a few KB on the device, one
# or two for each mode of a model.
@functools.cache
def _forward_plan(weights: tuple[_Weight, ...], itemsize: int, device: torch.device, divide: bool) -> _Plan:
    us, vs = _vector_starts(weights)
    copied = frozenset(i for i, weight in enumerate(weights) if weight.axes() is None)
    chunks = []
    for indices in _chunks(range(len(weights))):
        table = _Table()
        for i in indices:
            weight = weights[i].contiguous() if i in copied else weights[i]
            p, q, swapped = _oriented(weight)
            kind = _row_kind(p, q, 16 // itemsize)
            tile_p, _ = _tile_shape(kind)
            block = tile_p * _ceil(p.size, tile_p * MAX_BLOCKS)
            blocks = _ceil(p.size, block)
            tiles = _ceil(q.size, REDUCE_Q.value)
            finish = _ceil(weight.numel, COPY.value) if divide else _ceil(max(p.size, q.size), VECTOR.value)
            table.add(
                weight,
                (p, q, swapped),
                {
                    KIND: kind,
                    ITERATIONS: weight.iterations,
                    BLOCK_SIZE: block,
                    BLOCKS: blocks,
                    TILES: tiles,
                    CHUNKS: finish,
                    NUMEL: weight.numel,
                    SIGMA: i,
                    X: (vs if swapped else us)[i],
                    Y: (us if swapped else vs)[i],
                    T: table.take("workspace", p.size),
                    S: table.take("workspace", q.size),
                    PARTIAL: table.take("workspace", blocks * q.size),
                    BLOCK_SUMS: table.take("sums", 2 * blocks),
                    TILE_SUMS: table.take("sums", 2 * tiles),
                },
                {PASS_START: blocks, REDUCE_START: tiles, FINISH_START: finish},
            )
        chunks.append(table.chunk(indices, device))
    return _Plan(chunks, copied, frozenset())


@functools.cache
def _backward_plan(weights: tuple[_Weight, ...], itemsize: int, device: torch.device) -> _Plan:
    us, vs = _vector_starts(weights)
    present = [i for i, weight in enumerate(weights) if weight.grad_stride is not None]
    own = {i: weights[i]._replace(grad_stride=weights[i].stride) for i in present}
    copied = frozenset(i for i in present if own[i].axes() is None)
    relaid = frozenset(i for i in present if weights[i].axes() is None) - copied
    chunks = []
    for indices in _chunks(present):
        table = _Table()
        for i in indices:
            weight = own[i].contiguous() if i in copied else own[i] if i in relaid else weights[i]
            p, q, swapped = _oriented(weight)
            kind = _row_kind(p, q, 16 // itemsize)
            tile_p, tile_q = _tile_shape(kind)
            q_tiles = _ceil(q.size, tile_q)
            tiles = _ceil(p.size, tile_p) * q_tiles
            dot_tiles = _ceil(tiles, MAX_BLOCKS)
            dots = _ceil(tiles, dot_tiles)
            table.add(
                weight,
                (p, q, swapped),
                {
                    KIND: kind,
                    SIGMA: i,
                    X: (vs if swapped else us)[i],
                    Y: (us if swapped else vs)[i],
                    G_P_OUTER: p.grad_stride[0],
                    G_P_INNER: p.grad_stride[1],
                    G_Q_OUTER: q.grad_stride[0],
                    G_Q_INNER: q.grad_stride[1],
                    Q_TILES: q_tiles,
                    ALL_TILES: tiles,
                    DOTS: dots,
                    DOT_TILES: dot_tiles,
                    DOT_SUMS: table.take("sums", dots),
                },
                {DOT_START: dots, TILE_START: tiles},
            )
        chunks.append(table.chunk(indices, device))
    return _Plan(chunks, copied, relaid)


# ---------------------------------------------------------------- calls


def _addresses(tensors: Sequence[Tensor], count: int) -> tuple[int, ...]:
    # Triton compiles anew for every argument that becomes a multiple of 16, or 1. One more than an
    # address is neither, so a kernel is compiled once wherever the tensors lie.
    addresses = [t.data_ptr() + 1 for t in tensors]
    return (*addresses, *addresses[-1:] * (count - len(addresses)))


@functools.lru_cache(maxsize=4096)
def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether no element of memory lies between those of the tensor."""
    return sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 == math.prod(shape)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be that of the weights.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def start() -> None:
    """Build Triton's driver, with a C compiler, unless it is built already.

    Raises:
        Exception: Of any type: there is no compiler, or no Python headers, or no GPU that Triton knows.
    """
    triton.runtime.driver.active.get_current_target()


@torch.no_grad()
def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    dims: Sequence[int],
    orders: Sequence[str],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Power iterations, sigma and ``W / sigma`` of L weights.

    All on one device, the weights of one real floating dtype; "compute dtype" is fp32 for
    fp16 and bf16 weights, else the weights' own.

    Args:
        weights: L tensors of at least two dimensions, any strides.
        us: u of each, ``[m]``, any floating dtype; not changed.
        vs: v of each, ``[n]``, likewise; not changed.
        n_power_iterations: Of each, as in `reference.singular_vectors`.
        eps: Of each, as in `reference.power_iteration`.
        dims: The output dimension of each, from 0.
        orders: ``"uv"`` or ``"vu"`` of each.

    Returns:
        The new u and v, ``[sum of all m and n]``, compute dtype: u and v of each in turn.

        sigmas ``[L]``, fp64: what was divided by, or 0 where sigma was not above eps (or not finite)
        and the weight was left as it is.

        ``W / sigma`` of each, rounded once to the dtype of the weights, with shape and strides of the
        weight.
    """
    vectors, sigmas, normalized = _forward(weights, us, vs, n_power_iterations, eps, dims, orders, True)
    return vectors, sigmas, normalized


@torch.no_grad()
def power_iteration(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    dims: Sequence[int],
    orders: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """`normalize` without the division: the same vectors and sigmas, bit for bit.

    Args:
        weights: As in `normalize`, like all others.
        us: ``[m]`` each.
        vs: ``[n]`` each.
        n_power_iterations: Of each.
        eps: Of each.
        dims: Of each.
        orders: Of each.

    Returns:
        The new u and v in one, and sigmas ``[L]``.
    """
    vectors, sigmas, _ = _forward(weights, us, vs, n_power_iterations, eps, dims, orders, False)
    return vectors, sigmas


def _forward(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    dims: Sequence[int],
    orders: Sequence[str],
    divide: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    weights = [w if _is_dense(tuple(w.shape), w.stride()) else w.contiguous() for w in weights]
    key = tuple(
        _Weight(tuple(w.shape), w.stride(), dim, n, order, e)
        for w, dim, n, order, e in zip(weights, dims, n_power_iterations, orders, eps, strict=True)
    )
    device, dtype = weights[0].device, reference.compute_dtype(weights[0])
    # A model that was turned to half precision has u and v in it.
    us, vs = ([x.to(dtype).contiguous() for x in column] for column in (us, vs))
    plan = _forward_plan(key, weights[0].element_size(), device, divide)
    types = _types(weights[0])
    vectors = torch.empty(sum(x.numel() for x in (*us, *vs)), dtype=dtype, device=device)
    sigmas = torch.empty(len(weights), dtype=torch.float64, device=device)
    # Without division nothing is written there, so any address will do.
    outputs = [torch.empty_like(w) for w in weights] if divide else list(weights)
    read = [w.contiguous() if i in plan.copied else w for i, w in enumerate(weights)]
    with _on(device):
        for chunk in plan.chunks:
            workspace = torch.empty(chunk.workspace, dtype=dtype, device=device)
            sums = torch.empty(chunk.sums, dtype=torch.float64, device=device)
            count = chunk.padded
            pointers = _addresses([read[i] for i in chunk.indices], count)
            pairs = list(zip(chunk.indices, chunk.swapped, strict=True))
            xs = _addresses([(vs if swapped else us)[i] for i, swapped in pairs], count)
            ys = _addresses([(us if swapped else vs)[i] for i, swapped in pairs], count)
            state = (chunk.table, chunk.epsilons, vectors)
            passes, reduces, finishes = chunk.programs
            for step in range(max(chunk.iterations, 1)):
                _pass_kernel[(passes,)](
                    pointers, xs, ys, *state, workspace, sums, step,
                    FIRST=step == 0, VEC=16 // weights[0].element_size(), L=count, num_warps=8, **types,
                )  # fmt: skip
                _reduce_kernel[(reduces,)](
                    pointers, *state, workspace, sums, step, L=count, num_warps=8, **types
                )
            pointers = _addresses([weights[i] for i in chunk.indices], count)
            results = _addresses([outputs[i] for i in chunk.indices], count)
            _finish_kernel[(finishes,)](
                pointers, results, *state, sigmas, workspace, sums,
                DIVIDE=divide, L=count, num_warps=8, **types,
            )  # fmt: skip
    return vectors, sigmas, outputs


@torch.no_grad()
def normalize_backward(
    grads: Sequence[Tensor | None],
    normalized: Sequence[Tensor],
    vectors: Tensor,
    sigmas: Tensor,
    eps: Sequence[float],
    dims: Sequence[int],
) -> list[Tensor | None]:
    """``dW = (G - <G, W / sigma> u v^T) / sigma``, or G where the weight was left as it is.

    Args:
        grads: G of each ``W / sigma``, any strides, dtype of the weights; or None.
        normalized: ``W / sigma`` of each, from `normalize`.
        vectors: From `normalize`.
        sigmas: ``[L]``, from `normalize`.
        eps: Not used: a sigma of 0 tells what eps decided.
        dims: As in `normalize`.

    Returns:
        dW of each, with dtype, shape and strides of the weight; None where G is None.
    """
    weights = [w if _is_dense(tuple(w.shape), w.stride()) else w.contiguous() for w in normalized]
    key = tuple(
        _Weight(tuple(w.shape), w.stride(), dim, grad_stride=None if g is None else g.stride())
        for g, w, dim in zip(grads, weights, dims, strict=True)
    )
    device = weights[0].device
    plan = _backward_plan(key, weights[0].element_size(), device)
    types = _types(weights[0])
    read = [w.contiguous() if i in plan.copied else w for i, w in enumerate(weights)]
    outputs = [None if g is None else torch.empty_like(w) for g, w in zip(grads, read, strict=True)]
    with _on(device):
        for chunk in plan.chunks:
            sources = []
            for i in chunk.indices:
                g = grads[i]
                assert g is not None
                if i in plan.copied:
                    g = g.contiguous()
                elif i in plan.relaid:
                    g = torch.empty_like(weights[i]).copy_(g)
                sources.append(g)
            sums = torch.empty(chunk.sums, dtype=torch.float64, device=device)
            count, vec = chunk.padded, 16 // weights[0].element_size()
            dots, tiles = chunk.programs
            pointers = _addresses(sources, count)
            results = _addresses([out for i in chunk.indices if (out := outputs[i]) is not None], count)
            _dot_kernel[(dots,)](
                _addresses([read[i] for i in chunk.indices], count), pointers, chunk.table, sums,
                VEC=vec, L=count, num_warps=8, **types,
            )  # fmt: skip
            _gradient_kernel[(tiles,)](
                pointers, results, chunk.table, vectors, sigmas, sums,
                VEC=vec, L=count, num_warps=8, **types,
            )  # fmt: skip
    for i, out in enumerate(outputs):
        if i in plan.copied and out is not None:  # computed as if the weight were contiguous
            outputs[i] = torch.empty_like(weights[i]).copy_(out)
    return outputs


def _types(weight: Tensor) -> dict[str, Any]:
    names = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, reference.compute_dtype(weight)))
    return dict(zip(("W", "C"), (getattr(tl, name) for name in names), strict=True))
