"""The kernels of the gradient: two launches, each over all weights.

1. dot: partial sums of ``<G, W / sigma>``.
2. gradient: ``dW = (G - <G, W / sigma> x y^T) / sigma``.
"""

import triton
import triton.language as tl

from specnorm_fx.triton_kernels.fields import (
    ALL_TILES,
    AXIS,
    DOT_START,
    DOT_SUMS,
    DOT_TILES,
    DOTS,
    G_P_INNER,
    G_P_OUTER,
    G_Q_INNER,
    G_Q_OUTER,
    GRADIENT_START,
    GRADIENT_TILES,
    INNER,
    INNER_STRIDE,
    Q_TILES,
    SIGMA,
    SIZE,
    X,
    Y,
)
from specnorm_fx.triton_kernels.parts import (
    actual_kind,
    address_of,
    axis_at,
    find,
    offset_of,
    place_of,
    pointer_at,
    scale_by,
    total_of,
)
from specnorm_fx.triton_kernels.tiles import TALL, TALL_P, TALL_PLAIN, TALL_Q, WIDE_P, WIDE_PLAIN, WIDE_Q

__all__ = ["dot_kernel", "gradient_kernel"]


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
        w_offset = offset_of(p, p_axis)[:, None] + offset_of(q, q_axis)[None, :]
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
    p_axis = axis_at(row, 0)
    q_axis = axis_at(row, AXIS)
    w = pointer_at(w_at, W, VEC > 0)
    g = pointer_at(g_at, W, VEC > 0)
    products = tl.zeros([P, Q], C)
    for tile in range(begin, end):
        w_offset, g_offset, inside, _p, _q = _tile_offsets(tile, row, p_axis, q_axis, P, Q, VEC)
        w_tile = tl.load(w + w_offset, mask=inside, other=0.0).to(C)
        products += w_tile * tl.load(g + g_offset, mask=inside, other=0.0).to(C)
    return tl.sum(tl.sum(products.to(tl.float64), 1), 0)


@triton.jit
def dot_kernel(
    weights,
    grads,
    table,
    sums,
    W: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    L: tl.constexpr,
):
    """Each program one partial sum of one weight."""
    layer, row, dot = find(table, DOT_START, L)
    w_at = address_of(weights, layer, L)
    g_at = address_of(grads, layer, L)
    kind = actual_kind(row, (w_at % 16 == 0) & (g_at % 16 == 0))
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
    begin,
    end,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    VEC: tl.constexpr,
):
    p_axis = axis_at(row, 0)
    q_axis = axis_at(row, AXIS)
    g = pointer_at(g_at, W, VEC > 0)
    for tile in range(begin, end):
        w_offset, g_offset, inside, p, q = _tile_offsets(tile, row, p_axis, q_axis, P, Q, VEC)
        g_tile = tl.load(g + g_offset, mask=inside, other=0.0).to(C)
        x_p = tl.load(x + place_of(p, p_axis), mask=p < p_axis[SIZE], other=0.0) * factor
        y_q = tl.load(y + place_of(q, q_axis), mask=q < q_axis[SIZE], other=0.0)
        dw = scale_by(g_tile - x_p[:, None] * y_q[None, :], inverse, C)
        tl.store(out + w_offset, dw.to(W), mask=inside)


# Of the vectors and sigmas of all weights, a group of gradients has a part, which begins anywhere.
@triton.jit(do_not_specialize_on_alignment=["vectors", "sigmas"])
def gradient_kernel(
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
    """Each program some tiles of one dW."""
    layer, row, part = find(table, GRADIENT_START, L)
    g_at = address_of(grads, layer, L)
    kind = actual_kind(row, g_at % 16 == 0)
    out = pointer_at(address_of(outputs, layer, L), W, True)
    size = tl.load(row + GRADIENT_TILES).to(tl.int32)
    begin = part * size
    end = tl.minimum(begin + size, tl.load(row + ALL_TILES).to(tl.int32))
    x = vectors + tl.load(row + X)
    y = vectors + tl.load(row + Y)
    sigma = tl.load(sigmas + tl.load(row + SIGMA))
    inverse = 1.0 / tl.where(sigma != 0.0, sigma, 1.0)
    total = total_of(sums + tl.load(row + DOT_SUMS), tl.load(row + DOTS).to(tl.int32))
    # Selected, not multiplied: a weight that was left as it is may hold NaN.
    factor = tl.where(sigma != 0.0, total, 0.0).to(C)
    if kind == WIDE_PLAIN:
        _gradient(g_at, out, x, y, factor, inverse, row, begin, end, W, C, WIDE_P, WIDE_Q, VEC)
    elif kind == TALL_PLAIN:
        _gradient(g_at, out, x, y, factor, inverse, row, begin, end, W, C, TALL_P, TALL_Q, VEC)
    elif kind == TALL:
        _gradient(g_at, out, x, y, factor, inverse, row, begin, end, W, C, TALL_P, TALL_Q, 0)
    else:
        _gradient(g_at, out, x, y, factor, inverse, row, begin, end, W, C, WIDE_P, WIDE_Q, 0)
