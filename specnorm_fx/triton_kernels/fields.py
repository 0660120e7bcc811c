"""What a row of the table holds, in order: for the kernels that read it and for `tables`, which makes it."""

import triton.language as tl

__all__ = [
    "ALL_TILES", "AXIS", "BLOCKS", "BLOCK_SIZE", "BLOCK_SUMS", "DOTS", "DOT_START", "DOT_SUMS",
    "DOT_TILES", "FIELDS", "FINISHES", "FINISH_START", "GRADIENT_START", "GRADIENT_TILES", "G_P_INNER",
    "G_P_OUTER", "G_Q_INNER", "G_Q_OUTER", "INNER", "INNER_PLACE", "INNER_STRIDE",
    "ITERATIONS", "KIND", "NUMEL", "OUTER_PLACE", "OUTER_STRIDE",
    "PARTIAL", "PASS_START", "Q_TILES", "REDUCE_START", "SIGMA", "SIZE", "TILES", "TILE_SUMS",
    "S", "T", "X", "Y",
]  # fmt: skip

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
    FINISHES,  # programs of the finish
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
    GRADIENT_TILES,  # tiles of dW that a program computes
    DOT_START,
    GRADIENT_START,
) = (tl.constexpr(i) for i in range(30, 42))
FIELDS = tl.constexpr(42)
