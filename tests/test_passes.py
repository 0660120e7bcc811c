"""The rewrite: structure of the graph, idempotence, what is shared, and every refusal."""

import copy
import logging
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager, this_before_that_pass_constraint
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.nn.utils.parametrizations import weight_norm

import specnorm_fx
from specnorm_fx import SpectralNormConfig, SpectralNormPass, transform
from specnorm_fx.graph_module import spectral_norm_node
from specnorm_fx.module import SpectralNorm
from tests.models import (
    LAYERS,
    MODELS,
    Block,
    CalledTwice,
    Discriminator,
    Functional,
    Labelled,
    Tied,
    parametrize,
)


def counts(gm):
    """How often each kind of node stands in the graph, leaf modules by type."""
    found = {}
    for node in gm.graph.nodes:
        key = node.op
        if node.op == "call_module":
            key = type(gm.get_submodule(node.target)).__name__
        elif node.target is operator.getitem:
            key = "getitem"
        found[key] = found.get(key, 0) + 1
    return found


# --- structure ---


@parametrize(LAYERS + MODELS)
def test_one_call_at_the_head_of_the_graph(case):
    gm = transform(case.make())
    nodes = [n for n in gm.graph.nodes if n.op != "placeholder"]
    n = len(case.weights)
    assert [node.op for node in nodes[: 3 * n]] == ["get_attr"] * 3 * n
    call = nodes[3 * n]
    assert isinstance(gm.get_submodule(call.target), SpectralNorm)
    weights, us, vs = call.args
    assert tuple(node.target for node in weights) == case.weights
    assert [node.target for node in us] == [f"{fqn}_u" for fqn in case.weights]
    assert [node.target for node in vs] == [f"{fqn}_v" for fqn in case.weights]
    assert counts(gm)["SpectralNorm"] == 1
    assert counts(gm)["getitem"] == n
    assert {node.target for node in call.users} == {operator.getitem}
    # No stored weight is read by anything else.
    for node in weights:
        assert list(node.users) == [call]


def test_only_selected_layers_are_opened():
    gm = transform(Discriminator(), "blocks.0.*")
    # 6 reads: 3 weights are routed, 2 biases were opened, 3 u and 3 v were added, and 2 buffers are read.
    assert counts(gm) == {
        "placeholder": 1,
        "get_attr": 3 + 2 + 6 + 2,
        "SpectralNorm": 1,
        "getitem": 3,
        "call_function": 13,
        "Conv2d": 3,
        "BatchNorm2d": 1,
        "Dropout": 1,
        "Linear": 1,
        "call_method": 1,
        "output": 1,
    }


def test_the_code_reads_well():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return F.relu(self.conv(x))

    lines = [line.split(";")[0].strip() for line in transform(Net()).code.splitlines()]
    assert [line for line in lines if line] == [
        "def forward(self, x):",
        "conv_weight = self.conv.weight",
        "conv_weight_u = self.conv.weight_u",
        "conv_weight_v = self.conv.weight_v",
        "spectral_norm = self.spectral_norm([conv_weight], [conv_weight_u], [conv_weight_v])",
        "conv_weight_sn = spectral_norm[0]",
        "conv_bias = self.conv.bias",
        "conv2d = torch.conv2d(x, conv_weight_sn, conv_bias, (1, 1), (0, 0), (1, 1), 1)",
        "relu = torch.nn.functional.relu(conv2d, inplace = False)",
        "return relu",
    ]


@parametrize(MODELS)
def test_code_and_names_are_deterministic(case):
    model = case.make()
    assert transform(model).code == transform(model).code


def test_meta_is_kept():
    gm = transform(Discriminator())
    conv = next(n for n in gm.graph.nodes if n.target is torch.conv2d)
    assert "nn_module_stack" in conv.meta
    assert list(conv.meta["nn_module_stack"])[-1] == "blocks.0.conv1"
    traced = fx.symbolic_trace(Discriminator())
    for node in traced.graph.nodes:
        node.meta["mine"] = node.name
    gm = transform(traced)
    norm = next(n for n in gm.graph.nodes if n.target == "norm")
    assert norm.meta["mine"] == "norm"
    assert {n.meta["mine"] for n in gm.graph.nodes if n.target is torch.conv2d} == {
        f"blocks_{i}_{name}" for i in (0, 1) for name in ("conv1", "conv2", "skip")
    }


