"""The mathematics: against torch's own spectral norm bit for bit, and against float64 truths."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

import specnorm_fx
from specnorm_fx import reference
from tests.models import LAYERS, MODELS, apply_torch_sn, parametrize, relative_error

DTYPES = [torch.float32, torch.float64, torch.complex64]


def with_gap(m, n, gap=0.5, dtype=torch.float64):
    """A matrix with singular values 3, 3 * gap, 3 * gap^2, ..."""
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, dtype=dtype))
    v, _ = torch.linalg.qr(torch.randn(n, k, dtype=dtype))
    return u @ torch.diag((3 * gap ** torch.arange(k, dtype=torch.float64)).to(dtype)) @ v.mH


@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@parametrize(LAYERS)
def test_bit_identical_to_torch_over_20_steps(case, dtype, n_power_iterations):
    layer = case.build(dtype)
    ours_layer = copy.deepcopy(layer)
    torch.manual_seed(1)
    theirs = torch_sn(layer, n_power_iterations=n_power_iterations)
    torch.manual_seed(1)
    ours = specnorm_fx.transform(
        ours_layer, n_power_iterations=n_power_iterations, implementation="reference"
    )
    state = theirs.parametrizations.weight[0]
    models = (theirs, ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]

    for step in range(20):
        (x,) = case.inputs(dtype=dtype)
        outputs = [model(x) for model in models]
        assert torch.equal(*outputs), f"outputs, step {step}"
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            y.abs().pow(2).mean().backward()
        weights = (theirs.parametrizations.weight.original, ours.weight)
        assert torch.equal(*(w.grad for w in weights)), f"gradients, step {step}"
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(*weights)
        assert torch.equal(state._u, ours.weight_u)
        assert torch.equal(state._v, ours.weight_v)

    theirs.eval()
    ours.eval()
    assert torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # torch has no gradient of a complex embedding
def test_embedding_is_bit_identical_to_torch_over_20_steps(dtype, n_power_iterations):
    plain = nn.Embedding(10, 6, padding_idx=2, dtype=dtype)
    layer = copy.deepcopy(plain)
    torch.manual_seed(1)
    theirs = torch_sn(layer, n_power_iterations=n_power_iterations)
    torch.manual_seed(1)
    ours = specnorm_fx.transform(
        plain, "*", n_power_iterations=n_power_iterations, implementation="reference"
    )
    weights = (theirs.parametrizations.weight.original, ours.weight)
    for _ in range(20):
        index = torch.randint(10, (7,))
        outputs = [model(index) for model in (theirs, ours)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.abs().pow(2).mean().backward()
        assert torch.equal(*(w.grad for w in weights))
        for weight in weights:
            weight.data -= 0.1 * weight.grad
            weight.grad = None
        assert torch.equal(theirs.parametrizations.weight[0]._u, ours.weight_u)
        assert torch.equal(theirs.parametrizations.weight[0]._v, ours.weight_v)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@parametrize(LAYERS)
def test_gradcheck_of_whole_layers(case, implementation):
    """Of the input and of every parameter, u and v constant (``update="step"``)."""
    gm = specnorm_fx.transform(case.build(torch.float64), update="step", implementation=implementation)
    names = [name for name, _ in gm.named_parameters()]

    def forward(x, *parameters):
        return torch.func.functional_call(gm, dict(zip(names, parameters, strict=True)), (x,))

    (x,) = case.inputs(batch=1, dtype=torch.float64)
    arguments = [t.detach().requires_grad_() for t in (x, *gm.parameters())]
    assert torch.autograd.gradcheck(forward, arguments, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize(
    "case", [c for c in MODELS if c.name not in ("called_twice", "tied")], ids=lambda c: c.name
)
def test_models_bit_identical_to_torch(case):
    """But for the two rules that differ on purpose (see test_module)."""
    model = case.make()
    reference_model = copy.deepcopy(model)
    in_order = sorted(case.weights, key=list(dict(model.named_parameters())).index)
    torch.manual_seed(1)
    theirs = apply_torch_sn(reference_model, in_order, torch_sn)
    torch.manual_seed(1)
    ours = specnorm_fx.transform(model, implementation="reference")
    for mode in (True, False):
        theirs.train(mode)
        ours.train(mode)
        inputs = case.inputs()
        torch.manual_seed(2)  # dropout
        want = theirs(*inputs)
        torch.manual_seed(2)
        assert torch.equal(ours(*inputs), want)


@pytest.mark.parametrize("n_power_iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), 0), ((4, 3, 2), 1), ((1, 6), 0), ((6, 1), 0)])
def test_gradcheck_with_batched_gradients(shape, dim, dtype, n_power_iterations):
    """With u and v constant, as the gradient of spectral norm is defined; second derivatives too."""
    weight = torch.randn(shape, dtype=dtype)
    u, v = reference.initial_vectors(weight, dim, 1e-12)
    u, v = reference.singular_vectors(weight, u, v, n_power_iterations, 1e-12, dim)
    normalized = partial(reference.normalized, u=u, v=v, eps=1e-12, dim=dim)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(normalized, (weight,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(normalized, (weight,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradient_formula(dtype):
    weight = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    u, v = reference.initial_vectors(weight.detach(), 0, 1e-12)
    grad = torch.randn(4, 6, dtype=dtype)
    normalized = reference.normalized(weight, u, v, 1e-12, 0)
    (got,) = torch.autograd.grad(normalized, weight, grad)
    w = weight.detach()
    sigma = torch.vdot(u, w @ v)
    # dW = (G - conj(<W_sn, G>) u v^H) / conj(sigma); conjugates drop out for a real weight.
    inner = ((w / sigma).conj() * grad).sum()
    want = (grad - inner * torch.outer(u, v.conj())) / sigma.conj()
    assert relative_error(got, want) < 1e-14


@pytest.mark.parametrize("order", ["uv", "vu"])
@pytest.mark.parametrize("shape", [(8, 8), (3, 40), (40, 3), (1, 9), (9, 1)])
def test_power_iteration_converges_at_the_known_rate(shape, order):
    weight = with_gap(*shape)
    u, v = (torch.nn.functional.normalize(torch.randn(k, dtype=torch.float64), dim=0) for k in shape)
    # sigma's error falls by gap^4 = 1/16 with every iteration; from any generic start 20 suffice.
    u, v = reference.power_iteration(weight, u, v, 20, 1e-12, order)
    sigma = reference.sigma(weight, u, v)
    assert abs(sigma.item() - 3) < 1e-12
    assert torch.linalg.matrix_norm(weight / sigma, 2).item() == pytest.approx(1, abs=1e-12)


def test_legacy_order_updates_v_first():
    weight = torch.randn(4, 6)
    u, v = reference.initial_vectors(weight, 0, 1e-12, 1)
    new_u, new_v = reference.power_iteration(weight, u, v, 1, 1e-12, "vu")
    want_v = torch.nn.functional.normalize(weight.T @ u, dim=0)
    assert torch.equal(new_v, want_v)
    assert torch.equal(new_u, torch.nn.functional.normalize(weight @ want_v, dim=0))


def test_sigma_scales_with_the_weight():
    weight = torch.randn(6, 9, dtype=torch.float64)
    u, v = reference.initial_vectors(weight, 0, 1e-12)
    sigma = reference.sigma(weight, u, v)
    assert reference.sigma(-4 * weight, u, v).item() == pytest.approx(-4 * sigma.item(), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unit_keeps_the_bits_of_a_normalised_vector(dtype):
    for size in (1, 2, 27, 1000, 14_000, 50_000):
        x = torch.nn.functional.normalize(torch.randn(size, dtype=dtype), dim=0)
        assert torch.equal(reference.unit(x, 1e-12), x)


def test_unit_rescales_others_and_keeps_zero():
    x = torch.randn(9, dtype=torch.float64)
    assert reference.unit(x, 1e-12).norm().item() == pytest.approx(1, abs=1e-15)
    assert torch.equal(reference.unit(torch.zeros(4), 1e-12), torch.zeros(4))


@pytest.mark.parametrize("scale", [1e-25, 1e-13, 0.0])
def test_a_weight_below_eps_keeps_its_vectors_and_itself(scale):
    """Where torch gives NaN (scale 0), or vectors that decay to zero."""
    weight = (torch.randn(4, 6) * scale).requires_grad_()
    u, v = reference.initial_vectors(torch.randn(4, 6), 0, 1e-12)
    new_u, new_v = reference.singular_vectors(weight, u, v, 3, 1e-12, 0)
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)
    normalized = reference.normalized(weight, new_u, new_v, 1e-12, 0)
    assert torch.equal(normalized, weight)
    normalized.sum().backward()
    assert torch.equal(weight.grad, torch.ones(4, 6))


def test_nan_in_a_weight_leaves_the_vectors_as_they_are():
    weight = torch.randn(4, 6)
    u, v = reference.initial_vectors(weight, 0, 1e-12)
    weight[1, 2] = torch.nan
    new_u, new_v = reference.singular_vectors(weight, u, v, 2, 1e-12, 0)
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e4])
def test_half_precision_weights_are_computed_in_fp32(dtype, scale):
    """sigma to fp32 accuracy, one rounding to the weight's dtype, no fp16 overflow."""
    weight = (torch.rand(64, 96) * scale + scale / 2).to(dtype)
    u, v = reference.initial_vectors(weight, 0, 1e-12)
    assert u.dtype == v.dtype == torch.float32
    truth = weight.double() / torch.linalg.matrix_norm(weight.double(), 2)
    normalized = reference.normalized(weight, u, v, 1e-12, 0)
    assert normalized.dtype == dtype
    # Half a unit in the last place of the result, on top of sigma's own error of a few fp32 epsilons.
    assert relative_error(normalized, truth) < torch.finfo(dtype).eps / 2 * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_converge_and_residual(dtype):
    weight = with_gap(20, 30, 0.8).to(dtype)
    u, v = (torch.randn(k, dtype=dtype) for k in (20, 30))
    sigma, before = reference.residual(weight, u, v, 1e-12)
    u, v = reference.converge(weight, u, v, 1e-12)
    sigma, after = reference.residual(weight, u, v, 1e-12)
    assert abs(sigma.item() - 3) < 3 * 1e-5
    assert after < 1e-2 < before
    # The error bar holds: some singular value lies within residual * sigma.
    assert abs(sigma.item() - 3) <= after.item() * sigma.item() + 1e-6


