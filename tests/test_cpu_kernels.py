"""The CPU kernels against float64 truths, with the reference's own error as the measure."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from specnorm_fx import cpu_kernels, reference
from tests.models import relative_error

# name: shape, dim. One row, one column, one element, few and many columns, every layer type.
SHAPES = {
    "row": ((1, 9), 0),
    "column": ((9, 1), 0),
    "element": ((1, 1), 0),
    "linear": ((7, 5), 0),
    "conv_27_columns": ((64, 3, 3, 3), 0),
    "conv_transpose": ((8, 6, 4, 4), 1),
    "conv_transpose_1x1": ((8, 6, 1, 1), 1),
    "conv_transpose3d": ((3, 4, 2, 2, 2), 1),
    "conv_transpose_depthwise": ((8, 1, 3, 3), 1),
    "middle_dim": ((6, 4, 3, 5), 2),
    "last_dim": ((6, 3, 5), 2),
    "14k_columns": ((5, 14_000), 0),
    "odd_rows": ((67, 129), 0),
}
DTYPES = cpu_kernels.DTYPES
EPS = 1e-12

shapes = pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES)
orders = pytest.mark.parametrize("order", ["uv", "vu"])
iterations = pytest.mark.parametrize("n", [reference.AS_STORED, 0, 1, 3])


def problem(shape, dim, dtype=torch.float32, scale=1.0):
    """A weight with u and v near its singular vectors, as in training, and a gradient."""
    weight = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    start = reference.initial_vectors(weight.double(), dim, 1e-300, 5)
    u, v = (reference.unit(x.to(reference.compute_dtype(weight)), EPS) for x in start)
    return weight, u, v, torch.randn(shape, dtype=torch.float64).to(dtype)


def by_kernel(weight, u, v, grad, n, dim, order, eps=EPS):
    """u, v, W / sigma and dW."""
    vectors, sigmas, (normalized,) = cpu_kernels.normalize([weight], [u], [v], [n], [eps], [dim], [order])
    (gradient,) = cpu_kernels.normalize_backward([grad], [normalized], vectors, sigmas, [eps], [dim], [False])
    return *vectors.split([len(u), len(v)]), normalized, gradient


def by_reference(weight, u, v, grad, n, dim, order, eps=EPS):
    """The same by torch's operations in torch's order, and autograd."""
    u, v = reference.singular_vectors(weight, u, v, n, eps, dim, order)
    leaf = weight.clone().requires_grad_()
    normalized = reference.normalized(leaf, u, v, eps, dim)
    (gradient,) = torch.autograd.grad(normalized, leaf, grad)
    return u, v, normalized.detach(), gradient


def truth(weight, u, v, grad, n, dim, order):
    """The same by the formulas, in the 64-bit significand of numpy's long double."""
    shape = [weight.shape[dim], *(s for d, s in enumerate(weight.shape) if d != dim)]

    def matrix(x):
        return x.double().movedim(dim, 0).reshape(shape[0], -1).numpy().astype(np.longdouble)

    def unit(x):
        return x / np.sqrt((x * x).sum())

    w, g = matrix(weight), matrix(grad)
    u, v = (x.double().numpy().astype(np.longdouble) for x in (u, v))
    if n == 0:
        u, v = (reference.unit(torch.from_numpy(x.astype(float)), EPS).numpy() for x in (u, v))
    for _ in range(n):
        if order == "vu":
            v = unit(w.T @ u)
            u = unit(w @ v)
        else:
            u = unit(w @ v)
            v = unit(w.T @ u)
    sigma = u @ w @ v
    gradient = (g - (g * w).sum() / sigma * np.outer(u, v)) / sigma

    def tensor(x):
        return torch.from_numpy(x.astype(float)).reshape(shape).movedim(0, dim)

    return *(torch.from_numpy(x.astype(float)) for x in (u, v)), tensor(w / sigma), tensor(gradient)


