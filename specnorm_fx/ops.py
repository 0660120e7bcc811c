"""The operators: spectral norm of many weights in one opaque call, whatever runs it.

``specnorm_fx::normalize`` (`normalize`)
    Power iteration, sigma and ``W / sigma`` of weights of one device and compute dtype, differentiable.
``specnorm_fx::normalize_forward``, ``specnorm_fx::normalize_backward``
    What that is made of, and what is left of it in a graph traced below autograd: the same, and the gradient.
``specnorm_fx::power_iteration`` (`power_iteration`)
    The first without the division, for `specnorm_fx.update_`.
``specnorm_fx::singular_vectors`` (`singular_vectors`)
    u and v by torch's operations in torch's order, for ``implementation="reference"``.
``specnorm_fx::store_`` (`store_`)
    New u and v into their buffers.

Operators, because ``torch.compile`` must not look inside: were the power iteration a part of the graph,
Inductor would write the new u straight into its buffer and save that buffer for backward, where the next
forward overwrites it (torch 2.13: "modified by an inplace operation" for D(real) - D(fake)). And one call
costs the same to compile for any number of iterations and of layers.

On the CPU they run `specnorm_fx.cpu_kernels`, on CUDA `specnorm_fx.triton_kernels` where Triton is
installed, and elsewhere `specnorm_fx.reference`, weight by weight: on ROCm, too, where nobody has tried the
kernels. All three take and give the same, but for a sigma not above eps, which CUDA gives as 0.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _current_graph_task_id,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.fx import traceback
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy

from specnorm_fx import cpu_kernels, reference

__all__ = [
    "groups",
    "is_functionalized",
    "normalize",
    "power_iteration",
    "refuse_recompute",
    "singular_vectors",
    "split",
    "store_",
]

# The overload that the operators are. Compiled code is cached on disk by the names in its graph: whoever
# changes what an operator takes, gives or saves for backward must change this, or users get the old
# gradient with the new forward.
REVISION = "r8"

ARGUMENTS = (
    "Tensor[] weights, Tensor[] us, Tensor[] vs, int[] n_power_iterations, float[] eps, int[] dims, "
    "str[] orders"
)


def groups(weights: Sequence[Tensor]) -> list[list[int]]:
    """Which weights can go through one call of `normalize`: those of one device and compute dtype.

    Args:
        weights: Of any dtype.

    Returns:
        Positions in ``weights``, each in one group; but complex weights in none, they are for the reference.
    """
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, weight in enumerate(weights):
        if not weight.is_complex():
            found.setdefault((weight.device, reference.compute_dtype(weight)), []).append(index)
    return list(found.values())


# --- What runs where ---


@functools.cache
def _cuda_kernels() -> ModuleType | None:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return None
    from specnorm_fx import triton_kernels

    try:
        triton_kernels.start()
    except Exception as error:  # without a C compiler, or Python's headers, of types without a common one
        warnings.warn(
            f"Triton cannot build its launcher, so spectral norm on CUDA goes by single operations, which is "
            f"slow. It must have a C compiler and Python's headers (python3-dev), got: {error}",
            stacklevel=2,
        )
        return None
    return triton_kernels


def _kernels(weights: Sequence[Tensor]) -> ModuleType | None:
    """The module that has the three kernels for some weights, or None: go by the reference."""
    first = weights[0]
    dtype, device = first.dtype, first.device
    for weight in weights:
        # fp32 and half have one compute dtype, but a kernel reads one dtype; and one memory.
        if weight.dtype != dtype or weight.device != device:
            return None
    if first.is_cpu:
        return cpu_kernels if dtype in cpu_kernels.DTYPES and cpu_kernels.available() else None
    return _cuda_kernels() if first.is_cuda else None


def _normalize(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
    once: bool = False,
) -> list[Tensor]:
    refuse_recompute(n, once)
    kernels = _kernels(weights)
    if kernels is not None:
        vectors, sigmas, normalized = kernels.normalize(weights, us, vs, n, eps, dims, orders)
        return [vectors, sigmas, *normalized]
    vectors, sigmas = _power_iteration(weights, us, vs, n, eps, dims, orders)
    columns = (weights, *split(vectors, weights, dims), eps, dims)
    normalized = [reference.normalized(*site) for site in zip(*columns, strict=True)]
    return [vectors, sigmas, *map(_laid_out, normalized, weights)]


def _power_iteration(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(weights)
    if kernels is not None:
        found: tuple[Tensor, Tensor] = kernels.power_iteration(weights, us, vs, n, eps, dims, orders)
        return found
    unit = _singular_vectors(weights, us, vs, n, eps, dims, orders)
    pairs = [*zip(unit[: len(us)], unit[len(us) :], strict=True)]
    matrices = map(reference.weight_matrix, weights, dims)
    sigmas = [reference.sigma(matrix, *pair) for matrix, pair in zip(matrices, pairs, strict=True)]
    return torch.cat([x for pair in pairs for x in pair]), torch.stack(sigmas).double()


def _gradients_by_kernel(
    grads: list[Tensor | None],
    normalized: list[Tensor],
    vectors: Tensor,
    sigmas: Tensor,
    eps: list[float],
    dims: list[int],
    contiguous: list[bool],
) -> list[Tensor]:
    kernels = _kernels(normalized)
    if kernels is not None:
        gradients = kernels.normalize_backward(grads, normalized, vectors, sigmas, eps, dims, contiguous)
    else:
        columns = (grads, normalized, *split(vectors, normalized, dims), sigmas.unbind(), eps, dims)
        gradients = [
            None if grad is None else _laid_out(reference.gradient(grad, *site), site[0], wants)
            for wants, grad, *site in zip(contiguous, *columns, strict=True)
        ]
    return _never_one([gradient for gradient in gradients if gradient is not None])


def _singular_vectors(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
    once: bool = False,
) -> list[Tensor]:
    refuse_recompute(n, once)
    columns = (weights, us, vs, n, eps, dims, orders)
    pairs = [reference.singular_vectors(*site) for site in zip(*columns, strict=True)]
    return [*(u for u, _ in pairs), *(v for _, v in pairs)]


def _store(buffers: list[Tensor], vectors: list[Tensor]) -> None:
    torch._foreach_copy_(buffers, vectors)


def is_functionalized() -> bool:
    """Whether ``torch.func.functionalize`` is what looks at the next operation, in eager mode."""
    interpreter = peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == TransformType.Functionalize


def refuse_recompute(n: list[int], once: bool) -> None:
    """With ``once``, raise where a power iteration is due in the middle of a backward pass.

    The operators do so and not the module, of which ``torch.compile`` leaves nothing but them.

    Args:
        n: Power iterations of each weight.
        once: Whether there is a gradient that they would spoil.

    Raises:
        RuntimeError: It is so.
    """
    if once and _current_graph_task_id() != -1 and any(count > 0 for count in n):
        raise RuntimeError(
            "A training forward with update='forward' runs within a backward pass, as activation "
            "checkpointing makes it: u and v would move again, and the gradient be that of other weights "
            "than the forward's. Use transform(model, update='step') and "
            "specnorm_fx.update_after(optimizer, model)."
        )


def _promised(weight: Tensor, contiguous: bool = False) -> Tensor:
    """A new tensor with the strides that the operators promise for a result."""
    return torch.empty_like(weight, memory_format=_FORMATS[contiguous])


_FORMATS = {True: torch.contiguous_format, False: torch.preserve_format}


def _laid_out(result: Tensor, weight: Tensor, contiguous: bool = False) -> Tensor:
    promised = _promised(weight, contiguous)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _never_one(results: list[Tensor]) -> list[Tensor]:
    # Inductor's cpp_wrapper takes a list of one for a tensor, and the process dies of it (torch 2.13).
    return [*results, results[0].new_empty(0)] if len(results) == 1 else results


def split(
    vectors: Tensor, weights: Sequence[Tensor], dims: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The us and vs that are one tensor.

    Args:
        vectors: From `normalize` or `power_iteration`.
        weights: What these were given.
        dims: Likewise.

    Returns:
        u, ``[m]``, and v, ``[n]``, of each weight: views.
    """
    sizes: list[int] = []
    for weight, dim in zip(weights, dims, strict=True):
        m = weight.shape[dim]
        sizes += (m, weight.numel() // m)
    views = torch.split_with_sizes(vectors, sizes)
    return list(views[::2]), list(views[1::2])


def _gradients(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    vectors: Tensor,
    eps: Sequence[float],
    dims: Sequence[int],
) -> list[Tensor | None]:
    """The gradient of `reference.normalized` by ATen, differentiable again in G and W."""
    columns = (grads, weights, *split(vectors, weights, dims), eps, dims)
    return [
        None if grad is None else reference.normalized_backward(grad, *site)
        for grad, *site in zip(*columns, strict=True)
    ]


# --- Shapes ---


def _fake_normalize(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *_: object) -> list[Tensor]:
    return [*_fake_power_iteration(weights, us, vs), *map(_promised, weights)]


def _fake_power_iteration(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *_: object
) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(weights[0])
    size = sum(x.shape[0] for x in (*us, *vs))
    sigmas = us[0].new_empty(len(weights), dtype=torch.float64)
    return us[0].new_empty(size, dtype=dtype), sigmas


def _fake_gradients(
    grads: list[Tensor | None],
    normalized: list[Tensor],
    vectors: Tensor,
    sigmas: Tensor,
    eps: list[float],
    dims: list[int],
    contiguous: list[bool],
) -> list[Tensor]:
    sites = zip(grads, normalized, contiguous, strict=True)
    return _never_one([_promised(weight, wants) for grad, weight, wants in sites if grad is not None])


def _fake_singular_vectors(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *_: object
) -> list[Tensor]:
    dtypes = [reference.compute_dtype(weight) for weight in weights] * 2
    return [torch.empty_like(x, dtype=dtype) for x, dtype in zip([*us, *vs], dtypes, strict=True)]


# --- Gradient ---


class _Normalized(torch.autograd.Function):
    """What `specnorm_fx::normalize_forward` has found for some weights, with its gradient.

    An ``autograd.Function`` inside a composite operator, and not ``torch.library.register_autograd``, of
    which the version for lists of tensors cannot be used under ``torch.func`` (torch 2.13).
    """

    @staticmethod
    def forward(
        ctx: Any,
        eps: list[float],
        dims: list[int],
        vectors: Tensor,
        sigmas: Tensor,
        normalized: list[Tensor],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        # Backward takes what was made last first, and this was made before all layers: without a later number
        # the gradients of all W / sigma would be kept until the last of them is there.
        ctx._set_sequence_nr(_AS_SOON_AS_READY)
        ctx.eps, ctx.dims = eps, dims
        needed = ctx.needs_input_grad[5:]
        if not all(needed):  # a frozen weight's result carries no gradient, though others of the call do
            pairs = zip(normalized, needed, strict=True)
            ctx.mark_non_differentiable(*(result for result, need in pairs if not need))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights, *normalized, vectors, sigmas)
        return tuple(normalized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *saved, vectors, sigmas = ctx.saved_tensors
        weights, normalized = saved[: len(grads)], saved[len(grads) :]
        if torch.is_grad_enabled() or _transformed(grads):
            # create_graph, is_grads_batched or torch.func: by operations that can be transformed again.
            gradients = _gradients(grads, weights, vectors, ctx.eps, ctx.dims)
        else:
            contiguous = [weight.is_contiguous() for weight in weights]
            arguments = (normalized, vectors, sigmas, ctx.eps, ctx.dims, contiguous)
            compact = iter(_normalize_backward([*grads], *arguments))
            gradients = [None if grad is None else next(compact) for grad in grads]
        return (None, None, None, None, None, *gradients)


_AS_SOON_AS_READY = 2**62  # of 64 bits; the engine's own, for what collects gradients, is the largest

# Bytes of weights, at least, whose gradients are computed in one call, unless they are the last.
GRADIENT_GROUP = 16 << 20


def _gradient_groups(weights: Sequence[Tensor]) -> list[range]:
    """Weights whose gradients are computed in one call, in their order: that of the layers, mostly.

    Not all in one: G of every W / sigma would be in memory at once, and DDP could not send a gradient before
    the last one is there.
    """
    found, first, size = [], 0, 0
    for index, weight in enumerate(weights):
        size += weight.numel() * weight.element_size()
        if size >= GRADIENT_GROUP or index + 1 == len(weights):
            found.append(range(first, index + 1))
            first, size = index + 1, 0
    return found


def _transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether ``torch.func``, forward mode or ``is_grads_batched`` (it has a vmap of its own) is at work."""
    return (
        _are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        # Compiled autograd, which has no such vmap, could not trace the question.
        or (not torch.compiler.is_dynamo_compiling() and any(map(_is_legacy_batched, tensors)))
    )


def _is_legacy_batched(tensor: Tensor | None) -> bool:
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def _differentiable_normalize(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
    once: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    if _transformed(weights):
        refuse_recompute(n, once)
        # By operations that can be transformed as often as one likes.
        stored = [weight.detach() for weight in weights]
        vectors, sigmas = power_iteration(stored, us, vs, n, eps, dims, orders)
        columns = (weights, *split(vectors, weights, dims), eps, dims)
        return vectors, sigmas, [reference.normalized(*site) for site in zip(*columns, strict=True)]
    with torch.no_grad():
        vectors, sigmas, *found = _normalize_forward(weights, us, vs, n, eps, dims, orders, once)
    if not _needs_gradient(weights):
        return vectors, sigmas, found
    gradient_groups = _gradient_groups(weights)
    if len(gradient_groups) == 1:  # most models: without the slices
        return vectors, sigmas, [*_Normalized.apply(eps, dims, vectors, sigmas, found, *weights)]  # type: ignore[no-untyped-call]
    normalized: list[Tensor] = []
    at = 0
    for group in gradient_groups:
        part = slice(group.start, group.stop)
        size = sum(us[i].shape[0] + vs[i].shape[0] for i in group)
        normalized += _Normalized.apply(  # type: ignore[no-untyped-call]
            eps[part], dims[part], vectors[at : at + size], sigmas[part], found[part], *weights[part]
        )
        at += size
    return vectors, sigmas, normalized


def _forward_with_gradient(*arguments: Any) -> list[Tensor]:
    """What autograd sees of `specnorm_fx::normalize_forward`, where it does not stand in `normalize`.

    So it is in a program after ``run_decompositions()``, and in what ``make_fx`` traces: without a gradient
    of its own the weights would train no more, in silence.
    """
    if _transformed(arguments[0]) or _needs_gradient(arguments[0]):
        vectors, sigmas, normalized = _differentiable_normalize(*arguments)
        return [vectors, sigmas, *normalized]
    with torch._C._AutoDispatchBelowAutograd():
        found: list[Tensor] = _normalize_forward(*arguments)
    return found


def _needs_gradient(weights: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


def _is_differentiated(weights: Sequence[Tensor]) -> bool:
    return torch.autograd.forward_ad._current_level >= 0 or _needs_gradient(weights)


# --- Registration: with calls, not decorators, so that the functions above stay plain functions ---


def _define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any] | None,
    vmap: Callable[..., tuple[Any, Any]] | None = None,
    iterates: bool = False,
    autograd: Callable[..., Any] | None = None,
) -> Any:
    """Register an operator; without ``fake`` one made of others; ``vmap`` instead of `_one_by_one`."""
    qualified = f"specnorm_fx::{name}.{REVISION}"
    # Any layout will do: else Inductor, which turns the weights of convolutions to channels_last, would turn
    # each back before the operator, and its result again after it (2.8 M weights: 20 % of a training step).
    torch.library.define(qualified, schema, tags=torch.Tag.flexible_layout)
    key = "CompositeImplicitAutograd" if fake is None else "CompositeExplicitAutograd"
    torch.library.impl(qualified, key, function)
    overload = getattr(getattr(torch.ops.specnorm_fx, name), REVISION)
    overload._op = _past_dispatcher(overload._op, function, iterates, autograd is not None)
    if fake is not None:
        torch.library.register_fake(qualified, fake)
    if autograd is not None:
        torch.library.impl(qualified, "Autograd", autograd)
    torch.library.register_vmap(qualified, functools.partial(vmap or _one_by_one, overload))
    return overload


def _past_dispatcher(
    operator: Callable[..., Any], function: Callable[..., Any], iterates: bool, differentiable: bool
) -> Callable[..., Any]:
    """An operator, without the dispatcher where nothing but the dispatcher would see it.

    That is in eager mode, and in Inductor's code. The dispatcher turns seven lists over twice on the way to a
    function that stands in Python.

    Args:
        operator: What calls the dispatcher.
        function: What it would call.
        iterates: Whether it takes ``n_power_iterations``, as its fourth argument.
        differentiable: Whether autograd has a function of its own for it.
    """

    def call(*arguments: Any, **others: Any) -> Any:
        if not (
            others or _is_observed(arguments[0]) or (differentiable and _is_differentiated(arguments[0]))
        ):
            return function(*arguments)
        is_due = iterates and len(arguments) > 3 and any(count > 0 for count in arguments[3])
        with _kept_for_backward() if is_due else nullcontext():
            return operator(*arguments, **others)

    return call


@contextmanager
def _kept_for_backward() -> Iterator[None]:
    """Mark what is traced here as what a compiled backward must not compute again.

    The partitioner, told to save memory (``activation_memory_budget``, ``aggressive_recomputation``), would
    iterate again, from the u and v that the forward has left. But a user who asks for a recompute by
    activation checkpointing gets it, and the error of `refuse_recompute`, as in eager mode.
    """
    meta = traceback.current_meta
    if "recompute" in meta:
        yield
        return
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        del meta["recompute"]


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _is_observed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether somebody is to see the operator: a tracer, mode, transform, subclass or profiler."""
    return (
        _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)  # make_fx has it there
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """``torch.vmap`` of an operator: a call for each element, of an ensemble of models say."""
    values, structure = tree_flatten(arguments)
    batched = tree_flatten(in_dims, is_leaf=lambda d: d is None)[0]
    results = []
    for k in range(info.batch_size):
        selected = [x if dim is None else x.select(dim, k) for x, dim in zip(values, batched, strict=True)]
        results.append(operator(*tree_unflatten(selected, structure)))
    if results[0] is None:  # an operator that returns nothing
        return None, None
    stacked = tree_map(lambda *parts: torch.stack(parts), *results)
    return stacked, tree_map(lambda _: 0, stacked)


def _each_its_own(operator: Callable[..., Any], info: Any, in_dims: Any, *lists: Any) -> tuple[Any, Any]:
    """``torch.vmap`` of `store_`: what all models share cannot keep the vectors of each."""
    if any(buffer is None and vector is not None for buffer, vector in zip(*in_dims, strict=True)):
        raise RuntimeError(
            "torch.vmap over weights must be over their u and v as well, which training changes: the models "
            "cannot share one. Stack the buffers with the parameters."
        )
    return _one_by_one(operator, info, in_dims, *lists)


# (weights, us, vs, n_power_iterations, eps, dims, orders) -> (vectors, sigmas, normalized). `vectors` is one
# fresh tensor of the compute dtype with the new u and v of each weight in turn; `sigmas` are u^T W v of
# these, [L] in float64 (the CUDA kernels: 0 where |sigma| <= eps); `normalized` are W / sigma, or W where
# |sigma| <= eps. Only they carry gradient, to the weights. With once=True a power iteration within a backward
# pass is an error: `refuse_recompute`. Dynamo keeps it as one call; below, it is the two that follow.
normalize = _define(
    "normalize",
    f"({ARGUMENTS}, bool once=False) -> (Tensor, Tensor, Tensor[])",
    _differentiable_normalize,
    None,
)
# The same in one list: Inductor's cpp_wrapper takes no operator that returns a list among others.
_normalize_forward = _define(
    "normalize_forward",
    f"({ARGUMENTS}, bool once=False) -> Tensor[]",
    _normalize,
    _fake_normalize,
    iterates=True,
    autograd=_forward_with_gradient,
)
# (grads or None, normalized, vectors, sigmas, eps, dims, contiguous) -> the gradients of the weights that
# have one; behind a single one an empty tensor. From W / sigma and not W: the user of the weight keeps it
# anyway, in the layout that its gradient comes in. That is channels_last under Inductor, but the gradient is
# contiguous where W is: else autograd turns it, one element at a time (2.8 M weights: 3 % of a step).
_normalize_backward = _define(
    "normalize_backward",
    "(Tensor?[] grads, Tensor[] normalized, Tensor vectors, Tensor sigmas, float[] eps, int[] dims, "
    "bool[] contiguous) -> Tensor[]",
    _gradients_by_kernel,
    _fake_gradients,
)

# As `normalize`, (vectors, sigmas) only. The weights must be detached.
power_iteration = _define(
    "power_iteration",
    f"({ARGUMENTS}) -> (Tensor, Tensor)",
    _power_iteration,
    _fake_power_iteration,
    iterates=True,
)

# As `normalize`, -> all u, then all v: `reference.singular_vectors` of each weight, which must be detached.
singular_vectors = _define(
    "singular_vectors",
    f"({ARGUMENTS}, bool once=False) -> Tensor[]",
    _singular_vectors,
    _fake_singular_vectors,
    iterates=True,
)

# (buffers, vectors): new u and v into their buffers. Of plain copies Inductor would make one more kernel, and
# compiling that takes longer than all else that spectral norm adds; and vmap has no rule for those of a list.
store_ = _define(
    "store_",
    "(Tensor(a!)[] buffers, Tensor[] vectors) -> ()",
    _store,
    lambda buffers, vectors: None,
    _each_its_own,
)
