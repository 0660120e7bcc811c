"""Torch's spectral norm in captured graphs: the same numbers through one operator call."""

import copy
import logging
import operator
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from specnorm_fx import fuse, ops
from specnorm_fx.fuse import Fused, fuse_
from tests.models import (
    LAYERS,
    MODELS,
    Block,
    CalledTwice,
    Labelled,
    apply_torch_sn,
    case_named,
    relative_error,
)

APIS = pytest.mark.parametrize("sn", [torch_sn, hook_sn], ids=["parametrization", "hook"])
# float64, where another order of summation is all that differs.
TOLERANCE = 1e-13


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    fuse._logged.clear()
    yield
    torch._dynamo.reset()


class Fusing:
    """A backend that fuses, keeps the graphs and runs them as they are."""

    def __init__(self, implementation="auto"):
        self.implementation = implementation
        self.graphs, self.fused, self.passed = [], [], []

    def __call__(self, gm, example_inputs):
        fused, passed = fuse_(gm, self.implementation)
        self.graphs.append(gm)
        self.fused += fused
        self.passed += passed
        return gm

    def calls(self, target):
        graphs = [m.graph for gm in self.graphs for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        return [node for graph in graphs for node in graph.nodes if node.target is target]

    def reasons(self):
        return {entry.fqn: entry.reason for entry in self.passed}


def compare(model, function, inputs, backend=None, steps=2, tolerance=TOLERANCE):
    """Outputs, gradients and buffers after each step, captured and fused against eager; the backend."""
    backend = backend or Fusing()
    eager = copy.deepcopy(model)
    captured = torch.compile(lambda *args: function(model, *args), backend=backend)
    for _ in range(steps):
        got, want = captured(*inputs), function(eager, *inputs)
        assert relative_error(got, want) <= tolerance
        for m, loss in ((model, got), (eager, want)):
            m.zero_grad()
            if loss.requires_grad:
                loss.square().mean().backward()
        scale = max([p.grad.abs().max() for p in eager.parameters() if p.grad is not None], default=1)
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert (p.grad - q.grad).abs().max() <= tolerance * scale
        for (name, a), b in zip(model.named_buffers(), eager.buffers(), strict=True):
            assert relative_error(a, b) <= tolerance, name
    return backend


def forward(model, *inputs):
    return model(*inputs)


def with_sn(case, sn, **options):
    weights = [fqn for fqn in case.weights if fqn != "projection"]
    return apply_torch_sn(case.make().double(), weights, sn, **options)


# --- The same numbers ---


# Bias, padding and the shape of the input are nothing to what makes W / sigma.
KINDS = [
    case
    for case in LAYERS
    if not case.name.endswith(("no_bias", "input", "same", "depthwise", "reflect", "replicate", "circular"))
]


@pytest.mark.parametrize(
    ("case", "sn", "options"),
    [
        pytest.param(case, sn, options, id=f"{case.name}-{name}")
        for name, cases, sn, options in (
            ("parametrization", KINDS, torch_sn, {}),
            # Which have little to do with the kind of the layer.
            ("three_iterations", KINDS[::5], torch_sn, {"n_power_iterations": 3, "eps": 1e-5}),
            ("hook", KINDS[::2], hook_sn, {"n_power_iterations": 2}),
        )
        for case in cases
    ],
)
def test_layers_in_training_and_eval(case, sn, options):
    for training, steps in ((True, 2), (False, 1)):
        torch._dynamo.reset()
        model = with_sn(case, sn, **options)
        keys = [*model.state_dict()]
        backend = compare(model.train(training), forward, case.inputs(dtype=torch.float64), steps=steps)
        (use,) = backend.fused
        transposed = isinstance(model, torch.nn.modules.conv._ConvTransposeNd)
        expected = options.get("n_power_iterations", 1) if training else 0
        assert (use.n_power_iterations, use.dim, use.divides) == (expected, int(transposed), True)
        assert use.order == ("vu" if sn is hook_sn and training else "uv")
        assert use.fqn == "weight"
        assert [*model.state_dict()] == keys


# torch leaves the second user of a tied weight alone, and the hook does not fire for a weight in a function.
@pytest.mark.parametrize(
    ("case", "sn"),
    [pytest.param(case, torch_sn, id=case.name) for case in MODELS if case.name != "tied"]
    + [
        pytest.param(case, hook_sn, id=f"{case.name}-hook")
        for case in MODELS
        if case.name not in ("tied", "functional")
    ],
)
def test_models(case, sn):
    model = with_sn(case, sn)
    if hasattr(model, "dropout"):
        model.dropout.p = 0.0
    backend = compare(model, forward, case.inputs(4, torch.float64))
    assert {use.fqn for use in backend.fused} == set(case.weights) - {"projection"}


def test_every_dim_and_embedding():
    model = Labelled().double()
    torch_sn(model.conv, dim=2)
    torch_sn(model.embed, dim=1)
    hook_sn(model.fc, dim=1)
    backend = compare(model, forward, case_named("labelled").inputs(3, torch.float64))
    assert {use.fqn: use.dim for use in backend.fused} == {
        "conv.weight": 2,
        "embed.weight": 1,
        "fc.weight": 1,
    }


@APIS
def test_vectors_of_any_length_in_eval(sn):
    """Averaged buffers: torch divides by u^T W v as they are, and so must what takes its place."""
    model = sn(nn.Linear(5, 4)).double()
    for buffer in model.buffers():
        buffer.mul_(0.8)
    compare(model.eval(), forward, (torch.randn(2, 5, dtype=torch.float64),))


def test_float32_to_rounding():
    """No further from a float64 truth than eager torch."""
    case = case_named("discriminator")
    model = apply_torch_sn(case.make(), case.weights, torch_sn)
    model.dropout.p = 0.0
    (x,) = case.inputs(4)
    truth, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    results = [torch.compile(model, backend=Fusing())(x), eager(x), truth(x.double())]
    for result in results:
        result.square().mean().backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (model, eager, truth)
    ]
    for got, theirs, exact in (results, gradients):
        assert relative_error(got, theirs) < 1e-6
        assert relative_error(got, exact) <= 2 * relative_error(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@APIS
def test_half_precision_is_computed_in_fp32(dtype, sn):
    """Closer to the truth than eager torch, which rounds sigma to the weight's dtype."""
    model = sn(nn.Linear(64, 48)).to(dtype)
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    backend = Fusing()
    x = torch.eye(64, dtype=dtype)
    truth = exact(x.double())
    errors = [relative_error(m(x), truth) for m in (torch.compile(model, backend=backend), eager)]
    assert errors[0] <= errors[1]
    assert len(backend.fused) == 1
    assert all(buffer.dtype == dtype for buffer in model.buffers())


def test_autocast():
    model = torch_sn(nn.Linear(6, 6))
    eager = copy.deepcopy(model)
    backend = Fusing()

    def run(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(x)

    x = torch.randn(3, 6)
    got, want = torch.compile(lambda x: run(model, x), backend=backend)(x), run(eager, x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert relative_error(got, want) <= torch.finfo(torch.bfloat16).eps
    assert relative_error(*(m.parametrizations.weight[0]._u for m in (model, eager))) < 1e-6
    assert len(backend.fused) == 1


# --- The graph ---


@APIS
def test_one_operator_takes_the_place_of_all(sn):
    model = apply_torch_sn(
        Block(3, 4), ("conv1.weight", "conv2.weight", "skip.weight"), sn, n_power_iterations=2
    )
    backend = Fusing()
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(1, 3, 8, 8))
    assert len(backend.calls(ops.normalize)) == 1
    gone = (
        torch.mv,
        torch.dot,
        torch.vdot,
        F.normalize,
        torch._C._set_grad_enabled,
        operator.truediv,
        "clone",
    )
    assert not [target for target in gone if backend.calls(target)]
    (normalize,) = backend.calls(ops.normalize)
    assert normalize.args[3] == [2, 2, 2]
    assert not backend.graphs[0].graph.find_nodes(op="call_method", target="flatten")


@APIS
def test_a_module_called_twice_iterates_twice(sn):
    for training, calls in ((True, 2), (False, 1)):  # in eval nothing changes in between: one weight for both
        torch._dynamo.reset()
        model = apply_torch_sn(CalledTwice().double(), ("lin.weight",), sn).train(training)
        backend = compare(model, forward, (torch.randn(4, 6, dtype=torch.float64),))
        assert [len(call.args[0]) for call in backend.calls(ops.normalize)] == [1] * calls


def difference(model, x):
    return model(x) - model(x.flip(0) * 2)


def part_without_gradient(model, x):
    with torch.no_grad():
        fake = model(x)
    return model(2 * x) + fake


def both_modes(model, x):
    outputs = []
    for mode in (False, True, False):
        model.train(mode)
        outputs.append(model(x))
    model.train()
    return outputs[0] + 2 * outputs[1] + 3 * outputs[2]


@pytest.mark.parametrize(
    ("function", "calls"), [(difference, 2), (part_without_gradient, 2), (both_modes, 3)]
)
def test_several_calls_in_one_graph(function, calls):
    """The operator is called as often as u and v change, or gradients are switched."""
    model = torch_sn(nn.Linear(6, 6)).double()
    backend = compare(model, function, (torch.randn(4, 6, dtype=torch.float64),))
    assert len(backend.graphs) == 1
    assert len(backend.calls(ops.normalize)) == calls


# PyTorch 2.13, where it captures a part of the model alone.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.booleans(), st.sampled_from(["", "no_grad", "autocast", "clip", "read"])
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_order_of_calls_modes_and_regions(program):
    """What moves may pass neither what it depends on nor what depends on it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.ModuleList(
        [
            torch_sn(nn.Linear(4, 4)),
            torch_sn(nn.Linear(4, 4), n_power_iterations=2),
            hook_sn(nn.Linear(4, 4)),
        ]
    ).double()

    def run(model, x):
        for index, training, around in program:
            layer = model[index]
            # Backward through the old hook fails in eager torch where eval comes before training.
            layer.train(training or index == 2)
            if around == "no_grad":
                with torch.no_grad():
                    x = x + layer(x)
            elif around == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):  # of no effect on float64
                    x = layer(x)
            elif around == "clip":
                with torch.no_grad():
                    layer.bias.clamp_(-0.1, 0.1)
                x = layer(x)
            elif around == "read":
                x = layer(x) + next(iter(layer.buffers())).sum()
            else:
                x = layer(x)
        return x

    compare(model, run, (torch.randn(3, 4, dtype=torch.float64),), steps=2)


# PyTorch 2.13, when it goes on after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@APIS
def test_graph_breaks(sn):
    model = apply_torch_sn(CalledTwice().double(), ("lin.weight",), sn)
    model.append = sn(nn.Linear(6, 6)).double()

    def broken(model, x):
        x = model(x)
        torch._dynamo.graph_break()
        return model.append(model.append(x)) * 2

    backend = compare(model, broken, (torch.randn(4, 6, dtype=torch.float64),))
    assert len(backend.graphs) == 2
    assert [len(backend.calls(ops.normalize)), len(backend.fused)] == [4, 4]


def test_a_graph_within_the_graph():
    """Activation checkpointing of an eval model keeps the forward as a graph of its own."""
    model = torch_sn(nn.Linear(6, 6)).double().eval()

    def function(model, x):
        return checkpoint(model, x, use_reentrant=False)

    backend = compare(model, function, (torch.randn(4, 6, dtype=torch.float64),), steps=1)
    assert len(backend.calls(ops.normalize)) == 1
    assert [use.fqn for use in backend.fused] == ["weight"]


def test_dynamic_shapes():
    model = apply_torch_sn(Block(3, 4).double(), ("conv1.weight", "conv2.weight"), torch_sn, eps=1e-10)
    eager = copy.deepcopy(model)
    backend = Fusing()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, size in ((2, 8), (3, 8), (5, 12)):
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        assert relative_error(compiled(x), eager(x)) < TOLERANCE
    assert len(backend.graphs) == 1
    # eps is an input of such a graph, and guarded: another value means another graph.
    for m in (model, eager):
        m.conv1.parametrizations.weight[0].eps = 1e-6
    assert relative_error(compiled(x), eager(x)) < TOLERANCE
    assert [use.fqn for use in backend.fused] == ["conv1.weight", "conv2.weight"] * 2


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def halved_before(sn, **options):
    """A layer whose spectral norm is that of a weight that is computed."""
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Halved())
    return sn(layer, **options).double()


def test_an_eps_that_is_an_input_is_far_from_a_weight_that_is_computed():
    """Read once, for the first of two calls; the second one's weight comes after that."""
    model = halved_before(torch_sn, eps=1e-10)
    eager, backend = copy.deepcopy(model), Fusing()
    x = torch.randn(3, 4, dtype=torch.float64)
    got, want = torch.compile(lambda x: model(model(x)), backend=backend, dynamic=True)(x), eager(eager(x))
    assert relative_error(got, want) < TOLERANCE
    assert len(backend.fused) == 2
    # And not across a change of state that it lies before.
    torch._dynamo.reset()
    got = torch.compile(lambda x: part_without_gradient(model, x), backend=backend, dynamic=True)(x)
    assert relative_error(got, part_without_gradient(eager, x)) < TOLERANCE
    assert len(backend.fused) == 4
    assert not backend.calls("item")


@APIS
@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_weight_beside_others_needs_no_gradient(sn, training):
    """Though the same operator serves both."""
    model = nn.ModuleList([sn(nn.Linear(6, 6)), sn(nn.Linear(6, 6))]).double().train(training)
    eager, backend = copy.deepcopy(model), Fusing()
    x = torch.randn(3, 6, dtype=torch.float64)
    results = []
    for m, compiler in ((model, torch.compile(backend=backend)), (eager, lambda f: f)):
        m[1].requires_grad_(False)
        results.append(compiler(lambda m, x: (m[0](x), m[1](x)))(m, x))
    for got, want, trained in zip(*results, (True, False), strict=True):
        assert relative_error(got, want) < TOLERANCE
        assert got.requires_grad == want.requires_grad == trained
    assert len(backend.fused) == 2
    assert len(backend.calls(ops.normalize)) == 1


def test_reference_is_torch_bit_for_bit():
    case = case_named("discriminator")
    model = with_sn(case, torch_sn, n_power_iterations=2).float()
    model.dropout.p = 0.0
    backend = compare(model, forward, case.inputs(4), Fusing("reference"), tolerance=0)
    assert len(backend.calls(ops.singular_vectors)) == 1
    assert len(backend.fused) == 7
    assert not any(use.divides for use in backend.fused)
    torch._dynamo.reset()
    backend = compare(model.eval(), forward, case.inputs(4), Fusing("reference"), tolerance=0)
    assert (backend.fused, backend.passed) == ([], [])


def test_the_division_in_another_graph():
    """As where DDP splits a graph: the power iteration is fused all the same."""
    model = torch_sn(nn.Linear(6, 5), n_power_iterations=2).double()

    def scaled(model, x):
        spectral_norm = model.parametrizations.weight[0]
        weight_mat = model.parametrizations.weight.original.flatten(1)
        spectral_norm._power_method(weight_mat, 2)
        u, v = spectral_norm._u.clone(), spectral_norm._v.clone()
        return torch.vdot(u, torch.mv(weight_mat, v)) * x

    backend = compare(model, scaled, (torch.randn(2, dtype=torch.float64),))
    assert backend.fused == [Fused("weight", (5, 6), 2, 0, "uv", divides=False)]
    assert len(backend.calls(ops.power_iteration)) == 1


@APIS
def test_gradient_penalty_of_an_eval_model(sn):
    """Levels of torch.func are changes of state that nothing is moved across."""
    model = nn.Sequential(sn(nn.Linear(4, 8)), nn.Tanh(), sn(nn.Linear(8, 1))).double().eval()

    def penalty(model, x):
        slope = torch.func.grad(lambda x: model(x).sum())(x)
        return slope.square().sum(1) + model(x)[:, 0]

    x = torch.randn(5, 4, dtype=torch.float64)
    eager = copy.deepcopy(model)
    backend = Fusing()
    got = torch.compile(lambda x: penalty(model, x), backend=backend, fullgraph=True)(x)
    leaf = x.clone().requires_grad_()
    score = eager(leaf)[:, 0]
    (slope,) = torch.autograd.grad(score.sum(), leaf, create_graph=True)
    want = slope.square().sum(1) + score
    assert relative_error(got, want) < TOLERANCE
    for loss in (got, want):
        loss.sum().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < TOLERANCE
    assert len(backend.fused) == 4


# --- What is passed through ---


def clip(model, x):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)
    return model(x)


def square(model, x):
    with torch.no_grad():
        model.parametrizations.weight.original **= 2
    return model(x)


def clip_by_a_layer(model, x):
    weight = model.parametrizations.weight.original
    with torch.no_grad():
        before = model(x)
        F.hardtanh(weight, -0.1, 0.1, True)
        return before - model(x) + weight.sum()


@torch.library.custom_op("specnorm_fx_tests::clip", mutates_args=("weight",))
def _clip(weight: Tensor, limit: float) -> Tensor:
    norm = weight.norm()
    weight.clamp_(-limit, limit)
    return norm


_clip.register_fake(lambda weight, limit: weight.new_empty(()))


def clip_by_an_operator(model, x):
    weight = model.parametrizations.weight.original
    with torch.no_grad():
        before = model(x)
        norm = torch.ops.specnorm_fx_tests.clip(weight, 0.1)  # a packet of overloads, here of one
        return before - model(x) + norm


@torch._dynamo.allow_in_graph
def clip_unseen(weight, limit):
    return weight.clamp_(-limit, limit).norm()


def clip_by_a_function(model, x):
    weight = model.parametrizations.weight.original
    with torch.no_grad():
        before = model(x)
        norm = clip_unseen(weight, 0.1)
        return before - model(x) + norm


@torch._dynamo.allow_in_graph
class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.mark_dirty(weight)
        return weight.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def double_unseen(model, x):
    with torch.no_grad():
        first, second = model.weight, model.weight
        doubled = Doubled.apply(second)
        return F.linear(x, first) + F.linear(x, second) + F.linear(x, doubled)


def raise_by_numpy(model, x):
    weight = model.parametrizations.weight.original
    with torch.no_grad():
        before = model(x)
        array = weight.detach().numpy()
        array += 1
        return before - model(x)


def drop_in_place(model, x):
    return F.linear(x, F.leaky_relu(model.weight, 0.2, True), model.bias)


def cut_rows(model, x):
    return F.embedding(torch.arange(len(x)), model.weight, None, 0.1) + x


def read_u(model, x):
    return model(x) + model.parametrizations.weight[0]._u.sum()


def use_sigma(model, x):
    weight = model.parametrizations.weight.original
    vectors = model.parametrizations.weight[0]
    sigma = torch.vdot(vectors._u, torch.mv(weight, vectors._v))
    return F.linear(x, weight / sigma) * sigma


def differentiate_u(model, x):
    weight = model.parametrizations.weight.original
    v = model.parametrizations.weight[0]._v
    u = F.normalize(torch.mv(weight, v), dim=0)
    return F.linear(x, weight / torch.dot(u, torch.mv(weight, v)))


def round_down(model, x):
    weight = model.parametrizations.weight.original
    vectors = model.parametrizations.weight[0]
    sigma = torch.dot(vectors._u, torch.mv(weight, vectors._v))
    return F.linear(x, torch.div(weight, sigma, rounding_mode="floor"))


def other_matrix(model, x):
    weight = model.parametrizations.weight.original
    vectors = model.parametrizations.weight[0]
    return F.linear(x, weight / torch.dot(vectors._u, torch.mv(2 * weight, vectors._v)))


def iterate_with_two_eps(model, x):
    weight = model.parametrizations.weight.original
    u, v = model.parametrizations.weight[0]._u, model.parametrizations.weight[0]._v
    with torch.no_grad():
        for eps in (1e-12, 1e-10):
            u = F.normalize(torch.mv(weight, v), dim=0, eps=eps, out=u)
            v = F.normalize(torch.mv(weight.H, u), dim=0, eps=eps, out=v)
        u, v = u.clone(), v.clone()
    return F.linear(x, weight / torch.vdot(u, torch.mv(weight, v)))


def divide_without_gradient(model, x):
    weight = model.parametrizations.weight.original
    vectors = model.parametrizations.weight[0]
    sigma = torch.vdot(vectors._u, torch.mv(weight, vectors._v))
    with torch.no_grad():
        normalized = weight / sigma
    return F.linear(x, normalized) + F.linear(x, weight)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (clip, "the weight may be changed in place by clamp_"),
        (square, "the weight may be changed in place by"),
        (clip_by_a_layer, "the weight may be changed in place by"),
        (clip_by_an_operator, "the weight may be changed in place by"),
        (clip_by_a_function, "the weight may be changed in place by"),
        (double_unseen, "u may be changed in place by normalize"),  # of the second read, which stays
        (raise_by_numpy, "the weight may be changed in place by"),
        (drop_in_place, "W / sigma may be changed in place by"),
        (cut_rows, "W / sigma may be changed in place by"),
        (read_u, "u is read by sum_1 as well"),
        (use_sigma, "its sigma is not used for W / sigma, or not for that alone"),
        (differentiate_u, "gradient flows through u or v"),
        (round_down, "its sigma is not used for W / sigma"),
        (other_matrix, "its sigma is not used for W / sigma"),
        (iterate_with_two_eps, "its iterations differ in eps or order"),
        (divide_without_gradient, "the state that it is computed in changes in between"),
    ],
)
def test_what_is_not_fused_is_right_all_the_same(function, reason, caplog):
    model = torch_sn(nn.Linear(6, 6)).double()
    with caplog.at_level(logging.WARNING, "specnorm_fx.fuse"):
        backend = compare(model, function, (torch.randn(4, 6, dtype=torch.float64),))
        assert not backend.fused
        assert any(why.startswith(reason) for why in backend.reasons().values()), backend.reasons()
        once = len(caplog.records)
        assert once == len(backend.passed)
        torch._dynamo.reset()
        compare(model, function, (torch.randn(5, 6, dtype=torch.float64),))
        assert len(caplog.records) == once


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.round(decimals=2)

    @staticmethod
    def backward(ctx, grad):
        return grad


