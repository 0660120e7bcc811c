"""State dict layouts: what `load_state_dict` reads, what `convert_state_dict` writes, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

import specnorm_fx
from specnorm_fx import convert_state_dict, reference, transform
from specnorm_fx.checkpoint import fqn_of
from tests.models import MODELS, Discriminator, Tied, apply_torch_sn, case_named, parametrize

SN = {"parametrizations": torch_sn, "hook": hook_sn}
LAYOUTS = ["specnorm_fx", "parametrizations", "hook"]
CASES = [case for case in MODELS if case.name != "tied"]


def source(case, layout):
    """A trained model in a layout, and its outputs in eval."""
    model = case.make()
    if layout == "specnorm_fx":
        model = transform(model, implementation="reference")
    elif layout != "plain":
        # On layers only: torch cannot parametrise by the hook what the forward reads by itself.
        apply_torch_sn(model, case.weights, SN[layout])
    for _ in range(3):
        model(*case.inputs())
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@parametrize([case for case in CASES if case.name != "functional"])
def test_load_reads_every_layout(case, layout):
    theirs = source(case, layout)
    ours = transform(case.make(), implementation="reference")  # whose bits are torch's
    result = ours.load_state_dict(theirs.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    inputs = case.inputs()
    if layout == "hook":  # it computes its weight in the forward
        theirs.train()(*inputs)
        ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.eval()(*inputs), theirs.eval()(*inputs))


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@parametrize([case for case in CASES if case.name != "functional"])
def test_convert_from_each_to_each(case, layout, to):
    state = source(case, layout).state_dict()
    before = dict(state)
    converted = convert_state_dict(state, to=to)
    # Strictly loaded by a model of that kind, with the very same tensors.
    source(case, to).load_state_dict(converted, strict=True)
    assert {value.data_ptr() for value in converted.values()} == {v.data_ptr() for v in state.values()}
    assert dict(state).keys() == before.keys()
    assert converted._metadata is state._metadata
    back = convert_state_dict(converted, to=layout)
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_to_plain_drops_u_and_v_and_keeps_the_stored_weight(layout):
    case = case_named("discriminator")
    state = source(case, layout).state_dict()
    plain = convert_state_dict(state, to="plain")
    Discriminator().load_state_dict(plain, strict=True)
    ours = convert_state_dict(state, to="specnorm_fx")
    assert plain["fc.weight"] is ours["fc.weight"]
    assert list(convert_state_dict(plain, to="plain")) == list(plain)


@parametrize(MODELS)
def test_a_plain_checkpoint_re_converges_u_and_v(case):
    plain = case.make()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    gm = transform(case.make())
    stale = [site.u.clone() for site in gm.sites()]
    gm.load_state_dict(plain.state_dict(), strict=True)
    for site, old in zip(gm.sites(), stale, strict=True):
        exact = torch.linalg.matrix_norm(site.matrix().double(), 2)
        # converge stops when a step moves sigma by 1e-7, and is then right to some ten times that, or more.
        sigma = specnorm_fx.sigmas(gm)[site.fqn]
        assert sigma.item() == pytest.approx(exact.item(), rel=1e-4)
        assert min(site.matrix().shape) == 1 or not torch.equal(site.u, old)


def test_loading_inside_a_parent_and_with_assign():
    disc = transform(Discriminator(), implementation="reference")
    parent = nn.ModuleDict({"disc": disc, "gen": nn.Linear(2, 2)})
    theirs = nn.ModuleDict({"disc": Discriminator(), "gen": nn.Linear(2, 2)})
    apply_torch_sn(theirs, [f"disc.{site.fqn}" for site in parent["disc"].sites()], torch_sn)
    state = theirs.state_dict()
    for assign in (False, True):
        parent.load_state_dict(state, strict=True, assign=assign)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(parent.eval()["disc"](x), theirs.eval()["disc"](x))
    # A plain one.
    parent.load_state_dict(convert_state_dict(state, to="plain"), strict=True)


@pytest.mark.parametrize("layout", ["specnorm_fx", "plain", "parametrizations"])
def test_tied_weights(layout):
    theirs = Tied()
    if layout == "specnorm_fx":
        theirs = transform(theirs)
    elif layout == "parametrizations":
        torch_sn(theirs.encoder)
        torch_sn(theirs.decoder)
    gm = transform(Tied())
    gm.load_state_dict(theirs.state_dict(), strict=True)
    assert gm.encoder.weight is gm.decoder.weight
    stored = dict(theirs.named_parameters())
    assert torch.equal(gm.encoder.weight, next(p for name, p in stored.items() if p.ndim == 2))


def test_the_oldest_hook_format_has_no_v():
    theirs = hook_sn(nn.Linear(5, 4))
    for _ in range(30):
        theirs(torch.randn(2, 5))
    state = theirs.state_dict()
    cached = {"weight": theirs.weight.detach()}  # that format stored the cached W / sigma
    assert convert_state_dict(state | cached, to="plain")["weight"] is state["weight_orig"]
    del state["weight_v"], state["bias"]
    state |= cached
    gm = transform(nn.Linear(5, 4, bias=False))
    gm.load_state_dict(state, strict=True)
    assert torch.equal(gm.weight, theirs.weight_orig)
    exact = torch.linalg.matrix_norm(gm.weight, 2)
    assert specnorm_fx.sigmas(gm)["weight"].item() == pytest.approx(exact.item(), rel=1e-4)
    plain = convert_state_dict(state, to="plain")
    assert list(plain) == ["weight"]
    assert plain["weight"] is state["weight_orig"]
    with pytest.raises(ValueError, match="weight has no v in the state dict"):
        convert_state_dict(state, to="parametrizations")


def test_the_u_of_the_oldest_hook_format_is_where_v_starts(monkeypatch):
    """Singular values 1 % apart converge slowly, unless u is right already."""
    q, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    weight = q @ torch.diag(0.99 ** torch.arange(40, dtype=torch.float64)) @ torch.linalg.qr(q + 1).Q.T
    u, sigma, _ = torch.linalg.svd(weight)
    gm = transform(nn.Linear(40, 40, bias=False, dtype=torch.float64))
    steps = []
    one_step = reference.power_iteration
    monkeypatch.setattr(reference, "power_iteration", lambda *a: steps.append(a) or one_step(*a))
    gm.load_state_dict({"weight_orig": weight, "weight": weight / sigma[0], "weight_u": u[:, 0]})
    assert len(steps) == 2  # the second sees that sigma rests
    assert specnorm_fx.sigmas(gm)["weight"].item() == pytest.approx(sigma[0].item(), rel=1e-14)


def test_a_copy_loads_every_layout_too():
    import pickle

    theirs = apply_torch_sn(Discriminator(), ("fc.weight",), torch_sn)
    gm = transform(Discriminator(), "fc")
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        twin.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("layout", "put"), [("parametrizations", torch_sn), ("hook", hook_sn)])
def test_torch_runs_what_it_is_assigned_in_half_precision(layout, put, dtype):
    """Its products need u and v in the dtype of the weight; ours are in fp32."""
    gm = transform(nn.Linear(5, 4)).to(dtype)
    state = gm.state_dict()
    converted = convert_state_dict(state, to=layout)
    theirs = put(nn.Linear(5, 4))
    theirs.load_state_dict(converted, assign=True)
    assert theirs(torch.randn(2, 5, dtype=dtype)).dtype == dtype
    assert state["weight_u"].dtype == state["weight_v"].dtype == torch.float32
    ours = convert_state_dict(state, to="specnorm_fx")
    assert all(ours[key] is value for key, value in state.items())


# --- refusals, in PyTorch's own words ---


@pytest.mark.parametrize("layout", [*LAYOUTS, "plain"])
def test_wrong_shapes_missing_and_surplus_keys(layout):
    case = case_named("discriminator")
    gm = transform(case.make())
    before = copy.deepcopy(gm.state_dict())
    good = source(case, layout).state_dict()
    key = next(key for key in good if key.startswith("fc") and good[key].shape == (1, 8))

    bad = dict(good) | {key: torch.randn(1, 9)}
    with pytest.raises(RuntimeError, match=r"size mismatch for fc.weight: .*\[1, 9\].*\[1, 8\]"):
        gm.load_state_dict(bad)
    bad = {k: v for k, v in good.items() if not k.startswith("fc")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "fc.weight", "fc.bias"'):
        gm.load_state_dict(bad)
    bad = dict(good) | {"fc.colour": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "fc.colour"'):
        gm.load_state_dict(bad)
    result = gm.load_state_dict(bad, strict=False)
    assert result.unexpected_keys == ["fc.colour"]
    assert list(gm.state_dict()) == list(before)


def test_u_without_v_is_a_missing_key():
    gm = transform(nn.Linear(3, 2))
    state = gm.state_dict()
    del state["weight_v"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_v"'):
        gm.load_state_dict(state)


def test_the_loaded_dict_is_not_changed():
    gm = transform(nn.Linear(3, 2))
    state = torch_sn(nn.Linear(3, 2)).state_dict()
    keys = list(state)
    gm.load_state_dict(state)
    assert list(state) == keys


def test_convert_refuses():
    plain = nn.Linear(3, 2).state_dict()
    with pytest.raises(ValueError, match=r"to must be one of 'specnorm_fx', .*, got 'legacy'"):
        convert_state_dict(plain, to="legacy")
    with pytest.raises(ValueError, match=r"holds no u and v, which the layout 'hook' needs. Load it into"):
        convert_state_dict(plain, to="hook")


def test_convert_keeps_what_is_not_spectral_norm():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), torch_sn(nn.Linear(3, 3)))
    converted = convert_state_dict(model.state_dict(), to="specnorm_fx")
    assert {"0.parametrizations.weight.original0", "1.weight", "1.weight_u", "1.weight_v"} <= set(converted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", ["weight weight_u", "weight_orig weight_mask", "weight_u weight_v"])
def test_keys_that_only_look_like_spectral_norm(keys, layout):
    """A buffer of that name without v, a pruned weight, and what has no weight beside it."""
    state = {f"other.{key}": torch.ones(2) for key in keys.split()}
    converted = convert_state_dict(transform(nn.Linear(3, 2)).state_dict() | state, to=layout)
    assert all(converted[key] is value for key, value in state.items())


@pytest.mark.parametrize("others", [["weight"], ["weight_u", "weight_v"]])
def test_convert_keeps_what_is_no_tensor(others):
    state = transform(nn.Linear(3, 2)).state_dict()
    state |= {key: state[key].detach().numpy() for key in others}
    converted = convert_state_dict(state, to="hook")
    assert [*map(id, converted.values())] == [*map(id, state.values())]


@pytest.mark.parametrize(
    ("key", "fqn", "layout"),
    [
        ("parametrizations.weight.original", "weight", "parametrizations"),
        # The layer is part of a parametrization itself.
        (
            "a.parametrizations.weight.0.lin.parametrizations.weight.original",
            "a.parametrizations.weight.0.lin.weight",
            "parametrizations",
        ),
        ("a.parametrizations.weight.original0", "a.parametrizations.weight.original0", "plain"),
        ("a.original", "a.original", "plain"),
        ("a.weight_orig", "a.weight", "hook"),
    ],
)
def test_the_weight_that_a_key_is_of(key, fqn, layout):
    assert fqn_of(key) == (fqn, layout)


class Aliased(nn.Module):
    """One layer under two names, as in ``self.layers = ModuleList([self.first, ...])``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.layers = nn.ModuleList([self.first, nn.Linear(5, 2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_of_two_names(layout, assign):
    gm, other = transform(Aliased()), transform(Aliased())
    gm(torch.randn(2, 5))
    state = convert_state_dict(gm.state_dict(), to=layout)
    other.load_state_dict(state, assign=assign)
    for site, twin in zip(gm.sites(), other.sites(), strict=True):
        assert torch.equal(twin.weight, site.weight)
        assert torch.equal(twin.u, site.u)
        assert torch.equal(twin.v, site.v)
    other.load_state_dict(Aliased().state_dict())
    assert all(row.sigma == pytest.approx(row.exact, rel=1e-5) for row in specnorm_fx.report(other).rows)


@pytest.mark.parametrize("layout", [*LAYOUTS, "plain"])
def test_a_tied_weight_by_its_other_name_alone(layout):
    """As writers leave it that keep one name of a shared tensor."""
    names = ("decoder.weight", "encoder.weight")
    source = transform(nn.ModuleDict({"decoder": nn.Linear(6, 6, bias=False)})["decoder"])
    source(torch.randn(2, 6))
    state = {f"decoder.{k}": v for k, v in convert_state_dict(source.state_dict(), to=layout).items()}
    gm = transform(Tied())
    missing, unexpected = gm.load_state_dict(state, strict=False)
    assert (names[1] in missing, unexpected) == (True, [])
    (site,), (theirs,) = gm.sites(), source.sites()
    assert torch.equal(site.weight, theirs.weight)
    if layout == "plain":
        (row,) = specnorm_fx.report(gm).rows
        assert row.sigma == pytest.approx(row.exact, rel=1e-5)
    else:
        assert torch.equal(site.u, theirs.u)
        assert torch.equal(site.v, theirs.v)


def test_a_tied_weight_assigned_by_its_other_name_alone():
    """Which unties it: the graph reads the first name, and u and v stay of that."""
    gm = transform(Tied())
    (before,) = gm.sites()
    gm.load_state_dict({"decoder.weight": torch.randn(6, 6)}, strict=False, assign=True)
    (site,) = gm.sites()
    assert site.weight is before.weight
    assert torch.equal(site.u, before.u)
    assert torch.equal(site.v, before.v)


def test_assigned_to_a_model_on_the_meta_device():
    gm, plain = transform(Discriminator()).to("meta"), Discriminator()
    gm.load_state_dict(plain.state_dict(), assign=True)
    gm.offset = plain.offset  # not in the state dict
    assert all(row.sigma == pytest.approx(row.exact, rel=1e-5) for row in specnorm_fx.report(gm).rows)


@pytest.mark.parametrize("value", [None, [[1.0]]])
def test_what_is_no_tensor_is_pytorchs_to_report(value):
    gm = transform(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match='named "weight"'):
        gm.load_state_dict({"weight": value, "bias": torch.zeros(3)})


def test_assigned_in_another_dtype():
    gm = transform(nn.Linear(4, 3))
    gm.load_state_dict(nn.Linear(4, 3).double().state_dict(), assign=True)
    assert {tensor.dtype for tensor in gm.state_dict().values()} == {torch.float64}
