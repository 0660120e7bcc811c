"""The kernels of the power iteration and of ``W / sigma``: three launches, each over all weights.

1. pass: a program owns some of the p. It computes their t and at once adds ``W^T t`` of its own part,
   which is still in cache, to a partial sum: W comes from memory once.
2. reduce: the partial sums give s; |t| is known by now, so x is written, too.
3. finish: ``sigma = x^T W y = |s|`` (of the new x and y, so no third product over W), y, ``W / sigma``.

A further iteration is a further pass and reduce. Without iteration the pass computes ``x^T W y`` only.

t and s are kept in fp32 (fp64 for fp64 weights) and never squared there: partial sums carry a power of
two, the sums of squares are fp64. So sigma may be anything that fp32 can hold as a normal number, beside
some room for the single entries: 1e-30 to 1e+37.
"""

import triton
import triton.language as tl

from specnorm_fx.triton_kernels.fields import (
    AXIS,
    BLOCK_SIZE,
    BLOCK_SUMS,
    BLOCKS,
    FINISH_START,
    FINISHES,
    INNER_STRIDE,
    ITERATIONS,
    NUMEL,
    PARTIAL,
    PASS_START,
    REDUCE_START,
    SIGMA,
    SIZE,
    TILE_SUMS,
    TILES,
    S,
    T,
    X,
    Y,
)
from specnorm_fx.triton_kernels.parts import (
    actual_kind,
    address_of,
    axis_at,
    directed,
    find,
    offset_of,
    place_of,
    pointer_at,
    scale_by,
    total_of,
)
from specnorm_fx.triton_kernels.tiles import (
    COPY,
    REDUCE_P,
    REDUCE_Q,
    TALL,
    TALL_P,
    TALL_P_UNIT,
    TALL_PLAIN,
    TALL_Q,
    VECTOR,
    WIDE_P,
    WIDE_PLAIN,
    WIDE_Q,
    WRITERS,
)

