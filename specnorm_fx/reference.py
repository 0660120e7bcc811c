"""The mathematics of spectral norm in plain ATen, readable alone; the oracle for everything faster.

Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957.

Letters used throughout the library: a weight is seen as the matrix ``W`` of shape ``[m, n]``, ``m``
the output side (the dimension ``dim``), ``n`` everything else flattened; ``u`` ``[m]`` and ``v``
``[n]`` approximate its first left and right singular vectors, and ``sigma = u^H W v`` its largest
singular value.

Equivalent to ``torch.nn.utils.parametrizations.spectral_norm`` (and bit-identical to it on the CPU
for unit ``u``, ``v`` and a weight above ``eps``): the same operations in the same order. It differs in

1. nothing is updated in place: new ``u`` and ``v`` are returned;
2. a product no longer than ``eps``, or not finite, carries no direction: the vector keeps the one it
   had, where torch divides by ``eps`` and lets the vector decay to zero;
3. a weight whose ``|sigma|`` is no larger than ``eps`` is left as it is, where torch gives NaN;
4. stored vectors that are not of unit length (averaged buffers, say) are rescaled, so that sigma
   is ``u^H W v / (|u| |v|)``;
5. fp16 and bf16 weights are iterated and divided in fp32, with autocast off, and the result is
   rounded once to the weight's dtype.
"""

import contextlib

import torch
from torch import Tensor

__all__ = [
    "AS_STORED",
    "INITIAL_ITERATIONS",
    "compute_dtype",
    "converge",
    "direction",
    "gradient",
    "initial_vectors",
    "normalized",
    "normalized_backward",
    "power_iteration",
    "product",
    "random_start",
    "residual",
    "sigma",
    "singular_values",
    "singular_vectors",
    "unit",
    "weight_matrix",
]

# torch's own number of iterations when spectral norm is put on a weight (_SpectralNorm.__init__). In
# training mode torch adds one update: registering a parametrization reads the weight once.
INITIAL_ITERATIONS = 15

# A number of power iterations: none, and u and v as they are, of whatever length. So does torch in eval mode.
AS_STORED = -1

# Power iteration that is to converge stops once sigma moves by no more than this, relatively, in one
# step: a unit in the last place of fp32. Sigma is then right to some 3e-5 where the next singular value
# is 0.2 % smaller or more.
CONVERGENCE_TOLERANCE = 1.2e-7
MAX_ITERATIONS = 1000

# |x| within this many machine epsilons of 1, and one more for so many elements, counts as unit length: so far
# off rounding alone leaves a freshly normalised vector (torch adds up squares in the dtype itself; seen: 1.5
# for 500 elements, 2.5 for 4608, 7 for 50000), and rescaling it would only change bits. No further: an
# average may be of almost unit length, and sigma is to be right to 1e-6 in fp32.
UNIT_TOLERANCE = 2
ELEMENTS_PER_EPSILON = 4096


def weight_matrix(weight: Tensor, dim: int) -> Tensor:
    """The weight as a matrix in the dtype that spectral norm is computed in.

    Args:
        weight: ``[..., m at position dim, ...]``, at least two dimensions, any floating or complex
            dtype.
        dim: Position of the output dimension, ``0 <= dim < weight.ndim``.

    Returns:
        ``[m, n]``; fp32 for an fp16 or bf16 weight, else the weight's dtype. A view where the layout
        allows it (``dim=0`` of a contiguous weight), else a copy.
    """
    weight = weight.to(compute_dtype(weight))
    if dim != 0:
        weight = weight.permute(dim, *(d for d in range(weight.ndim) if d != dim))
    return weight.reshape(weight.shape[0], -1)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that spectral norm is computed in, and that u and v are kept in.

    Args:
        weight: Any shape, floating or complex.

    Returns:
        fp32 for fp16 and bf16, whose range and rounding would spoil the norms, else the weight's own.
    """
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else weight.dtype


@torch.no_grad()
def initial_vectors(
    weight: Tensor, dim: int, eps: float, n_power_iterations: int = INITIAL_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Random u and v after some power iterations, drawn as torch draws them.

    u, then v, from the global generator of the weight's device and in the weight's dtype, so that the
    same seed gives the same start as ``torch.nn.utils.parametrizations.spectral_norm``.

    Args:
        weight: As in `weight_matrix`.
        dim: As in `weight_matrix`.
        eps: Norms up to this count as zero.
        n_power_iterations: How many.

    Returns:
        u ``[m]`` and v ``[n]`` of unit length, in the dtype of `weight_matrix`.
    """
    weight_mat = weight_matrix(weight, dim)
    m, n = weight_mat.shape
    u = weight.new_empty(m).normal_(0, 1).to(weight_mat.dtype)
    v = weight.new_empty(n).normal_(0, 1).to(weight_mat.dtype)
    u = torch.nn.functional.normalize(u, dim=0, eps=eps)
    v = torch.nn.functional.normalize(v, dim=0, eps=eps)
    return power_iteration(weight_mat, u, v, n_power_iterations, eps)