def distance(got: Tensor, want: Tensor, grad: Tensor, is_gradient: bool) -> float:
    # A gradient that is nearly parallel to u v^T cancels: its error is relative to what it is made from.
    scale = torch.maximum(want.abs().max(), grad.double().abs().max() if is_gradient else want.abs().max())
    return ((got.double() - want).abs().max() / scale).item()


@iterations
@orders
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shapes
def test_no_further_from_the_truth_than_torch(shape, dim, dtype, order, n):
    weight, u, v, grad = problem(shape, dim, dtype)
    if n == reference.AS_STORED:
        u, v = 0.7 * u, 1.5 * v
    arguments = (weight, u, v, grad, n, dim, order)
    got, torchs, want = by_kernel(*arguments), by_reference(*arguments), truth(*arguments)
    names = ("u", "v", "normalized", "gradient")
    for name, a, b, c in zip(names, got, torchs, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        errors = [distance(x, c, grad, name == "gradient") for x in (a, b)]
        # Both are sums of the same products in another order, and a sum of k is off by some sqrt(k) eps.
        chance = (2 + max(weight.numel() // shape[dim], shape[dim]) ** 0.5 / 8) * torch.finfo(a.dtype).eps
        assert errors[0] <= 2 * errors[1] + chance, name


def test_no_further_from_the_truth_than_torch_on_average():
    """Where single cases differ by chance the average over many does not: here nothing is granted.

    But for one element, whose gradient is zero and the computed one all rounding: 1.6 eps, torch's 0.7.
    """
    errors = torch.zeros(2, 4)
    for shape, dim in (SHAPES[name] for name in SHAPES if name != "element"):
        for _ in range(20):
            arguments = (*problem(shape, dim), 1, dim, "uv")
            want = truth(*arguments)
            for k, method in enumerate((by_kernel, by_reference)):
                for i, (a, c) in enumerate(zip(method(*arguments), want, strict=True)):
                    errors[k, i] += distance(a, c, arguments[3], i == 3)
    assert (errors[0] <= errors[1]).all(), errors


@orders
@pytest.mark.parametrize("memory_format", ["channels_last", "keras", "transposed", "sliced"])
def test_weights_and_gradients_of_other_strides(memory_format, order):
    if memory_format == "channels_last":
        weights = [torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)] * 2
        dims = [0, 1]
    elif memory_format == "keras":  # [kh, kw, in, out]
        weights, dims = [torch.randn(3, 2, 6, 8).permute(3, 2, 0, 1)], [0]
    elif memory_format == "transposed":
        weights, dims = [torch.randn(9, 7).t()], [0]
    else:
        weights, dims = [torch.randn(9, 14)[:, ::2]], [0]
    for weight, dim in zip(weights, dims, strict=True):
        dense = weight.contiguous()
        _, u, v, grad = problem(weight.shape, dim)
        for g in (
            grad,
            grad.to(memory_format=torch.channels_last) if grad.ndim == 4 else grad.t().contiguous().t(),
        ):
            got = by_kernel(weight, u, v, g, 2, dim, order)
            want = truth(dense, u, v, g, 2, dim, order)
            for a, b in zip(got, want, strict=True):
                assert relative_error(a, b) < 1e-5
            assert got[2].stride() == torch.empty_like(weight).stride()
            assert got[3].stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        *SHAPES.values(),
        ((1, 6), 1),
        ((1, 6, 4, 2), 2),
        ((1, 6, 1, 4), 3),
        ((40, 33, 5, 7), 0),  # no multiple of the tiles in which it is transposed
        ((40, 33, 5, 7), 1),
        ((4, 16, 4, 4), 0),
        ((1, 512, 4, 4), 0),
        ((3, 1, 3, 3), 1),
        ((2, 600, 9, 9), 1),  # larger than a block
        ((6, 5, 3, 2, 4), 0),
        ((6, 4, 3, 5), 3),
    ],
    ids=str,
)
def test_the_gradient_of_a_contiguous_weight_is_contiguous(shape, dim, dtype):
    """Where its W / sigma has come in channels_last: the same bits, in their places."""
    weight, u, v, grad = problem(shape, dim, dtype)
    found = cpu_kernels.normalize([weight], [u], [v], [1], [EPS], [dim], ["uv"])
    check_contiguous(found, dim, grad)
    check_contiguous(found, dim, channels_last(grad))


