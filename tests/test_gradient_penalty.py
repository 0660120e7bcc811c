"""Gradient penalties: compiled and eager helper against double backward by hand, and what it is made of."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_sn

import specnorm_fx
from specnorm_fx import gradient_penalty, ops, transform
from tests.models import Labelled, apply_torch_sn

# Relative to the largest gradient.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def conv(norm=nn.Identity):
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1))


def with_torch_sn(sn):
    return apply_torch_sn(mlp(), ("0.weight", "2.weight"), sn)


# What to build, and the shape of a sample.
CRITICS = {
    "mlp": (lambda: transform(mlp()), (6,)),
    "mlp_step": (lambda: transform(mlp(), update="step"), (6,)),
    "mlp_reference": (lambda: transform(mlp(), implementation="reference"), (6,)),
    "mlp_plain": (mlp, (6,)),
    "mlp_torch_sn": (lambda: with_torch_sn(parametrizations.spectral_norm), (6,)),
    "mlp_legacy_sn": (lambda: with_torch_sn(legacy_sn), (6,)),
    "layer": (lambda: transform(nn.Sequential(nn.Linear(6, 1), nn.Tanh())), (6,)),
    "conv": (lambda: transform(conv()), (1, 4, 4)),
    "batch_norm": (lambda: transform(conv(nn.BatchNorm2d)), (1, 4, 4)),
    "labelled": (lambda: transform(Labelled(), "*"), (1, 6, 6)),
}


def build(name, dtype):
    make, shape = CRITICS[name]
    return make().to(dtype), shape


def batch_of(name, shape, dtype):
    """real, fake, alpha and the labels, if there are any."""
    labels = (torch.randint(10, (4,)),) if name == "labelled" else ()
    real, fake = torch.randn(2, 4, *shape, dtype=dtype)
    return real, fake, torch.rand(4, dtype=dtype), *labels


def r1_step(model, real, fake, alpha, *labels):
    penalty, scores = gradient_penalty.r1(model, real, *labels, return_output=True)
    return F.softplus(-scores).mean() + F.softplus(model(fake, *labels)).mean() + 5 * penalty


def r2_step(model, real, fake, alpha, *labels):
    penalty, scores = gradient_penalty.r2(model, fake, *labels, return_output=True)
    return F.relu(1 - model(real, *labels)).mean() + F.relu(1 + scores).mean() + 5 * penalty


def wgan_gp_step(model, real, fake, alpha, *labels):
    penalty = gradient_penalty.wgan_gp(model, real, fake, *labels, alpha=alpha)
    return model(fake, *labels).mean() - model(real, *labels).mean() + 10 * penalty


def squared_norms(model, x, *labels):
    """By hand: of the slope at each sample, and the scores."""
    x = x.clone().requires_grad_()
    scores = model(x, *labels)
    (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return torch.stack([(row * row).sum() for row in slope]), scores


def r1_by_hand(model, real, fake, alpha, *labels):
    squares, scores = squared_norms(model, real, *labels)
    return F.softplus(-scores).mean() + F.softplus(model(fake, *labels)).mean() + 5 * squares.mean()


def r2_by_hand(model, real, fake, alpha, *labels):
    squares, scores = squared_norms(model, fake, *labels)
    return F.relu(1 - model(real, *labels)).mean() + F.relu(1 + scores).mean() + 5 * squares.mean()


def wgan_gp_by_hand(model, real, fake, alpha, *labels):
    between = torch.stack([a * x + (1 - a) * y for a, x, y in zip(alpha, real, fake, strict=True)])
    squares, _ = squared_norms(model, between, *labels)
    loss = model(fake, *labels).mean() - model(real, *labels).mean()
    return loss + 10 * (squares.sqrt() - 1).square().mean()


STEPS = {
    "r1": (r1_step, r1_by_hand),
    "r2": (r2_step, r2_by_hand),
    "wgan_gp": (wgan_gp_step, wgan_gp_by_hand),
}


def compiled(step, model, backend):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(partial(step, model), backend=counter, fullgraph=True), counter


def check(name, penalty, dtype, backend):
    """Two steps of the helper equal those by hand: loss, gradients, u and v and all other buffers."""
    model, shape = build(name, dtype)
    twin = copy.deepcopy(model)
    step, by_hand = STEPS[penalty]
    run, counter = (partial(step, model), None) if backend is None else compiled(step, model, backend)
    for _ in range(2):
        batch = batch_of(name, shape, dtype)
        model.zero_grad()
        twin.zero_grad()
        got, want = run(*batch), by_hand(twin, *batch)
        got.backward()
        want.backward()
        assert (got - want).abs() < TOLERANCE[dtype] * want.abs()
        scale = max(p.grad.abs().max() for p in twin.parameters() if p.grad is not None)
        for (fqn, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                assert (p.grad - q.grad).abs().max() / scale < TOLERANCE[dtype], fqn
        for (fqn, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert (a - b).abs().max() < TOLERANCE[dtype], fqn
    if counter is not None:
        assert counter.frame_count == 1


@pytest.mark.parametrize("penalty", STEPS)
@pytest.mark.parametrize("name", CRITICS)
def test_eager_equals_double_backward_by_hand(name, penalty):
    check(name, penalty, torch.float64, None)


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        *[(name, "wgan_gp") for name in CRITICS if name not in ("mlp", "layer", "conv")],
        ("labelled", "r2"),
    ],  # r1: test_inductor
)
def test_one_graph_without_recompilation(name, penalty):
    check(name, penalty, torch.float64, "aot_eager")


@pytest.mark.parametrize("name", ["mlp_torch_sn", "mlp_legacy_sn"])
def test_torchs_spectral_norm_is_fused_in_the_step(name):
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return lookup_backend("aot_eager")(graph_module, inputs)

    backend = partial(specnorm_fx.specnorm, options={"inner": keep})
    check(name, "wgan_gp", torch.float64, backend)
    (calls,) = ([n for n in gm.graph.nodes if n.target is ops.normalize] for gm in graphs)
    assert [len(call.args[0]) for call in calls] == [2, 2, 2]  # three forwards of two weights


def test_inductor():
    """D(real) with its penalty, D(fake), one backward: of one layer, whose C++ compiles fast."""
    check("layer", "r1", torch.float32, "inductor")


def test_the_fused_operators_serve_the_compiled_step():
    """Forward by one call for each forward of the model, and the gradient, through both backwards, too."""
    forward, backward = [], []

    def into(graphs):
        def keep(graph_module, inputs):
            graphs.append(graph_module)
            return make_boxed_func(graph_module.forward)

        return keep

    model = transform(mlp())
    backend = aot_autograd(fw_compiler=into(forward), bw_compiler=into(backward))
    step = torch.compile(partial(wgan_gp_step, model), fullgraph=True, backend=backend)
    step(*batch_of("mlp", (6,), torch.float32)).backward()
    for (graph_module,), name, other in (
        (forward, "normalize_forward", "normalize_backward"),
        (backward, "normalize_backward", "normalize_forward"),
    ):
        targets = [str(node.target) for node in graph_module.graph.nodes]
        assert targets.count(f"specnorm_fx.{name}.{ops.REVISION}") == 3
        assert targets.count(f"specnorm_fx.{other}.{ops.REVISION}") == 0


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_every_forward_iterates_once(backend):
    model = transform(mlp().double(), implementation="reference")
    twin = copy.deepcopy(model)
    step = wgan_gp_step if backend is None else torch.compile(wgan_gp_step, backend=backend, fullgraph=True)
    step(model, *batch_of("mlp", (6,), torch.float64))
    specnorm_fx.warm_up_(twin, n=3)
    for site, iterated in zip(model.sites(), twin.sites(), strict=True):
        assert torch.equal(site.u, iterated.u)
        assert torch.equal(site.v, iterated.v)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_gradient_of_zero(backend):
    """No NaN from the norm's derivative, and nothing that pulls away from zero."""
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    run = gradient_penalty.wgan_gp
    run = run if backend is None else torch.compile(run, backend=backend, fullgraph=True)
    penalty = run(model, torch.randn(4, 6), torch.randn(4, 6))
    assert penalty == 1
    penalty.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_alpha_is_drawn_for_each_sample():
    """From D(x) = x^2 / 2, whose slope at x is x."""
    seen = []

    def model(x):
        seen.append(x)
        return x.square() / 2

    real, fake = torch.full((1000, 1), 3.0), torch.full((1000, 1), 2.0)
    penalty = gradient_penalty.wgan_gp(model, real, fake)
    (x,) = seen
    assert len(x.unique()) > 900
    assert 2 <= x.min() < 2.1
    assert 2.9 < x.max() <= 3
    assert torch.isclose(penalty, (x - 1).square().mean())


