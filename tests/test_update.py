"""`update_`, `update_after` and `warm_up_`."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import specnorm_fx
from specnorm_fx import SpectralNormConfig, report, sigmas, transform, update_, update_after, warm_up_
from tests.models import MODELS, Discriminator, apply_torch_sn, case_named, parametrize


def vectors(model):
    return {name: x.clone() for name, x in model.named_buffers() if name.endswith(("_u", "_v"))}


def test_update_moves_only_step_weights():
    gm = transform(
        Discriminator(), {"fc": SpectralNormConfig(update="step"), nn.Conv2d: SpectralNormConfig()}
    )
    before = {site.fqn: site.v.clone() for site in gm.sites()}
    nn.init.normal_(gm.fc.weight)
    update_(gm)
    moved = {site.fqn for site in gm.sites() if not torch.equal(site.v, before[site.fqn])}
    assert moved == {"fc.weight"}


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_update_gives_what_a_forward_would(implementation):
    torch.manual_seed(1)
    by_forward = transform(nn.Linear(6, 4), implementation=implementation)
    torch.manual_seed(1)
    by_step = transform(nn.Linear(6, 4), update="step", implementation=implementation)
    for _ in range(3):
        by_forward(torch.randn(2, 6))
        update_(torch.compile(by_step, backend="eager"))
        assert torch.equal(by_forward.weight_u, by_step.weight_u)
        assert torch.equal(by_forward.weight_v, by_step.weight_v)


def test_update_refuses_a_model_without_step_weights():
    for call in (update_, lambda gm: update_after(torch.optim.SGD(gm.parameters()), gm)):
        with pytest.raises(
            ValueError, match=r"no weight with update='step'.*transform\(model, update='step'\)"
        ):
            call(transform(nn.Linear(2, 2)))
        with pytest.raises(TypeError, match="Linear holds no transformed model"):
            call(nn.Linear(2, 2))


class Called(TorchDispatchMode):
    """The operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [2, 9])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_update_is_one_operator_call(implementation, depth):
    """... whatever the number of weights and of iterations; what it gives is cut, and stored by another."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
    gm = transform(model, update="step", n_power_iterations=3, implementation=implementation)
    with Called() as called:
        update_(gm)
    ours = [name for name in called.names if name.startswith("specnorm_fx")]
    want = "power_iteration" if implementation == "auto" else "singular_vectors"
    assert ours == [f"specnorm_fx::{want}", "specnorm_fx::store_"]
    # That of the reference is told apart by its operations, which it runs inside.
    if implementation == "auto":
        assert set(called.names) <= {*ours, "aten::detach", "aten::split_with_sizes"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_step_reads_no_value(update, dtype):
    """... back into Python, for which it would have to wait for a device."""
    gm = transform(Discriminator(), update=update)
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    if update == "step":
        update_after(optimizer, gm)
    with Called() as called:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = gm(torch.randn(2, 3, 8, 8)).float().square().mean()
        loss.backward()
        optimizer.step()
        warm_up_(gm, n=2)
        sigmas(gm, residual=True)
    assert not {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"} & set(called.names)
    assert "specnorm_fx::normalize_backward" in called.names
    with Called() as called:
        warm_up_(gm)  # looks whether sigma rests
    assert "aten::_local_scalar_dense" in called.names


# --- One step sees one set of weights: the gradient is that of the plain computation ---


def plain(model, batch):
    """Everything in one forward."""
    scores = model(*batch)
    half = len(scores) // 2
    return scores[:half].square().sum() - scores[half:].sum()


def real_and_fake(model, batch):
    """Two forwards, one backward."""
    parts = zip(*(x.chunk(2) for x in batch), strict=True)
    real, fake = (model(*part) for part in parts)
    return real.square().sum() - fake.sum()


def micro_batches(model, batch):
    """Eight forwards and backwards; the last loss is for the caller."""
    parts = list(zip(*(x.split(len(x) // 8) for x in batch), strict=True))
    losses = (
        model(*part).square().sum() if i < len(parts) // 2 else -model(*part).sum()
        for i, part in enumerate(parts)
    )
    for _ in range(7):
        next(losses).backward()
    return next(losses)


def reentrant(model, batch):
    x = batch[0].detach().requires_grad_()
    return plain(lambda *args: checkpoint(model, *args, use_reentrant=True), (x, *batch[1:]))


def not_reentrant(model, batch):
    return plain(lambda *args: checkpoint(model, *args, use_reentrant=False), batch)


WAYS = pytest.mark.parametrize("way", [real_and_fake, micro_batches, reentrant, not_reentrant])
CASES = parametrize([case for case in MODELS if case.name != "frozen_parameter"])


def cold(case, normalize):
    """A model whose u and v are of other weights, so that iterating once more shows."""
    torch.manual_seed(0)
    model = normalize(case.build(torch.float64).double(), case.weights)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):  # they depend on the batch by themselves
            module.eval()
    return model


def error_of(way, model, twin, batch, compiled=False):
    """Of the gradients, against one forward and one backward of an equal model."""
    way(torch.compile(model, backend="aot_eager") if compiled else model, batch).backward()
    plain(twin, batch).backward()
    got, want = ([p.grad for p in m.parameters() if p.grad is not None] for m in (model, twin))
    assert len(got) == len(want) > 0
    scale = max(g.abs().max() for g in want)
    return max((a - b).abs().max() / scale for a, b in zip(got, want, strict=True)).item()


@WAYS
@CASES
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_step_gives_the_plain_gradient(case, way, implementation):
    def normalize(model, _):
        return transform(model, update="step", implementation=implementation)

    batch = case.inputs(16, torch.float64)
    model, twin = (cold(case, normalize) for _ in range(2))
    assert error_of(way, model, twin, batch) < 1e-10
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@WAYS
def test_step_gives_the_plain_gradient_compiled(way):
    torch._dynamo.reset()
    case = case_named("called_twice")
    model, twin = (cold(case, lambda model, _: transform(model, update="step")) for _ in range(2))
    assert error_of(way, model, twin, case.inputs(16, torch.float64), compiled=True) < 1e-10


@pytest.mark.parametrize("sn", [torch_sn, hook_sn], ids=["parametrization", "hook"])
@WAYS
def test_torch_does_not(way, sn):
    """What the tests above are there for."""
    case = case_named("labelled")
    model, twin = (cold(case, lambda m, names: apply_torch_sn(m, names, sn)) for _ in range(2))
    assert error_of(way, model, twin, case.inputs(16, torch.float64)) > 1e-3


@pytest.mark.parametrize("way", [real_and_fake, micro_batches])
def test_forward_does_not(way):
    case = case_named("labelled")
    model, twin = (cold(case, lambda m, _: transform(m)) for _ in range(2))
    assert error_of(way, model, twin, case.inputs(16, torch.float64)) > 1e-3


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", [reentrant, not_reentrant])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_forward_refuses_a_recompute(way, implementation, compiled):
    torch._dynamo.reset()
    case = case_named("called_twice")
    gm = cold(case, lambda model, _: transform(model, implementation=implementation))
    model = torch.compile(gm, backend="aot_eager") if compiled else gm
    batch = case.inputs(16, torch.float64)
    loss = way(model, batch)
    after_forward = vectors(gm)
    with pytest.raises(RuntimeError, match=r"(?s)within a backward pass.*update='step'.*update_after"):
        loss.backward()
    assert all(torch.equal(x, after_forward[name]) for name, x in vectors(gm).items())
    way(model.eval(), batch).backward()  # where nothing iterates


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's decompositions for it
def test_forward_refuses_a_recompute_in_forward_mode():
    case = case_named("called_twice")
    gm = cold(case, lambda model, _: transform(model))
    with fwAD.dual_level():
        loss = not_reentrant(gm, case.inputs(16, torch.float64))
        with pytest.raises(RuntimeError, match="within a backward pass"):
            loss.backward()


# --- Compiled ---


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_update_compiles_to_one_graph(backend, dynamic):
    torch._dynamo.reset()
    gm = transform(Discriminator(), update="step", n_power_iterations=2, eps=1e-10)
    for site in gm.sites():
        nn.init.normal_(site.weight)
    twin = copy.deepcopy(gm)
    compiled = torch.compile(update_, backend=backend, fullgraph=True, dynamic=dynamic)
    for _ in range(3):
        compiled(gm)
        update_(twin)
        for name, x in vectors(gm).items():
            assert torch.equal(x, twin.get_buffer(name))


def test_a_compiled_optimizer_step_updates():
    torch._dynamo.reset()
    gm = transform(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), update="step")
    twin = copy.deepcopy(gm)
    optimizers = [torch.optim.SGD(model.parameters(), 0.125) for model in (gm, twin)]
    for optimizer, model in zip(optimizers, (gm, twin), strict=True):
        update_after(optimizer, model)
    compiled = torch.compile(optimizers[0].step, backend="aot_eager")
    for _ in range(3):
        x, before = torch.randn(3, 6), vectors(gm)
        for model, step in ((gm, compiled), (twin, optimizers[1].step)):
            model.zero_grad()
            model(x).sum().backward()
            step()
        for name, u in vectors(gm).items():
            assert torch.equal(u, twin.get_buffer(name))
            assert not torch.equal(u, before[name])


# --- Registered on an optimizer ---


def trainee(update="step"):
    torch.manual_seed(3)
    model = case_named("discriminator").make()
    model.dropout.p = 0.0
    gm = transform(model, update=update)
    return gm, torch.optim.Adam(gm.parameters(), 1e-2)


def train(gm, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()


def states_equal(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


def test_update_after_refuses_the_optimizer_of_another_model():
    gm, _ = trainee()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="This SGD has no parameter of the model"):
        update_after(optimizer, gm)
    assert not optimizer._optimizer_step_post_hooks
    optimizer.add_param_group({"params": list(gm.parameters())[:1]})
    update_after(optimizer, gm)


def test_update_after_refuses_a_wrapper_without_hooks():
    class Wrapper(torch.optim.Optimizer):  # as torch's PostLocalSGDOptimizer
        def __init__(self, inside):
            self.inside, self.param_groups = inside, inside.param_groups

    gm, optimizer = trainee()
    with pytest.raises(TypeError, match="Wrapper is a wrapper without hooks of its own"):
        update_after(Wrapper(optimizer), gm)


def test_update_after_is_update_after_every_step():
    (gm, optimizer), (twin, other) = trainee(), trainee()
    handle = update_after(optimizer, gm)
    train(gm, optimizer, range(3))
    for step in range(3):
        train(twin, other, [step])
        update_(twin)
    assert states_equal(gm, twin)
    handle.remove()
    train(gm, optimizer, [3])
    train(twin, other, [3])
    assert states_equal(gm, twin)


def test_resume_bit_for_bit(tmp_path):
    """From a file, and from copies, with `update_after` registered again."""
    whole, optimizer = trainee()
    update_after(optimizer, whole)
    train(whole, optimizer, range(6))

    first, optimizer = trainee()
    update_after(optimizer, first)
    train(first, optimizer, range(3))
    torch.save((first.state_dict(), optimizer.state_dict()), tmp_path / "c.pt")
    copied, copied_optimizer = copy.deepcopy((first, optimizer))

    resumed, optimizer = trainee()
    model_state, optimizer_state = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    for model, its_optimizer in ((resumed, optimizer), (copied, copied_optimizer)):
        update_after(its_optimizer, model)
        train(model, its_optimizer, range(3, 6))
        assert states_equal(model, whole)
    assert not states_equal(first, whole)


def test_several_transformed_models_in_one():
    """As where the blocks of a model are transformed one by one."""
    blocks = [transform(nn.Linear(6, 6), update="step"), nn.ReLU(), transform(nn.Linear(6, 6), update="step")]
    model = nn.Sequential(*blocks)
    for gm in (blocks[0], blocks[2]):
        nn.init.normal_(gm.weight)
    before = vectors(model)
    update_(model)
    assert all(not torch.equal(x, before[name]) for name, x in vectors(model).items())
    warm_up_(model)
    exact = {f"{i}.weight": torch.linalg.matrix_norm(blocks[i].weight.detach(), 2).item() for i in (0, 2)}
    assert {name: s.item() for name, s in sigmas(model).items()} == pytest.approx(exact, rel=1e-5)
    assert [row.fqn for row in report(model).rows] == list(exact)
    with pytest.raises(TypeError, match=r"not transformed as a whole: '0', '2' are"):
        specnorm_fx.freeze(model.eval())


# --- warm_up_ ---


@pytest.mark.parametrize("options", [{}, {"tol": 1e-9}, {"n": 400}], ids=str)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_warm_up_mends_an_overwritten_weight(options, update):
    gm = transform(nn.Linear(30, 20), update=update).double()
    nn.init.orthogonal_(gm.weight)
    gm.weight.data[0] *= 10
    exact = torch.linalg.matrix_norm(gm.weight, 2).item()
    assert abs(sigmas(gm)["weight"].item() - exact) > 1
    warm_up_(gm, **options)
    assert sigmas(gm)["weight"].item() == pytest.approx(exact, rel=1e-5)
    assert gm.weight_u.norm().item() == pytest.approx(1)


def test_warm_up_refuses():
    gm = transform(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="n or tol, not both"):
        warm_up_(gm, 3, 1e-3)
    with pytest.raises(ValueError, match="n must be above 0, got 0"):
        warm_up_(gm, 0)
    with pytest.raises(ValueError, match="tol must be above 0, got -1"):
        warm_up_(gm, tol=-1.0)
