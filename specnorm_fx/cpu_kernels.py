"""Spectral norm of many weights on the CPU, in one call of the library that ``cpu_kernels.c`` compiles to.

The library is built when the package is installed and there is a C compiler. Without it `available` is
false, and `specnorm_fx.ops` goes by the reference.

Equal to `specnorm_fx.reference` up to rounding. What is not plain (a product no longer than ``eps``, NaN, a
sigma whose powers leave the range of fp32) is left to the reference, weight by weight.
"""

import ctypes
import functools
import importlib.util
import math
import warnings
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specnorm_fx import memory, reference

__all__ = ["DTYPES", "available", "normalize", "normalize_backward", "power_iteration"]

# Of the weights; half precision is for the reference, it is seldom trained on a CPU.
DTYPES = (torch.float32, torch.float64)


class _Site(ctypes.Structure):
    """``site`` of the C file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("outer", "inner", "width")),
        *((name, ctypes.c_int64) for name in ("outer_first", "iterations", "taps", "channels", "transposed")),
        *((name, ctypes.c_int64) for name in ("u_at", "v_at", "places")),
        ("eps", ctypes.c_double),
    ]


INTERFACE = 3  # of the C file


@functools.cache
def available() -> bool:
    """Whether the library was built with the package."""
    return _library() is not None


@functools.cache
def _library() -> Any:
    spec = importlib.util.find_spec("specnorm_fx._cpu_kernels")
    if spec is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:  # without OpenMP's runtime, say
        warnings.warn(
            f"The library for the CPU cannot be loaded, so spectral norm goes by single operations there, "
            f"which is slower. Install specnorm_fx anew, got: {error}",
            stacklevel=2,
        )
        return None
    try:
        interface = ctypes.c_int.in_dll(library, "INTERFACE").value
    except ValueError:  # of the first version
        return None
    return library if interface == INTERFACE else None  # else left by another version, and not built anew


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    # It runs without the GIL, and on the OpenMP threads that PyTorch has started already.
    library = _library()
    function = getattr(library, f"{name}_{'float' if dtype == torch.float32 else 'double'}")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    # sites, addresses, their number, threads; what follows.
    rest = [number, pointer, pointer, pointer] if name == "normalize" else [pointer, pointer]
    function.argtypes = [pointer, pointer, number, number, *rest]
    return function


def normalize(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n_power_iterations: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Power iterations, sigma and ``W / sigma`` of L weights.

    Args:
        weights: L tensors of at least two dimensions, all fp32 or all fp64, any strides.
        us: u of each, ``[m]``; not changed.
        vs: v of each, ``[n]``; not changed.
        n_power_iterations: Of each, as in `reference.singular_vectors`.
        eps: Of each, as in `reference.power_iteration`.
        dims: The output dimension of each, from 0.
        orders: ``"uv"`` or ``"vu"`` of each.

    Returns:
        The new u and v of each in turn, ``[sum of all m and n]``. sigmas ``[L]``, fp64: ``u^T W v``. And
        ``W / sigma`` of each, or W where sigma is not above eps, with the strides of a dense weight.

    Raises:
        ValueError: u or v have another number of elements than the weight needs.
        MemoryError: There is none for the singular vectors.
    """
    return _run(weights, us, vs, n_power_iterations, eps, dims, orders, divides=True)


def power_iteration(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n_power_iterations: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
) -> tuple[Tensor, Tensor]:
    """`normalize` without the division.

    Args:
        weights: As in `normalize`, like all others.
        us: ``[m]`` each.
        vs: ``[n]`` each.
        n_power_iterations: Of each.
        eps: Of each.
        dims: Of each.
        orders: Of each.

    Returns:
        The new u and v in one, and sigmas ``[L]``.
    """
    return _run(weights, us, vs, n_power_iterations, eps, dims, orders, divides=False)[:2]


