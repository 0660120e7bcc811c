"""Semantics 11: the result behaves as any module does."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.proxy import TraceError

import specnorm_fx
from specnorm_fx import transform
from specnorm_fx.graph_module import SpectralNormGraphModule, resolve
from specnorm_fx.module import SpectralNorm
from tests.models import LAYERS, MODELS, Discriminator, Tied, parametrize


def by_pickle(gm):
    return pickle.loads(pickle.dumps(gm))


def by_torch_save(gm):
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = [copy.deepcopy, by_pickle, by_torch_save]
COPIES = pytest.mark.parametrize("duplicate", DUPLICATES)


def forward(gm, inputs, mode):
    torch.manual_seed(3)  # dropout
    return gm.train(mode)(*inputs)


@COPIES
@parametrize(LAYERS + MODELS)
def test_a_copy_is_the_same_and_independent(case, duplicate):
    gm = transform(case.make())
    gm(*case.inputs())  # the legacy hook cannot be copied after a forward
    twin = duplicate(gm)
    assert isinstance(twin, SpectralNormGraphModule)
    assert type(twin).__name__ == type(gm).__name__
    assert list(twin.state_dict()) == list(gm.state_dict())
    assert dict(twin.named_buffers()).keys() == dict(gm.named_buffers()).keys()
    assert [type(m) for m in twin.modules()][1:] == [type(m) for m in gm.modules()][1:]
    inputs = case.inputs()
    for mode in (True, False, True):
        assert torch.equal(forward(twin, inputs, mode), forward(gm, inputs, mode))
    for site, other in zip(gm.sites(), twin.sites(), strict=True):
        for mine, its in zip((site.weight, site.u, site.v), (other.weight, other.u, other.v), strict=True):
            assert mine.data_ptr() != its.data_ptr()
    assert transform(twin) is twin


@COPIES
def test_plain_attributes_stay(duplicate):
    model = Discriminator()
    model.image_size = 8
    model.layers = [model.fc]
    gm = transform(model)
    for module in (gm, duplicate(gm)):
        assert module.image_size == 8
        assert module.layers[0] is module.fc


@COPIES
def test_a_copy_of_a_frozen_parameter_stays_frozen(duplicate):
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    twin = duplicate(transform(model))
    assert [p.requires_grad for p in twin.parameters()] == [False, False, True, True]


@COPIES
def test_a_copy_keeps_ties_and_unregistered_tensors(duplicate):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.tied = Tied()
            self.same = self.tied
            self.plain = torch.ones(6)
            self.register_buffer("hidden", torch.ones(6), persistent=False)

        def forward(self, x):
            return self.same(x) * self.plain + self.hidden + torch.full((6,), 2.0)

    model = Odd()
    gm = transform(model)
    twin = duplicate(gm)
    vectors = {"tied.encoder.weight_u", "tied.encoder.weight_v"} | {
        "same.encoder.weight_u",
        "same.encoder.weight_v",
    }
    for module in (gm, twin):
        assert set(module.state_dict()) == set(model.state_dict()) | vectors
        assert module.same is module.tied
        assert module.tied.encoder.weight is module.tied.decoder.weight
    x = torch.randn(2, 6)
    assert torch.equal(twin.eval()(x), gm.eval()(x))
    # And the copy can be copied.
    assert torch.equal(duplicate(twin)(x), gm(x))


def test_modes_follow_the_model():
    gm = transform(Discriminator().eval())
    assert not any(module.training for module in gm.modules())
    gm.train()
    assert all(module.training for module in gm.modules())
    assert not transform(gm.eval(), "*").training


def test_partial_modes_are_kept():
    model = Discriminator()
    model.norm.eval()
    gm = transform(model)
    assert gm.training
    assert not gm.norm.training


def test_to_dtype_moves_everything():
    gm = transform(nn.Linear(4, 3)).double()
    assert {t.dtype for t in gm.state_dict().values()} == {torch.float64}
    assert gm(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    "wrap",
    [
        lambda gm: gm,
        lambda gm: torch.compile(gm, backend="eager"),
        torch.optim.swa_utils.AveragedModel,
        nn.DataParallel,
        checkpoint_wrapper,
    ],
    ids=["itself", "compiled", "averaged", "data_parallel", "checkpointed"],
)
def test_functions_find_the_transformed_model_inside_others(wrap):
    wrapped = wrap(transform(nn.Linear(4, 3)))
    assert resolve(wrapped).sites()[0].fqn == "weight"
    assert specnorm_fx.sigmas(wrapped).keys() == {"weight"}
    assert "weight_u" not in specnorm_fx.freeze(wrapped.eval()).state_dict()


def test_functions_refuse_what_holds_none_or_several():
    with pytest.raises(TypeError, match=r"Linear holds no transformed model.*transform\(model\) makes one"):
        specnorm_fx.sigmas(nn.Linear(2, 2))
    one = nn.ModuleDict({"disc": transform(nn.Linear(2, 2)), "gen": nn.Linear(2, 2)})
    assert specnorm_fx.sigmas(one).keys() == {"weight"}
    two = nn.ModuleList([transform(nn.Linear(2, 2)), transform(nn.Linear(2, 2))])
    for model, parts in ((one, "'disc' is.*the part"), (two, "'0', '1' are.*the parts, one after the other")):
        with pytest.raises(TypeError, match=f"{type(model).__name__} is not transformed as a whole: {parts}"):
            specnorm_fx.freeze(model.eval())


def test_a_second_trace_is_refused_unless_the_call_stays_a_leaf():
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, SpectralNorm) or super().is_leaf_module(module, name)

    gm = transform(Discriminator())
    with pytest.raises(TraceError, match=r"would fix.*is_leaf_module is true for specnorm_fx.module.Spec"):
        fx.symbolic_trace(gm)
    again = fx.GraphModule(gm, Tracer().trace(gm)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), gm.eval()(x))


def test_a_model_may_use_the_name_spectral_norm_itself():
    gm = transform(nn.Sequential(OrderedDict(spectral_norm=nn.Linear(4, 3))))
    assert isinstance(gm.spectral_norm, nn.Linear)
    assert gm.spectral_norm_1.configs
    assert transform(gm) is gm


def test_repr_and_extra_repr():
    text = repr(transform(Discriminator(), n_power_iterations=2))
    assert text.startswith("Discriminator(")
    assert "(spectral_norm): SpectralNorm(" in text
    assert "7 weights" in text
    assert "n_power_iterations=2" in text


def double(module, inputs, output):
    return 2 * output


def halve(module, inputs):
    return (inputs[0] / 2,)


def rename(module, state_dict, prefix, *_):
    if f"{prefix}old" in state_dict:
        state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}old")


@pytest.mark.parametrize("captured", [False, True], ids=["trace", "export"])
def test_hooks_on_the_model(captured):
    """By trace they stay on the model, by export they are in the graph."""
    x = torch.randn(2, 4)
    model = nn.Linear(4, 3)
    plain = transform(copy.deepcopy(model), example_inputs=x if captured else None)
    model.register_forward_hook(double)
    model.register_forward_pre_hook(halve)
    model.register_load_state_dict_pre_hook(rename)
    gm = transform(model, example_inputs=x if captured else None)
    gm.load_state_dict(plain.state_dict())
    want = 2 * plain.eval()(x / 2)
    for twin in (gm, *(duplicate(gm) for duplicate in (copy.copy, copy.deepcopy, by_pickle))):
        assert torch.equal(twin.eval()(x), want)
        assert torch.equal(specnorm_fx.freeze(twin)(x), want)
        assert [hook.module() for hook in twin._load_state_dict_pre_hooks.values()] == [twin]
        state = twin.state_dict()
        state["old"] = state.pop("bias") + 1
        twin.load_state_dict(state)
        assert torch.equal(twin.bias, state["old"])
        twin.load_state_dict(plain.state_dict())
    assert [hook.module() for hook in gm._load_state_dict_pre_hooks.values()] == [gm]
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


def test_a_shallow_copy_shares_the_tensors():
    gm = transform(Discriminator())
    twin = copy.copy(gm)
    assert isinstance(twin, SpectralNormGraphModule)
    assert list(twin.state_dict()) == list(gm.state_dict())
    for site, other in zip(gm.sites(), twin.sites(), strict=True):
        assert (site.weight, site.u, site.v) == (other.weight, other.u, other.v)


@pytest.mark.parametrize("name", ["sites", "call", "graph", "meta"])
def test_names_that_a_transformed_model_has_for_itself(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"Sequential has an attribute named '{name}'.* Rename it"):
        transform(model)


def test_attributes_by_the_names_of_its_methods():
    model = nn.Linear(2, 2)
    model.sites = 5
    with pytest.raises(ValueError, match="Linear has an attribute named 'sites'"):
        transform(model)


@COPIES
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["itself", "in a parent"])
def test_a_copy_of_a_model_compiled_in_place_runs_its_own_weights(duplicate, wrap):
    model = transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).eval()
    model.compile(backend="eager")
    whole, x = wrap(model), torch.randn(3, 4)
    want = whole(x)
    copied = duplicate(whole)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), want)
    assert torch.equal(whole(x), torch.zeros(3, 2))


@pytest.mark.parametrize("duplicate", [*DUPLICATES, specnorm_fx.freeze])
def test_a_copy_of_a_model_whose_forward_was_set_runs_its_own_weights(duplicate):
    model = transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).eval()
    model.forward = torch.compile(model.forward, backend="eager")
    x = torch.randn(3, 4)
    want = model(x)
    copied = duplicate(model)
    assert torch.equal(copied(x), want)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), torch.zeros(3, 2))


def test_weights_tied_afterwards_have_each_their_own_vectors():
    gm = transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).eval()
    gm.get_submodule("1").weight = gm.get_submodule("0").weight
    x = torch.randn(3, 8)
    want = gm(x)
    assert torch.equal(specnorm_fx.freeze(gm)(x), want)
    gm.load_state_dict(copy.deepcopy(gm.state_dict()))
    assert torch.equal(gm(x), want)


def test_an_edit_between_a_weight_and_the_call_is_refused():
    gm = transform(nn.Sequential(nn.Linear(4, 3)))
    read = gm.graph.find_nodes(op="get_attr", target="0.weight")[0]
    with gm.graph.inserting_after(read):
        cast = gm.graph.call_method("clone", (read,))
    read.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    with pytest.raises(ValueError, match=r"takes stored weights.*the graph gives it clone"):
        gm.recompile()


def test_methods_of_the_model_that_stay_behind_are_named(caplog):
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            return super().train(False)

        def get_extra_state(self):
            return torch.tensor(7)

    transform(nn.Sequential(Frozen(nn.Linear(4, 3))))
    assert not caplog.records  # those of a part stay
    transform(Frozen(nn.Linear(4, 3)))
    (record,) = caplog.records
    assert record.getMessage().startswith("Frozen has its own get_extra_state, train, which")
