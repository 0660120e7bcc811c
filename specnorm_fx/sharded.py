"""Weights that are spread over devices (``DTensor``: FSDP2, tensor parallel).

Each rank holds a block of W. ``W v`` is the sum over blocks of block times its part of v: every rank
multiplies what it has, and an all-reduce of m numbers gives the product to all; ``W^H u`` takes one of n
numbers. W itself stays where it is. u and v are whole on every rank, and the same, as all get the same sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specnorm_fx import reference

__all__ = ["Matrix", "full", "is_sharded", "local", "matrix", "normalized", "placed_like", "power_iteration"]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``.

    Args:
        tensor: Any tensor.
    """
    # Not by its class, whose import costs half as much time as that of torch.
    return hasattr(tensor, "device_mesh")


def local(vector: Tensor) -> Tensor:
    """The memory of a u or v on this rank, to read and to write.

    Args:
        vector: A plain tensor, or a replicated ``DTensor`` (``distribute_module`` makes buffers one).

    Raises:
        ValueError: It is sharded.
    """
    if not is_sharded(vector):
        return vector
    dtensor: Any = vector
    if not all(placement.is_replicate() for placement in dtensor.placements):
        raise ValueError(
            f"u and v must be whole on every rank, got a buffer with placements {dtensor.placements}. "
            f"Distribute the parameters alone."
        )
    whole: Tensor = dtensor.to_local()
    return whole


def placed_like(vector: Tensor, buffer: Tensor) -> Tensor:
    """The inverse of `local`: a u or v to copy into a buffer.

    Args:
        vector: A plain tensor, the same on every rank.
        buffer: As in `local`.

    Returns:
        ``vector``, or a replicated ``DTensor`` of it.
    """
    if not is_sharded(buffer):
        return vector
    from torch.distributed.tensor import DTensor

    dtensor: Any = buffer
    return DTensor.from_local(vector, dtensor.device_mesh, dtensor.placements, run_check=False)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor on every rank; for a sharded one a collective call.

    Args:
        tensor: Plain or sharded, on every rank.
    """
    if not is_sharded(tensor):
        return tensor
    dtensor: Any = tensor
    gathered: Tensor = _where_ranks_meet(dtensor, dtensor.device_mesh).full_tensor()
    return gathered


def _where_ranks_meet(shard: Any, mesh: Any) -> Any:
    """A shard on the device of the ranks' communication, and of u and v: FSDP may keep it on the CPU."""
    return shard if shard.device.type == mesh.device_type else shard.to(mesh.device_type)


def matrix(weight: Tensor, dim: int) -> Any:
    """`reference.weight_matrix` of a plain or sharded weight.

    Args:
        weight: As there; or a ``DTensor``, sharded along any dimensions by even or uneven blocks.
        dim: As there.

    Returns:
        A tensor; or a `Matrix`, which every function of `specnorm_fx.reference` on matrices takes as well.

    Raises:
        ValueError: The weight is a ``DTensor`` of pending sums.
    """
    if not is_sharded(weight):
        return reference.weight_matrix(weight, dim)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dtensor: Any = weight
    mesh, placements = dtensor.device_mesh, dtensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"A weight must be sharded or replicated, got placements {placements}.")
    block = _where_ranks_meet(dtensor.to_local(), mesh)
    _, starts = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    places = [slice(start, start + size) for start, size in zip(starts, block.shape, strict=True)]
    others = [d for d in range(weight.ndim) if d != dim]
    return Matrix(
        block=block.to(reference.compute_dtype(block)).permute(dim, *others).flatten(1),
        shape=(weight.shape[dim], math.prod(weight.shape[d] for d in others)),
        rows=places[dim],
        columns=tuple(places[d] for d in others),
        sizes=tuple(weight.shape[d] for d in others),
        groups=tuple(mesh.get_group(d) for d, p in enumerate(placements) if not p.is_replicate()),
    )