def test_alpha_is_not_rounded_to_the_lesser_of_two_dtypes():
    """From D(x) = x^2 / 2, at x = alpha."""
    real, fake, alpha = torch.ones(8, 1, dtype=torch.bfloat16), torch.zeros(8, 1), torch.rand(8)
    penalty = gradient_penalty.wgan_gp(lambda x: x.square() / 2, real, fake, alpha=alpha)
    assert torch.isclose(penalty, (alpha - 1).square().mean())


def test_what_flows_where():
    model = transform(mlp())
    real, fake = torch.randn(2, 4, 6).requires_grad_().unbind()
    gradient_penalty.r1(model, real).backward()
    gradient_penalty.wgan_gp(model, real, fake).backward()
    assert real.grad_fn is not None  # it could have been reached
    plain = torch.randn(4, 6)
    gradient_penalty.r1(model, plain).backward()
    assert not plain.requires_grad
    assert model.get_parameter("0.weight").grad.any()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(gradient_penalty.r2(model, fake), fake)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_several_outputs_inputs_and_single_numbers(backend):
    """D(x, y) = (x1 + x2) y, [b, 2] and [b]: the slope is (y, y, x1 + x2)."""

    def model(x, y, power):
        scores = x.sum(1) * y
        return [scores, {"power": scores**power}]

    def penalize(x, y, fake_x, fake_y):
        def score(output):
            return output[0]

        penalty, output = gradient_penalty.r1(model, (x, y), 2, score=score, return_output=True)
        return (
            penalty,
            output,
            gradient_penalty.wgan_gp(model, [x, y], [fake_x, fake_y], 2, alpha=alpha, score=score),
        )

    alpha = torch.tensor([0.0, 0.25, 1.0])
    (x, fake_x), (y, fake_y) = torch.randn(2, 3, 2), torch.randn(2, 3)
    run = penalize if backend is None else torch.compile(penalize, backend=backend, fullgraph=True)
    penalty, (scores, others), wgan_gp = run(x, y, fake_x, fake_y)
    assert torch.allclose(penalty, (2 * y**2 + x.sum(1) ** 2).mean())
    assert torch.allclose(scores, x.sum(1) * y)
    assert torch.allclose(others["power"], scores**2)
    x = fake_x + alpha[:, None] * (x - fake_x)
    y = fake_y + alpha * (y - fake_y)
    assert torch.allclose(wgan_gp, ((2 * y**2 + x.sum(1) ** 2).sqrt() - 1).square().mean())


