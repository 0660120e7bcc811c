"""Selection: every form of pattern, and what it matches."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

from specnorm_fx import SpectralNormConfig, transform
from tests.models import Discriminator

CONVS = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("conv1", "conv2", "skip")}
CONFIG = SpectralNormConfig()
BLOCK0 = {fqn for fqn in CONVS if fqn.startswith("blocks.0")}


def selected(select):
    return {site.fqn for site in transform(Discriminator(), select).sites()}


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, CONVS | {"fc.weight"}),
        (nn.Conv2d, CONVS),
        ((nn.Conv2d, nn.Linear), CONVS | {"fc.weight"}),
        (nn.Module, CONVS | {"fc.weight"}),
        ("blocks.0.*", BLOCK0),
        ("blocks.0.conv1", {"blocks.0.conv1.weight"}),
        ("blocks.0.conv1.weight", {"blocks.0.conv1.weight"}),
        ("*.conv?", {f for f in CONVS if "conv" in f}),
        ("re:blocks\\.[01]\\.skip", {f for f in CONVS if "skip" in f}),
        ("re:.*conv[12]\\.weight", {f for f in CONVS if "conv" in f}),
        (lambda module, fqn: getattr(module, "kernel_size", 0) == (1, 1), {f for f in CONVS if "skip" in f}),
        (lambda module, fqn: fqn == "fc", {"fc.weight"}),
        (["fc", nn.Conv2d], CONVS | {"fc.weight"}),
        (("fc", nn.Conv2d), CONVS | {"fc.weight"}),
        ([nn.Conv2d, nn.Linear], CONVS | {"fc.weight"}),
        (["fc", lambda module, fqn: fqn.endswith("skip")], {f for f in CONVS if "skip" in f} | {"fc.weight"}),
        ({"blocks.1.*": None, "*": SpectralNormConfig()}, BLOCK0 | {"fc.weight"}),
        ({"*": SpectralNormConfig(), "blocks.1.*": None}, CONVS | {"fc.weight"}),  # the first match wins
        ({nn.Linear: None, nn.Conv2d: SpectralNormConfig()}, CONVS),
    ],
)
def test_select(select, expected):
    assert selected(select) == expected


def test_a_glob_is_case_sensitive_and_an_expression_matches_in_full():
    with pytest.raises(ValueError, match="'FC' matches no weight"):
        selected("FC")
    with pytest.raises(ValueError, match="'re:skip' matches no weight"):
        selected("re:skip")


@pytest.mark.parametrize(("n", "end"), [(20, ""), (21, ", and 1 more"), (30, ", and 10 more")])
def test_a_long_list_of_weights_is_cut(n, end):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(n)))
    with pytest.raises(ValueError, match=rf"0.weight \(Linear\), .*, 19.weight \(Linear\){end}\.$"):
        transform(model, "nothing")


def test_a_callable_that_matches_nothing_is_named():
    def never(module, fqn):
        return False

    with pytest.raises(ValueError, match="select pattern never matches no weight"):
        selected(never)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("torchs", [False, True])
def test_a_callable_is_given_the_modules_of_the_model(traced, torchs):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if torchs:
        for layer in model:
            torch_sn(layer)
    if traced:
        model = fx.symbolic_trace(model)
    last = model.get_submodule("1")
    assert last not in model.get_submodule("0").modules()
    for select in (
        lambda module, fqn: module is last,
        {lambda module, fqn: module is not last: None, "1": CONFIG},
    ):
        assert [site.fqn for site in transform(model, select).sites()] == ["1.weight"]


def test_options_are_the_defaults_of_patterns_without_their_own():
    gm = transform(Discriminator(), ["fc", nn.Conv2d], n_power_iterations=2, eps=1e-6, update="step")
    assert {(s.config.n_power_iterations, s.config.eps, s.config.update) for s in gm.sites()} == {
        (2, 1e-6, "step")
    }


def test_config_is_frozen_and_compares_by_value():
    config = SpectralNormConfig(n_power_iterations=2)
    assert config == SpectralNormConfig(2)
    with pytest.raises(FrozenInstanceError):
        config.eps = 1.0


@pytest.mark.parametrize("eps", ["1e-6", True, torch.tensor(1e-6), float("nan"), 0, None])
def test_eps_is_a_number(eps):
    with pytest.raises(ValueError, match="eps must be a finite number above 0"):
        SpectralNormConfig(eps=eps)


def test_eps_of_numpy():
    gm = transform(nn.Linear(3, 2), eps=np.float32(2**-20))
    assert gm(torch.ones(1, 3)).isfinite().all()
    (site,) = gm.sites()
    assert type(site.config.eps) is float
