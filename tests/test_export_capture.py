"""Capture by torch.export: the same model as by trace, programs of every kind, and export again."""

import copy
import inspect
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.utils import _pytree as pytree

from specnorm_fx import freeze, frozen_state_dict, transform
from specnorm_fx.exported import fixed_layers
from specnorm_fx.module import SpectralNorm
from tests.architectures import MultiPeriodDiscriminator, PeriodDiscriminator
from tests.models import LAYERS, MODELS, Discriminator, Tied, parametrize, relative_error

BATCH = Dim("batch")
CASES = LAYERS + MODELS

# Of those that decompose alike, one.
DECOMPOSED = (
    *("conv1d", "conv2d_reflect", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("functional", "tied", "discriminator", "labelled"),
)

# torch 2.13 about its own LSTM.
LSTM_WARNS = pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")


class Conditional(PeriodDiscriminator):
    """With an optional label."""

    def forward(self, x, label=None):
        score, features = super().forward(x)
        return score if label is None else score * label, features


class OnPairs(MultiPeriodDiscriminator):
    """On real and generated sound at once, as HiFi-GAN's own."""

    def forward(self, real, fake):
        return {"real": super().forward(real), "fake": super().forward(fake)}


def any_batch(args):
    return tuple({0: BATCH} for _ in args)


def seeded(seed, function, *args, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def same(a, b):
    """Bit for bit, and in the same structure."""
    (xs, one), (ys, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return one == other and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def types_of(model):
    return {name: type(m) for name, m in model.named_modules() if name}


# --- by example inputs ---


@parametrize(CASES)
def test_the_same_model_as_by_trace(case):
    model, args = case.make(), case.inputs(3)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    gm = seeded(1, transform, model, example_inputs=args, dynamic_shapes=any_batch(args))
    traced = seeded(1, transform, model)

    assert [(s.fqn, s.names, s.config) for s in gm.sites()] == [
        (s.fqn, s.names, s.config) for s in traced.sites()
    ]
    assert list(gm.state_dict()) == list(traced.state_dict())
    assert types_of(gm) == types_of(traced)
    assert all(p is q for p, q in zip(gm.parameters(), model.parameters(), strict=True))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before

    calls = gm.graph.find_nodes(op="call_module")
    assert [type(gm.get_submodule(node.target)) for node in calls] == [SpectralNorm]
    assert all(node.users for node in gm.graph.find_nodes(op="get_attr"))
    assert all("val" in node.meta for node in calls[0].args[0])

    copied, pickled = copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))
    batch = case.inputs(5)
    want = seeded(2, traced, *batch)
    for module in (gm, copied, pickled):
        assert torch.equal(seeded(2, module, *batch), want)
        assert [s.names for s in module.sites()] == [s.names for s in traced.sites()]
        for s, t in zip(module.sites(), traced.sites(), strict=True):
            # In training mode each copy has taken its own iteration; gm's buffers are its own, too.
            assert torch.equal(s.u, t.u)
            assert torch.equal(s.v, t.v)


@pytest.mark.parametrize("period", [2, 3, 5])
def test_a_period_discriminator(period):
    """Control flow on sizes, which symbolic trace cannot follow; the batch stays free."""
    model, x = PeriodDiscriminator(period), torch.randn(2, 1, 32)
    gm = transform(model, example_inputs=x, dynamic_shapes=({0: BATCH},)).eval()
    plain = PeriodDiscriminator(period)
    plain.load_state_dict(frozen_state_dict(gm))
    batch = torch.randn(5, 1, 32)
    assert same(gm(batch), plain(batch))
    assert same(gm(x=batch), plain(batch))
    with pytest.raises(AssertionError, match=r"x.size\(\)\[2\] == 32"):
        gm(torch.randn(5, 1, 33))


def test_checks_on_free_sizes_are_kept():
    gm = transform(
        PeriodDiscriminator(3),
        example_inputs=torch.randn(2, 1, 32),
        dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},),
    )
    gm.eval()
    plain = PeriodDiscriminator(3)
    plain.load_state_dict(frozen_state_dict(gm))
    for module in (gm, pickle.loads(pickle.dumps(gm))):
        assert same(module(x := torch.randn(3, 1, 50)), plain(x))
        # The example was padded; without padding the graph would be another.
        with pytest.raises(AssertionError, match=r"x.size\(\)\[2\] % 3 != 0"):
            module(torch.randn(3, 1, 51))


