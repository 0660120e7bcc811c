"""What all kernels are made of: find the weight, its elements and places, add up, divide."""

import triton
import triton.language as tl

from specnorm_fx.triton_kernels.fields import (
    FIELDS,
    INNER,
    INNER_PLACE,
    INNER_STRIDE,
    KIND,
    OUTER_PLACE,
    OUTER_STRIDE,
    SIZE,
)
from specnorm_fx.triton_kernels.tiles import TALL_PLAIN, TOTAL, WIDE_PLAIN

__all__ = [
    "actual_kind",
    "address_of",
    "axis_at",
    "directed",
    "find",
    "offset_of",
    "place_of",
    "pointer_at",
    "scale_by",
    "total_of",
]


@triton.jit
def find(table, start, L: tl.constexpr):
    """Which weight this program serves, its row of the table, and which of its programs this is."""
    program = tl.program_id(0)
    starts = tl.load(table + tl.arange(0, L) * FIELDS + start)
    layer = tl.sum((starts <= program).to(tl.int32), 0) - 1
    row = table + layer * FIELDS
    return layer, row, (program - tl.load(row + start)).to(tl.int32)


@triton.jit
def address_of(addresses, layer, L: tl.constexpr):
    """The address of this weight, among those of L."""
    address = addresses[0]
    for i in tl.static_range(1, L):
        address = tl.where(layer == i, addresses[i], address)
    return address.to(tl.int64) - 1  # see launching._addresses


@triton.jit
def pointer_at(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to elements of type T; ALIGNED: 16 divides the address."""
    pointer = address.to(tl.pointer_type(T))
    if ALIGNED:
        # Said of a pointer that only this branch has: the hint would hold for the others as well.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def axis_at(row, first: tl.constexpr):
    """The axis p (first: 0) or q (AXIS) of a row."""
    return (
        tl.load(row + first + SIZE).to(tl.int32),
        tl.load(row + first + INNER).to(tl.int32),
        tl.load(row + first + OUTER_STRIDE),
        tl.load(row + first + INNER_STRIDE),
        tl.load(row + first + OUTER_PLACE).to(tl.int32),
        tl.load(row + first + INNER_PLACE).to(tl.int32),
    )


@triton.jit
def offset_of(index, axis):
    """Where an index of the matrix lies in W."""
    return (index // axis[INNER]) * axis[OUTER_STRIDE] + (index % axis[INNER]) * axis[INNER_STRIDE]


@triton.jit
def place_of(index, axis):
    """Where it lies in u or v."""
    return (index // axis[INNER]) * axis[OUTER_PLACE] + (index % axis[INNER]) * axis[INNER_PLACE]


@triton.jit
def actual_kind(row, aligned):
    """How to read the weight, given where it really lies."""
    kind = tl.load(row + KIND)
    plain = (kind == WIDE_PLAIN) | (kind == TALL_PLAIN)
    return tl.where(plain & (aligned == 0), kind - WIDE_PLAIN, kind)


@triton.jit
def total_of(sums, count):
    """The sum of the partial sums, in a fixed order."""
    total = tl.zeros([TOTAL], tl.float64)
    for start in range(0, count, TOTAL):
        index = start + tl.arange(0, TOTAL)
        total += tl.load(sums + index, mask=index < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def directed(length, eps):
    """Whether a vector of this length has a direction."""
    # NaN and inf are no direction either: one bad step of the weights must not poison the vectors.
    return (length > eps) & (length < float("inf"))


@triton.jit
def scale_by(x, inverse, C: tl.constexpr):
    """``x * inverse`` in C."""
    # By a reciprocal in fp64: for fp32 that rounds as a division does (which is exact only as a call
    # of a slow routine, and two units off as Triton's operator), for fp64 it is at most a unit off.
    return (x.to(tl.float64) * inverse).to(C)
