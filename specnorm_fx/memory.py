"""How tensors lie in memory: what kernels ask, which look at nothing but addresses."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["contiguous_vectors", "is_dense"]


def contiguous_vectors(vectors: Sequence[Tensor], dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Tensor]:
    """The u and v as kernels read them.

    Args:
        vectors: Of any dtype: a model that was turned to half precision may have them in it.
        dtype: What they are to have.
        sizes: Elements that the weights need of each.

    Returns:
        The same tensors where they fit, else contiguous copies.

    Raises:
        ValueError: One has another number of elements.
    """
    stored = [x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous() for x in vectors]
    if (given := tuple([x.numel() for x in stored])) != sizes:
        raise ValueError(f"u and v have {given} elements and need {sizes}.")
    return stored


@functools.lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor fills its memory: no gaps between its elements, and no two in one place.

    Args:
        shape: Of the tensor.
        stride: Likewise.
    """
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True
