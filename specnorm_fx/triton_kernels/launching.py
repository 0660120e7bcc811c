"""The calls: what they allocate, and the launches over the chunks of a plan.

The pointers travel by value, as kernel arguments, so a call has no state and may be recorded in a CUDA
graph. The first call with some shapes also builds their table and compiles the kernels; it must come before
a recording.
"""

import contextlib
import contextvars
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specnorm_fx import memory, reference
from specnorm_fx.triton_kernels.gradient import dot_kernel, gradient_kernel
from specnorm_fx.triton_kernels.iteration import finish_kernel, pass_kernel, reduce_kernel
from specnorm_fx.triton_kernels.tables import backward_plan, forward_plan

__all__ = ["normalize", "normalize_backward", "power_iteration", "start"]


class _Specialization(NamedTuple):
    """What the kernels of a chunk are compiled for."""

    device: torch.device  # the current one
    weight: torch.dtype
    compute: torch.dtype  # of u and v
    many: int  # weights, filled up

    def constants(self, kernel: Any, flag: bool) -> list[Any]:
        """Those that a kernel takes, in its order: they come last.

        Args:
            kernel: One of Triton's.
            flag: What FIRST or DIVIDE is, where it has one of them.
        """
        names = (str(dtype).removeprefix("torch.") for dtype in (self.weight, self.compute))
        values = dict(zip(("W", "C"), (getattr(tl, name) for name in names), strict=True))
        values |= {"VEC": 16 // self.weight.itemsize, "L": self.many, "FIRST": flag, "DIVIDE": flag}
        return [values[name] for name in kernel.arg_names if name in values]

    def examples(self, kernel: Any) -> list[Any]:
        """All other arguments, as the calls have them."""
        values = {"table": torch.int64, "step": 0}
        values |= dict.fromkeys(("epsilons", "sigmas", "sums"), torch.float64)
        values |= dict.fromkeys(("vectors", "workspace"), self.compute)
        # Like those of `_addresses`: neither small nor a multiple of 16.
        addresses = (2**40 + 1,) * self.many
        values |= dict.fromkeys(("weights", "xs", "ys", "grads", "outputs"), addresses)
        return [values[name] for name in kernel.arg_names if name in values]


class _Launcher:
    """A kernel, past Triton's own launch where it is compiled already.

    For each of some dozens of arguments that one looks up what to specialise on and which kernel that makes,
    and then whether a constant has changed: 50 to 75 us a launch on a host where this takes 8. The hooks
    around each launch, of a profiler say, would be as much again, so they are called where there are any.

    Args:
        kernel: All but its constants is specialised alike in all calls.
        **options: What Triton compiles it with.
    """

    def __init__(self, kernel: Any, **options: int) -> None:
        self.kernel = kernel
        self.options = options
        self._compiled: dict[tuple[_Specialization, bool], tuple[Any, list[Any]]] = {}  # with its constants

    def __call__(
        self, special: _Specialization, programs: int, arguments: tuple[Any, ...], flag: bool = False
    ) -> None:
        """Launch it.

        Args:
            special: What for.
            programs: How many.
            arguments: All but the constants.
            flag: As in `_Specialization.constants`.
        """
        found = self._compiled.get((special, flag))
        if found is not None:
            compiled, constants = found
            if _is_hooked():
                compiled[programs, 1, 1](*arguments, *constants)
                return
            stream = triton.runtime.driver.active.get_current_stream(special.device.index)
            hooks = (None, None, None)  # what they are given, that before the launch, that after it
            # `run` comes first: it loads the kernel, which has no function before.
            run, loaded = compiled.run, (compiled.function, compiled.packed_metadata)
            run(programs, 1, 1, stream, *loaded, *hooks, *arguments, *constants)
            return
        constants = special.constants(self.kernel, flag)
        compiled = self.kernel[(programs,)](*arguments, *constants, **self.options)
        if isinstance(compiled, triton.FutureKernel):  # another thread has it compiled right now (Triton 3.7)
            compiled = compiled.result()
        if compiled is not None:  # else it is interpreted
            self._compiled[special, flag] = compiled, constants


def _is_hooked() -> bool:
    """Whether somebody wants to hear of launches: in Triton a chain of hooks, or one, or None."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


# Two programs share the 65536 registers of an SM: one reads while the other one computes. (Of four warps each
# thread may have 255, and has no more in any case.)
_pass = _Launcher(pass_kernel, num_warps=4)
_reduce, _finish, _dot, _gradient = (
    _Launcher(kernel, num_warps=8, maxnreg=128)
    for kernel in (reduce_kernel, finish_kernel, dot_kernel, gradient_kernel)
)


@functools.cache
def _compile(special: _Specialization, *due: tuple[_Launcher, bool]) -> None:
    """Compile kernels at the same time, and not each where it is first launched.

    Nothing else hangs on it: a launch compiles what it does not find.

    Args:
        special: What for.
        *due: Which, and their flags.
    """
    # In a context of its own, where nobody has such a mode on, and which takes the mode with it if it does
    # not come to its end (Ctrl-C): every later compile, of the user's kernels as well, would find it.
    contextvars.Context().run(_compile_together, special, due)


def _compile_together(special: _Specialization, due: tuple[tuple[_Launcher, bool], ...]) -> None:
    futures: list[Any] = []
    try:
        with ThreadPoolExecutor(len(due)) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for launcher, flag in due:
                kernel = launcher.kernel
                arguments = (*special.examples(kernel), *special.constants(kernel, flag))
                futures.append(kernel.warmup(*arguments, grid=(1,), **launcher.options))
    finally:
        for (launcher, _), future in zip(due, futures, strict=False):
            # Triton 3.7 keeps a future that has failed, and would raise its error at every launch.
            if isinstance(future, triton.FutureKernel) and future.future.exception() is not None:
                launcher.kernel.device_caches.clear()


def start() -> None:
    """Build Triton's driver, with a C compiler, unless it is built already.

    Raises:
        Exception: Of any type: there is no compiler, or no Python headers, or no GPU that Triton knows.
    """
    triton.runtime.driver.active.get_current_target()


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    dims: Sequence[int],
    orders: Sequence[str],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Power iterations, sigma and ``W / sigma`` of L weights.

    All on one device, the weights of one real floating dtype; "compute dtype" is fp32 for
    fp16 and bf16 weights, else the weights' own.

    Args:
        weights: L tensors of at least two dimensions, any strides.
        us: u of each, ``[m]``, any floating dtype; not changed.
        vs: v of each, ``[n]``, likewise; not changed.
        n_power_iterations: Of each, as in `reference.singular_vectors`.
        eps: Of each, as in `reference.power_iteration`.
        dims: The output dimension of each, from 0.
        orders: ``"uv"`` or ``"vu"`` of each.

    Returns:
        The new u and v, ``[sum of all m and n]``, compute dtype: u and v of each in turn.

        sigmas ``[L]``, fp64: what was divided by, or 0 where sigma was not above eps (or not finite)
        and the weight was left as it is.

        ``W / sigma`` of each, rounded once to the dtype of the weights, with shape and strides of the
        weight.

    Raises:
        ValueError: u or v have another number of elements than the weight needs.
    """
    vectors, sigmas, normalized = _forward(weights, us, vs, n_power_iterations, eps, dims, orders, True)
    return vectors, sigmas, normalized


def power_iteration(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    dims: Sequence[int],
    orders: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """`normalize` without the division: the same vectors and sigmas, bit for bit.

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
    vectors, sigmas, _ = _forward(weights, us, vs, n_power_iterations, eps, dims, orders, False)
    return vectors, sigmas


def _forward(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    dims: Sequence[int],
    orders: Sequence[str],
    divide: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    options = (dims, n_power_iterations, orders, eps)
    device, dtype, compute = weights[0].device, weights[0].dtype, reference.compute_dtype(weights[0])
    plan = forward_plan(device, dtype, divide, *_geometry(weights), *map(tuple, options))
    if not plan.is_dense:
        return _forward([*map(memory.dense, weights)], us, vs, n_power_iterations, eps, dims, orders, divide)
    stored = memory.contiguous_vectors((*us, *vs), weights[0], compute, plan.sizes)
    read = weights
    if plan.copied:
        read = [w.contiguous() if i in plan.copied else w for i, w in enumerate(weights)]
    empty = memory.empty_on(device)
    with _on(device):
        vectors = empty((plan.size,), (1,), compute)
        sigmas = empty((len(weights),), (1,), torch.float64)
        # Without division nothing is written there, so any address will do.
        outputs = [empty(*layout, dtype) for layout in plan.results] if divide else weights
        addresses = _addresses((*read, *stored, *weights, *outputs))
        for chunk in plan.chunks:
            workspace = empty((chunk.workspace,), (1,), compute)
            sums = empty((chunk.sums,), (1,), torch.float64)
            special = _Specialization(device, dtype, compute, chunk.padded)
            _compile(special, (_pass, True), (_reduce, False), (_finish, divide))
            readable, xs, ys, originals, results = [take(addresses) for take in chunk.takes]
            (table,) = chunk.tables
            state = (table, chunk.epsilons, vectors)
            passes, reduces, finishes = chunk.programs
            for step in range(max(chunk.iterations, 1)):
                _pass(special, passes, (readable, xs, ys, *state, workspace, sums, step), step == 0)
                _reduce(special, reduces, (readable, *state, workspace, sums, step))
            _finish(special, finishes, (originals, results, *state, sigmas, workspace, sums), divide)
    return vectors, sigmas, list(outputs)


def normalize_backward(
    grads: Sequence[Tensor | None],
    normalized: Sequence[Tensor],
    vectors: Tensor,
    sigmas: Tensor,
    eps: Sequence[float],
    dims: Sequence[int],
    contiguous: Sequence[bool],
) -> list[Tensor | None]:
    """``dW = (G - <G, W / sigma> u v^T) / sigma``, or G where the weight was left as it is.

    Args:
        grads: G of each ``W / sigma``, any strides, dtype of the weights; or None.
        normalized: ``W / sigma`` of each, from `normalize`.
        vectors: From `normalize`.
        sigmas: ``[L]``, from `normalize`.
        eps: Not used: a sigma of 0 tells what eps decided.
        dims: As in `normalize`.
        contiguous: Whether the weight of each is, though ``W / sigma`` may not be.

    Returns:
        dW of each, with dtype, shape and strides of ``W / sigma``, but contiguous where the weight is; None
        where G is None.
    """
    device, dtype = normalized[0].device, normalized[0].dtype
    grads = [None if g is None else g.resolve_neg() for g in grads]  # the imaginary part of a conjugate
    grad_strides = tuple([None if g is None else g.stride() for g in grads])
    plan = backward_plan(device, dtype, *_geometry(normalized), tuple(dims), tuple(contiguous), grad_strides)
    if not plan.is_dense:
        dense = [*map(memory.dense, normalized)]
        return normalize_backward(grads, dense, vectors, sigmas, eps, dims, contiguous)
    read, sources = normalized, grads
    if plan.copied or plan.relaid:
        read = [w.contiguous() if i in plan.copied else w for i, w in enumerate(normalized)]
        sources = [
            torch.empty_like(w).copy_(g) if g is not None and i in plan.copied | plan.relaid else g
            for i, (g, w) in enumerate(zip(grads, read, strict=True))
        ]
    empty = memory.empty_on(device)
    with _on(device):
        outputs = [None if layout is None else empty(*layout, dtype) for layout in plan.results]
        addresses = _addresses((*read, *sources, *outputs))
        for chunk in plan.chunks:
            sums = empty((chunk.sums,), (1,), torch.float64)
            special = _Specialization(device, dtype, vectors.dtype, chunk.padded)
            _compile(special, (_dot, False), (_gradient, False))
            factors, gradients, results = [take(addresses) for take in chunk.takes]
            dot_table, gradient_table = chunk.tables
            dots, tiles = chunk.programs
            _dot(special, dots, (factors, gradients, dot_table, sums))
            _gradient(special, tiles, (gradients, results, gradient_table, vectors, sigmas, sums))
    for i in plan.copied:  # computed as if W / sigma were contiguous
        if (out := outputs[i]) is not None and not contiguous[i]:
            outputs[i] = torch.empty_like(normalized[i]).copy_(out)
    return outputs


def _geometry(weights: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Shapes and strides."""
    return tuple([w.shape for w in weights]), tuple([w.stride() for w in weights])


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    # Triton compiles anew for every argument that becomes a multiple of 16, or 1. One more than an
    # address is neither, so a kernel is compiled once wherever the tensors lie.
    return [0 if t is None else t.data_ptr() + 1 for t in tensors]


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be that of the weights.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = contextlib.nullcontext()
