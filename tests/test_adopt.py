"""Models that already carry torch's spectral norm go on exactly where they were."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.nn.utils import prune
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import _SpectralNorm, orthogonal
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.nn.utils.spectral_norm import SpectralNorm as HookSN

import specnorm_fx
from specnorm_fx import SpectralNormConfig, transform
from specnorm_fx.adopt import find_torch_sn
from tests.models import LAYERS, MODELS, Discriminator, Tied, apply_torch_sn, parametrize

APIS = pytest.mark.parametrize("sn", [torch_sn, hook_sn], ids=["parametrizations", "hook"])

# Where torch differs on purpose: it iterates per access, and leaves the second user of a tied weight.
CASES = [case for case in LAYERS + MODELS if case.name not in ("called_twice", "tied", "functional")]


def original(model, fqn):
    """The stored parameter and torch's u and v."""
    module, _, name = fqn.rpartition(".")
    module = model.get_submodule(module)
    if torch_parametrize.is_parametrized(module, name):
        state = module.parametrizations[name]
        return state.original, state[0]._u, state[0]._v
    return tuple(getattr(module, f"{name}_{part}") for part in ("orig", "u", "v"))


def train_step(model, inputs):
    torch.manual_seed(4)  # dropout
    y = model(*inputs)
    model.zero_grad()
    y.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    return y


@pytest.mark.parametrize("n_power_iterations", [1, 3])
@APIS
@parametrize(CASES)
def test_training_continues_where_it_was(case, sn, n_power_iterations):
    """Bit for bit on the CPU, both APIs: the tolerance is zero, as the operations are the same."""
    theirs = apply_torch_sn(case.make(), case.weights, sn, n_power_iterations=n_power_iterations, eps=1e-10)
    for _ in range(3):
        train_step(theirs, case.inputs())
    # torch's hook cannot be deep-copied after a forward: save and load instead.
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    twin = apply_torch_sn(case.make(), case.weights, sn, n_power_iterations=n_power_iterations, eps=1e-10)
    twin.load_state_dict(torch.load(file))
    ours = transform(twin, implementation="reference")

    assert [site.fqn for site in ours.sites()] == list(case.weights)
    for site in ours.sites():
        assert site.config.n_power_iterations == n_power_iterations
        assert site.config.eps == 1e-10
        assert site.config.order == ("uv" if sn is torch_sn else "vu")
    for step in range(5):
        inputs = case.inputs()
        assert torch.equal(train_step(ours, inputs), train_step(theirs, inputs)), step
        for site in ours.sites():
            for mine, its in zip((site.weight, site.u, site.v), original(theirs, site.fqn), strict=True):
                assert torch.equal(mine, its)
    assert torch.equal(ours.eval()(*inputs), theirs.eval()(*inputs))


@APIS
def test_the_model_is_left_as_it_is_and_shares_its_parameter(sn):
    model = sn(nn.Linear(4, 3))
    twin = sn(nn.Linear(4, 3))
    twin.load_state_dict(model.state_dict())
    weight, u, _ = original(model, "weight")
    before = u.clone()
    gm = transform(model, implementation="reference")
    assert gm.weight is weight
    assert gm.weight_u is not u
    gm(torch.randn(2, 4))
    assert torch.equal(u, before)
    # It still is what it was.
    x = torch.randn(2, 4)
    assert type(model) is type(twin) or sn is torch_sn
    assert torch.equal(model(x), twin(x))
    assert list(model.state_dict()) == list(twin.state_dict())


@APIS
def test_exactly_the_weights_with_torch_sn_are_adopted(sn):
    model = apply_torch_sn(Discriminator(), ("blocks.0.conv2.weight", "fc.weight"), sn)
    gm = transform(model, implementation="reference")
    assert {site.fqn for site in gm.sites()} == {"blocks.0.conv2.weight", "fc.weight"}
    assert transform(gm) is gm
    with pytest.raises(ValueError, match=r"matches no weight.* fc.weight \(Linear\)"):
        transform(model, "head")
    assert type(gm.fc) is nn.Linear
    assert not gm.fc._forward_pre_hooks
    assert not gm.fc._state_dict_hooks
    assert not gm.fc._load_state_dict_pre_hooks
    assert set(gm.state_dict()) >= {"fc.weight", "fc.weight_u", "fc.weight_v"}
    assert not [key for key in gm.state_dict() if "orig" in key]