__all__ = ["finish_kernel", "pass_kernel", "reduce_kernel"]


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
    p_axis = axis_at(row, 0)
    q_axis = axis_at(row, AXIS)
    w = pointer_at(at, W, VEC > 0)
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
        length = tl.sqrt(total_of(sums + tl.load(row + TILE_SUMS), tl.load(row + TILES).to(tl.int32)))
        renewed = directed(length, eps)
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
            p_offset = offset_of(p, p_axis)

        products = tl.zeros([P, Q], C)
        for q_start in range(0, q_size, Q):
            q = q_start + tl.arange(0, Q)
            q_in = q < q_size
            q_offset = q.to(tl.int64) if VEC > 0 else offset_of(q, q_axis)
            inside = p_in[:, None] & q_in[None, :]
            tile = tl.load(w + (p_offset[:, None] + q_offset[None, :]), mask=inside, other=0.0).to(C)
            place = place_of(q, q_axis)
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
            place = place_of(p, p_axis)
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
                q_offset = q.to(tl.int64) if VEC > 0 else offset_of(q, q_axis)
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
def pass_kernel(
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
    """Each program one block of p of one weight."""
    # Longer tiles for half precision: as many bytes. A shorter one where address registers are many.
    WIDER: tl.constexpr = 2 * WIDE_Q if VEC == 8 else WIDE_Q
    LONGER: tl.constexpr = 2 * TALL_Q if VEC == 8 else TALL_Q
    SHORT: tl.constexpr = TALL_Q // 2
    layer, row, block = find(table, PASS_START, L)
    if step < tl.maximum(tl.load(row + ITERATIONS), 1):
        eps = tl.load(epsilons + layer)
        at = address_of(weights, layer, L)
        kind = actual_kind(row, at % 16 == 0)
        x = pointer_at(address_of(xs, layer, L), C, False)
        y = pointer_at(address_of(ys, layer, L), C, False)
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
            place = place_of(index, axis)
            value = tl.load(source + (place if PLACED else index), mask=inside, other=0.0)
            tl.store(to + place, scale_by(value, inverse, C), mask=inside)


@triton.jit(do_not_specialize=["step"])
def reduce_kernel(
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
    """Each program one tile of q of one weight."""
    layer, row, tile = find(table, REDUCE_START, L)
    iterations = tl.load(row + ITERATIONS).to(tl.int32)
    if step < tl.maximum(iterations, 1):
        p_axis = axis_at(row, 0)
        q_axis = axis_at(row, AXIS)
        q = tile * REDUCE_Q + tl.arange(0, REDUCE_Q)
        q_in = q < q_axis[SIZE]
        tiles = tl.load(row + TILES).to(tl.int32)
        tile_sums = sums + tl.load(row + TILE_SUMS) + tile
        y = tl.load(vectors + tl.load(row + Y) + place_of(q, q_axis), mask=q_in, other=0.0).to(tl.float64)
        if iterations <= 0:
            tl.store(tile_sums, tl.sum(y * y, 0))
        else:
            block_sums = sums + tl.load(row + BLOCK_SUMS)
            blocks = tl.load(row + BLOCKS).to(tl.int32)
            length = tl.sqrt(total_of(block_sums, blocks))
            x_to = vectors + tl.load(row + X)
            s = tl.zeros([REDUCE_P, REDUCE_Q], tl.float64)
            if directed(length, tl.load(epsilons + layer)):
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
                w = pointer_at(address_of(weights, layer, L), W, False)
                q_offset = offset_of(q, q_axis)
                for start in range(0, p_axis[SIZE], REDUCE_P):
                    p = start + tl.arange(0, REDUCE_P)
                    p_in = p < p_axis[SIZE]
                    x = tl.load(x_to + place_of(p, p_axis), mask=p_in, other=0.0)
                    inside = p_in[:, None] & q_in[None, :]
                    offset = offset_of(p, p_axis)[:, None] + q_offset[None, :]
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
    return tl.where(directed(length, eps), length, 1.0)


@triton.jit
def finish_kernel(
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
    """Each program one part of W / sigma, or of x and y."""
    layer, row, part = find(table, FINISH_START, L)
    eps = tl.load(epsilons + layer)
    parts = tl.load(row + FINISHES).to(tl.int32)
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
        x_length = tl.where(stays, 1.0, _length(total_of(block_sums + blocks, blocks), eps))
        y_length = tl.where(stays, 1.0, _length(total_of(tile_sums, tiles), eps))
        sigma = total_of(block_sums, blocks) / (x_length * y_length)
        _write_vector(x_to, x_to, axis_at(row, 0), 1.0 / x_length, part, parts, True, C)
        _write_vector(y_to, y_to, axis_at(row, AXIS), 1.0 / y_length, part, parts, True, C)
    else:
        length = tl.sqrt(total_of(tile_sums, tiles))
        if directed(length, eps):
            sigma = length
            s = workspace + tl.load(row + S)
            _write_vector(s, y_to, axis_at(row, AXIS), 1.0 / length, part, parts, False, C)
        else:
            sigma = total_of(tile_sums + tiles, tiles)  # y stayed, so it is no longer s / |s|

    divides = directed(tl.abs(sigma), eps)
    if part == 0:
        tl.store(sigmas + tl.load(row + SIGMA), tl.where(divides, sigma, 0.0))

    if DIVIDE:
        inverse = 1.0 / tl.where(divides, sigma, 1.0)
        address = address_of(weights, layer, L)
        numel = tl.load(row + NUMEL)
        start = part.to(tl.int64) * COPY
        out = pointer_at(address_of(outputs, layer, L), W, True) + start  # a fresh tensor is aligned
        index = tl.arange(0, COPY)
        if (address % 16 == 0) & (start + COPY <= numel):
            w = pointer_at(address, W, True) + start
            tl.store(out + index, scale_by(tl.load(w + index), inverse, C).to(W))
        else:
            w = pointer_at(address, W, False) + start
            inside = start + index < numel
            tile = tl.load(w + index, mask=inside, other=0.0)
            tl.store(out + index, scale_by(tile, inverse, C).to(W), mask=inside)