@torch.no_grad()
def power_iteration(
    weight_mat: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float, order: str = "uv"
) -> tuple[Tensor, Tensor]:
    """``n_power_iterations`` steps of ``u = Wv / |Wv|``, ``v = W^H u / |W^H u|``.

    Args:
        weight_mat: ``[m, n]``.
        u: ``[m]``, same dtype; used only to start from in the order ``"vu"``.
        v: ``[n]``, same dtype.
        n_power_iterations: How many.
        eps: A product no longer than this leaves the vector as it is (a zero matrix must not turn u
            and v into zeros, from which they could never recover).
        order: ``"uv"``, or ``"vu"`` as the legacy hook ``torch.nn.utils.spectral_norm`` does.

    Returns:
        The new u and v, fresh tensors.
    """
    for _ in range(n_power_iterations):
        if order == "vu":
            v = direction(product(weight_mat.H, u), v, eps)
            u = direction(product(weight_mat, v), u, eps)
        else:
            u = direction(product(weight_mat, v), u, eps)
            v = direction(product(weight_mat.H, u), v, eps)
    return u, v


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """``torch.mv`` without autocast, which on CUDA would round both to half precision, and nothing else here.

    Args:
        matrix: ``[m, n]``.
        vector: ``[n]``, same dtype.

    Returns:
        ``[m]``.
    """
    with _autocast_off(vector.device.type):
        # In an operator that torch.compile calls, a conjugate that is a view would be read as what it views.
        return torch.mv(matrix.resolve_conj(), vector)


def direction(x: Tensor, previous: Tensor, eps: float) -> Tensor:
    """A product of the power iteration, at unit length.

    Args:
        x: ``W v`` or ``W^H u``.
        previous: The vector it takes the place of.
        eps: A product no longer than this, or not finite, has no direction.

    Returns:
        ``x / |x|``, or ``previous``.
    """
    norm = x.norm(2, dim=0, keepdim=True)
    # Nor do NaN and inf carry one: a bad step of the weights must not poison the vectors for good.
    return torch.where((norm > eps) & norm.isfinite(), x / norm, previous)