@dataclass(frozen=True)
class Matrix:
    """A sharded weight as a matrix, for ``torch.mv(M, v)`` and ``torch.mv(M.H, u)``: collective calls.

    Attributes:
        block: What this rank holds of it, as a matrix; may be empty.
        shape: ``(m, n)`` of the whole.
        rows: Which rows the block has.
        columns: Which columns, as a slice of each dimension in ``sizes``.
        sizes: The dimensions of the weight beside the output dimension, whose product is n.
        groups: The process groups to add up over, one after the other.
        adjoint: Whether it stands for the adjoint.
    """

    block: Tensor
    shape: tuple[int, int]
    rows: slice
    columns: tuple[slice, ...]
    sizes: tuple[int, ...]
    groups: tuple[Any, ...]
    adjoint: bool = False

    @property
    def H(self) -> "Matrix":  # noqa: N802 (torch's name)
        """The adjoint."""
        return replace(self, adjoint=not self.adjoint)

    def resolve_conj(self) -> "Matrix":
        """Itself: it conjugates what it multiplies."""
        return self

    def partial_product(self, x: Tensor) -> Tensor:
        """What the block contributes to the product.

        Args:
            x: A whole vector, v or (adjoint) u.

        Returns:
            A whole vector, ``[m]`` or (adjoint) ``[n]``.
        """
        m, n = self.shape
        if self.adjoint:
            product = x.new_zeros(n).view(self.sizes)
            part = product[self.columns]
            part += reference.product(self.block.H, x[self.rows]).view_as(part)
            return product.flatten()
        product = x.new_zeros(m)
        product[self.rows] = reference.product(self.block, x.view(self.sizes)[self.columns].flatten())
        return product

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``torch.mv`` alone."""
        if func is not torch.mv:
            return NotImplemented
        this, x = args
        return _sums([this], [this.partial_product(x)])[0]


def _sums(matrices: Sequence[Matrix], parts: Sequence[Tensor]) -> list[Tensor]:
    """Add up over ranks, in one all-reduce for all matrices that are spread over the same ranks."""
    sums = list(parts)
    together: dict[Any, list[int]] = {}
    for i, (m, part) in enumerate(zip(matrices, parts, strict=True)):
        together.setdefault((m.groups, part.dtype, part.device), []).append(i)
    for (groups, _, _), indices in together.items():
        total = torch.cat([parts[i] for i in indices])
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        for i, x in zip(indices, total.split([len(parts[i]) for i in indices]), strict=True):
            sums[i] = x
    return sums


@torch.no_grad()
def power_iteration(
    matrices: Sequence[Matrix],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    orders: Sequence[str],
) -> tuple[list[Tensor], list[Tensor]]:
    """`reference.power_iteration` of L matrices, in two all-reduces for each iteration of all.

    Args:
        matrices: From `matrix`.
        us: u of each.
        vs: v of each.
        n_power_iterations: Of each; 0 brings u and v to unit length, as in `reference.singular_vectors`.
        eps: Of each.
        orders: Of each.

    Returns:
        The new u and v, fresh tensors in the dtype of the matrices.
    """
    us, vs = (
        [
            reference.unit(x.to(m.block.dtype), e) if n == 0 else x.to(m.block.dtype)
            for m, x, e, n in zip(matrices, column, eps, n_power_iterations, strict=True)
        ]
        for column in (us, vs)
    )
    for k in range(max(n_power_iterations, default=0)):
        due = [i for i, n in enumerate(n_power_iterations) if n > k]
        for half in (0, 1):
            to_u = [orders[i][half] == "u" for i in due]
            factors = [matrices[i] if is_u else matrices[i].H for i, is_u in zip(due, to_u, strict=True)]
            vectors = [vs[i] if is_u else us[i] for i, is_u in zip(due, to_u, strict=True)]
            parts = [m.partial_product(x) for m, x in zip(factors, vectors, strict=True)]
            for i, is_u, product in zip(due, to_u, _sums(factors, parts), strict=True):
                column = us if is_u else vs
                column[i] = reference.direction(product, column[i], eps[i])
    return us, vs


def normalized(weight: Tensor, u: Tensor, v: Tensor, eps: float, dim: int) -> Tensor:
    """`reference.normalized` of a sharded weight, differentiable as often: by operations on ``DTensor``.

    sigma is the sum of ``W * (u v^H)``, whose shards fit those of W; it costs an all-reduce of one number.

    Args:
        weight: A ``DTensor``.
        u: ``[m]``, whole, of unit length.
        v: ``[n]``, likewise.
        eps: As there.
        dim: As there.

    Returns:
        A ``DTensor`` like ``weight``.
    """
    from torch.distributed.tensor import DTensor

    dtensor: Any = weight
    mat = matrix(weight.detach(), dim)
    rank_one = torch.outer(u[mat.rows], v.view(mat.sizes)[mat.columns].flatten().conj())
    sizes = [place.stop - place.start for place in (mat.rows, *mat.columns)]
    outer = DTensor.from_local(
        rank_one.view(sizes).movedim(0, dim).contiguous(),
        dtensor.device_mesh,
        dtensor.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    stored = weight.to(u.dtype)
    sigma = (stored * outer.conj()).sum()
    divisor = torch.where(sigma.abs() > eps, sigma, 1)
    result: Any = (stored / divisor).to(weight.dtype)
    # DTensor replicates a dimension with fewer elements than ranks.
    if result.placements != dtensor.placements:
        result = result.redistribute(placements=dtensor.placements)
    placed: Tensor = result
    return placed