def test_checks_that_no_trace_can_follow_stay():
    module = torch.export.export(nn.Linear(3, 3), (torch.ones(2, 3),)).module()
    module._guards_fn.forward = lambda *args: torch._assert(args[0].shape[0] in (1, 2), "one or two")
    gm = transform(module)
    gm(torch.ones(1, 3))
    with pytest.raises(AssertionError, match="one or two"):
        gm(torch.ones(3, 3))
    gm.graph.lint()


def test_nested_modules_and_outputs_by_keyword():
    model, real, fake = OnPairs(), torch.randn(2, 1, 17), torch.randn(2, 1, 17)
    # In the order of the forward, whatever that of the dict.
    gm = transform(model, example_inputs={"fake": fake, "real": real}).eval()
    assert list(inspect.signature(gm.forward).parameters) == ["real", "fake"]
    plain = OnPairs()
    plain.load_state_dict(frozen_state_dict(gm))
    want = plain(real, fake)
    assert same(gm(real, fake), want)
    assert same(gm(fake=fake, real=real), want)
    assert same(pickle.loads(pickle.dumps(gm))(real, fake=fake), want)


def test_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, scales, extra, *, gain=1.0):
            return [self.lin(x) * gain for x in scales] + [extra["y"]]

    args = {"scales": [torch.randn(2, 3), torch.randn(4, 3)], "extra": {"y": torch.randn(1)}, "gain": 2.0}
    gm = transform(Nested(), example_inputs=args).eval()
    plain = Nested()
    plain.load_state_dict(frozen_state_dict(gm))
    for module in (gm, pickle.loads(pickle.dumps(gm))):
        assert same(module(args["scales"], args["extra"], gain=2.0), plain(**args))
        with pytest.raises(AssertionError, match=r"gain == 2\.0"):
            module(args["scales"], args["extra"], gain=3.0)


def test_an_optional_argument():
    model, x, label = Conditional(3), torch.randn(2, 1, 32), torch.randn(2, 1)
    without = transform(model, example_inputs=x)
    without(x)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3"):
        without(x, label)

    with_none = transform(model, example_inputs=(x, None))
    for module in (with_none, pickle.loads(pickle.dumps(with_none))):
        assert same(copy.deepcopy(module).eval()(x, None), module.eval()(x, label=None))
        with pytest.raises(AssertionError, match="label is None"):
            module(x, label)

    with_label = transform(model, example_inputs=(x, label)).eval()
    plain = Conditional(3)
    plain.load_state_dict(frozen_state_dict(with_label))
    assert same(with_label(x, label=label), plain(x, label))


