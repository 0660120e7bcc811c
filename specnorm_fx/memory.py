"""How tensors lie in memory: what kernels ask, which look at nothing but addresses."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._dynamo import guards

__all__ = ["contiguous_strides", "contiguous_vectors", "dense", "empty_on", "is_dense", "refuse_empty"]


def empty_on(device: torch.device) -> Callable[..., Tensor]:
    """What allocates a tensor there, given its shape and strides, two tuples, and dtype.

    Inductor's code calls it: past the dispatcher, in two thirds of the time of ``torch.empty_like``.

    Args:
        device: The CPU, or a GPU, which must be the current one when it is called.
    """
    return _EMPTY[device.type]


_EMPTY: dict[str, Callable[..., Tensor]] = {
    "cpu": guards._empty_strided_cpu,  # type: ignore[attr-defined]
    "cuda": guards._empty_strided_cuda,  # type: ignore[attr-defined]
}


def contiguous_vectors(
    vectors: Sequence[Tensor], like: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]
) -> list[Tensor]:
    """The u and v as kernels read them.

    Args:
        vectors: Of any dtype: a model that was turned to half precision may have them in it.
        like: A weight, on the device where they are to be.
        dtype: What they are to have.
        sizes: Elements that the weights need of each.

    Returns:
        The same tensors where they fit, else contiguous copies.

    Raises:
        ValueError: One has another number of elements.
        RuntimeError: One is on another device.
    """
    device = like.device
    if others := {str(x.device) for x in vectors if x.device != device}:
        got = ", ".join(sorted(others))
        raise RuntimeError(f"u and v must be on the device of their weights, {device}, got {got}.")
    stored = [x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous() for x in vectors]
    if (given := tuple([x.numel() for x in stored])) != sizes:
        raise ValueError(f"u and v have {given} elements and need {sizes}.")
    return stored


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a contiguous tensor.

    Args:
        shape: Without zeros.
    """
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def refuse_empty(shapes: Sequence[Sequence[int]]) -> None:
    """Kernels cut weights into blocks, of which a weight without elements has none.

    Args:
        shapes: Of weights.

    Raises:
        ValueError: One has no elements.
    """
    if any(0 in shape for shape in shapes):
        raise ValueError("A weight without elements has no sigma.")


def dense(weight: Tensor) -> Tensor:
    """The weight, or a copy without gaps, its dimensions in the same order, as operators promise it.

    Args:
        weight: Any strides.
    """
    if is_dense(weight.shape, weight.stride()):
        return weight
    return torch.empty_like(weight).copy_(weight)


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
