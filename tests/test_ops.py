"""The operators: registered as PyTorch wants them, differentiable, transformable; what runs where."""

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from specnorm_fx import cpu_kernels, ops, reference, transform
from tests.models import CalledTwice, Discriminator, relative_error


def operator(name):
    return getattr(getattr(torch.ops.specnorm_fx, name), ops.REVISION)


def arguments(dtype=torch.float64, n=(1, 3, 0)):
    """Three weights of one compute dtype."""
    weights = [
        torch.randn(4, 6, dtype=dtype),
        torch.randn(3, 5, 2, dtype=dtype),
        torch.randn(4, 4, dtype=dtype),
    ]
    dims = [0, 1, 0]
    vectors = [reference.initial_vectors(w, d, 1e-12) for w, d in zip(weights, dims, strict=True)]
    us, vs = ([pair[i] for pair in vectors] for i in (0, 1))
    return weights, us, vs, list(n), [1e-12] * 3, dims, ["uv", "vu", "uv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["normalize_forward", "power_iteration", "singular_vectors"])
def test_opcheck(name, dtype):
    torch.library.opcheck(operator(name), arguments(dtype))


@pytest.mark.parametrize(
    "name", ["normalize_forward", "normalize_backward", "power_iteration", "singular_vectors", "store_"]
)
def test_returns_what_cpp_wrapper_takes(name):
    """Tensors, or one list of them, beside which there is nothing."""
    returns = [str(argument.type) for argument in operator(name)._schema.returns]
    assert returns == ["List[Tensor]"] or set(returns) <= {"Tensor"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_weights_with_gaps(dtype):
    """Of which the copy without gaps has its dimensions in the order that is promised."""
    weights, *others = arguments(dtype)
    turned = [torch.randn(12, 8, dtype=dtype).t()[::2, ::2], torch.randn(2, 3, 10, dtype=dtype)]
    weights = [turned[0], turned[1].permute(1, 2, 0)[:, ::2], weights[2]]
    assert [tuple(w.shape) for w in weights] == [(4, 6), (3, 5, 2), (4, 4)]
    torch.library.opcheck(operator("normalize_forward"), (weights, *others))


def test_arguments_by_keyword():
    weights, us, vs, n, eps, dims, orders = arguments()
    want = ops.normalize(weights, us, vs, n, eps, dims, orders)
    got = ops.normalize(weights, us, vs, n_power_iterations=n, eps=eps, dims=dims, orders=orders)
    assert torch.equal(got[0], want[0])


def test_devices_that_differ_are_torchs_own_error():
    weights, us, vs, *options = arguments(torch.float32)
    weights[1] = weights[1].to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        ops.normalize(weights, us, vs, *options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_the_gradient(dtype):
    weights, us, vs, n, eps, dims, orders = arguments(dtype)
    vectors, sigmas, normalized = ops.normalize(weights, us, vs, n, eps, dims, orders)
    grads = [torch.randn_like(normalized[0]), None, None]
    normalized[1] = normalized[1].transpose(1, 2).contiguous().transpose(1, 2)  # channels_last
    grads[1] = torch.randn_like(normalized[1])
    for given in (grads, [None, grads[1], None]):
        for contiguous in (True, False):
            torch.library.opcheck(
                operator("normalize_backward"),
                (given, normalized, vectors, sigmas, eps, dims, [contiguous] * 3),
            )


def test_gradients_of_first_and_second_order():
    weights, *others = arguments(n=(0, 0, 0))

    def normalized(*weights):
        return tuple(ops.normalize(list(weights), *others)[2])

    leaves = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(normalized, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(normalized, leaves)


def test_the_gradient_by_kernel_is_the_one_by_operations():
    """`create_graph` takes another way to the same numbers."""
    weights, *others = arguments()
    leaves = [w.requires_grad_() for w in weights]
    grads = [torch.randn_like(w) for w in weights]
    by_kernel = torch.autograd.grad(ops.normalize(leaves, *others)[2], leaves, grads)
    by_operations = torch.autograd.grad(ops.normalize(leaves, *others)[2], leaves, grads, create_graph=True)
    for a, b in zip(by_kernel, by_operations, strict=True):
        assert not a.requires_grad
        assert b.requires_grad
        assert relative_error(a, b) < 1e-13


def test_torch_func():
    weights, *others = arguments(n=(1, 1, 1))

    def loss(weight):
        return ops.normalize([weight, *weights[1:]], *others)[2][0].pow(3).sum()

    leaf = weights[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert relative_error(torch.func.grad(loss)(weights[0]), want) < 1e-13
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(weights[0])
    want = torch.autograd.functional.hessian(loss, weights[0])
    assert relative_error(hessian, want) < 1e-12


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_an_ensemble_under_vmap(implementation):
    models = [transform(CalledTwice().double(), implementation=implementation).eval() for _ in range(3)]
    x = torch.randn(4, 6, dtype=torch.float64)
    # Not stack_module_state: to PyTorch every GraphModule is of a class of its own.
    parameters, buffers = (
        {name: torch.stack([dict(part(m))[name] for m in models]).detach() for name, _ in part(models[0])}
        for part in (nn.Module.named_parameters, nn.Module.named_buffers)
    )

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    got = torch.vmap(call)(parameters, buffers)
    assert relative_error(got, torch.stack([model(x) for model in models])) < 1e-14


def test_what_is_shared_under_vmap_keeps_what_is_shared():
    own, shared, vectors = torch.zeros(3, 4), torch.zeros(4), torch.randn(3, 4)
    alone = vectors[0].clone()
    store = torch.vmap(lambda buffer, x: ops.store_([buffer, shared], [x, alone]), out_dims=None)
    store(own, vectors)
    assert torch.equal(own, vectors)
    assert torch.equal(shared, alone)


def test_weights_are_grouped_by_device_and_compute_dtype():
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float64]
    assert ops.groups([torch.empty(2, 2, dtype=dtype) for dtype in dtypes]) == [[0, 2], [1, 3]]
    assert ops.groups([torch.empty(2, 2), torch.empty(2, 2, device="meta")]) == [[0], [1]]


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_model_of_several_dtypes(implementation):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.float64)
            self.c = nn.Linear(6, 6, dtype=torch.complex64)

        def forward(self, x):
            return self.c(self.b(self.a(x).double()).to(torch.complex64)).abs()

    gm = transform(Mixed(), implementation=implementation)
    twin = copy.deepcopy(gm)
    gm(torch.randn(2, 6)).sum().backward()
    for site, start in zip(gm.sites(), twin.sites(), strict=True):
        u, v = reference.power_iteration(start.matrix(), *start.vectors(), 1, 1e-12)
        assert relative_error(site.u.abs(), u.abs()) < 1e-5
        assert relative_error(site.v.abs(), v.abs()) < 1e-5
        assert site.weight.grad.isfinite().all()


def on(device, dtype=torch.float32):
    """As much of a weight as the choice of kernels looks at: there may be no such device."""
    return SimpleNamespace(device=device, is_cpu=device == "cpu", is_cuda=device == "cuda", dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_read_one_dtype(device, monkeypatch):
    """Also where another one has the same compute dtype."""
    monkeypatch.setattr(ops, "_cuda_kernels", SimpleNamespace)

    single, half = (on(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert ops._kernels([single, single]) is not None
    assert ops._kernels([single, half]) is None


def test_without_a_c_compiler_cuda_goes_by_the_reference(monkeypatch):
    triton_kernels = pytest.importorskip("specnorm_fx.triton_kernels")

    def start():
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton_kernels, "start", start)
    monkeypatch.setattr(ops, "_cuda_kernels", functools.cache(ops._cuda_kernels.__wrapped__))
    with pytest.warns(UserWarning, match="python3-dev.*got: Failed to find C compiler"):
        assert ops._kernels([on("cuda")]) is None


def test_rocm_goes_by_the_reference(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(ops, "_cuda_kernels", functools.cache(ops._cuda_kernels.__wrapped__))
    assert ops._kernels([on("cuda")]) is None


def test_only_part_of_the_weights_trains():
    gm = transform(Discriminator())
    frozen = gm.get_parameter("blocks.0.conv1.weight").requires_grad_(False)
    gm(torch.randn(2, 3, 8, 8)).sum().backward()
    assert frozen.grad is None
    assert gm.fc.weight.grad is not None


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_weight_that_is_not_used_has_no_gradient(create_graph):
    """An optimizer passes it over, where one of zeros would decay it."""
    weights, *rest = arguments()
    weights = [weight.requires_grad_() for weight in weights]
    *_, normalized = ops.normalize(weights, *rest)
    gradients = torch.autograd.grad(
        normalized[0].sum(), weights, create_graph=create_graph, allow_unused=True
    )
    assert [gradient is None for gradient in gradients] == [False, True, True]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_result_of_a_frozen_weight_carries_no_gradient(backend):
    """Backward would go through the layers before it, for nothing."""
    weights, *rest = arguments()
    plain = [weight.clone().requires_grad_() for weight in weights]
    weights = [weight.requires_grad_(k != 1) for k, weight in enumerate(weights)]
    normalize = ops.normalize if backend is None else torch.compile(ops.normalize, backend=backend)
    *_, normalized = normalize(weights, *rest)
    *_, wanted = ops.normalize(plain, *rest)
    assert [x.requires_grad for x in normalized] == [True, False, True]
    assert all(map(torch.equal, normalized, wanted))
    for results in (normalized, wanted):
        sum(x.square().sum() * x.sum() for x in results).backward()
    assert weights[1].grad is None
    assert all(torch.equal(weights[k].grad, plain[k].grad) for k in (0, 2))


def test_a_device_without_kernels_goes_by_the_reference(monkeypatch):
    given = arguments()
    want = ops.normalize(*given)
    monkeypatch.setattr(ops, "_kernels", lambda weights: None)
    got = ops.normalize(*given)
    us, _ = reference.singular_vectors(*(column[1] for column in given))
    assert torch.equal(got[0].split([4, 6, 5, 6, 4, 4])[2], us)
    for a, b in zip((got[0], got[1], *got[2]), (want[0], want[1], *want[2]), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 1e-13
    vectors, sigmas = ops.power_iteration(*given)
    assert torch.equal(vectors, got[0])
    assert torch.equal(sigmas, got[1])
    leaves = [w.requires_grad_() for w in given[0]]
    grads = torch.autograd.grad(sum(w.sum() for w in ops.normalize(leaves, *given[1:])[2]), leaves)
    monkeypatch.undo()
    again = torch.autograd.grad(sum(w.sum() for w in ops.normalize(leaves, *given[1:])[2]), leaves)
    for a, b in zip(grads, again, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_inside(dtype, create_graph, monkeypatch):
    """Of the reference, with products that autocast rounds, as on CUDA."""

    def product(matrix, vector, _mv=torch.mv):
        to = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else matrix.dtype
        return _mv(matrix.to(to), vector.to(to)).to(matrix.dtype)

    monkeypatch.setattr(torch, "mv", product)
    monkeypatch.setattr(ops, "_kernels", lambda weights: None)
    weights, *others = arguments(torch.float32)
    leaves = [w.requires_grad_() for w in weights]
    grads = [torch.randn_like(w) for w in weights]

    def run():
        vectors, sigmas, normalized = ops.normalize(leaves, *others)
        gradients = torch.autograd.grad(normalized, leaves, grads, create_graph=create_graph)
        return vectors, sigmas, *normalized, *gradients

    want = run()
    with torch.autocast("cpu", dtype=dtype):
        got = run()
    assert all(map(torch.equal, got, want))


SIZE = 8 * 8 * 4  # bytes of each weight of what follows

groups_of_five = pytest.mark.parametrize(
    ("together", "groups"),
    [
        (1, [[4], [3], [2], [1], [0]]),
        (SIZE + 1, [[4], [3, 2], [1, 0]]),
        (2 * SIZE, [[4], [3, 2], [1, 0]]),
        (5 * SIZE, [[4, 3, 2, 1, 0]]),
        (ops.GRADIENT_GROUP, [[4, 3, 2, 1, 0]]),
    ],
)


def five_layers(backward_reaches=None):
    """A function of five weights, which says when backward reaches a layer if it is to, and the weights."""
    weights, us, vs = ([torch.randn(*shape) for _ in range(5)] for shape in ((8, 8), (8,), (8,)))
    options = ([1] * 5, [1e-12] * 5, [0] * 5, ["uv"] * 5)

    def function(*weights):
        x = torch.ones(2, 8)
        for k, weight in enumerate(ops.normalize(list(weights), us, vs, *options)[2]):
            x = x @ weight
            if backward_reaches is not None:
                x.register_hook(lambda _, k=k: backward_reaches(k))
        return x.sum()

    return function, [weight.requires_grad_() for weight in weights]


@groups_of_five
def test_gradients_come_in_groups_as_soon_as_backward_is_past_them(monkeypatch, together, groups):
    events = []
    function, weights = five_layers(lambda k: events.append(("layer", k)))
    want = torch.autograd.grad(function(*weights), weights)
    monkeypatch.setattr(ops, "GRADIENT_GROUP", together)
    for k, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, k=k: events.append(("weight", k)))
    events.clear()
    function(*weights).backward()
    assert all(map(torch.equal, want, [weight.grad for weight in weights]))
    for group in groups:
        now, events = events[: 2 * len(group)], events[2 * len(group) :]
        assert now[: len(group)] == [("layer", k) for k in group]
        assert sorted(now[len(group) :], reverse=True) == [("weight", k) for k in group]
    assert events == []


@groups_of_five
def test_compiled_gradients_come_in_groups_too(monkeypatch, together, groups):
    monkeypatch.setattr(ops, "GRADIENT_GROUP", together)
    function, weights = five_layers()
    graphs = []

    def keep(gm, _):
        graphs.append([node.target for node in gm.graph.nodes])
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward), bw_compiler=keep)
    got = torch.autograd.grad(torch.compile(function, backend=backend, fullgraph=True)(*weights), weights)
    want = torch.autograd.grad(function(*weights), weights)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    (targets,) = graphs
    calls = [k for k, target in enumerate(targets) if target is operator("normalize_backward")]
    products = [k for k, target in enumerate(targets) if target is torch.ops.aten.mm.default]
    assert len(calls) == len(groups)
    # Of each layer but the first two products: the gradients of its input and of its weight.
    done = [sum(k < call for k in products) for call in calls]
    assert done == [sum(map(len, groups[: k + 1])) * 2 for k in range(len(groups) - 1)] + [9]


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_calls_go_past_the_dispatcher(backend, monkeypatch):
    """And get the same bits; but a profiler is to see the operators."""
    weights, *others = arguments()
    leaves = [weight.requires_grad_() for weight in weights]
    observed, is_observed = [], ops._is_observed
    monkeypatch.setattr(ops, "_is_observed", lambda x: observed.append(is_observed(x)) or observed[-1])
    normalize = ops.normalize
    if backend is not None:  # Dynamo would look at the operator that this file gives it, so a function
        normalize = torch.compile(lambda *given: ops.normalize(*given), backend=backend, fullgraph=True)

    def run():
        normalized = normalize(leaves, *others)
        return [*normalized[2], *torch.autograd.grad(sum(w.sum() for w in normalized[2]), leaves)]

    run()
    observed.clear()
    past = run()
    assert observed == [False] * (3 if backend is None else 2)
    with torch.profiler.profile(acc_events=True) as profile:
        through = run()
    seen = {event.name.partition("::")[2] for event in profile.events() if "specnorm_fx::" in event.name}
    assert seen == {"normalize_forward", "normalize_backward"} | ({"normalize"} if backend is None else set())
    assert all(map(torch.equal, past, through))


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        SEEN.append(func)
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        SEEN.append(func)
        raise NotImplementedError


SEEN = []


def traced(tracing_mode, pre_dispatch):
    def trace(weights, us, vs, options):
        def function(*weights):
            return ops.normalize(list(weights), us, vs, *options)[2]

        trace = make_fx(
            function, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True
        )
        return [node.target for node in trace(*weights).graph.nodes]

    return trace


class WatchFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        SEEN.append(func)
        return func(*args, **kwargs or {})


def watched(mode):
    def watch(weights, us, vs, options):
        SEEN.clear()
        with mode():
            ops.normalize(weights, us, vs, *options)
        return SEEN

    return watch


def of_a_subclass(weights, us, vs, options):
    SEEN.clear()
    weights = [weight.as_subclass(Subclass) for weight in weights]
    with contextlib.suppress(NotImplementedError):
        ops.normalize(weights, us, vs, *options)
    return SEEN


def jit_traced(weights, us, vs, options):
    """It does not know lists of text, and says so: else the trace would hold the results as constants."""
    with pytest.raises(RuntimeError, match="unsupported input list type: str"):
        torch.jit.trace(lambda *weights: ops.normalize(list(weights), us, vs, *options)[2], (*weights,))
    return [operator("normalize_forward")]


def compiled(weights, us, vs, options):
    targets = []

    def backend(gm, _):
        targets.extend(node.target for node in gm.graph.nodes)
        return gm

    run = torch.compile(lambda *given: ops.normalize(*given), backend=backend, fullgraph=True)
    run(weights, us, vs, *options)
    return targets


OBSERVERS = {
    **{
        f"make_fx-{mode}-{'pre' if pre else 'post'}": (traced(mode, pre), "normalize" if pre else None)
        for mode in ("real", "fake", "symbolic")
        for pre in (False, True)
    },
    "dispatch mode": (watched(Watch), None),
    "function mode": (watched(WatchFunctions), "normalize"),
    "jit": (jit_traced, None),
    "subclass": (of_a_subclass, None),
    "compile": (compiled, "normalize"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("observer", "sees"), OBSERVERS.values(), ids=OBSERVERS)
def test_who_looks_at_operators_sees_them(observer, sees):
    weights, us, vs, *options = arguments()
    assert operator(sees or "normalize_forward") in observer(weights, us, vs, options)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_is_not_that_of_the_results(device):
    weights, *others = arguments(torch.float32)
    weights[1] = (
        weights[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    )  # columns that stand elsewhere in v
    want = ops.normalize(weights, *others)
    cpu_kernels._plan.cache_clear(), cpu_kernels._places.cache_clear()
    with torch.device(device):
        got = ops.normalize(weights, *others)
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's decompositions for it
@pytest.mark.parametrize("training", [False, True])
def test_forward_mode(training):
    """A dual number in the weights, and forward over reverse: as the reference."""
    torch.manual_seed(1)
    gm = transform(nn.Linear(4, 3).double())
    twin = copy.deepcopy(gm)
    twin.get_submodule("spectral_norm")._auto = frozenset()
    x, tangent, direction = (torch.randn(s, dtype=torch.float64) for s in ((2, 4), (3, 4), (2, 4)))
    found = []
    for m in (gm, twin):
        m.train(training)
        with fwAD.dual_level():
            state = {"weight": fwAD.make_dual(m.weight.detach(), tangent)}
            out = torch.func.functional_call(m, state, (x,))
            dual = fwAD.make_dual(x, direction)
            (grad,) = torch.autograd.grad(m(dual).exp().sum(), m.weight)
            found.append((fwAD.unpack_dual(out).tangent, fwAD.unpack_dual(grad).tangent))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-13