@APIS
def test_selection_adopts_some_and_leaves_others_to_torch(sn):
    model = apply_torch_sn(Discriminator(), ("blocks.0.conv2.weight", "fc.weight"), sn)
    _, fc_u, _ = original(model, "fc.weight")
    gm = transform(model, ["fc", "blocks.1.skip"], update="step")
    sites = {site.fqn: site for site in gm.sites()}
    assert set(sites) == {"fc.weight", "blocks.1.skip.weight"}
    assert torch.equal(sites["fc.weight"].u, fc_u)
    assert sites["fc.weight"].config.update == "step"
    conv = gm.get_submodule("blocks.0.conv2")
    before = original(gm, "blocks.0.conv2.weight")[1].clone()
    gm(torch.randn(2, 3, 8, 8))
    assert not torch.equal(original(gm, "blocks.0.conv2.weight")[1], before)
    assert torch_parametrize.is_parametrized(conv) or conv._forward_pre_hooks


@APIS
def test_a_rule_may_leave_out_what_carries_torchs(sn):
    model = nn.Sequential(sn(nn.Linear(4, 4)), nn.Linear(4, 4))
    gm = transform(model, {"0": None, "*": SpectralNormConfig()})
    assert [site.fqn for site in gm.sites()] == ["1.weight"]
    gm(torch.randn(2, 4)).sum().backward()
    assert original(gm, "0.weight")[0].grad is not None


@APIS
def test_an_explicit_configuration_keeps_u_and_v(sn):
    model = sn(nn.Linear(4, 3), n_power_iterations=2)
    _, u, _ = original(model, "weight")
    (site,) = transform(model, {"*": SpectralNormConfig(n_power_iterations=5)}).sites()
    assert site.config.n_power_iterations == 5
    assert torch.equal(site.u, u)
    with pytest.raises(ValueError, match="'weight' carries u and v of 3 and 4 elements, and dim=1 needs 4"):
        transform(model, {"*": SpectralNormConfig(dim=1)})


@APIS
def test_dim_of_torch_is_kept(sn):
    model = sn(nn.Linear(4, 3), dim=1)
    (site,) = transform(model).sites()
    assert site.config.dim == 1
    assert site.u.shape == (4,)


@APIS
def test_either_name_of_a_tied_weight_is_adopted(sn):
    model = Tied()
    sn(model.decoder)
    stored, u, _ = original(model, "decoder.weight")
    (site,) = transform(model).sites()
    assert site.names == ("encoder.weight", "decoder.weight")
    assert site.weight is stored
    assert torch.equal(site.u, u)
    assert site.config.order == ("uv" if sn is torch_sn else "vu")


def test_functional_use_of_a_parametrised_weight():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch_sn(nn.Linear(4, 3))

        def forward(self, x):
            return nn.functional.linear(x, self.lin.weight, self.lin.bias)

    model = Net()
    theirs = copy.deepcopy(model)
    x = torch.randn(2, 4)
    want = theirs(x)
    for captured in (model, fx.symbolic_trace(model)):
        ours = transform(captured, implementation="reference")
        assert torch.equal(ours(x), want)
        assert type(ours.lin) is nn.Linear or captured is not model
    ours = transform(fx.symbolic_trace(theirs.lin), implementation="reference")  # which is the whole model
    assert torch.equal(ours(x), theirs.lin(x))


@APIS
def test_a_graph_traced_with_torch_sn_in_it(sn):
    traced = fx.symbolic_trace(nn.Sequential(sn(nn.Linear(4, 3)), nn.ReLU(), sn(nn.Conv1d(1, 2, 3))))
    twin = copy.deepcopy(traced)
    ours = transform(traced, implementation="reference")
    assert [site.fqn for site in ours.sites()] == ["0.weight", "2.weight"]
    x = torch.randn(2, 1, 4)
    assert torch.equal(ours(x), twin(x))


