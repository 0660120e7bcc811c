"""`torch.compile` with Inductor on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import specnorm_fx
from specnorm_fx import ops, reference, transform, update_
from tests.models import CalledTwice, Case, apply_torch_sn, case_named, relative_error

NEEDS_STORE = pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="torch 2.11 takes any compile for an export, where u and v are copied",
)

# Relative to eager; another order of summation is all that differs.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(gm, backend="inductor", **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(gm, backend=counter, fullgraph=True, **options), counter


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def backward_of_two_forwards(model, real, fake, sign):
    """GAN training's pattern; returns the outputs."""
    model.zero_grad()
    outputs = model(*real), model(*fake)
    (outputs[0].exp() + sign * outputs[1].exp()).mean().backward()
    return outputs


def close(got, want, dtype, factor=1):
    return all(relative_error(a, b) < factor * TOLERANCE[dtype] for a, b in zip(got, want, strict=True))


def vectors(gm):
    return [x for site in gm.sites() for x in (site.u, site.v)]


def conv_and_batch_norm():
    """Small: what takes time is to compile the C++."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1))


BATCH_NORM = Case("batch_norm", conv_and_batch_norm, (2, 4, 4))

# The difference D(real) - D(fake) cancels; what is rounded are its terms. In fp32 the sum is compared.
FP32, FP64 = (torch.float32, 1), (torch.float64, -1)


@pytest.mark.parametrize(
    ("name", "dtype", "sign"),
    [("batch_norm", *FP64), ("labelled", *FP32), ("tied", *FP64)],
    ids=["batch_norm-fp64", "labelled-fp32", "tied-fp64"],
)
def test_equal_to_eager_over_steps_without_recompilation(name, dtype, sign):
    """Two forwards and one backward in every step; one graph for training, one for eval."""
    case = BATCH_NORM if name == "batch_norm" else case_named(name)
    gm = transform(case.make().to(dtype), "*" if name == "labelled" else None)
    eager = copy.deepcopy(gm)
    model, counter = compiled(gm)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    for _ in range(4):
        eager.load_state_dict(gm.state_dict())  # compare steps, not the growth of rounding over steps
        terms = copy.deepcopy(eager)
        real, fake = case.inputs(4, dtype), case.inputs(4, dtype)
        got = backward_of_two_forwards(model, real, fake, sign)
        want = backward_of_two_forwards(eager, real, fake, sign)
        assert close(got, want, dtype)
        backward_of_two_forwards(terms, real, fake, 1)
        scale = max(g.abs().max() for g in gradients(terms))
        for a, b in zip(gradients(gm), gradients(eager), strict=True):
            assert (a - b).abs().max() / scale < TOLERANCE[dtype]
        assert close(vectors(gm), vectors(eager), dtype)
        optimizer.step()
    assert counter.frame_count == 1
    for mode in (False, True, False):
        eager.load_state_dict(gm.state_dict())
        assert close([model.train(mode)(*real)], [eager.train(mode)(*real)], dtype)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("implementation", "memory_format"),
    [
        ("kernels", torch.contiguous_format),
        ("kernels", torch.channels_last),
        ("reference", torch.contiguous_format),
    ],
)
def test_the_gradients_of_convolutions_lie_as_their_weights(monkeypatch, memory_format, implementation):
    """Inductor gives W / sigma and its gradient in channels_last, and autograd would have to turn it back."""
    if implementation == "reference":  # it is held to the same strides
        monkeypatch.setattr(ops, "_kernels", lambda weights: None)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3))
    gm = transform(layers.double()).to(memory_format=memory_format)
    eager = copy.deepcopy(gm)
    model, _ = compiled(gm)
    strides = []
    for weight in (p for p in gm.parameters() if p.dim() == 4):
        weight.register_hook(lambda grad, weight=weight: strides.append((grad.stride(), weight.stride())))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for m in (model, eager):
        m(x.to(memory_format=memory_format)).exp().mean().backward()
    assert len(strides) == 2
    assert all(of_grad == of_weight for of_grad, of_weight in strides)
    scale = max(g.abs().max() for g in gradients(eager))
    for a, b in zip(gradients(gm), gradients(eager), strict=True):
        assert (a - b).abs().max() / scale < TOLERANCE[torch.float64]


def test_dynamic_batch_compiles_once():
    """And calls the backend once: a float option that became an input would make it start anew."""
    gm = transform(nn.Linear(4, 3), eps=1e-10)
    eager = copy.deepcopy(gm)
    model, counter = compiled(gm, dynamic=True)
    for batch in (5, 6, 9):  # unlike any other size, which Dynamo would take for the same symbol
        x = torch.randn(batch, 4)
        assert close([model(x)], [eager(x)], torch.float32)
    assert counter.frame_count == 1


@pytest.mark.parametrize("modes", [(False, True), (True, False)])
def test_eval_and_training_forwards_before_one_backward(modes):
    gm = transform(CalledTwice())
    eager = copy.deepcopy(gm)
    model, _ = compiled(gm)
    inputs = torch.randn(2, 4, 6)
    for m in (model, eager):
        outputs = [m.train(mode)(x).sum() for mode, x in zip(modes, inputs, strict=True)]
        (outputs[0] - outputs[1]).backward()
    assert relative_error(gm.lin.weight.grad, eager.lin.weight.grad) < TOLERANCE[torch.float32]


def test_step_update_and_float64():
    gm = transform(CalledTwice().double(), update="step", n_power_iterations=2)
    eager = copy.deepcopy(gm)
    model, counter = compiled(gm)
    for _ in range(3):
        x = torch.randn(4, 6, dtype=torch.float64)
        assert relative_error(model(x), eager(x)) < TOLERANCE[torch.float64]
        update_(model)
        update_(eager)
        assert torch.equal(gm.get_buffer("lin.weight_u"), eager.get_buffer("lin.weight_u"))
    assert counter.frame_count == 1


def test_copies_of_a_compiled_model():
    gm = transform(CalledTwice())
    model, _ = compiled(gm, backend="aot_eager")
    x = torch.randn(4, 6)
    model(x)
    twin = torch.compile(copy.deepcopy(gm), backend="aot_eager", fullgraph=True)
    assert torch.equal(model(x), twin(x))


def test_a_frozen_model_compiles():
    gm = transform(CalledTwice()).eval()
    model, _ = compiled(specnorm_fx.freeze(gm), backend="aot_eager")
    x = torch.randn(4, 6)
    assert torch.equal(model(x), gm(x))


def test_autocast_inside_a_compiled_model():
    gm = transform(CalledTwice())
    eager = copy.deepcopy(gm)
    model, _ = compiled(gm, backend="aot_eager")
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = model(x), eager(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    assert torch.equal(gm.get_buffer("lin.weight_u"), eager.get_buffer("lin.weight_u"))


def test_one_operator_call_whatever_the_number_of_iterations():
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    for n in (1, 7):
        torch._dynamo.reset()
        case = case_named("discriminator")
        torch.compile(transform(case.make(), n_power_iterations=n), backend=keep)(*case.inputs())
    sizes = [len(graph.graph.nodes) for graph in graphs]
    assert sizes[0] == sizes[1]
    for graph in graphs:
        calls = [n for n in graph.graph.nodes if n.target is ops.normalize]
        assert len(calls) == 1


def test_operator_passes_opcheck():
    weights = [torch.randn(4, 6), torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(4, 4).bfloat16()]
    dims = [0, 1, 0]
    vectors = [reference.initial_vectors(w, d, 1e-12) for w, d in zip(weights, dims, strict=True)]
    us, vs = ([pair[i] for pair in vectors] for i in (0, 1))
    args = (weights, us, vs, [1, 3, 0], [1e-12] * 3, dims, ["uv", "vu", "uv"])
    torch.library.opcheck(ops.singular_vectors, args)


def test_exports_with_buffer_mutations():
    gm = transform(CalledTwice())
    exported = torch.export.export(gm, (torch.randn(2, 6),)).run_decompositions({})
    assert set(exported.graph_signature.buffers_to_mutate.values()) == {"lin.weight_u", "lin.weight_v"}


def decomposed(gm, x):
    program = torch.export.export(gm, (x,)).run_decompositions().module()
    return lambda state, x: torch.func.functional_call(program, state, (x,))


def by_make_fx(gm, x):
    call = make_fx(lambda state, x: torch.func.functional_call(gm, state, (x,)), tracing_mode="fake")
    return call(dict(gm.state_dict(keep_vars=True)), x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's decompositions for jvp
@pytest.mark.parametrize("way", [decomposed, by_make_fx])
def test_what_is_traced_below_autograd_is_differentiable(way):
    """It has `normalize_forward` where autograd has seen `normalize`: all would train but the weights."""
    layers, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(3, 6).double()
    gm = transform(layers.double())
    traced, copied = way(gm, x), copy.deepcopy(gm)
    for batch in (x, x + 1):
        traced(dict(copied.state_dict(keep_vars=True)), batch).exp().sum().backward()
        gm(batch).exp().sum().backward()
    assert close(gradients(copied), gradients(gm), torch.float64)
    assert close(vectors(copied), vectors(gm), torch.float64)

    traced, state = way(gm.eval(), x), dict(gm.state_dict())
    tangent = torch.randn_like(state["0.weight"])
    got, want = (
        torch.func.jvp(lambda w, f=f: f({**state, "0.weight": w}, x), (state["0.weight"],), (tangent,))[1]
        for f in (traced, lambda state, x: torch.func.functional_call(gm, state, (x,)))
    )
    assert relative_error(got, want) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("update", ["step", "forward"])
def test_torch_func_in_one_compiled_step(update):
    """A gradient penalty by hand; in training mode u and v are written through the transformation.

    One that goes through Inductor is in test_gradient_penalty.py.
    """
    gm = transform(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double(), update=update)
    eager = copy.deepcopy(gm)
    buffers = dict(gm.named_buffers())
    parameters = {name: p.detach() for name, p in gm.named_parameters()}
    x = torch.randn(5, 4, dtype=torch.float64)

    def penalty(parameters):
        def score(x):
            return torch.func.functional_call(gm, (parameters, buffers), (x,)).sum()

        return (torch.func.grad(score)(x).norm(dim=1) - 1).square().mean()

    got = torch.compile(torch.func.grad(penalty), backend="aot_eager", fullgraph=True)(parameters)

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(eager(leaf).sum(), leaf, create_graph=True)
    (slope.norm(dim=1) - 1).square().mean().backward()
    for name, parameter in eager.named_parameters():
        if parameter.grad is not None:  # the last bias has no part in the slope
            assert relative_error(got[name], parameter.grad) < 1e-13, name
    assert close(vectors(gm), vectors(eager), torch.float64)


@NEEDS_STORE
def test_inductor_makes_no_kernel_of_its_own_for_spectral_norm():
    """Neither to store u and v, for which the C++ compiler would have to run."""
    counts = []
    for make in (lambda model: model, transform):
        torch._dynamo.reset()
        torch._inductor.metrics.reset()
        model, _ = compiled(make(CalledTwice()))
        model(torch.randn(4, 6)).sum().backward()
        counts.append(torch._inductor.metrics.generated_kernel_count)
    assert counts[0] == counts[1] > 0


def test_inductors_cpp_wrapper():
    """It takes no list beside other results; and a list of one, the gradient of one weight, for a tensor."""
    gm = transform(nn.Sequential(nn.Linear(3, 4)))
    eager = copy.deepcopy(gm)
    fast = torch.compile(gm, fullgraph=True, options={"cpp_wrapper": True})
    x = torch.randn(2, 3)
    for model in (fast, eager):
        model(x).exp().sum().backward()
    assert close([*gradients(gm), *vectors(gm)], [*gradients(eager), *vectors(eager)], torch.float32)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("way", ["transform", "backend"])
@pytest.mark.parametrize(
    "option", [{"activation_memory_budget": 0.5}, {"aggressive_recomputation": True}], ids=["budget", "all"]
)
def test_a_partitioner_that_saves_memory_does_not_iterate_again(option, way, implementation):
    """By the one of Inductor, without Inductor."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()
    given, inner = {"implementation": implementation}, "aot_eager_decomp_partition"
    if way == "transform":
        model = transform(model, **given)
        fast = torch.compile(copy.deepcopy(model), backend=inner)
    else:
        apply_torch_sn(model, ("0.weight", "2.weight"), nn.utils.parametrizations.spectral_norm)
        fast = torch.compile(copy.deepcopy(model), backend="specnorm", options={**given, "inner": inner})
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch._functorch.config.patch(option):
        for m in (fast, model):
            m(x).exp().sum().backward()
    assert close(gradients(fast), gradients(model), torch.float64)
    assert close(fast.buffers(), model.buffers(), torch.float64)