# --- idempotence ---


@parametrize(LAYERS + MODELS)
def test_a_second_run_changes_nothing(case, caplog):
    gm = transform(case.make())
    code, state = gm.code, copy.deepcopy(gm.state_dict())
    with caplog.at_level(logging.INFO, logger="specnorm_fx"):
        assert transform(gm) is gm
    assert "nothing to do" in caplog.text
    result = SpectralNormPass(list(case.weights))(gm)
    assert result.modified is False
    assert result.graph_module is gm
    assert gm.code == code
    assert all(torch.equal(value, state[key]) for key, value in gm.state_dict().items())
    assert "keep their options" not in caplog.text


@pytest.mark.parametrize(
    "given", [{"update": "step"}, {"select": {"0": SpectralNormConfig(dim=1)}}, {"select": "0", "eps": 1e-3}]
)
def test_other_options_for_what_is_normalised_are_logged(given, caplog):
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    gm = transform(layers, "0", n_power_iterations=3)
    assert transform(gm, "0", n_power_iterations=3, dim=-2) is gm
    assert not caplog.records
    assert transform(gm, **given) is gm
    assert "0.weight keep their options, as they are normalised already: for others" in caplog.text
    assert gm.sites()[0].config == SpectralNormConfig(n_power_iterations=3, dim=0)


def test_a_second_run_may_add_weights():
    model = Discriminator()
    first = transform(model, "blocks.0.*")
    both = transform(first, ["blocks.0.*", "fc"], n_power_iterations=3)
    assert counts(first)["getitem"] == 3
    assert counts(both)["getitem"] == 4
    assert counts(both)["SpectralNorm"] == 1
    iterations = {site.fqn: site.config.n_power_iterations for site in both.sites()}
    assert iterations["blocks.0.conv1.weight"] == 1  # as it was
    assert iterations["fc.weight"] == 3
    assert both.get_buffer("blocks.0.conv1.weight_u") is first.get_buffer("blocks.0.conv1.weight_u")


# --- sharing ---


@parametrize(LAYERS + MODELS)
def test_the_model_is_left_as_it_is_and_parameters_are_shared(case):
    model = case.make()
    before = copy.deepcopy(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    gm = transform(model)
    gm(*case.inputs())
    gm.eval()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(module.training for module in model.modules())
    named = dict(model.named_parameters())
    assert {name: id(p) for name, p in gm.named_parameters()} == {n: id(p) for n, p in named.items()}
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, named[name])


def test_state_dict_has_the_same_keys_plus_u_and_v():
    model = Discriminator()
    gm = transform(model)
    vectors = {f"{site.fqn}_{x}" for site in gm.sites() for x in "uv"}
    assert set(gm.state_dict()) == set(model.state_dict()) | vectors
    assert len(vectors) == 14


def test_an_optimizer_built_before_stays_valid():
    model = Discriminator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gm = transform(model)
    before = gm.fc.weight.detach().clone()
    gm(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(gm.fc.weight, before)


def test_init_after_transform_reaches_the_layers():
    gm = transform(Discriminator())
    gm.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Conv2d) else None)
    assert torch.equal(gm.get_parameter("blocks.0.conv1.weight"), torch.ones(8, 3, 3, 3))


# --- other ways in ---


# fx cannot trace a bare ConvTranspose; see test_conv_transpose_inside_a_model.
TRACEABLE = [case for case in LAYERS + MODELS if "transpose" not in case.name]