def channels_last(x):
    """``torch.channels_last``, for any number of dimensions."""
    last = [0, *range(2, x.ndim), 1]
    return x.permute(last).contiguous().permute([last.index(d) for d in range(x.ndim)])


def check_contiguous(found, dim, grad):
    vectors, sigmas, (normalized,) = found
    arguments = ([grad], [channels_last(normalized)], vectors, sigmas, [EPS], [dim])
    ((got,), (want,)) = (cpu_kernels.normalize_backward(*arguments, [c]) for c in (True, False))
    assert got.is_contiguous()
    assert torch.equal(got, want)


@iterations
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1e-13, 1e-11, 1e-9, 1e9, 1e18])
def test_any_scale(scale, n):
    """Down to eps the weight is divided, below it is left alone, and nothing overflows on the way."""
    weight, u, v, grad = problem((8, 12), 0, scale=scale)
    got = by_kernel(weight, u, v, grad, n, 0, "uv")
    want = by_reference(weight, u, v, grad, n, 0, "uv")
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [1, 3])
def test_a_bad_step_leaves_u_and_v_as_they_were(value, n):
    weight, u, v, grad = problem((8, 12), 0)
    weight[3, 4] = value
    new_u, new_v, normalized, _ = by_kernel(weight, u, v, grad, n, 0, "uv")
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)
    assert not normalized.isfinite().all()  # the bad step itself is not hidden


@pytest.mark.parametrize("value", [float("nan"), 1e30, 1.0])
def test_without_division_a_bad_step_gives_the_same(value):
    weight, u, v, _ = problem((8, 12), 0)
    weight[3, 4] = value
    arguments = ([weight], [u], [v], [1], [EPS], [0], ["uv"])
    vectors, sigmas, _ = cpu_kernels.normalize(*arguments)
    torch.testing.assert_close(
        cpu_kernels.power_iteration(*arguments), (vectors, sigmas), rtol=0, atol=0, equal_nan=True
    )


def test_a_large_eps_is_respected():
    weight, u, v, grad = problem((8, 12), 0)
    new_u, new_v, normalized, gradient = by_kernel(weight, u, v, grad, 1, 0, "uv", eps=1e3)
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)
    assert torch.equal(normalized, weight)
    assert torch.equal(gradient, grad)
    assert gradient is not grad


