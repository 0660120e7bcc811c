"""How much a program takes at once, and how it reads a weight: tiles, and the kinds of reading them."""

import triton.language as tl

from specnorm_fx.triton_kernels.layout import Axis

__all__ = [
    "COPY", "REDUCE_P", "REDUCE_Q", "TALL", "TALL_P", "TALL_PLAIN", "TALL_P_UNIT", "TALL_Q", "TOTAL",
    "VECTOR", "WIDE", "WIDE_P", "WIDE_PLAIN", "WIDE_Q", "WRITERS", "kind_of", "tile_shape",
]  # fmt: skip

# Tiles [p, q] of 4096 elements. WIDE is for long rows: a warp reads 512 bytes of one row, and the sum over p
# stays within a thread. TALL is for short rows, and for weights that are contiguous along p, of which it
# takes full lines of 128 bytes.
WIDE_P, WIDE_Q = tl.constexpr(8), tl.constexpr(512)
TALL_P, TALL_Q = tl.constexpr(32), tl.constexpr(128)

REDUCE_P, REDUCE_Q = tl.constexpr(32), tl.constexpr(128)  # narrow in q: more programs for few columns
VECTOR = tl.constexpr(1024)  # elements of x or y that a program writes at once
WRITERS = tl.constexpr(1024)  # programs that do so
COPY = tl.constexpr(8192)  # elements of W that a program divides
TOTAL = tl.constexpr(512)  # partial sums added at once

# How to read a weight. PLAIN: aligned for 16-byte loads along q. P_UNIT: contiguous along p.
WIDE, TALL, WIDE_PLAIN, TALL_PLAIN, TALL_P_UNIT = (tl.constexpr(i) for i in range(5))


def kind_of(p: Axis, q: Axis, vec: int) -> int:
    """How to read a weight that is aligned.

    Args:
        p: Its axis p.
        q: Its axis q.
        vec: Elements of 16 bytes.
    """
    tall = q.size <= 2 * TALL_Q.value
    steps = (p.stride[1], p.grad_stride[1], q.size)
    if p.flat and q.flat and q.stride[1] == q.grad_stride[1] == 1 and all(step % vec == 0 for step in steps):
        return int((TALL_PLAIN if tall else WIDE_PLAIN).value)
    if p.flat and p.stride[1] == 1 and q.stride[1] != 1:
        return int(TALL_P_UNIT.value)
    return int((TALL if tall else WIDE).value)


def tile_shape(kind: int) -> tuple[int, int]:
    """What a tile takes of p and of q; those of the pass may be longer or shorter in q.

    Args:
        kind: From `kind_of`.
    """
    if kind in (WIDE.value, WIDE_PLAIN.value):
        return WIDE_P.value, WIDE_Q.value
    return TALL_P.value, TALL_Q.value