def quantize(model, x):
    return F.linear(x, Rounded.apply(model.weight))


def checkpoint_a_part(model, x):
    return torch.utils.checkpoint.checkpoint(torch.relu, F.linear(x, model.weight), use_reentrant=False)


def checkpoint_a_weight(model, x):
    model.eval()  # in training its u and v would be written in there
    return model(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))


# torch 2.13, which does so itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("function", [quantize, checkpoint_a_part, checkpoint_a_weight])
def test_what_runs_a_graph_of_its_own_is_looked_into(function):
    model = torch_sn(nn.Linear(6, 6)).double()
    backend = compare(model, function, (torch.randn(4, 6, dtype=torch.float64),))
    assert backend.fused
    assert not backend.passed


@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
def test_a_region_that_loses_its_u_and_v_is_an_error(sn):
    """As PyTorch compiles it, without a word."""
    model = nn.Sequential(sn(nn.Linear(4, 4)), nn.ReLU())
    region = torch.compiler.nested_compile_region(lambda x: model(x))

    def call(x):
        return region(x) + region(x + 1)

    x = torch.randn(2, 4)
    compiled = torch.compile(call, backend=Fusing())
    if sn is hook_sn:  # Dynamo refuses the other one
        with pytest.raises(Exception, match=r"0\.weight is normalised in a torch\.compiler\.nested_compile"):
            compiled(x)
    model.eval()
    torch._dynamo.reset()
    assert relative_error(compiled(x), call(x)) < 1e-6


