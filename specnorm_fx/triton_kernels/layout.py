"""How a weight lies in memory, and how its matrix is read there: from shape and strides alone.

A dimension of the matrix is below 2^31, the weight as a whole need not be.
"""

import math
from typing import NamedTuple

from specnorm_fx import memory

__all__ = ["Axis", "Weight"]


class Axis(NamedTuple):
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
        """What a row of the table has of it, in the order of `fields`."""
        return (self.size, self.inner, *self.stride, *self.place)


class Weight(NamedTuple):
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
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """The sides m and n of the matrix."""
        return self.shape[self.dim], self.numel // self.shape[self.dim]

    def axes(self) -> tuple[Axis, Axis] | None:
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
        columns = Axis(a * b, b, *zip(outer_steps, inner_steps, strict=True))
        m = self.shape[self.dim]
        step, grad_step = (self.stride[self.dim], grad_stride[self.dim]) if m > 1 else (0, 0)
        return Axis(m, m, (0, step), (0, grad_step), (0, 1)), columns

    def oriented(self) -> tuple[Axis, Axis, bool]:
        """The axes p and q, and whether p counts the columns, so that x is v."""
        axes = self.axes()
        assert axes is not None
        rows, columns = axes
        # Without iteration both orders give the same: take the one in which q runs along memory.
        swapped = self.order == "vu" if self.iterations > 0 else not _columns_inside(rows, columns)
        p, q = (columns, rows) if swapped else (rows, columns)
        assert max(p.size, q.size) < 2**31
        return p, q, swapped

    def contiguous(self) -> "Weight":
        """Of a contiguous copy, and of a gradient that is contiguous, too."""
        stride = memory.contiguous_strides(self.shape)
        return self._replace(stride=stride, grad_stride=stride)


def _columns_inside(rows: Axis, columns: Axis) -> bool:
    """The columns are what is contiguous, not the rows."""
    return rows.size == 1 or (columns.size > 1 and columns.stride[1] < rows.stride[1])
