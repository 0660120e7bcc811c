"""The semantics of the design, one by one (their numbers are those of docs/design.md, section 3)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.utils.checkpoint import checkpoint

import specnorm_fx
from specnorm_fx import reference, transform, update_
from tests.models import CalledTwice, Discriminator, Labelled, Tied, relative_error


def vectors(gm):
    return [x.clone() for site in gm.sites() for x in (site.u, site.v)]


def unchanged(gm, before):
    return all(torch.equal(a, b) for a, b in zip(vectors(gm), before, strict=True))


# --- 1: training iterates once per forward, eval does not ---


def test_1_training_iterates_and_eval_does_not():
    gm = transform(Discriminator(), n_power_iterations=2, implementation="reference")
    x = torch.randn(2, 3, 8, 8)
    gm.eval()
    before = vectors(gm)
    first = gm(x)
    assert torch.equal(first, gm(x))
    assert unchanged(gm, before)
    gm.train()
    expected = [
        reference.power_iteration(site.matrix(), site.u, site.v, 2, site.config.eps) for site in gm.sites()
    ]
    gm(x)
    assert unchanged(gm, [x for pair in expected for x in pair])


def test_1_eval_uses_sigma_of_the_stored_vectors():
    gm = transform(nn.Linear(6, 4, bias=False)).eval()
    gm.weight.data.normal_()  # u and v are stale now
    sigma = torch.vdot(gm.weight_u, gm.weight @ gm.weight_v)
    assert relative_error(gm(torch.eye(6)).T, gm.weight / sigma) < 1e-6


# --- 2: the gradient flows through sigma (the formula is in test_reference) ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_2_gradient_is_torchs(dtype):
    layer = nn.Linear(6, 4, dtype=dtype)
    plain = copy.deepcopy(layer)
    torch.manual_seed(1)
    theirs = torch_sn(layer)
    torch.manual_seed(1)
    ours = transform(plain, implementation="reference")
    x = torch.randn(3, 6, dtype=dtype)
    for model in (theirs, ours):
        model(x).square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.parametrizations.weight.original.grad)


# --- 3: one normalised weight for all users ---


@pytest.mark.parametrize("make", [CalledTwice, Tied])
def test_3_a_shared_weight_is_normalised_once(make):
    model = make().double()
    gm = transform(model)
    (site,) = gm.sites()
    x = torch.randn(3, 6, dtype=torch.float64)
    u, v = reference.power_iteration(site.matrix(), site.u, site.v, 1, site.config.eps)
    normalized = reference.normalized(site.weight, u, v, site.config.eps, 0)

    plain = copy.deepcopy(model)
    layers = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        layer.weight = nn.Parameter(normalized.detach())
    y = gm(x)
    assert relative_error(y, plain(x)) < 1e-14
    assert relative_error(site.u, u) < 1e-14  # one iteration, not two

    # Its gradient gathers both uses.
    (got,) = torch.autograd.grad(y.sum(), site.weight)
    layers[0].weight.requires_grad_()
    if len(layers) > 1:
        layers[1].weight = layers[0].weight
    (at_normalized,) = torch.autograd.grad(plain(x).sum(), layers[0].weight)
    (want,) = torch.autograd.grad(normalized, site.weight, at_normalized)
    assert relative_error(got, want) < 1e-14


# --- 4: update="step" ---


def test_4_step_moves_only_in_update():
    gm = transform(Discriminator(), update="step", n_power_iterations=2, implementation="reference")
    x = torch.randn(2, 3, 8, 8)
    before = vectors(gm)
    for _ in range(2):
        gm(x).sum().backward()
    assert unchanged(gm, before)
    expected = [
        reference.power_iteration(site.matrix(), site.u, site.v, 2, site.config.eps) for site in gm.sites()
    ]
    update_(gm)
    assert unchanged(gm, [x for pair in expected for x in pair])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_4_step_gives_the_true_gradient_under_checkpointing(use_reentrant):
    gm = transform(CalledTwice().double(), update="step")
    gm.lin.weight.data.normal_()  # cold u, v: where iterating again would show
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(gm(x).square().sum(), gm.lin.weight)
    checkpoint(gm, x, use_reentrant=use_reentrant).square().sum().backward()
    assert relative_error(gm.lin.weight.grad, want) < 1e-14


def test_4_micro_batches_see_the_same_weights():
    gm = transform(CalledTwice().double(), update="step")
    x = torch.randn(8, 6, dtype=torch.float64)
    (want,) = torch.autograd.grad(gm(x).square().sum(), gm.lin.weight)
    for part in x.split(1):
        gm(part).square().sum().backward()
    assert relative_error(gm.lin.weight.grad, want) < 1e-14


# --- 5: two forwards, one backward ---


@pytest.mark.parametrize("modes", [(True, True), (False, True), (True, False), (False, False)])
def test_5_two_forwards_one_backward(modes):
    gm = transform(CalledTwice().double())
    real, fake = torch.randn(2, 4, 6, dtype=torch.float64)
    want = torch.zeros_like(gm.lin.weight)
    twin = copy.deepcopy(gm)
    for mode, x, sign in zip(modes, (real, fake), (1, -1), strict=True):
        twin.train(mode)
        (gradient,) = torch.autograd.grad(sign * twin(x).sum(), twin.lin.weight)
        want += gradient
    outputs = [gm.train(mode)(x).sum() for mode, x in zip(modes, (real, fake), strict=True)]
    (outputs[0] - outputs[1]).backward()
    assert relative_error(gm.lin.weight.grad, want) < 1e-14


# --- 6: sigma does not depend on the length of u and v ---


@pytest.mark.parametrize("factor", [0.9, 0.1, 30.0])
def test_6_scaled_vectors_change_nothing(factor):
    gm = transform(Discriminator().double()).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = gm(x)
    for site in gm.sites():
        site.u.mul_(factor)
        site.v.mul_(0.7)
    assert relative_error(gm(x), want) < 1e-14


def test_6_averaging_buffers_does_no_harm():
    gm = transform(nn.Linear(20, 30), n_power_iterations=1)
    average = torch.optim.swa_utils.AveragedModel(
        gm, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        (gm(torch.randn(8, 20)) - 1).square().mean().backward()
        optimizer.step()
        average.update_parameters(gm)
    average.eval()
    (site,) = specnorm_fx.graph_module.resolve(average).sites()
    u, v = (x.double() / x.double().norm() for x in (site.u, site.v))
    # By the formula for unit vectors, in float64, from the averaged weights and directions.
    sigma = torch.vdot(u, site.weight.double() @ v)
    (got,) = specnorm_fx.sigmas(average).values()
    assert got.item() == pytest.approx(sigma.item(), rel=1e-6)


# --- 7: a zero matrix ---


@pytest.mark.parametrize("mode", [True, False])
def test_7_a_zero_matrix_gives_zeros_and_finite_gradients(mode):
    layer = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    gm = transform(layer).train(mode)
    for _ in range(2):
        y = gm(torch.randn(5, 4))
        assert torch.equal(y, torch.zeros(5, 3))
    y.sum().backward()
    assert gm.weight.grad.isfinite().all()
    # And it recovers: the vectors have not become zeros.
    gm.train()
    gm.weight.data.normal_()
    for _ in range(200):
        gm(torch.randn(5, 4))
    normalized = gm.eval()(torch.eye(4)).T
    assert torch.linalg.matrix_norm(normalized, 2).item() == pytest.approx(1, abs=1e-5)


# --- 8: dtypes and autocast (fp16, bf16 arithmetic is in test_reference) ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast_after", [False, True])
def test_8_half_precision_models(dtype, cast_after):
    layer = nn.Linear(32, 16, bias=False)
    gm = transform(layer if cast_after else layer.to(dtype))
    gm = gm.to(dtype)
    for mode in (True, False):
        y = gm.train(mode)(torch.eye(32, dtype=dtype))
        assert y.dtype == dtype
        sigma = torch.linalg.matrix_norm(gm.weight.double(), 2)
        (got,) = specnorm_fx.sigmas(gm).values()
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(sigma.item(), rel=5e-3)  # u, v after 16 iterations
        # ... and against the sigma of those u, v in float64: fp32 arithmetic.
        (site,) = gm.sites()
        u, v = (x.double() / x.double().norm() for x in (site.u, site.v))
        assert got.item() == pytest.approx(torch.vdot(u, gm.weight.double() @ v).item(), rel=1e-6)
    y.sum().backward()
    assert gm.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_8_autocast_is_off_inside(dtype):
    gm = transform(nn.Linear(32, 16))
    twin = copy.deepcopy(gm)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=dtype):
        assert gm(x).dtype == dtype
    twin(x)
    assert torch.equal(gm.weight_u, twin.weight_u)
    assert torch.equal(gm.weight_v, twin.weight_v)
    with torch.autocast("cpu", dtype=dtype):
        gm(x).sum().backward()
    assert gm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_8_other_dtypes(dtype):
    gm = transform(nn.Linear(6, 4, dtype=dtype))
    assert gm.weight_u.dtype == dtype
    assert gm(torch.randn(2, 6, dtype=dtype)).dtype == dtype


# --- 9: the start (test_reference compares u and v with torch's) ---


def test_9_weights_draw_in_module_order_from_the_global_generator():
    model = Labelled()
    plain = copy.deepcopy(model)
    torch.manual_seed(5)
    for layer in (model.conv, model.embed, model.fc):
        torch_sn(layer)
    after_torch = torch.rand(3)
    torch.manual_seed(5)
    gm = transform(plain, "*")
    assert torch.equal(torch.rand(3), after_torch)
    for name in ("conv", "embed", "fc"):
        state = model.get_submodule(name).parametrizations.weight[0]
        assert torch.equal(gm.get_buffer(f"{name}.weight_u"), state._u)
        assert torch.equal(gm.get_buffer(f"{name}.weight_v"), state._v)


# 10 (names) is in test_passes, 11 (deepcopy, pickle, modes) in test_graph_module.


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_shapes_on_the_meta_device(implementation):
    gm = transform(nn.Linear(4, 3), implementation=implementation).to("meta")
    assert gm(torch.empty(2, 4, device="meta")).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace_is_for_the_frozen_model():
    gm, x = transform(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="Trace the frozen model"):
        torch.jit.trace(gm, x)