@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
def test_adopts_torch_spectral_norm(sn):
    theirs, x = PeriodDiscriminator(3), torch.randn(2, 1, 32)
    for layer in (*theirs.convs, theirs.post):
        sn(layer, n_power_iterations=2)
    theirs(x)
    ours = transform(theirs, example_inputs=x, implementation="reference")
    assert {site.config.n_power_iterations for site in ours.sites()} == {2}
    for _ in range(2):
        assert same(ours(x), theirs(x))
    assert same(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_of_a_transformed_model_is_refused(decomposed):
    """Its iteration would go on in eval mode, and `freeze` would leave it in."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(4, 6)
    program = torch.export.export(transform(model, "0"), (x,))
    if decomposed:
        program = program.run_decompositions()
    for source in (program, program.module()):
        with pytest.raises(
            ValueError, match=r"^0\.weight carries spectral norm that torch.export has spread"
        ):
            transform(source)
    beside = transform(program, "2").eval()
    with pytest.raises(RuntimeError, match=r"0\.weight still carries spectral norm"):
        freeze(beside)


def test_one_tensor_for_two_arguments():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.critic = nn.Linear(6, 1)

        def forward(self, real, fake):
            return self.critic(real) - self.critic(fake)

    model, x = Difference(), torch.randn(2, 6)
    gm = transform(model, example_inputs=(x, x), implementation="reference").eval()
    real, fake = torch.randn(2, 2, 6).unbind()
    assert gm(real, fake).abs().min() > 0
    assert torch.equal(gm(real, fake), -gm(fake, real))


class Holding(nn.Module):
    """Has its tensors once more where ``torch.export`` does not look for parameters."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.held = (self.fc.weight, [self.scale])

    def forward(self, x):
        weight, (scale,) = self.held
        return self.fc(F.linear(x, weight)) * scale


def test_tensors_that_are_held_elsewhere():
    """To ``torch.export`` they are constants, without a gradient."""
    model, x = Holding(), torch.randn(2, 4)
    traced = transform(model, implementation="reference")
    exported = transform(copy.deepcopy(model), example_inputs=x, implementation="reference")
    exported.load_state_dict(traced.state_dict())
    assert dict(exported.named_buffers()).keys() == {"scale", "fc.weight_u", "fc.weight_v"}
    for gm in (traced, exported):
        gm.scale.mul_(2)
        gm(x).square().sum().backward()
    assert torch.equal(traced(x), exported(x))
    assert torch.equal(traced.fc.weight.grad, exported.fc.weight.grad)
    plain = Holding()
    plain.load_state_dict(frozen_state_dict(exported.eval()))
    assert torch.equal(exported(x), plain(x))


# torch 2.13 about its old hook.
@pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned during export:UserWarning")
@pytest.mark.parametrize("sn", [None, torch_sn, hook_sn])
def test_a_function_that_holds_the_model(sn):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)), torch.randn(2, 4)
    if sn is not None:
        sn(model[0])
    model.forward = lambda x: model[1](model[0](x))
    if sn is not None:  # which is still on the layer that the function calls
        with pytest.raises(ValueError, match=r"'0\.weight' carries torch's .* holds the model itself"):
            transform(model, example_inputs=x)
        return
    gm = transform(model, example_inputs=x)
    assert [site.fqn for site in gm.sites()] == ["0.weight", "1.weight"]
    gm(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# torch 2.13 about its old hook.
@pytest.mark.filterwarnings(
    "ignore:The tensor attribute self.0.0.weight was assigned during export:UserWarning"
)
@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
def test_a_program_of_a_model_with_torchs_spectral_norm_is_refused(sn):
    """It is in there as operations; normalising the other weights instead would be a surprise."""
    model, x = nn.Sequential(nn.Sequential(sn(nn.Linear(4, 8))), nn.Linear(8, 1)), torch.randn(2, 4)
    program = torch.export.export(model.eval(), (x,))
    with pytest.raises(ValueError, match=r"^0\.0\.weight carries spectral.*transform\(model, example_inputs"):
        transform(program)
    beside = transform(program, "1")
    assert [site.fqn for site in beside.sites()] == ["1.weight"]
    # Seen as a module, it is taken over.
    assert [site.fqn for site in transform(torch.fx.symbolic_trace(model)).sites()] == ["0.0.weight"]


class Noisy(nn.Module):
    """Operations without an input of the graph: noise, a constant, an update of a buffer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))
        self.lin.plain = torch.ones(3)

    def forward(self, x):
        self.count.add_(1)
        return self.lin(x) + torch.randn(2, 3) + self.lin.plain + torch.tensor([1.0, 2.0, 3.0])


def test_what_has_no_input_stays_an_operation():
    model, x = Noisy(), torch.randn(2, 3)
    gm = transform(model, example_inputs=x)
    assert model.count == 0
    assert set(gm.state_dict()) - set(model.state_dict()) == {"lin.weight_u", "lin.weight_v"}
    again = pickle.loads(pickle.dumps(gm))
    assert gm.count is model.count
    for module in (gm, again):
        first, second = seeded(3, lambda m=module: (m(x), m(x)))
        assert not torch.equal(first, second)
        assert module.count == 2
    assert torch.equal(*(seeded(4, module.eval(), x) for module in (gm, again)))
    gm.double()(x.double())  # the constants come along


class Branches(nn.Module):
    """Control flow on values, as torch.export wants it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x) + 1, (x,))


def test_branches_on_values():
    gm = transform(Branches(), example_inputs=torch.ones(2, 3)).eval()
    plain = Branches()
    plain.load_state_dict(frozen_state_dict(gm))
    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        assert torch.equal(gm(x), plain(x))
    with pytest.raises(pickle.PicklingError, match=r"torch's cond, which torch.fx cannot read back"):
        pickle.dumps(gm)


def test_hooks_on_a_layer_are_part_of_the_graph():
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    gm = transform(model, example_inputs=x).eval()
    plain = nn.Sequential(nn.Linear(3, 3))
    plain.load_state_dict(frozen_state_dict(gm))
    assert torch.equal(gm(x), 2 * plain(x))