def test_converge_ends_at_once_on_nan():
    weight = torch.randn(4, 6)
    weight[0, 0] = torch.nan
    u, v = torch.nn.functional.normalize(torch.randn(4), dim=0), torch.zeros(6)
    calls = []
    original = reference.power_iteration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "power_iteration", lambda *a: calls.append(1) or original(*a))
        got = reference.converge(weight, u, v, 1e-12)
    assert torch.equal(got[0], u)
    assert len(calls) == 1


def test_singular_values_of_a_matrix_of_rank_one():
    """Of which rounding makes squares below zero."""
    x = torch.randn(64)
    values = reference.singular_values(torch.outer(x, x))
    assert values[0].item() == pytest.approx(x.square().sum().item(), rel=1e-6)
    assert (values[1:] <= 1e-6 * values[0]).all()


def test_weight_matrix_puts_the_output_dimension_first():
    weight = torch.randn(4, 3, 2)
    assert reference.weight_matrix(weight, 0).shape == (4, 6)
    assert torch.equal(reference.weight_matrix(weight, 1)[2], weight[:, 2].flatten())
    assert reference.weight_matrix(weight, 0).data_ptr() == weight.data_ptr()


def test_initial_vectors_are_torchs_own():
    for whole, training in ((True, True), (False, False), (True, False)):
        model = nn.Sequential(nn.Linear(7, 5)).train(whole)
        layer = model[0].train(training)
        plain = copy.deepcopy(model)
        torch.manual_seed(3)
        theirs = torch_sn(layer, n_power_iterations=2).parametrizations.weight[0]
        torch.manual_seed(3)
        (ours,) = specnorm_fx.transform(plain, n_power_iterations=2).sites()
        assert torch.equal(theirs._u, ours.u)
        assert torch.equal(theirs._v, ours.v)


def test_vectors_as_they_are_stored():
    weight, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    new_u, new_v = reference.singular_vectors(weight, u, v, reference.AS_STORED, 1e-12, 0)
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)
    assert new_u.data_ptr() != u.data_ptr()
    by_unit = reference.singular_vectors(weight, u, v, 0, 1e-12, 0)
    sigmas = [reference.sigma(weight, *pair) for pair in ((new_u, new_v), by_unit)]
    assert sigmas[0].item() == pytest.approx((sigmas[1] * u.norm() * v.norm()).item(), rel=1e-5)