def normalize_backward(
    grads: list[Tensor | None],
    normalized: list[Tensor],
    vectors: Tensor,
    sigmas: Tensor,
    eps: list[float],
    dims: list[int],
    contiguous: list[bool],
) -> list[Tensor | None]:
    """``(G - <G, W / sigma> u v^T) / sigma``, or G where the weight was left as it is.

    Args:
        grads: G of each ``W / sigma``, any strides; or None.
        normalized: ``W / sigma`` of each.
        vectors: From `normalize`.
        sigmas: From `normalize`.
        eps: As there.
        dims: As there.
        contiguous: Whether the weight of each is, though ``W / sigma`` may not be.

    Returns:
        The gradient of each weight, None where G is None. With the strides of ``W / sigma``, but contiguous
        where the weight is.
    """
    count = len(normalized)
    plan, weights = _planned(normalized, dims, ["uv"] * count, [0] * count, eps, contiguous)
    empty, dtype = memory.empty_on(weights[0].device), weights[0].dtype
    results = [
        None if grad is None else empty(*layout, dtype)
        for grad, layout in zip(grads, plan.results, strict=True)
    ]
    aligned = [
        grad
        if grad is None or (grad.stride() == w.stride() and not grad.is_neg())
        else torch.empty_like(w).copy_(grad)
        for grad, w in zip(grads, weights, strict=True)
    ]
    addresses = [0 if x is None else x.data_ptr() for x in (*weights, *aligned, *results)]
    _call("normalize_backward", vectors.dtype, plan.sites, addresses, vectors.data_ptr(), sigmas.data_ptr())
    return [
        x.contiguous() if x is not None and wants else x for x, wants in zip(results, contiguous, strict=True)
    ]


