"""Frozen models: bit for bit the eval model, and nothing of spectral norm left."""

import copy
from functools import partial

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.nn.utils.prune import random_unstructured

from specnorm_fx import freeze, frozen_state_dict, report, sigmas, transform, warm_up_
from specnorm_fx.freeze import whole_copy
from specnorm_fx.module import SpectralNorm
from tests.models import LAYERS, MODELS, Discriminator, Labelled, Tied, parametrize


def trained(case):
    gm = transform(case.make(), "*" if case.make is Labelled else None)
    for _ in range(2):
        gm(*case.inputs())
    return gm.eval()


@parametrize(LAYERS + MODELS)
def test_frozen_equals_eval_bit_for_bit(case):
    gm = trained(case)
    frozen = freeze(gm)
    inputs = case.inputs(batch=3)
    assert torch.equal(frozen(*inputs), gm(*inputs))
    assert isinstance(frozen, fx.GraphModule)


@parametrize(LAYERS + MODELS)
def test_nothing_of_spectral_norm_is_left(case):
    frozen = freeze(trained(case))
    assert not any(isinstance(module, SpectralNorm) for module in frozen.modules())
    assert "spectral_norm" not in frozen.code
    assert list(frozen.state_dict()) == list(case.make().state_dict())
    assert "_u" not in frozen.code
    assert "_v" not in frozen.code


@parametrize(LAYERS + MODELS)
def test_state_dict_loads_strictly_into_the_original_class(case):
    gm = trained(case)
    plain = case.make().eval()
    plain.load_state_dict(frozen_state_dict(gm), strict=True)
    inputs = case.inputs(batch=3)
    assert torch.equal(plain(*inputs), gm(*inputs))


def test_frozen_has_the_nodes_of_the_model_without_spectral_norm():
    plain = fx.symbolic_trace(Discriminator())
    everything = freeze(transform(plain, "blocks.0.conv1").eval())
    # One layer was opened: its call became weight, bias and conv2d.
    assert len(everything.graph.nodes) == len(plain.graph.nodes) + 2


def test_frozen_shares_nothing():
    gm = transform(Discriminator()).eval()
    frozen = freeze(gm)
    theirs = {t.data_ptr() for t in gm.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in frozen.state_dict().values()}


def test_tied_weights_stay_tied_and_flags_stay():
    model = Tied()
    model.encoder.weight.requires_grad_(False)
    frozen = freeze(transform(model).eval())
    assert frozen.encoder.weight is frozen.decoder.weight
    assert not frozen.encoder.weight.requires_grad
    assert frozen.encoder.bias.requires_grad


def test_freeze_leaves_the_model_as_it_is_and_through_compile():
    gm = transform(Discriminator()).eval()
    before = copy.deepcopy(gm.state_dict())
    code = gm.code
    frozen = freeze(torch.compile(gm, backend="eager"))
    assert gm.code == code
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(frozen(x), gm(x))


def test_a_frozen_model_can_be_transformed_and_copied():
    gm = transform(nn.Sequential(nn.Linear(4, 3))).eval()
    gm.meta["mine"] = 1
    warm_up_(gm)
    frozen = freeze(gm)
    twin = copy.deepcopy(frozen)
    assert frozen.meta == twin.meta == gm.meta
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), frozen(x))
    again = transform(frozen).eval()
    warm_up_(again)
    assert sigmas(again)["0.weight"].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
def test_torchs_own_spectral_norm_left_on_a_weight_is_refused(sn):
    gm = transform(nn.Sequential(sn(nn.Linear(4, 4)), nn.Linear(4, 3)), "1").eval()
    with pytest.raises(RuntimeError, match=r"^0.weight still carries spectral norm.*Select it"):
        freeze(gm)


@pytest.mark.parametrize("function", [freeze, frozen_state_dict])
def test_refusals(function):
    gm = transform(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=r"Linear is in training mode.*call .eval\(\) before freezing"):
        function(gm)
    gm.eval()
    gm.spectral_norm.train()
    with pytest.raises(RuntimeError, match="in training mode"):
        function(gm)
    with pytest.raises(RuntimeError, match="Linear is frozen already"):
        function(freeze(gm.eval()))
    with pytest.raises(TypeError, match="holds no transformed model"):
        function(nn.Linear(4, 3))


def test_tied_weights_that_were_untied_since():
    """``assign=True`` makes two parameters of one; the graph reads the first, whatever the other holds."""
    gm = transform(Tied())
    gm.load_state_dict({key: x.clone() * 4 for key, x in gm.state_dict().items()}, assign=True)
    assert gm.encoder.weight is not gm.decoder.weight
    plain = Tied()
    plain.load_state_dict(frozen_state_dict(gm.eval()))
    x = torch.randn(2, 6)
    assert torch.equal(plain(x), gm(x))


def test_a_tied_layer_that_is_deleted_since():
    class Encodes(Tied):
        def forward(self, x):
            return self.encoder(x)

    gm = transform(Encodes()).eval()
    del gm.decoder
    assert gm.sites()[0].names == ("encoder.weight",)
    x = torch.randn(2, 6)
    assert torch.equal(freeze(gm)(x), gm(x))


def test_a_weight_that_is_computed_since():
    """Parametrized after `transform`: it trains, loads and is reported, and cannot be frozen."""
    gm = transform(nn.Sequential(nn.Linear(4, 3)))
    nn.utils.parametrize.register_parametrization(gm.get_submodule("0"), "weight", nn.Identity())
    gm(torch.randn(2, 4)).sum().backward()
    state = {key: 2 * x for key, x in gm.state_dict().items()}
    gm.load_state_dict(state)
    assert all(torch.equal(x, state[key]) for key, x in gm.state_dict().items())
    warm_up_(gm)
    (row,) = report(gm).rows
    assert row.sigma == pytest.approx(row.exact, rel=1e-5)
    with pytest.raises(RuntimeError, match=r"0\.weight is no parameter any more.*remove_parametrizations"):
        freeze(gm.eval())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", [weight_norm, partial(random_unstructured, amount=0.5)])
def test_a_hook_that_computes_the_weight_of_another_layer(hook):
    """What it last computed stays on the layer, with its graph, and ``deepcopy`` refuses that."""
    model = nn.Sequential(torch_sn(nn.Linear(4, 3)), hook(nn.Linear(3, 2), name="weight"))
    gm = transform(model)
    x = torch.randn(2, 4)
    gm(x).sum().backward()
    frozen = freeze(gm.eval())
    assert torch.equal(frozen(x), gm(x))
    assert torch.equal(whole_copy(frozen)(x), gm(x))  # as onnx.export of a frozen model makes it


def test_a_part_is_not_the_model():
    model = nn.Sequential(transform(nn.Linear(4, 3)), nn.Linear(3, 2)).eval()
    with pytest.raises(TypeError, match=r"Sequential is not transformed as a whole: '0' is.*the part\."):
        freeze(model)
    freeze(model[0])