@iterations
@pytest.mark.parametrize("short", [0, 1], ids="uv")
def test_vectors_no_longer_than_eps_stay_as_they_are(short, n):
    weight, *pair, grad = problem((8, 12), 0)
    pair[short] *= 1e-4
    got, want = (method(weight, *pair, grad, n, 0, "uv", eps=1e-3) for method in (by_kernel, by_reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length", [0.5, 3.0])
def test_vectors_of_another_length_are_rescaled(length):
    weight, u, v, grad = problem((8, 12), 0)
    got = by_kernel(weight, u * length, v * length, grad, 0, 0, "uv")
    for a, b in zip(got, truth(weight, u, v, grad, 0, 0, "uv"), strict=True):
        assert relative_error(a, b) < 1e-5


def test_unit_vectors_keep_their_bits_without_iterations():
    weight, u, v, grad = problem((8, 12), 0)
    new_u, new_v, *_ = by_kernel(weight, u, v, grad, 0, 0, "uv")
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_in_one_call_are_the_same_bits_as_each_alone_and_again(dtype):
    problems = [(*problem(shape, dim, dtype), dim) for shape, dim in SHAPES.values()]
    weights, us, vs, grads, dims = map(list, zip(*problems, strict=True))
    counts = [k % 3 for k in range(len(weights))]
    orders = [("uv", "vu")[k % 2] for k in range(len(weights))]
    options = (counts, [EPS] * len(weights), dims, orders)
    first = cpu_kernels.normalize(weights, us, vs, *options)
    again = cpu_kernels.normalize(weights, us, vs, *options)
    assert torch.equal(first[0], again[0])
    gradients = cpu_kernels.normalize_backward(
        grads, first[2], *first[:2], options[1], dims, [False] * len(dims)
    )
    new = first[0].split([len(x) for pair in zip(us, vs, strict=True) for x in pair])
    for k in range(len(weights)):
        alone = by_kernel(weights[k], us[k], vs[k], grads[k], counts[k], dims[k], orders[k])
        together = (new[2 * k], new[2 * k + 1], first[2][k], gradients[k])
        assert all(map(torch.equal, alone, together))


def test_weights_without_a_gradient_are_skipped():
    weight, u, v, grad = problem((4, 5), 0)
    both = [weight, weight + 1]
    vectors, sigmas, normalized = cpu_kernels.normalize(
        both, [u, u], [v, v], [1, 1], [EPS] * 2, [0, 0], ["uv", "uv"]
    )
    first, second = cpu_kernels.normalize_backward(
        [None, grad], normalized, vectors, sigmas, [EPS] * 2, [0, 0], [False, True]
    )
    assert first is None
    assert second is not None


def test_the_library_was_built():
    """It is optional where there is no compiler; where the tests run there is one."""
    assert cpu_kernels.available()


@iterations
@orders
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        *(((1023, 300), 0), ((70_001, 5), 0), ((3, 80_000), 0)),
        # Transposed convolutions, of more positions than are worked on at once, too; a last dimension.
        *(((300, 50, 3, 3), 1), ((101, 40, 9, 9), 1), ((303, 9, 51), 2)),
    ],
    ids=str,
)
def test_large_matrices_are_cut_into_blocks(shape, dim, order, n):
    """Of sizes that no power of two divides."""
    weight, u, v, grad = problem(shape, dim, torch.float64)
    got = by_kernel(weight, u, v, grad, n, dim, order)
    for i, (a, b) in enumerate(zip(got, truth(weight, u, v, grad, n, dim, order), strict=True)):
        assert distance(a, b, grad, i == 3) < 1e-12


@orders
@pytest.mark.parametrize(("shape", "dim"), [((1023, 300), 0), ((300, 50, 3, 3), 1)], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(shape, dim, order):
    weight, u, v, grad = problem(shape, dim)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(by_kernel(weight, u, v, grad, 2, dim, order))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.integers(0, 4),
    st.sampled_from(["uv", "vu"]),
    st.integers(0, 3),
    st.integers(0, 2**31),
)
def test_random_shapes(shape, dim, order, n, seed):
    torch.manual_seed(seed)
    dim = dim % len(shape)
    weight, u, v, grad = problem(shape, dim, torch.float64)
    got = by_kernel(weight, u, v, grad, n, dim, order)
    want = by_reference(weight, u, v, grad, n, dim, order)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert distance(a, b, grad, i == 3) < 1e-12
    check_contiguous(cpu_kernels.normalize([weight], [u], [v], [n], [EPS], [dim], [order]), dim, grad)


def test_a_plan_keeps_the_places_whose_address_it_has():
    weight = torch.empty(3, 2, 4, 5).permute(0, 3, 1, 2)
    plan, _ = cpu_kernels._planned([weight], [0], ["uv"], [1], [EPS], [False])
    cpu_kernels._places.cache_clear()
    (places,) = plan._places
    assert places.data_ptr() == plan.sites[0].places


def test_elements_in_one_place():
    """With the span of a dense weight: [3, 3] with strides (4, 0)."""
    weight = torch.randn(3, 4)[:, :1].expand(3, 3)
    _, u, v, grad = problem((3, 3), 0)
    got, want = by_kernel(weight, u, v, grad, 1, 0, "uv"), truth(weight, u, v, grad, 1, 0, "uv")
    for a, b in zip(got[:3], want[:3], strict=True):
        assert relative_error(a, b) < 1e-5