def _run(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n_power_iterations: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
    divides: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    plan, weights = _planned(weights, dims, orders, n_power_iterations, eps, [False] * len(weights))
    dtype = weights[0].dtype
    stored = memory.contiguous_vectors((*us, *vs), weights[0], dtype, plan.sizes)
    empty = memory.empty_on(weights[0].device)
    vectors = empty((plan.size,), (1,), dtype)
    sigmas = empty((len(weights),), (1,), torch.float64)
    results = [empty(*layout, dtype) for layout in plan.results] if divides else []
    done = array("b", bytes(len(weights)))
    addresses = [x.data_ptr() for x in (*weights, *stored, *results)]
    outputs = (vectors.data_ptr(), sigmas.data_ptr(), done.buffer_info()[0])
    _call("normalize", dtype, plan.sites, addresses, divides, *outputs)
    if 0 in done:
        for k in (k for k, is_done in enumerate(done) if not is_done):
            options = (n_power_iterations[k], eps[k], dims[k], orders[k])
            pair = reference.singular_vectors(weights[k], us[k], vs[k], *options)
            for at, x in zip((plan.sites[k].u_at, plan.sites[k].v_at), pair, strict=True):
                vectors[at : at + x.numel()] = x
            sigmas[k] = reference.sigma(reference.weight_matrix(weights[k], dims[k]), *pair)
            if divides:
                results[k].copy_(reference.normalized(weights[k], *pair, eps[k], dims[k]))
    return vectors, sigmas, results


def _call(name: str, dtype: torch.dtype, sites: Any, addresses: list[int], *others: Any) -> None:
    packed = array("q", addresses)  # an array of ctypes takes three times as long to make
    at, _ = packed.buffer_info()
    if not _function(name, dtype)(sites, at, len(sites), torch.get_num_threads(), *others):
        raise MemoryError(f"{name} of {len(sites)} weights found no memory for their singular vectors.")


class _Plan:
    """What follows from the shapes alone.

    Attributes:
        sites: The weights, as the C code takes them; valid as long as the plan lives.
        results: Shape and strides of each result.
        sizes: Elements of every u, then of every v.
        size: Of all together.
        is_dense: Whether no weight has gaps between its elements, or elements in one place.
    """

    def __init__(self, weights: Sequence[tuple[Any, ...]]) -> None:
        memory.refuse_empty([shape for shape, *_ in weights])
        layouts = [_layout(*weight) for weight in weights]
        self.sites = (_Site * len(layouts))(*[site for site, _ in layouts])
        self.results = [
            (tuple(shape), memory.contiguous_strides(shape) if site.channels > 0 else stride)
            for site, (shape, stride, *_) in zip(self.sites, weights, strict=True)
        ]
        # Kept, and not left to the cache of `_places`: of two threads that fill it at once the second throws
        # out what the first has taken.
        self._places = [places for _, places in layouts]
        ms = [shape[dim] for shape, _, dim, *_ in weights]
        ns = [math.prod(shape) // m for (shape, *_), m in zip(weights, ms, strict=True)]
        self.sizes = (*ms, *ns)
        self.size = 0
        for site, places, m, n in zip(self.sites, self._places, ms, ns, strict=True):
            site.u_at, site.v_at = self.size, self.size + m
            site.places = 0 if places is None else places.data_ptr()
            self.size += m + n
        self.is_dense = all(memory.is_dense(shape, stride) for shape, stride, *_ in weights)


def _planned(
    weights: list[Tensor],
    dims: list[int],
    orders: list[str],
    n: list[int],
    eps: list[float],
    contiguous: list[bool],
) -> tuple[_Plan, list[Tensor]]:
    """The plan, and the weights, copied if they have gaps."""
    columns = ([w.shape for w in weights], [w.stride() for w in weights], dims, orders, n, eps, contiguous)
    plan = _plan(*[tuple(column) for column in columns])
    if plan.is_dense:
        return plan, weights
    return _planned([memory.dense(weight) for weight in weights], dims, orders, n, eps, contiguous)


@functools.lru_cache(maxsize=256)
def _plan(*columns: tuple[Any, ...]) -> _Plan:
    return _Plan(list(zip(*columns, strict=True)))


def _layout(
    shape: Sequence[int],
    stride: Sequence[int],
    dim: int,
    order: str,
    iterations: int,
    eps: float,
    contiguous: bool,
) -> tuple[_Site, Tensor | None]:
    """A weight as the matrix that it is in memory, and `_places`.

    With ``contiguous`` the gradient is to be that, whatever the weight is.

    In memory it is ``[a, m, b]``: what comes before, at and after ``dim``. ``a`` is 1 for a contiguous
    Linear or Conv weight, and for one in channels_last; for a ConvTranspose ``a`` counts the input channels
    and ``b`` the positions of the kernel. Columns are taken as they lie in memory, and v with them, so that
    nothing of the size of the weight is permuted.
    """
    in_memory = sorted(range(len(shape)), key=lambda d: (-stride[d], shape[d] == 1, d))
    position = in_memory.index(dim)
    a = math.prod(shape[d] for d in in_memory[:position])
    b = math.prod(shape[d] for d in in_memory[position + 1 :])
    m = shape[dim]
    columns = [d for d in in_memory if d != dim and shape[d] > 1]
    places = _places(tuple(shape), tuple(columns)) if columns != sorted(columns) else None
    is_transposed = min(a, m) > 1  # u is the inner vector; of one element it may as well be the outer
    taps, channels = math.prod(shape[2:]), shape[1]
    is_channels_last = in_memory == [0, *range(2, len(shape)), 1] and min(taps, channels) > 1
    if not (contiguous and is_channels_last and min(a, b) == 1):
        taps = channels = 0
    outer, inner, width = (a, m, b) if is_transposed else (m, a * b, 1)
    outer_first = (order == "uv") != is_transposed
    site = _Site(outer, inner, width, outer_first, iterations, taps, channels, is_transposed, eps=eps)
    return site, places


@functools.lru_cache(maxsize=256)
def _places(shape: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Where in v each column stands, in the order of memory."""
    logical = sorted(columns)
    places = torch.arange(math.prod(shape[d] for d in logical), device="cpu").view(
        [shape[d] for d in logical]
    )
    return places.permute([logical.index(d) for d in columns]).flatten().contiguous()