@torch.no_grad()
def converge(
    weight_mat: Tensor,
    u: Tensor,
    v: Tensor,
    eps: float,
    order: str = "uv",
    tol: float = CONVERGENCE_TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Power iteration until sigma rests; waits for the device after every iteration.

    Args:
        weight_mat: ``[m, n]``.
        u: ``[m]``, same dtype, where to start.
        v: ``[n]``, likewise.
        eps: As in `power_iteration`.
        order: As in `power_iteration`.
        tol: Stop when an iteration changes sigma by no more than this, relatively; and after 1000 in any
            case (two close singular values converge slowly, but then either serves).

    Returns:
        u and v of unit length.
    """
    before = torch.inf
    for _ in range(MAX_ITERATIONS):
        u, v = power_iteration(weight_mat, u, v, 1, eps, order)
        size = sigma(weight_mat, u, v).abs().item()
        if not abs(size - before) > tol * size:  # NaN or inf in the weight ends it, too
            break
        before = size
    return u, v


def random_start(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Where power iteration is to start that must find the largest singular value.

    Stored vectors may rest at another one, which a change of the weight has made the smaller; or have no
    direction, being zero (as opposite ones average to) or NaN. Power iteration would stay there.

    Args:
        u: ``[m]``, whose shape, dtype and device are taken.
        v: ``[n]``, likewise.

    Returns:
        Unit vectors, the same at every call; the global generator is left alone.
    """
    generator = torch.Generator(u.device).manual_seed(0)
    new_u, new_v = (torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in (u, v))
    return new_u / new_u.norm(), new_v / new_v.norm()


@torch.no_grad()
def unit(x: Tensor, eps: float) -> Tensor:
    """``x / |x|``, with the bits of x kept where its length is 1 up to rounding; a fresh tensor.

    Args:
        x: ``[k]``.
        eps: A vector no longer than this is returned as it is.

    Returns:
        ``[k]``, same dtype.
    """
    norm = x.norm(2, dim=0, keepdim=True)
    rounding = (UNIT_TOLERANCE + x.numel() / ELEMENTS_PER_EPSILON) * torch.finfo(x.dtype).eps
    off = (norm - 1).abs() > rounding
    return torch.where(off & (norm > eps), x / norm, x)


def sigma(weight_mat: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``u^H W v`` for unit u and v: differentiable in W, with u and v constant.

    Args:
        weight_mat: ``[m, n]``.
        u: ``[m]``, same dtype.
        v: ``[n]``, same dtype.

    Returns:
        ``[]``, same dtype (complex, with a negligible imaginary part, for a complex weight).
    """
    return torch.vdot(u, product(weight_mat, v))


@torch.no_grad()
def singular_vectors(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    n_power_iterations: int,
    eps: float,
    dim: int,
    order: str = "uv",
) -> tuple[Tensor, Tensor]:
    """The u and v to normalise by: after power iterations, or for none the given ones.

    Args:
        weight: As in `weight_matrix`.
        u: ``[m]``, the weight's dtype or fp32.
        v: ``[n]``, likewise.
        n_power_iterations: 0 brings the given ones to unit length; `AS_STORED` keeps them as they are.
        eps: As in `power_iteration`.
        dim: As in `weight_matrix`.
        order: As in `power_iteration`.

    Returns:
        u and v in the dtype of `weight_matrix`; fresh tensors.
    """
    weight_mat = weight_matrix(weight, dim)
    u, v = u.to(weight_mat.dtype), v.to(weight_mat.dtype)
    if n_power_iterations > 0:
        return power_iteration(weight_mat, u, v, n_power_iterations, eps, order)
    if n_power_iterations == AS_STORED:
        return u.clone(), v.clone()
    return unit(u, eps), unit(v, eps)


def normalized(weight: Tensor, u: Tensor, v: Tensor, eps: float, dim: int) -> Tensor:
    """``W / sigma(W)`` by unit u and v.

    Gradient: ``dW = (G - <G, W_sn> u v^H) / sigma``, u and v constant.

    Args:
        weight: As in `weight_matrix`.
        u: ``[m]``, from `singular_vectors`.
        v: ``[n]``, likewise.
        eps: A weight whose ``|sigma|`` is no larger is left as it is.
        dim: As in `weight_matrix`.

    Returns:
        Shape and dtype of ``weight``.
    """
    weight_mat = weight_matrix(weight, dim)
    divisor = sigma(weight_mat, u, v)
    divisor = torch.where(divisor.abs() > eps, divisor, 1)
    return (weight.to(weight_mat.dtype) / divisor).to(weight.dtype)


def normalized_backward(grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, eps: float, dim: int) -> Tensor:
    """The gradient of `normalized` in W, written out: differentiable in G and W, u and v constant.

    Args:
        grad: G, the gradient of the result; shape and dtype of ``weight``.
        weight: As in `weight_matrix`, real.
        u: As in `normalized`.
        v: Likewise.
        eps: Likewise; where ``|sigma|`` is no larger the gradient is G.
        dim: As in `weight_matrix`.

    Returns:
        ``(G - <G, W> / sigma u v^T) / sigma``, shape and dtype of ``weight``.
    """
    weight_mat, grad_mat = weight_matrix(weight, dim), weight_matrix(grad, dim)
    value = sigma(weight_mat, u, v)
    normalized_mat = weight_mat / torch.where(value.abs() > eps, value, 1)
    return _as_weight(_gradient(grad_mat, normalized_mat, u, v, value, eps), weight, dim)


def gradient(
    grad: Tensor, normalized: Tensor, u: Tensor, v: Tensor, sigma: Tensor, eps: float, dim: int
) -> Tensor:
    """The gradient of `normalized` in W from its result, where it need not be differentiated again.

    Args:
        grad: G; shape and dtype of the weight.
        normalized: ``W / sigma``, likewise.
        u: As in `normalized`.
        v: Likewise.
        sigma: ``[]``.
        eps: Where ``|sigma|`` is no larger the gradient is G.
        dim: As in `weight_matrix`.

    Returns:
        ``(G - <G, W / sigma> u v^T) / sigma``, shape and dtype of the weight.
    """
    grad_mat, normalized_mat = weight_matrix(grad, dim), weight_matrix(normalized, dim)
    return _as_weight(_gradient(grad_mat, normalized_mat, u, v, sigma, eps), normalized, dim)


def _gradient(
    grad_mat: Tensor, normalized_mat: Tensor, u: Tensor, v: Tensor, sigma: Tensor, eps: float
) -> Tensor:
    normal = sigma.abs() > eps
    inner = torch.where(normal, (grad_mat * normalized_mat).sum(), 0)
    return (grad_mat - inner * torch.outer(u, v)) / torch.where(normal, sigma, 1).to(u.dtype)


def _as_weight(weight_mat: Tensor, weight: Tensor, dim: int) -> Tensor:
    """The inverse of `weight_matrix`."""
    others = [size for d, size in enumerate(weight.shape) if d != dim]
    return weight_mat.reshape(-1, *others).movedim(0, dim).to(weight.dtype).contiguous()


def singular_values(weight_mat: Tensor) -> Tensor:
    """All of them, the largest first.

    Of an fp32 matrix by the eigenvalues of its product with itself, which in fp64 squares no rounding that
    fp32 would not have: 1024 x 9216 takes seconds where the SVD in fp32 takes most of a minute.

    Args:
        weight_mat: ``[m, n]``, finite.

    Returns:
        ``[min(m, n)]``, fp64.
    """
    double = {torch.float32: torch.float64, torch.complex64: torch.complex128}.get(weight_mat.dtype)
    if double is None:
        svd: Tensor = torch.linalg.svdvals(weight_mat)
        return svd
    short = (weight_mat if weight_mat.shape[0] <= weight_mat.shape[1] else weight_mat.mH).to(double)
    squares: Tensor = torch.linalg.eigvalsh(short @ short.mH)
    return squares.clamp(min=0).sqrt().flip(0)


@torch.no_grad()
def residual(weight_mat: Tensor, u: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sigma, and how far u and v are from being singular vectors: a cheap error bar of sigma.

    The larger of ``|W v - sigma u|`` and ``|W^H u - sigma v|``, over sigma (an iteration makes one of
    the two zero by itself, which one depends on its order). Some singular value of W lies within
    ``residual * sigma`` of sigma.

    Args:
        weight_mat: ``[m, n]``.
        u: ``[m]``, same dtype, any length.
        v: ``[n]``, likewise.
        eps: A sigma no larger than this has residual 0: there is nothing to normalise.

    Returns:
        ``|sigma|`` ``[]`` and the residual ``[]``, real.
    """
    u, v = unit(u, eps), unit(v, eps)
    value = sigma(weight_mat, u, v)
    gap_u = (product(weight_mat, v) - value * u).norm()
    gap_v = (product(weight_mat.H, u) - value.conj() * v).norm()
    size = value.abs()
    return size, torch.where(size <= eps, 0, torch.maximum(gap_u, gap_v) / size)  # NaN stays NaN


def _autocast_off(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A context without autocast, which would round what is to be computed in fp32.

    Args:
        device_type: Of the tensors inside.
    """
    # Entered only when autocast is on: the context would otherwise stand in every exported graph.
    # (The meta device has none, and would raise. torch 2.11 cannot compile torch.amp.is_autocast_available.)
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