def test_what_runs_something_unknown_may_write():
    """Such as a kernel of Triton's."""
    graph = fx.Graph()
    arguments = {"kwargs": {"weight": graph.placeholder("weight")}}
    kernel = graph.call_function(triton_kernel_wrapper_mutation, (), arguments)
    assert fuse._may_write(kernel)


def test_what_an_operator_is_told_to_write_to_is_written():
    """And not by those of its overloads that are given no `out`."""
    graph = fx.Graph()
    weight = graph.placeholder("weight")
    for operator_, given, writes in (
        (torch.ops.aten.aminmax, {}, False),
        (torch.ops.aten.aminmax.default, {}, False),
        (torch.ops.aten.aminmax, {"min": weight, "max": weight}, True),
        (torch.ops.aten.aminmax.out, {"min": weight, "max": weight}, True),
    ):
        assert fuse._may_write(graph.call_function(operator_, (weight,), given)) == writes


def test_wrapped_weights_pass_through():
    """DTensor, say: the operator has no rule for what a wrapper keeps inside."""
    model = torch_sn(nn.Linear(4, 4)).eval()
    original = model.parametrizations.weight.original
    model.parametrizations.weight.original = nn.Parameter(TwoTensor(original.detach(), original.detach()))
    backend = Fusing()
    x = torch.randn(2, 4)
    got, want = torch.compile(model, backend=backend)(x), model(x)
    assert torch.equal(got.a, want.a)
    assert backend.reasons() == {"weight": "the weight is not an ordinary tensor in this graph"}