def test_scores_of_patches_are_summed_unless_said_otherwise():
    patches = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(patches.weight, 3.0)
    x = torch.randn(2, 1, 4, 4)
    assert torch.isclose(gradient_penalty.r1(patches, x), torch.tensor(16 * 9.0))
    mean = gradient_penalty.r1(patches, x, score=lambda scores: scores.mean((1, 2, 3)))
    assert torch.isclose(mean, torch.tensor(9 / 16))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autocast_and_half_precision(backend):
    model = transform(mlp())
    run = gradient_penalty.wgan_gp
    run = run if backend is None else torch.compile(run, backend=backend, fullgraph=True)
    batch, alpha = torch.randn(2, 4, 6), torch.rand(4)
    want = gradient_penalty.wgan_gp(copy.deepcopy(model), *batch, alpha=alpha)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = run(model, *batch, alpha=alpha)
    penalty.backward()
    half = run(copy.deepcopy(model).bfloat16(), *batch.bfloat16(), alpha=alpha.bfloat16())
    half.backward()
    for got in (penalty, half):
        assert got.dtype == torch.float32
        assert torch.isclose(got, want, rtol=0.02)
    assert model.get_parameter("0.weight").grad.isfinite().all()


def test_a_compiled_model_in_a_compiled_step():
    """And alone PyTorch refuses it, with its own error."""
    model = torch.compile(transform(mlp()), backend="aot_eager")
    x = torch.randn(4, 6)
    penalize = torch.compile(partial(gradient_penalty.r1, model), backend="aot_eager", fullgraph=True)
    penalize(x).backward()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient_penalty.r1(model, x).backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's, on the way to the error
def test_a_graph_break_in_the_model_is_an_error():
    """Not a wrong gradient: the halves of the model would be in two graphs."""
    inner = transform(mlp())

    def model(x):
        x = inner(x)
        torch._dynamo.graph_break()
        return x.square()

    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.compile(gradient_penalty.r1, backend="aot_eager")(model, torch.randn(4, 6))


def test_another_batch_size():
    model = transform(mlp())
    run, counter = compiled(r1_step, model, "aot_eager")
    for batch in (4, 7, 9, 11):
        run(torch.randn(batch, 6), torch.randn(batch, 6), None).backward()
    assert counter.frame_count == 2  # one for the first size, one for all


def test_errors():
    model, x = transform(mlp()), torch.randn(4, 6)
    with pytest.raises(TypeError, match=r"samples must be floating tensors, got torch.int64"):
        gradient_penalty.r1(model, torch.ones(4, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"samples must be floating tensors, got str"):
        gradient_penalty.r1(model, {"x": x})
    for samples in ([x, x[:1]], [], torch.ones(())):
        with pytest.raises(ValueError, match=r"samples must be of one batch size, \[b, \.\.\.\], got \["):
            gradient_penalty.wgan_gp(model, samples, samples)
    with pytest.raises(ValueError, match=r"shape \(4,\), got 0.5"):
        gradient_penalty.wgan_gp(model, x, x, alpha=0.5)
    with pytest.raises(TypeError, match=r"scores must be a tensor, got list.*score="):
        gradient_penalty.r2(lambda x: [model(x)], x)
    with pytest.raises(ValueError, match=r"shape of real, \[\(4, 6\)\], got \[\(1, 6\)\]"):
        gradient_penalty.wgan_gp(model, x, x[:1])
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(4, 1\)"):
        gradient_penalty.wgan_gp(model, x, x, alpha=torch.rand(4, 1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients enabled"):
        gradient_penalty.r1(model, x)