def test_optimizer_of_the_torch_model_stays_valid():
    model = torch_sn(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gm = transform(model, implementation="reference")
    before = gm.weight.detach().clone()
    gm(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(gm.weight, before)


@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
def test_parameters_keep_their_order(sn):
    """By which an optimizer's state dict finds them."""
    theirs = nn.Sequential(
        sn(nn.Linear(4, 8)), nn.ReLU(), nn.Sequential(sn(nn.Linear(8, 8)), nn.Linear(8, 1))
    )
    ours = transform(theirs)
    assert [*map(id, ours.parameters())] == [*map(id, theirs.parameters())]
    optimizers = [torch.optim.Adam(model.parameters()) for model in (theirs, ours)]
    x = torch.randn(3, 4)
    theirs(x).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    ours(x).sum().backward()
    optimizers[1].step()


def test_other_parametrizations_beside_it_are_refused():
    model = nn.Sequential(torch_sn(orthogonal(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match=r"on 'weight' \(on it: _Orthogonal, _SpectralNorm; on others: none"):
        transform(model)

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(torch_sn(nn.Linear(4, 4)))
    torch_parametrize.register_parametrization(model[0], "bias", Twice())
    with pytest.raises(ValueError, match=r"on others: bias.*remove_parametrizations"):
        transform(model)


@APIS
def test_a_pruned_weight_is_refused(sn):
    model = nn.Sequential(sn(nn.Linear(4, 4)), nn.Linear(4, 4))
    owner, name = (
        (model[0], "weight_orig") if sn is hook_sn else (model[0].parametrizations.weight, "original")
    )
    prune.random_unstructured(owner, name, 0.5)
    assert all(isinstance(x, torch.Tensor) for x in find_torch_sn(model)["0.weight"].stored)
    with pytest.raises(ValueError, match=r"Linear carries spectral norm on a weight that is computed.*prune"):
        transform(model)
    assert [site.fqn for site in transform(model, {"0": None, "1": SpectralNormConfig()}).sites()] == [
        "1.weight"
    ]


class Bounded(_SpectralNorm):
    """No more than 0.9, as for SNGP."""

    def forward(self, weight):
        return 0.9 * super().forward(weight)


class BoundedHook(HookSN):
    def compute_weight(self, module, do_power_iteration):
        return 0.9 * super().compute_weight(module, do_power_iteration)


@APIS
def test_a_class_derived_from_torchs_is_refused(sn):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    if sn is hook_sn:
        hook_sn(model[0])
        (hook,) = model[0]._forward_pre_hooks.values()
        hook.__class__ = BoundedHook
    else:
        torch_parametrize.register_parametrization(model[0], "weight", Bounded(model[0].weight))
    with pytest.raises(ValueError, match=r"Linear carries spectral norm by Bounded.* Leave the module out"):
        transform(model)
    x = torch.randn(2, 4)
    gm = transform(model, "1")
    sigma = specnorm_fx.sigmas(gm)["1.weight"]
    torch.testing.assert_close(gm(x), F.linear(model[0](x), model[1].weight / sigma, model[1].bias))


def test_torchs_spectral_norm_of_a_vector_stays():
    """It is the vector over its length, without u and v."""
    model = nn.Sequential(nn.Linear(4, 3), torch_sn(nn.LayerNorm(3)))
    assert [site.fqn for site in transform(model).sites()] == ["0.weight"]


class Own(nn.Module):
    """Not torch's, though it has a u."""

    def __init__(self):
        super().__init__()
        self.register_buffer("_u", torch.ones(3))

    def forward(self, x):
        return 2 * x


class LooksLikeIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.parametrizations = nn.ModuleDict({"weight": nn.Linear(3, 3)})
        torch_parametrize.register_parametrization(self.lin, "bias", Own())
        self.gain = nn.Parameter(torch.ones(3))
        for suffix in ("_u", "_v"):
            self.register_buffer("gain" + suffix, torch.ones(3))

    def forward(self, x):
        return self.gain * self.parametrizations["weight"](self.lin(x))


def test_what_only_looks_like_torchs_spectral_norm():
    model, x = LooksLikeIt(), torch.randn(2, 4)
    assert find_torch_sn(model) == {}
    assert [site.fqn for site in transform(model, example_inputs=x).sites()] == [
        "lin.weight",
        "parametrizations.weight.weight",
    ]


class Chain(nn.Module):
    """Two weights in one module."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def forward(self, x):
        return x @ self.first @ self.last


@pytest.mark.parametrize("kind", [HookSN, BoundedHook])
def test_of_two_hooks_on_a_module_one_is_taken_over(kind):
    """Beside a hook of another kind."""
    model = hook_sn(hook_sn(Chain(), "first"), "last")
    model.register_forward_pre_hook(lambda module, inputs: None)
    _, last, other = model._forward_pre_hooks.values()
    last.__class__ = kind
    found = find_torch_sn(model)
    found["first"].strip_()
    assert [*model._forward_pre_hooks.values()] == [last, other]
    assert [*find_torch_sn(model)] == ["last"]
    assert [name for name, _ in model.named_parameters()] == ["last_orig", "first"]


def test_freeze_after_adoption_loads_into_the_plain_class():
    model = apply_torch_sn(Discriminator(), ("fc.weight",), hook_sn)
    gm = transform(model).eval()
    plain = Discriminator().eval()
    plain.load_state_dict(specnorm_fx.frozen_state_dict(gm), strict=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(x), gm(x))