@orders
def test_a_transposed_convolution_of_many_channels(order):
    """Its rows are thousands of groups of a few elements: no further from the truth than torch's."""
    for shape in ((2048, 64, 3), (16_384, 8, 2)):
        arguments = (*problem(shape, 1), 1, 1, order)
        want = truth(*arguments)
        ours, theirs = (
            [relative_error(a, b) for a, b in zip(method(*arguments)[:2], want, strict=False)]
            for method in (by_kernel, by_reference)
        )
        assert all(a <= b for a, b in zip(ours, theirs, strict=True))


@orders
@pytest.mark.parametrize("shape", [(30_000, 1), (15_000, 2), (1, 165_263), (4, 60_000)], ids=str)
def test_long_sums(shape, order):
    """Of thousands of rows, or of columns: no further from the truth than torch's."""
    errors = torch.zeros(2, 3)
    draws = 8
    for _ in range(draws):
        weight = torch.rand(shape)  # of one sign, so that sums grow
        u, v = torch.randn(shape[0]), torch.randn(shape[1])
        arguments = (weight, u, v, weight, 1, 0, order)
        want = truth(*arguments)[:3]
        for k, method in enumerate((by_kernel, by_reference)):
            for i, (a, c) in enumerate(zip(method(*arguments)[:3], want, strict=True)):
                errors[k, i] += distance(a, c, weight, False) / draws
    # Each value is rounded twice, when a sum is divided by a length that is rounded. Of so few draws chance
    # is a part; one sum after the other over all rows was off by four to ten times as much.
    assert (errors[0] <= (1.5 * errors[1]).clamp(min=torch.finfo(torch.float32).eps)).all(), errors


@pytest.mark.parametrize("short", [0, 1], ids="uv")
def test_u_and_v_of_another_length(short):
    """They would be read past their end."""
    weight, *pair, _ = problem((4, 6), 0)
    pair[short] = pair[short][1:]
    with pytest.raises(ValueError, match="elements and need"):
        cpu_kernels.normalize([weight], [pair[0]], [pair[1]], [1], [EPS], [0], ["uv"])


@pytest.mark.parametrize("away", [0, 1], ids="uv")
def test_u_and_v_on_another_device(away):
    """Where their addresses mean something else."""
    weight, *pair, _ = problem((4, 6), 0)
    pair[away] = pair[away].to("meta")
    with pytest.raises(RuntimeError, match="must be on the device of their weights, cpu, got meta"):
        cpu_kernels.normalize([weight], [pair[0]], [pair[1]], [1], [EPS], [0], ["uv"])


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_a_weight_without_elements(shape):
    weight, u, v = torch.empty(shape), torch.randn(shape[0]), torch.randn(shape[1])
    with pytest.raises(ValueError, match="without elements has no sigma"):
        cpu_kernels.normalize([weight], [u], [v], [1], [EPS], [0], ["uv"])


def test_gradients_that_are_yet_to_be_negated():
    """As PyTorch has the imaginary part of a conjugate."""
    weight, u, v, grad = problem((4, 6), 0)
    want, got = (by_kernel(weight, u, v, g, 1, 0, "uv")[3] for g in (-grad, torch._neg_view(grad)))
    assert torch.equal(got, want)


def test_a_library_of_another_version_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "INTERFACE", cpu_kernels.INTERFACE + 1)
    assert cpu_kernels._library.__wrapped__() is None


def test_a_library_that_cannot_be_loaded_is_left_alone(monkeypatch):
    def load(path):
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(cpu_kernels.ctypes, "CDLL", load)
    with pytest.warns(UserWarning, match="cannot be loaded.*libgomp"):
        assert cpu_kernels._library.__wrapped__() is None