# Which PyTorch keeps from being shown, but not from being an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_autograd_of_an_eager_forward():
    """Without a break, and with the operator for the gradient."""
    gm = transform(nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double())
    twin = copy.deepcopy(gm)
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(2, 3, dtype=torch.float64)
    losses = [model(x).exp().sum() for model in (gm, twin)]
    with compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
        losses[0].backward()
    losses[1].backward()
    assert close(gradients(gm), gradients(twin), torch.float64)
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert targets.count(ops._normalize_backward) == 1


@pytest.mark.parametrize(
    "compiles", [False, pytest.param(True, marks=NEEDS_STORE)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_an_ensemble_in_training(shared, implementation, compiles):
    """By vmap: each model moves its own u and v, and several cannot move one."""
    gm = transform(nn.Linear(4, 3), implementation=implementation)
    models = [copy.deepcopy(gm) for _ in range(2)]
    for model in models:
        nn.init.normal_(model.weight)
    state = {name: torch.stack([model.state_dict()[name] for model in models]) for name in gm.state_dict()}
    parameters = {name: state[name] for name, _ in gm.named_parameters()}
    buffers = {name: state[name] for name, _ in gm.named_buffers()}
    x = torch.randn(5, 4)
    if shared:
        buffers = dict(gm.named_buffers())

    def run(parameters, buffers):
        return torch.func.functional_call(gm, (parameters, buffers), (x,))

    in_dims = (0, None if shared else 0)
    ensemble = torch.vmap(run, in_dims)
    if compiles:
        ensemble = torch.compile(ensemble, backend="aot_eager")
    if shared:
        with pytest.raises(RuntimeError, match="the models cannot share one"):
            ensemble(parameters, buffers)
        return
    outputs = ensemble(parameters, buffers)
    for k, model in enumerate(models):
        assert relative_error(outputs[k], model(x)) < 1e-6
        for name, buffer in model.named_buffers():
            assert torch.equal(buffers[name][k], buffer)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_functionalized_in_training(implementation):
    """The graph of a training step by `make_fx`, with the new u and v written back into the buffers."""
    gm = transform(nn.Linear(4, 3), implementation=implementation)
    twin, x = copy.deepcopy(gm), torch.randn(5, 4)
    state = [
        {name: tensor.detach() for name, tensor in named}
        for named in (gm.named_parameters(), gm.named_buffers())
    ]

    def run(parameters, buffers):
        return torch.func.functional_call(gm, (parameters, buffers), (x,))

    traced = make_fx(torch.func.functionalize(run))(*copy.deepcopy(state))
    for _ in range(2):
        assert relative_error(traced(*state), twin(x)) < 1e-6
        for name, buffer in twin.named_buffers():
            assert torch.equal(state[1][name], buffer)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_complex_weights(implementation):
    """By aot_eager: Inductor has no operators with several complex results."""
    gm = transform(nn.Linear(4, 6, dtype=torch.complex128), implementation=implementation)
    eager = copy.deepcopy(gm)
    model, _ = compiled(gm, "aot_eager")
    x = torch.randn(3, 4, dtype=torch.complex128)
    for _ in range(3):
        for m in (model, eager):
            m(x).abs().sum().backward()
    for ours, theirs in zip(
        (*gm.parameters(), *gm.buffers()), (*eager.parameters(), *eager.buffers()), strict=True
    ):
        assert relative_error(ours.detach(), theirs.detach()) < 1e-14
        if ours.grad is not None:
            assert relative_error(ours.grad, theirs.grad) < 1e-14