@parametrize(TRACEABLE)
@pytest.mark.parametrize("inlined", [False, True], ids=["leaf modules", "get_attr"])
def test_a_traced_graph_module(case, inlined):
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            weighty = isinstance(module, specnorm_fx.capture.KINDS)
            return super().is_leaf_module(module, name) and not (inlined and weighty)

    model = case.make()
    traced = fx.GraphModule(model, Tracer().trace(model))
    gm = transform(traced)
    reachable = {weight for weight in case.weights}
    assert {site.fqn for site in gm.sites()} == reachable
    torch.manual_seed(1)
    direct = transform(model)
    torch.manual_seed(1)
    via_graph = transform(traced)
    inputs = case.inputs()
    for mode in (True, False):
        torch.manual_seed(2)
        want = direct.train(mode)(*inputs)
        torch.manual_seed(2)
        got = via_graph.train(mode)(*inputs)
        # Where the tree has no layers, weights may stand in another order and so start otherwise.
        if [s.fqn for s in direct.sites()] == [s.fqn for s in via_graph.sites()]:
            assert torch.equal(got, want)


def test_conv_transpose_inside_a_model():
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 4, stride=2), nn.ReLU())
    gm = transform(fx.symbolic_trace(model))
    (site,) = gm.sites()
    assert site.config.dim == 1
    assert site.u.shape == (5,)
    gm(torch.randn(1, 3, 4, 4)).sum().backward()


def test_exported_module():
    model = Block(3, 4)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.manual_seed(1)
    via_export = transform(exported.module())
    torch.manual_seed(1)
    direct = transform(model)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(via_export(x), direct(x))
    assert torch.equal(via_export.eval()(x), direct.eval()(x))
    assert via_export.get_parameter("conv1.weight") is model.conv1.weight


@parametrize(LAYERS)
def test_exported_layers_are_recognised(case):
    """By the function that uses the weight: the layers themselves are gone."""
    model = nn.Sequential(case.make())
    exported = transform(torch.export.export(model, case.inputs()).module())
    assert [site.config for site in exported.sites()] == [site.config for site in transform(model).sites()]


class _Relu6(PassBase):
    """Someone else's pass."""

    def call(self, graph_module):
        found = graph_module.graph.find_nodes(op="call_function", target=F.relu)
        for node in found:
            node.target, node.kwargs = F.relu6, {}
        graph_module.recompile()
        return PassResult(graph_module, bool(found))


@pytest.mark.parametrize("first", [0, 1])
def test_in_a_pass_manager(first):
    passes = [SpectralNormPass("conv*"), _Relu6()]
    manager = PassManager(passes[first:] + passes[:first], run_checks_after_each_pass=True)
    result = manager(fx.symbolic_trace(Block(3, 4)))
    assert result.modified
    assert {site.fqn for site in result.graph_module.sites()} == {"conv1.weight", "conv2.weight"}
    assert "relu6" in result.graph_module.code
    assert not manager(result.graph_module).modified


