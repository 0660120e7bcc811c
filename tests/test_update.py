"""`update_` and `warm_up_`."""

import pytest
import torch
from torch import nn

import specnorm_fx
from specnorm_fx import SpectralNormConfig, transform, update_, warm_up_
from tests.models import Discriminator


def test_update_moves_only_step_weights():
    gm = transform(
        Discriminator(), {"fc": SpectralNormConfig(update="step"), nn.Conv2d: SpectralNormConfig()}
    )
    before = {site.fqn: site.v.clone() for site in gm.sites()}
    nn.init.normal_(gm.fc.weight)
    update_(gm)
    moved = {site.fqn for site in gm.sites() if not torch.equal(site.v, before[site.fqn])}
    assert moved == {"fc.weight"}


def test_update_gives_what_a_forward_would():
    torch.manual_seed(1)
    by_forward = transform(nn.Linear(6, 4))
    torch.manual_seed(1)
    by_step = transform(nn.Linear(6, 4), update="step")
    for _ in range(3):
        by_forward(torch.randn(2, 6))
        update_(torch.compile(by_step, backend="eager"))
        assert torch.equal(by_forward.weight_u, by_step.weight_u)
        assert torch.equal(by_forward.weight_v, by_step.weight_v)


def test_update_refuses_a_model_without_step_weights():
    with pytest.raises(ValueError, match=r"no weight with update='step'.*transform\(model, update='step'\)"):
        update_(transform(nn.Linear(2, 2)))


@pytest.mark.parametrize("options", [{}, {"tol": 1e-9}, {"n": 400}], ids=str)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_warm_up_mends_an_overwritten_weight(options, update):
    gm = transform(nn.Linear(30, 20), update=update).double()
    nn.init.orthogonal_(gm.weight)
    gm.weight.data[0] *= 10
    exact = torch.linalg.matrix_norm(gm.weight, 2).item()
    assert abs(specnorm_fx.sigmas(gm)["weight"].item() - exact) > 1
    warm_up_(gm, **options)
    assert specnorm_fx.sigmas(gm)["weight"].item() == pytest.approx(exact, rel=1e-5)
    assert gm.weight_u.norm().item() == pytest.approx(1)


def test_warm_up_refuses():
    gm = transform(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="n or tol, not both"):
        warm_up_(gm, 3, 1e-3)
    with pytest.raises(ValueError, match="n must be above 0, got 0"):
        warm_up_(gm, 0)
    with pytest.raises(ValueError, match="tol must be above 0, got -1"):
        warm_up_(gm, tol=-1.0)