def test_backward_hooks():
    model, x, fired = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3, requires_grad=True), []
    model.register_full_backward_hook(lambda *_: fired.append("model"))
    transform(model, example_inputs=x)(x).sum().backward()
    assert fired == ["model"]
    for register in (model[0].register_full_backward_hook, model[0].register_full_backward_pre_hook):
        handle = register(lambda *_: None)
        with pytest.raises(ValueError, match=r"'0' \(Linear\) has backward hooks.*Remove them"):
            transform(model, example_inputs=x)
        handle.remove()


# --- exported programs ---


@parametrize([case for case in CASES if case.name in DECOMPOSED])
def test_decomposed_programs(case):
    model = case.make().double()
    args, batch = (case.inputs(size, torch.float64) for size in (3, 5))
    program = torch.export.export(model, args, dynamic_shapes=any_batch(args)).run_decompositions()
    gm, traced = (seeded(1, transform, what) for what in (program, model))
    assert {s.fqn: (s.names, s.config) for s in gm.sites()} == {
        s.fqn: (s.names, s.config) for s in traced.sites()
    }
    assert all(site.weight is model.get_parameter(site.fqn) for site in gm.sites())
    # Other functions compute the same sums, in float64.
    got, want = (seeded(2, module, *batch) for module in (gm, traced))
    assert relative_error(got, want) < 128 * torch.finfo(torch.float64).eps


def test_a_program_is_its_module():
    x = torch.randn(3, 3, 8, 8)
    program = torch.export.export(Discriminator(), (x,))
    direct, module = (seeded(1, transform, what) for what in (program, program.module()))
    assert direct.code == module.code
    assert same(dict(direct.state_dict()), dict(module.state_dict()))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(seeded(2, direct, x), seeded(2, again, x))


@pytest.mark.parametrize(("shape", "bias"), [((3,), True), ((2, 3), False), ("transposed", True)])
def test_every_form_of_a_decomposed_linear(shape, bias):
    """addmm, mm, and bmm with the expanded weight."""
    x = torch.randn(2, 3, 5).transpose(1, 2) if shape == "transposed" else torch.randn(shape)
    model = nn.Sequential(nn.Linear(3, 4, bias=bias))
    program = torch.export.export(model, (x,)).run_decompositions()
    (site,) = transform(program).sites()
    assert (site.fqn, site.config.dim) == ("0.weight", 0)


@LSTM_WARNS
def test_weights_of_a_recurrent_layer_stay_out():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x):
            return self.lstm(self.lin(x))[0]

    program = torch.export.export(Recurrent(), (torch.randn(2, 3, 4),))
    for either in (program, program.run_decompositions()):
        assert [site.fqn for site in transform(either).sites()] == ["lin.weight"]


def test_transforming_twice_changes_nothing():
    program = torch.export.export(Tied(), (torch.randn(2, 6),)).run_decompositions()
    gm = transform(program)
    assert transform(gm, "*") is gm


# --- what export fixes ---


FIXED = [
    (nn.Dropout(), True),
    (nn.Dropout(0.0), False),
    (nn.Dropout1d(), True),
    (nn.AlphaDropout(), True),
    (nn.BatchNorm1d(3), True),
    (nn.BatchNorm1d(3, track_running_stats=False), False),
    (nn.InstanceNorm1d(3), False),
    (nn.InstanceNorm1d(3, track_running_stats=True), True),
    (nn.RReLU(), True),
    (nn.LSTM(8, 4), False),
    (nn.LSTM(8, 4, 2, dropout=0.1), True),
]


@LSTM_WARNS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layer", "is_fixed"), FIXED, ids=[str(layer) for layer, _ in FIXED])
def test_layers_fixed_in_a_mode(layer, is_fixed, training):
    model = nn.ModuleDict({"inner": layer}).train(training)
    model.forward = lambda x: model["inner"](x)
    program = torch.export.export(model, (torch.randn(2, 3, 8),))
    graph = program.module().graph
    assert fixed_layers(graph, training) == (["inner"] if is_fixed else [])
    assert fixed_layers(graph, not training) == []


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_stays_visible_after_decomposition(training):
    model = nn.Sequential(nn.BatchNorm1d(3)).train(training)
    program = torch.export.export(model, (torch.randn(2, 3),))
    for table in ({}, None):
        graph = program.run_decompositions(table).module().graph
        assert (fixed_layers(graph, training), fixed_layers(graph, not training)) == (["0"], [])


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_the_graph_cannot_follow_is_refused(training, caplog):
    model, x = Discriminator().train(training), torch.randn(3, 3, 8, 8)
    here, there = ("training", "eval") if training else ("eval", "training")
    with caplog.at_level(logging.WARNING):
        gm = transform(model, example_inputs=x)
    assert f"torch.export has fixed these layers in {here} mode: norm, dropout" in caplog.text
    gm.train(training)
    for module in (gm, copy.deepcopy(gm)):
        with pytest.raises(
            RuntimeError, match=f"cannot go to {there} mode: torch.export has fixed 'norm', 'dro"
        ):
            module.train(not training)
        assert module.training is training
        assert module.spectral_norm.training is training
    with pytest.raises(RuntimeError, match="'batch_norm_default', 'dropout_default'"):
        pickle.loads(pickle.dumps(gm)).train(not training)

    # The remedy: the other mode in a graph of its own, with the same weights, u and v.
    other = transform(model.train(not training), example_inputs=x)
    other.load_state_dict(gm.state_dict())
    evaluated = gm if other.training else other
    traced = transform(Discriminator()).eval()
    traced.load_state_dict(gm.state_dict())
    assert torch.equal(evaluated(x), traced(x))
    assert torch.equal(freeze(evaluated)(x), traced(x))