class _Repeats(nn.Module):
    """Computes one thing twice, before batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x):
        return self.norm(self.conv(torch.relu(x) + torch.relu(x)))


def _fuse(graph_module):
    """Conv + batch norm fusion, as a pass."""
    return PassResult(fuse(graph_module, no_trace=True), True)


def _run(model, *passes, constraints=None):
    torch.manual_seed(1)
    return PassManager(list(passes), constraints)(fx.symbolic_trace(model)).graph_module


def test_next_to_torchs_own_passes():
    model, x = _Repeats().eval(), torch.randn(2, 3, 6, 6)
    ours, cse = SpectralNormPass(), CSEPass()
    alone = _run(model, ours)

    before, after = _run(model, cse, ours), _run(model, ours, cse)
    for gm in (before, after):
        assert torch.equal(gm(x), alone(x))
        assert len(gm.graph.find_nodes(op="call_function", target=torch.relu)) == 1
        assert counts(gm)["SpectralNorm"] == 1
    # What CSEPass makes is a plain GraphModule, so it comes first where ours is wanted in the end.
    assert specnorm_fx.sigmas(before)
    with pytest.raises(TypeError, match="holds no transformed model"):
        specnorm_fx.sigmas(after)

    # Fusion afterwards leaves W / sigma alone; before, it would change what sigma is taken of.
    assert torch.equal(_run(model, ours, _fuse)(x), alone(x))
    assert not torch.allclose(_run(model, _fuse, ours)(x), alone(x), rtol=0.01)

    # Constraints put them in order.
    order = [this_before_that_pass_constraint(cse, ours), this_before_that_pass_constraint(ours, _fuse)]
    sorted_out = _run(model, _fuse, ours, cse, constraints=order)
    assert torch.equal(sorted_out(x), alone(x))
    assert len(sorted_out.graph.find_nodes(op="call_function", target=torch.relu)) == 1


@pytest.mark.filterwarnings("ignore:Failed to fetch", "ignore:Attempted to insert")  # for any layer's weight
@pytest.mark.parametrize(("update", "training"), [("forward", True), ("forward", False), ("step", True)])
def test_what_iterates_is_neither_folded_nor_dropped(update, training):
    """As torch.fx treats calls with a side effect; without an iteration they are as good as constants."""
    model = transform(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), update=update).train(training)
    x = torch.randn(2, 3)
    folded = split_const_subgraphs(copy.deepcopy(model))
    expected = copy.deepcopy(model)
    for _ in range(2):
        assert torch.equal(folded(x), expected(x))

    iterates = training and update == "forward"
    call = spectral_norm_node(model)
    for item in list(call.users):
        item.replace_all_uses_with(call.args[0][item.args[1]])
    model.graph.eliminate_dead_code()
    assert (spectral_norm_node(model) is not None) == iterates


# --- selection, through transform (the forms are in test_config) ---


def test_embedding_only_when_selected():
    by_default = transform(Labelled())
    assert {site.fqn for site in by_default.sites()} == {"conv.weight", "fc.weight"}
    everything = transform(Labelled(), "*")
    assert {site.fqn for site in everything.sites()} == {"conv.weight", "embed.weight", "fc.weight"}
    everything(torch.randn(2, 1, 6, 6), torch.tensor([1, 2])).sum().backward()
    assert everything.embed.weight.grad.isfinite().all()


def test_mapping_gives_each_weight_its_options():
    gm = transform(
        Discriminator(),
        {"fc": None, "blocks.0.*": SpectralNormConfig(n_power_iterations=4), nn.Conv2d: SpectralNormConfig()},
    )
    iterations = {site.fqn: site.config.n_power_iterations for site in gm.sites()}
    assert "fc.weight" not in iterations
    assert {iterations[f"blocks.0.{name}.weight"] for name in ("conv1", "conv2", "skip")} == {4}
    assert {iterations[f"blocks.1.{name}.weight"] for name in ("conv1", "conv2", "skip")} == {1}


def test_the_other_name_of_a_tied_weight_selects_it():
    (site,) = transform(Tied(), "decoder").sites()
    assert site.names == ("encoder.weight", "decoder.weight")


def test_a_tied_weight_goes_by_its_first_name_whichever_is_used_first():
    class DecoderFirst(Tied):
        def forward(self, x):
            return self.encoder(F.relu(self.decoder(x)))

    gm = transform(DecoderFirst())
    (site,) = gm.sites()
    assert site.fqn == "encoder.weight"
    assert site.names == ("encoder.weight", "decoder.weight")
    (node, *_), *_ = gm.graph.find_nodes(op="call_module", target="spectral_norm")[0].args
    assert node.target == "encoder.weight"
    gm.load_state_dict(DecoderFirst().state_dict())


def test_dim_is_resolved():
    model = nn.Sequential(nn.Linear(4, 6), nn.Flatten())
    (site,) = transform(model, dim=-1).sites()
    assert site.config.dim == 1
    assert site.u.shape == (4,)


# --- refusals: one clear error, nothing changed ---


def refuses(model, error, match, *args, **options):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    code = getattr(model, "code", None)
    with pytest.raises(error, match=match):
        transform(model, *args, **options)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert getattr(model, "code", None) == code


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("error", "match", "select", "options"),
    [
        (
            ValueError,
            r"'block.0.conv1' matches no weight. Did you mean 'blocks.0.conv1'",
            "block.0.conv1",
            {},
        ),
        (ValueError, r"'re:head' matches no weight.*fc.weight \(Linear\)", "re:head", {}),
        (ValueError, "Conv3d matches no weight", nn.Conv3d, {}),
        (ValueError, r"\(Conv1d, Embedding\) matches no weight", (nn.Conv1d, nn.Embedding), {}),
        (
            ValueError,
            "'unused' matches only weights out of reach: unused.weight is not used in",
            "unused",
            {},
        ),
        (
            TypeError,
            "unknown option 'n_iterations'. Did you mean 'n_power_iterations'",
            None,
            {"n_iterations": 2},
        ),
        (
            ValueError,
            "n_power_iterations must be an integer of at least 1, got 0",
            None,
            {"n_power_iterations": 0},
        ),
        (ValueError, "n_power_iterations must be", None, {"n_power_iterations": 1.5}),
        (ValueError, "eps must be a finite number above 0, got 0", None, {"eps": 0.0}),
        (ValueError, "eps must be a finite number above 0, got -0.001", None, {"eps": -1e-3}),
        (ValueError, "eps must be", None, {"eps": float("nan")}),
        (IndexError, r"dim=4 is out of range for 'blocks.0.conv1.weight' \(Conv2d\) of 4", None, {"dim": 4}),
        (IndexError, r"dim=-3 is out of range for 'fc.weight' \(Linear\) of 2.*\[-2, 1\]", "fc", {"dim": -3}),
        (ValueError, "dim must be an integer or None", None, {"dim": 0.5}),
        (ValueError, r"update must be one of \('forward', 'step'\), got 'epoch'", None, {"update": "epoch"}),
        (ValueError, r"order must be one of \('uv', 'vu'\), got 'u'", None, {"order": "u"}),
        (TypeError, "select takes a module type", 3, {}),
        (TypeError, "not modules: got a Linear. Give its FQN", nn.Linear(2, 2), {}),
        (TypeError, "not modules: got a ReLU", ["fc", nn.ReLU()], {}),
        (TypeError, "select maps 'fc' to 3", {"fc": 3}, {}),
        (ValueError, "'re:\\(' does not compile", "re:(", {}),
    ],
)
def test_refuses_options(error, match, select, options, traced):
    model = fx.symbolic_trace(Discriminator()) if traced else Discriminator()
    if traced and select == "unused":
        match = "'unused' matches no weight"  # fx has dropped it
    refuses(model, error, match, select, **options)


def _fill(value):
    def make():
        model = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 2, 3))
        model[1].weight.data[0, 0, 1] = value
        return model

    return make


def _with_weight(weight):
    def make():
        model = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
        model[1].weight = nn.Parameter(weight, requires_grad=False)
        return model

    return make


def _quantized():
    return torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8)


def _hooked():
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _hooked_backward():
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].register_full_backward_hook(lambda *_: None)
    return model


def _bias_parametrized():
    model = nn.Sequential(nn.Linear(3, 4))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("make", "match", "select"),
    [
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            r"'0.weight' \(LazyLinear\) is lazy.*Run the model once",
            None,
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 4, device="meta")),
            r"'0.weight' \(Linear\) is on the meta device.*to_empty",
            None,
        ),
        (_with_weight(torch.eye(4).to_sparse()), r"'1.weight' \(Linear\) is sparse.*Transform before", None),
        (
            _with_weight(torch.eye(4, dtype=torch.int64)),
            "dtype torch.int64, .*needs a floating or complex",
            None,
        ),
        (
            _with_weight(torch.eye(4).to(torch.float8_e4m3fn)),
            "dtype torch.float8_e4m3fn, .*of 16 bits or more",
            None,
        ),
        (_with_weight(torch.empty(0, 4)), r"shape \[0, 4\], .*needs a non-empty matrix", None),
        (_fill(torch.nan), r"'1.weight' \(Conv1d\) contains NaN or inf. Initialise", None),
        (_fill(-torch.inf), r"'1.weight' \(Conv1d\) contains NaN or inf. Initialise", None),
        (_hooked, r"'0' \(Linear\) has hooks.*Remove them, or leave it out", None),
        (_hooked_backward, r"'0' \(Linear\) has hooks.*Remove them, or leave it out", None),
        (_bias_parametrized, r"'0' \(ParametrizedLinear\) has a parametrization.*example_inputs", None),
        (lambda: nn.Sequential(nn.ReLU()), "Sequential has no weight to normalise", None),
        (lambda: nn.Sequential(nn.Embedding(3, 4)), "has no weight to normalise. By default", None),
        (
            lambda: nn.Sequential(nn.Embedding(3, 4, max_norm=1.0)),
            r"'0.weight' \(Embedding\) has max_norm.*Build it without",
            "*",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(3, 4, sparse=True)),
            r"'0.weight' \(Embedding\) has sparse=True",
            "*",
        ),
        (
            lambda: nn.Sequential(weight_norm(nn.Linear(3, 3))),
            "Sequential has no weight to normalise",
            None,
        ),
    ],
)
def test_refuses_weights(make, match, select):
    refuses(make(), ValueError, match, select)


class Masked(nn.Conv1d):
    """As some PixelCNN mask their weights."""

    def forward(self, x):
        self.weight.data.mul_(self.weight > 0)
        return super().forward(x)


def test_refuses_a_weight_that_is_changed_through_data():
    refuses(
        nn.Sequential(Masked(2, 4, 3)),
        ValueError,
        r"'0.weight' \(Masked.*read as \.data.*weight \* mask",
        None,
    )


def test_data_of_what_a_layer_gives_may_be_read():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x).data

    assert not transform(Reads())(torch.ones(2, 3)).requires_grad


def test_refuses_a_quantized_weight():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch announce the end of quantized tensors
        weight = _quantized()
    refuses(_with_weight(weight)(), ValueError, r"'1.weight' \(Linear\) is quantized", None)


def test_refuses_a_name_that_is_taken():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight_u = 5
    refuses(model, ValueError, "'0.weight_u' is to hold a singular vector.*Rename it")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: torch.relu, "transform takes a torch.nn.Module or an ExportedProgram, got"),
        (lambda: torch.compile(nn.Linear(2, 2)), "transform comes before OptimizedModule"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "transform comes before DataParallel"),
    ],
)
def test_refuses_other_kinds_of_model(model, match):
    with pytest.raises(TypeError, match=match):
        transform(model())


def test_a_layer_inside_an_opaque_one_is_reported(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    gm = transform(model)
    assert {site.fqn for site in gm.sites()} == {"0.weight"}
    assert "1.linear1.weight is not normalised: inside '1' (TransformerEncoderLayer)" in caplog.text
    with pytest.raises(ValueError, match=r"out of reach: 1.linear1.weight is inside '1' \(Transformer"):
        transform(model, ["0", "1.linear1"])


def test_a_weight_shared_with_an_opaque_layer_is_refused():
    model = nn.Sequential(nn.Linear(8, 4), nn.TransformerEncoderLayer(4, 2, 8))
    model[0].weight = model[1].linear2.weight
    refuses(model, ValueError, r"'0.weight' is shared with a layer inside '1' \(Transformer.*Untie it")


def test_a_transformed_part_is_refused():
    model = nn.Sequential(transform(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(TypeError, match="Sequential holds a model that is transformed already, '0'"):
        transform(model)


def test_torch_sn_out_of_reach_is_refused_and_can_be_left_to_torch():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    torch_sn(model[0])
    torch_sn(model[1], "weight_hh_l0")
    refuses(model, ValueError, "'1.weight_hh_l0' carries torch's spectral norm and cannot be taken over")
    gm = transform(model, "0")
    assert [site.fqn for site in gm.sites()] == ["0.weight"]
    assert nn.utils.parametrize.is_parametrized(gm.get_submodule("1"), "weight_hh_l0")


def test_called_twice_and_functional_use_one_normalised_weight():
    for model in (CalledTwice(), Functional()):
        gm = transform(model)
        for node in gm.graph.nodes:
            if node.target is operator.getitem:
                assert len(node.users) >= 1
    gm = transform(CalledTwice())
    (item,) = (n for n in gm.graph.nodes if n.target is operator.getitem)
    assert len(item.users) == 2
