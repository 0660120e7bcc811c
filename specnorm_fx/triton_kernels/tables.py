"""What depends on shapes alone: a small table on the device, built by the first call with these shapes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specnorm_fx import memory
from specnorm_fx.triton_kernels.fields import (
    ALL_TILES,
    BLOCK_SIZE,
    BLOCK_SUMS,
    BLOCKS,
    DOT_START,
    DOT_SUMS,
    DOT_TILES,
    DOTS,
    FIELDS,
    FINISH_START,
    FINISHES,
    G_P_INNER,
    G_P_OUTER,
    G_Q_INNER,
    G_Q_OUTER,
    GRADIENT_START,
    GRADIENT_TILES,
    ITERATIONS,
    KIND,
    NUMEL,
    PARTIAL,
    PASS_START,
    Q_TILES,
    REDUCE_START,
    SIGMA,
    TILE_SUMS,
    TILES,
    S,
    T,
    X,
    Y,
)
from specnorm_fx.triton_kernels.layout import Axis, Weight
from specnorm_fx.triton_kernels.tiles import COPY, REDUCE_Q, VECTOR, kind_of, tile_shape

__all__ = ["Chunk", "Plan", "backward_plan", "forward_plan"]

# CUDA takes 4 KB of kernel arguments; three pointers a weight make 1.5 KB. More weights: more chunks.
MAX_WEIGHTS = 64
# A kernel is compiled for 8, 16, 32 and 64 weights; fewer are filled up. An address too many costs less than
# a microsecond in a launch, compiling the kernels some seconds.
MIN_WEIGHTS = 8

# A weight is cut into at most 256 blocks along p, about two for each of an H200's 132 SMs. The partial
# sums (one row of q per block) are then at most 1/16 of a weight of 4096 p or more, and at most 1/8 of
# a smaller one, where programs count for more; being small, those stay in the 50 MB of L2.
MAX_BLOCKS = 256

# A program of the gradient reads the table and the sums before its first tile. With one tile each, a large
# weight takes 1.4 times as long (BigGAN-128, H200).
MAX_GRADIENT_TILES = 4

NEVER = 2**62  # start of the programs of a row that fills the table up to a power of two


class Chunk(NamedTuple):
    """The tables of some weights, at most `MAX_WEIGHTS`."""

    # What each argument of the launches takes from the addresses of all tensors.
    takes: list[Callable[[Sequence[int]], tuple[int, ...]]]
    tables: list[Tensor]  # [L, FIELDS] int64: one for all launches, or one for each
    epsilons: Tensor  # [L] fp64
    padded: int  # L: how many weights, filled up to a power of two, at least `MIN_WEIGHTS`
    iterations: int
    workspace: int
    sums: int
    programs: tuple[int, ...]  # of each launch


class Plan(NamedTuple):
    """How all weights of a call are served."""

    chunks: Sequence[Chunk] = ()
    copied: frozenset[int] = frozenset()  # weights (and gradients) to be read from a contiguous copy
    relaid: frozenset[int] = frozenset()  # gradients to be read from a copy with the strides of the weight
    results: Sequence[Any] = ()  # shape and strides of each, or None where nothing is to be written
    sizes: tuple[int, ...] = ()  # of every u, then of every v
    size: int = 0  # of all together
    is_dense: bool = True  # else there is nothing here: no weight may have gaps


# For good: a recorded CUDA graph reads the tables again at every replay. They are a few KB on the device, one
# or two for each mode of a model.
@functools.cache
def forward_plan(
    device: torch.device,
    dtype: torch.dtype,
    divide: bool,
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    dims: tuple[int, ...],
    n_power_iterations: tuple[int, ...],
    orders: tuple[str, ...],
    eps: tuple[float, ...],
) -> Plan:
    """Of pass, reduce and finish.

    The addresses are those of the weights as they are to be read, then of every u, v, weight and result.

    Args:
        device: Where the tables go.
        dtype: Of the weights.
        divide: Whether the finish writes ``W / sigma``.
        shapes: Of the weights.
        strides: Likewise.
        dims: As in `launching.normalize`, like all that follow.
        n_power_iterations: Of each.
        orders: Of each.
        eps: Of each.
    """
    if not all(map(memory.is_dense, shapes, strides)):
        return Plan(is_dense=False)
    memory.refuse_empty(shapes)
    columns = (shapes, strides, dims, n_power_iterations, orders, eps)
    weights = [Weight(*site) for site in zip(*columns, strict=True)]
    many, itemsize = len(weights), dtype.itemsize
    us, vs = _vector_starts(weights)
    copied = frozenset(i for i, weight in enumerate(weights) if weight.axes() is None)
    chunks = []
    for indices in _chunks(range(len(weights))):
        table = _Table()
        for i in indices:
            weight = weights[i].contiguous() if i in copied else weights[i]
            p, q, swapped = weight.oriented()
            kind = kind_of(p, q, 16 // itemsize)
            tile_p, _ = tile_shape(kind)
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
                    FINISHES: finish,
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
        xs = [many * (2 if swapped else 1) for swapped in table.swapped]
        starts: list[int | list[int]] = [0, xs, [3 * many - x for x in xs], 3 * many, 4 * many]
        chunks.append(_chunk([table], indices, device, starts))
    ms, ns = zip(*(weight.sides for weight in weights), strict=True)
    results = [*map(_layout, weights)]
    return Plan(chunks, copied, results=results, sizes=(*ms, *ns), size=sum(ms) + sum(ns))


@functools.cache
def backward_plan(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    dims: tuple[int, ...],
    contiguous: tuple[bool, ...],
    grad_strides: tuple[tuple[int, ...] | None, ...],
) -> Plan:
    """Of dot and gradient.

    The addresses are those of every ``W / sigma``, gradient and result; of what is missing, any.

    Args:
        device: Where the tables go.
        dtype: Of ``W / sigma``.
        shapes: Likewise.
        strides: Likewise.
        dims: As in `launching.normalize_backward`.
        contiguous: Likewise.
        grad_strides: Of the gradient of each, or None.
    """
    if not all(map(memory.is_dense, shapes, strides)):
        return Plan(is_dense=False)
    columns = (shapes, strides, dims, grad_strides)
    weights = [Weight(*site[:3], grad_stride=site[3]) for site in zip(*columns, strict=True)]
    many, itemsize = len(weights), dtype.itemsize
    us, vs = _vector_starts(weights)
    present = [i for i, weight in enumerate(weights) if weight.grad_stride is not None]

    def result_of(i: int, weight: Weight) -> Weight:
        """What gradient writes, in its order: that of the result."""
        return weight._replace(stride=weight.contiguous().stride) if contiguous[i] else weight

    def has_axes(i: int, weight: Weight) -> bool:
        return weight.axes() is not None and result_of(i, weight).axes() is not None

    own = {i: weights[i]._replace(grad_stride=weights[i].stride) for i in present}
    copied = frozenset(i for i in present if not has_axes(i, own[i]))
    relaid = frozenset(i for i in present if not has_axes(i, weights[i])) - copied
    written = {i: weights[i].contiguous() if i in copied else result_of(i, weights[i]) for i in present}
    results = [_layout(written[i]) if i in written else None for i in range(many)]
    chunks = []
    for indices in _chunks(present):
        dot_table, gradient_table = _Table(), _Table()
        for i in indices:
            weight = own[i].contiguous() if i in copied else own[i] if i in relaid else weights[i]
            oriented = weight.oriented()
            fields, tiles = _tiled(oriented, itemsize)
            dot_tiles = _ceil(tiles, MAX_BLOCKS)
            dots = _ceil(tiles, dot_tiles)
            sums = dot_table.take("sums", dots)
            fields |= {DOT_TILES: dot_tiles, DOT_SUMS: sums}
            dot_table.add(weight, oriented, fields, {DOT_START: dots})

            result = result_of(i, weight)
            oriented = result.oriented()
            fields, tiles = _tiled(oriented, itemsize)
            gradient_tiles = min(_ceil(tiles, MAX_BLOCKS), MAX_GRADIENT_TILES)
            x, y = (vs, us) if oriented[2] else (us, vs)
            fields |= {SIGMA: i, X: x[i], Y: y[i], DOTS: dots, DOT_SUMS: sums}
            fields |= {GRADIENT_TILES: gradient_tiles}
            gradient_table.add(result, oriented, fields, {GRADIENT_START: _ceil(tiles, gradient_tiles)})
        chunks.append(_chunk([dot_table, gradient_table], indices, device, [0, many, 2 * many]))
    return Plan(chunks, copied, relaid, results)


def _tiled(oriented: tuple[Axis, Axis, bool], itemsize: int) -> tuple[dict[Any, int], int]:
    """What dot and gradient have of a weight in common; and how many tiles it is."""
    p, q, _ = oriented
    kind = kind_of(p, q, 16 // itemsize)
    tile_p, tile_q = tile_shape(kind)
    q_tiles = _ceil(q.size, tile_q)
    tiles = _ceil(p.size, tile_p) * q_tiles
    fields = {
        KIND: kind,
        G_P_OUTER: p.grad_stride[0],
        G_P_INNER: p.grad_stride[1],
        G_Q_OUTER: q.grad_stride[0],
        G_Q_INNER: q.grad_stride[1],
        Q_TILES: q_tiles,
        ALL_TILES: tiles,
    }
    return fields, tiles


def _layout(weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(weight.shape), weight.stride  # a torch.Size would not do for `memory.empty_on`


class _Table:
    """Rows of one chunk under construction; running totals become offsets."""

    def __init__(self) -> None:
        self.rows: list[dict[int, int]] = []
        self.weights: list[Weight] = []
        self.swapped: list[bool] = []
        self.totals = {"workspace": 0, "sums": 0}
        self.programs: dict[int, int] = {}

    def take(self, what: str, count: int) -> int:
        offset = self.totals[what]
        self.totals[what] += _ceil(count, 32) * 32  # keeps 16-byte vectors aligned
        return offset

    def add(
        self,
        weight: Weight,
        oriented: tuple[Axis, Axis, bool],
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

    def tensor(self, count: int, device: torch.device) -> Tensor:
        """The rows, filled up to ``count``."""
        rows = self.rows + [dict.fromkeys(self.programs, NEVER)] * (count - len(self.rows))
        numbers = [[row.get(field, 0) for field in range(FIELDS.value)] for row in rows]
        return _kept(numbers, torch.int64, device)


def _chunk(
    tables: Sequence[_Table],
    indices: list[int],
    device: torch.device,
    starts: Sequence[int | Sequence[int]],
) -> Chunk:
    """The chunk of these weights.

    Args:
        tables: Their rows; workspace and sums are those of the first.
        indices: Which weights they are.
        device: Where the tables go.
        starts: Before the addresses of each argument, or of each weight for it.
    """
    count = max(MIN_WEIGHTS, 1 << (len(indices) - 1).bit_length())
    takes: list[Any] = []
    for start in starts:
        before = [start] * len(indices) if isinstance(start, int) else start
        places = [b + i for b, i in zip(before, indices, strict=True)]
        takes.append(itemgetter(*places, *places[-1:] * (count - len(places))))
    first = tables[0]
    return Chunk(
        takes=takes,
        tables=[table.tensor(count, device) for table in tables],
        epsilons=_kept([w.eps for w in first.weights], torch.float64, device),
        padded=count,
        iterations=max(w.iterations for w in first.weights),
        workspace=first.totals["workspace"],
        sums=first.totals["sums"],
        programs=tuple(count for table in tables for count in table.programs.values()),
    )


def _vector_starts(weights: Sequence[Weight]) -> tuple[list[int], list[int]]:
    """Where each u and each v starts: u and v of each weight in turn, without gaps."""
    starts = list(itertools.accumulate((size for weight in weights for size in weight.sides), initial=0))
    return starts[:-1:2], starts[1::2]


def _chunks(indices: Sequence[int]) -> list[list[int]]:
    return [list(indices[i : i + MAX_WEIGHTS]) for i in range(0, len(indices), MAX_WEIGHTS)]


def _kept(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that stays, made on a thread of its own.

    Before torch.compile records a CUDA graph it runs the model, with all that this thread allocates in a
    pool, and raises if anything but its outputs is still alive there. The copy to the device is over on
    return, so every stream may read it.
    """
    with ThreadPoolExecutor(1) as own_thread:
        kept = own_thread.submit(torch.tensor, values, dtype=dtype, device=device).result()
    # Not left to the caches of the plans: of two threads that fill one at once the second throws out what the
    # first goes on to launch kernels with.
    _all_kept.append(kept)
    return kept


_all_kept: list[Tensor] = []


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