def test_attention_with_dropout_cannot_go_to_eval():
    """It is told a probability, and no mode."""

    class Attends(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    gm = transform(Attends(4, 4), example_inputs=torch.randn(2, 3, 4))
    with pytest.raises(RuntimeError, match=r"cannot go to eval mode: torch.export has fixed 'scaled_dot_"):
        gm.eval()


def test_spectral_norm_follows_the_mode_alone(caplog):
    gm = transform(PeriodDiscriminator(2), example_inputs=torch.randn(2, 1, 8))
    assert "fixed" not in caplog.text
    assert not gm.eval().spectral_norm.training
    assert gm.train().spectral_norm.training


# --- and out again ---


@pytest.mark.parametrize(("training", "strict"), [(True, False), (False, False), (True, True)])
def test_exports_again(training, strict):
    x = torch.randn(2, 1, 32)
    gm = transform(PeriodDiscriminator(3), example_inputs=x, dynamic_shapes=({0: BATCH},)).train(training)
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: BATCH},), strict=strict)
    vectors = {f"{site.fqn}_{which}" for site in gm.sites() for which in "uv"}
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    functional = program.run_decompositions({})
    assert set(functional.graph_signature.buffers_to_mutate.values()) == (vectors if training else set())

    batch = torch.randn(4, 1, 32)
    again = copy.deepcopy(functional).module()
    for _ in range(2):
        want = gm(batch)
        assert same(again(batch), want)
        assert same(loaded(batch), want)
    for model in (again, loaded):
        assert same(dict(model.named_buffers()), dict(gm.named_buffers()))


def test_a_frozen_model_compiles_ahead_of_time(tmp_path):
    x = torch.randn(2, 3)
    frozen = freeze(transform(nn.Linear(3, 4), example_inputs=x).eval())
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(frozen, (x,)),
        package_path=str(tmp_path / "model.pt2"),
        # Less than half the time, and it is not the compiler that is tested.
        inductor_configs={
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,  # for one file
        },
    )
    loaded = torch._inductor.aoti_load_package(path)
    truth = frozen.double()(x.double())
    # Four roundings of at most half an epsilon of the sum of what is added.
    added = x.abs().double() @ frozen.weight.abs().T + frozen.bias.abs()
    assert (loaded(x) - truth).abs().le(2 * torch.finfo(torch.float32).eps * added).all()


# --- refusals ---


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "must be a tensor, a tuple.*or a dict.*got list", {"example_inputs": [torch.ones(1, 3)]}),
        (
            TypeError,
            r"arguments of Linear.forward\(input.*too many",
            {"example_inputs": (torch.ones(1, 3), 1)},
        ),
        (TypeError, "missing a required argument: 'input'", {"example_inputs": {}}),
        (ValueError, "dynamic_shapes belongs to example_inputs", {"dynamic_shapes": ({0: BATCH},)}),
    ],
)
def test_refuses_example_inputs(error, match, options):
    with pytest.raises(error, match=match):
        transform(nn.Linear(3, 3), **options)


def test_refuses_example_inputs_for_a_graph():
    x = torch.ones(1, 3)
    program = torch.export.export(nn.Linear(3, 3), (x,))
    for model in (program, program.module(), transform(nn.Linear(3, 3))):
        with pytest.raises(ValueError, match=r"is a graph already.*leave them out"):
            transform(model, example_inputs=x)
