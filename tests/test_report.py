"""`sigmas` and `report`."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from specnorm_fx import SigmaLogger, freeze, report, sigmas, transform, warm_up_
from tests.models import Discriminator, relative_error


def test_sigmas_are_what_eval_divides_by():
    gm = transform(nn.Linear(5, 4, bias=False)).eval()
    (sigma,) = sigmas(gm).values()
    assert relative_error(gm(torch.eye(5)).T, gm.weight / sigma) < 1e-6
    assert sigma.ndim == 0
    assert not sigma.requires_grad


def test_sigma_has_no_sign():
    gm = transform(nn.Linear(5, 4))
    want = sigmas(gm)
    gm.weight.data.neg_()
    assert sigmas(gm) == want


def test_report_names_every_weight():
    gm = transform(nn.Sequential(Discriminator(), nn.Identity()), ["0.blocks.0.*", "0.fc"])
    warm_up_(gm, tol=1e-12)
    found = report(gm)
    assert [row.fqn for row in found.rows] == [site.fqn for site in gm.sites()]
    for row in found.rows:
        assert row.sigma == pytest.approx(row.exact, rel=1e-5)
        assert row.residual < 1e-2
    assert found.skipped == {
        **{f"0.blocks.1.{name}.weight": "not selected" for name in ("conv1", "conv2", "skip")},
        "0.unused.weight": "not used in the forward",
    }
    lines = str(found).splitlines()
    assert lines[0].split() == ["weight", "shape", "sigma", "exact", "residual"]
    assert lines[1].split()[:2] == ["0.blocks.0.conv1.weight", "8x3x3x3"]
    assert lines[-1] == "0.unused.weight: skipped, not used in the forward"


def test_report_of_a_frozen_model():
    frozen = freeze(transform(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "0").eval())
    found = report(frozen)
    assert not found.rows
    assert found.skipped == dict.fromkeys(("0.weight", "1.weight"), "the model is frozen")


OVERWRITES = {
    "init": nn.init.normal_,
    "copy": lambda weight: weight.data.copy_(torch.randn_like(weight)),
    "data": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
}


@pytest.mark.parametrize("overwrite", OVERWRITES)
def test_report_shows_stale_vectors_and_warm_up_mends_them(overwrite):
    gm = transform(nn.Linear(30, 20))
    assert report(gm).rows[0].residual < 0.2
    OVERWRITES[overwrite](gm.weight)
    (row,) = report(gm).rows
    assert row.residual > 0.5
    assert abs(row.sigma - row.exact) > 1
    warm_up_(gm, tol=1e-9)
    (row,) = report(gm).rows
    assert row.residual < 2e-2
    assert row.sigma == pytest.approx(row.exact, rel=1e-5)


@pytest.mark.parametrize("iterations", [0, 1, 5, 200])
@pytest.mark.parametrize("order", ["uv", "vu"])
def test_residual_is_an_error_bar(iterations, order):
    """Some singular value lies within it; where u and v are near, that is the largest."""
    gm = transform(nn.Linear(30, 20, dtype=torch.float64), order=order)
    nn.init.orthogonal_(gm.weight)
    gm.weight.data[0] *= 1.5  # the largest singular value, and a gap below it
    if iterations:
        warm_up_(gm, iterations)
    (row,) = report(gm).rows
    ((sigma, residual),) = sigmas(gm, residual=True).values()
    assert (sigma.item(), residual.item()) == (row.sigma, row.residual)
    assert torch.equal(sigma, sigmas(gm)["weight"])
    (site,) = gm.sites()
    signed = site.u @ site.weight @ site.v  # with cold u and v it may be negative
    gaps = site.weight @ site.v - signed * site.u, site.weight.T @ site.u - signed * site.v
    assert residual.item() == pytest.approx(max(gap.norm() for gap in gaps).item() / sigma.item(), abs=1e-12)
    values = torch.linalg.svdvals(site.weight.detach())
    assert (values - sigma).abs().min() <= residual * sigma + 1e-14
    if iterations == 200:
        assert residual < 1e-12


def test_report_names_layers_inside_an_opaque_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    skipped = report(transform(model)).skipped
    assert (
        skipped["1.linear2.weight"]
        == "inside '1' (TransformerEncoderLayer), which the graph calls as a whole"
    )


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_sigma_logger_writes_sigma_and_residual():
    gm = transform(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    writer = Writer()
    log = SigmaLogger(writer, gm)
    for step in range(3):
        gm(torch.randn(2, 6))
        log(step)
    log.flush()
    assert [tag for tag, _, step in writer.scalars if step == 1] == [
        f"{name}/{i}.weight" for i in (0, 1) for name in ("sigma", "residual")
    ]
    assert [step for *_, step in writer.scalars] == [0] * 4 + [1] * 4 + [2] * 4
    last = {tag: value for tag, value, step in writer.scalars if step == 2}
    for fqn, found in sigmas(gm, residual=True).items():
        assert last[f"sigma/{fqn}"] == found.sigma.item()
        assert last[f"residual/{fqn}"] == found.residual.item()


def test_sigma_logger_without_a_writer_writes_nothing():
    """As on the ranks that have none."""
    log = SigmaLogger(None, transform(nn.Linear(2, 2)))
    log(0)
    log.flush()
    with pytest.raises(TypeError, match="holds no transformed model"):
        SigmaLogger(None, nn.Linear(2, 2))


def test_sigma_logger_with_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    gm = transform(nn.Linear(6, 5))
    with tensorboard.SummaryWriter(tmp_path) as writer:
        log = SigmaLogger(writer, gm)
        log(7)
        log.flush()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"sigma/weight", "residual/weight"}
    (event,) = events.Scalars("sigma/weight")
    assert event.step == 7
    assert event.value == pytest.approx(sigmas(gm)["weight"].item(), rel=1e-6)


def test_a_weight_with_nan():
    gm = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with torch.no_grad():
        gm.get_submodule("0").weight[0, 0] = torch.nan
    bad, good = report(gm).rows
    assert all(x != x for x in (bad.sigma, bad.exact, bad.residual))
    assert good.exact > 0
    assert sigmas(gm, residual=True)["0.weight"].residual.isnan()


def test_layers_whose_weight_is_computed(caplog):
    gm = transform(nn.Sequential(weight_norm(nn.Conv1d(2, 3, 2)), nn.Flatten(), nn.Linear(9, 1)))
    why = "computed from other parameters (a parametrization, weight_norm)"
    assert report(gm).skipped == {"0.weight": why}
    assert f"0.weight is not normalised: {why}" in caplog.text