def test_complex_weights_pass_through():
    layer = torch_sn(nn.Linear(4, 3, dtype=torch.complex128))
    backend = Fusing()
    eager = copy.deepcopy(layer)
    x = torch.randn(2, 4, dtype=torch.complex128)
    assert torch.equal(torch.compile(layer, backend=backend)(x), eager(x))
    assert backend.reasons() == {"weight": "the weight is complex, for which there is no operator"}


def test_a_graph_without_spectral_norm_stays():
    backend = Fusing()
    x = torch.randn(2, 4)
    layer = nn.Linear(4, 3)
    torch.compile(layer, backend=backend)(x)
    assert (backend.fused, backend.passed) == ([], [])
    assert len(backend.graphs[0].graph.nodes) == 5  # weight, bias, x, linear, output


class Twice(nn.Module):
    """The weight read without gradients, then with, both results of the graph."""

    def __init__(self, sn, doubled=False):
        super().__init__()
        self.layer, self.doubled = sn(nn.Linear(4, 4)), doubled

    def forward(self, x):
        with torch.no_grad():
            target = self.layer.weight
        if self.doubled:
            target *= 2
        weight = self.layer.weight
        return target, weight, F.linear(x, weight)


@pytest.mark.parametrize(
    ("inner", "doubled"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_one_weight_twice_among_the_results(inner, doubled):
    """In eval mode: AOTAutograd would make one tensor of them, without a gradient."""
    model = Twice(torch_sn, doubled).double().eval()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4, dtype=torch.float64)
    compiled = torch.compile(model, backend="specnorm", options={"inner": inner})
    results = [m(x) for m in (compiled, twin)]
    for a, b in zip(*results, strict=True):
        assert a.requires_grad == b.requires_grad
        assert relative_error(a, b) < TOLERANCE
    for _, weight, out in results:
        (weight.exp().sum() + out.exp().sum()).backward()
    stored = [m.layer.parametrizations.weight.original.grad for m in (model, twin)]
    assert relative_error(*stored) < TOLERANCE
    results[0][1].detach().zero_()
    assert results[0][0].any()


@pytest.mark.parametrize("computed", [False, True])
def test_one_weight_twice_among_the_results_by_other_nodes(computed):
    """Views of it, and one that another parametrization computes each time."""
    model = (halved_before(torch_sn) if computed else torch_sn(nn.Linear(4, 4)).double()).eval()
    twin = copy.deepcopy(model)

    def call(model, x):
        with torch.no_grad():
            target = model.weight.flatten()
        weight = model.weight
        return target, weight.flatten(), F.linear(x, weight)

    x = torch.randn(2, 4, dtype=torch.float64)
    compiled = torch.compile(call, backend="specnorm", options={"inner": "aot_eager"})
    results = [compiled(model, x), call(twin, x)]
    for a, b in zip(*results, strict=True):
        assert a.requires_grad == b.requires_grad
        assert relative_error(a, b) < TOLERANCE
    for _, weight, out in results:
        (weight.exp().sum() + out.exp().sum()).backward()
    stored = [m.parametrizations.weight.original.grad for m in (model, twin)]
    assert relative_error(*stored) < TOLERANCE
    results[0][1].detach().zero_()
    assert results[0][0].any()


def double_the_gradient_of_one_read(model, x):
    first, second = model.weight, model.weight
    first.register_hook(lambda gradient: 2 * gradient)
    return F.linear(x, first).sin() * F.linear(x, second)


def differentiate_by_one_read(model, x):
    first, second = model.weight, model.weight
    product = F.linear(x, first).sin() * F.linear(x, second)
    return torch.autograd.grad(product.sum(), first)[0]


# torch 2.11, inside itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("function", [double_the_gradient_of_one_read, differentiate_by_one_read])
def test_the_gradient_of_one_read_is_not_that_of_all(function):
    """In eval mode, where all reads are one weight otherwise."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch does not capture torch.autograd.grad")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        backend = compare(
            torch_sn(nn.Linear(6, 6)).double().eval(),
            function,
            (torch.randn(4, 6, dtype=torch.float64),),
        )
    assert len(backend.fused) == 2
    (call,) = backend.calls(ops.normalize)
    # For torch 2.11 a hook is a function of the weight, which others may read all the same.
    is_function = function is double_the_gradient_of_one_read and torch.__version__ < "2.13"
    assert len(call.args[0]) == (1 if is_function else 2)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_passes_through(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has nothing to initialise
        model = torch_sn(nn.Linear(*shape))
    backend = Fusing()
    out = torch.compile(model, backend=backend)(torch.randn(2, shape[0]))
    assert out.shape == (2, shape[1])
    assert [passed.reason for passed in backend.passed] == ["the weight is empty"]
