"""Averaged models: sigma is u^T W v / (|u| |v|) of what is stored, whatever the length of u and v."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import specnorm_fx
from specnorm_fx import transform, warm_up_
from specnorm_fx.graph_module import resolve, spectral_norm_node
from tests.models import LAYERS, MODELS, Case, parametrize

EPS = torch.finfo(torch.float32).eps
LARGE = [
    Case("large", partial(nn.Linear, 4608, 256, bias=False), (4608,)),
    Case("large_transposed", partial(nn.ConvTranspose2d, 256, 128, 4, bias=False), (256, 4, 4)),
]


def divided_by(gm):
    """What the eval forward divides each weight by: W is sigma times W / sigma."""
    sites = gm.sites()
    columns = [[getattr(site, name) for site in sites] for name in ("weight", "u", "v")]
    results = gm.get_submodule(spectral_norm_node(gm).target).eval()(*columns)
    pairs = [(site.weight.double(), result.double()) for site, result in zip(sites, results, strict=True)]
    return [((w * w).sum() / (w * result).sum()).item() for w, result in pairs]


def check_formula(model):
    gm = resolve(model).eval()
    sigmas = specnorm_fx.sigmas(gm)
    for site, divisor in zip(gm.sites(), divided_by(gm), strict=True):
        u, v = (x.double() / x.double().norm() for x in (site.u, site.v))
        sigma = torch.dot(u, site.matrix().double() @ v).item()
        assert divisor == pytest.approx(sigma, rel=1e-6)
        assert sigmas[site.fqn].item() == pytest.approx(abs(sigma), rel=1e-6)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@parametrize(LAYERS + MODELS + LARGE)
def test_any_length_of_u_and_v(case, implementation):
    """Also lengths so near to one that they might be taken for it."""
    gm = transform(case.make(), implementation=implementation)
    stored = [(site, site.u.double(), site.v.double()) for site in gm.sites()]
    for length in (1e-3, 0.99, 1 - 4 * EPS, 1 + 2 * EPS, 1 + 3 * EPS, 1 + 8 * EPS, 30.0):
        for site, u, v in stored:
            site.u.copy_(u / u.norm() * length)
            site.v.copy_(v / v.norm() * length)
        check_formula(gm)


def by_hand(decay):
    """As most training scripts do it, over everything floating in the state dict."""

    def update(average, model):
        state = model.state_dict()
        for key, value in average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(state[key], 1 - decay)
            else:
                value.copy_(state[key])

    return copy.deepcopy, update


def by_torch(decay, use_buffers):
    make = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    return make, AveragedModel.update_parameters


AVERAGES = {
    "parameters": by_torch(0.9, False),
    "buffers": by_torch(0.999, True),
    "mean": (partial(AveragedModel, use_buffers=True), AveragedModel.update_parameters),
    "by hand": by_hand(0.9),
    "by hand, slow": by_hand(0.9999),
}


@pytest.mark.parametrize("average", AVERAGES)
@parametrize([case for case in MODELS if case.name in ("discriminator", "tied", "functional")])
def test_an_average_over_a_training(case, average):
    make, update = AVERAGES[average]
    gm = transform(case.make())
    averaged = make(gm)
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        (gm(*case.inputs(4)) - 1).square().mean().backward()
        optimizer.step()
        update(averaged, gm)
        check_formula(averaged)
    assert any(
        not torch.equal(a.weight, b.weight)
        for a, b in zip(resolve(averaged).sites(), gm.sites(), strict=True)
    )
    warm_up_(averaged)
    for row in specnorm_fx.report(averaged).rows:
        assert row.sigma == pytest.approx(row.exact, rel=2e-5)


def test_vectors_of_almost_unit_length_after_a_slow_average():
    """The average of directions 2e-3 apart is 5e-7 short of a unit vector."""
    gm = transform(nn.Linear(4608, 256, bias=False))
    for x in (gm.weight_u, gm.weight_v):
        other = nn.functional.normalize(x + 2e-3 * nn.functional.normalize(torch.randn_like(x), dim=0), dim=0)
        x.lerp_(other, 0.5)
        assert 0 < 1 - x.double().norm() < 1e-6
    check_formula(gm)


@pytest.mark.parametrize("order", ["uv", "vu"])
@pytest.mark.parametrize("remainder", [1e-6, 0.0])
def test_opposite_vectors(remainder, order):
    """(u, v) and (-u, -v) are the same singular pair; their average is next to nothing, or nothing."""
    gm = transform(nn.Linear(12, 8, bias=False, dtype=torch.float64), order=order).eval()
    exact = torch.linalg.matrix_norm(gm.weight, 2).item()
    for x in (gm.weight_u, gm.weight_v):
        x.mul_(remainder)
    if remainder:
        check_formula(gm)  # as long as there is a direction, it counts
    else:
        assert specnorm_fx.sigmas(gm)["weight"] == 0
        assert torch.equal(gm(torch.eye(12).double()).T, gm.weight)  # undivided, as a zero matrix is
        (row,) = specnorm_fx.report(gm).rows
        assert (row.sigma, row.exact) == (0, pytest.approx(exact))
    state = torch.get_rng_state()
    warm_up_(gm)
    assert torch.equal(torch.get_rng_state(), state)
    assert specnorm_fx.sigmas(gm)["weight"].item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, torch.nan], ids=str)
def test_vectors_without_a_direction(value):
    gm = transform(nn.Conv2d(3, 5, 2, dtype=torch.float64))
    exact = torch.linalg.matrix_norm(gm.weight.flatten(1), 2).item()
    for x in (gm.weight_u, gm.weight_v):
        x.fill_(value)
    # A checkpoint without u and v does the same.
    twin = copy.deepcopy(gm)
    twin.load_state_dict(nn.Conv2d(3, 5, 2).state_dict() | {"weight": gm.weight, "bias": gm.bias})
    warm_up_(gm)
    for model in (gm, twin):
        assert specnorm_fx.sigmas(model)["weight"].item() == pytest.approx(exact, rel=1e-4)


def test_vectors_that_rest_at_another_singular_value():
    """The second has become the largest: an average of the weights crosses over so, or an edit by hand."""
    q, p = (torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0] for _ in range(2))
    values = torch.linspace(2, 1, 20, dtype=torch.float64)
    gm = transform(nn.Linear(20, 20, bias=False, dtype=torch.float64))
    with torch.no_grad():
        gm.weight.copy_(q @ torch.diag(values) @ p.T)
    gm.weight_u.copy_(q[:, 1])
    gm.weight_v.copy_(p[:, 1])
    (row,) = specnorm_fx.report(gm).rows
    assert row.residual < 1e-12  # they are singular vectors,
    assert (row.sigma, row.exact) == (pytest.approx(values[1].item()), pytest.approx(2))  # of another value
    twin = copy.deepcopy(gm)
    twin.load_state_dict({"weight": gm.weight})
    warm_up_(gm)
    for model in (gm, twin):
        assert specnorm_fx.sigmas(model)["weight"].item() == pytest.approx(2, rel=1e-5)
