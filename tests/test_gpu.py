"""What the CPU tests show, on a CUDA device: against float64 truths and against torch's own."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import specnorm_fx
from specnorm_fx import (
    freeze,
    gradient_penalty,
    report,
    sharded,
    sigmas,
    transform,
    update_,
    update_after,
    warm_up_,
)
from specnorm_fx.graph_module import resolve, spectral_norm_node
from tests.models import LAYERS, MODELS, Discriminator, apply_torch_sn, parametrize, relative_error

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()


def cuda(inputs):
    return tuple(x.cuda() for x in inputs)


def vectors(gm):
    return [x.clone() for site in gm.sites() for x in (site.u, site.v)]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def normalized(gm):
    """W / sigma in the mode of the model."""
    columns = [[getattr(site, name) for site in gm.sites()] for name in ("weight", "u", "v")]
    return gm.get_submodule(str(spectral_norm_node(gm).target))(*columns)


def discriminator(update="forward"):
    gm = transform(Discriminator().cuda(), update=update)
    gm.dropout.p = 0.0
    return gm


def gradients(gm):
    return [p.grad.clone() for p in gm.parameters() if p.grad is not None]


def check_gradients(got, theirs, truth):
    """No further from the float64 truth than twice eager torch, and 1e-5 of the largest of all gradients."""
    room = 1e-5 * max(g.abs().max() for g in truth)
    for a, b, want in zip(got, theirs, truth, strict=True):
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + room


def check_formula(model, rel=1e-6):
    """sigma against u^T W v / (|u| |v|) in float64, and what the forward divides by against both."""
    gm = resolve(model).eval()
    for site, sigma, result in zip(gm.sites(), sigmas(gm).values(), normalized(gm), strict=True):
        assert site.u.dtype == site.v.dtype == torch.float32
        u, v = (x.double() / x.double().norm() for x in (site.u, site.v))
        want = torch.dot(u, site.matrix().double() @ v)
        assert sigma.item() == pytest.approx(want.abs().item(), rel=rel)
        w = site.weight.double()
        divisor = (w * w).sum() / (w * result.double()).sum()  # roundings of W / sigma average out
        assert divisor.item() == pytest.approx(want.item(), rel=rel + torch.finfo(result.dtype).eps)


@parametrize(LAYERS)
def test_no_further_from_the_truth_than_torch(case):
    """Over 5 steps with the same start; the truth is the same computation in float64 on the CPU."""
    layer = case.make()
    torch.manual_seed(1)
    truth = transform(copy.deepcopy(layer).double())
    start = {key: value.float() for key, value in truth.state_dict().items()}
    ours = transform(copy.deepcopy(layer).cuda())
    ours.load_state_dict(start)
    theirs = torch_sn(copy.deepcopy(layer).cuda())
    theirs.load_state_dict(specnorm_fx.convert_state_dict(start, to="parametrizations"))
    errors = []
    for _ in range(5):
        (x,) = case.inputs()
        want = truth(x.double())
        errors.append([relative_error(model(x.cuda()).cpu(), want) for model in (ours, theirs)])
    # The operations are the same; a kernel may round a bit here and there.
    worst, allowed = (max(column) for column in zip(*errors, strict=True))
    assert worst <= 2 * allowed + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@parametrize([case for case in MODELS if case.name == "discriminator"])
def test_compiled_equals_eager(case, mode):
    gm = transform(case.make().cuda())
    gm.dropout.p = 0.0
    eager = copy.deepcopy(gm)
    model = torch.compile(gm, mode=mode, fullgraph=True)
    for _ in range(5):
        eager.load_state_dict(gm.state_dict())
        exact = copy.deepcopy(eager).double()
        (real,), (fake,) = case.inputs(4), case.inputs(4)
        losses = []
        for m, dtype in ((model, torch.float32), (eager, torch.float32), (exact, torch.float64)):
            m.zero_grad()
            first = m(real.to(DEVICE, dtype)).clone()  # a graph replay reuses its outputs
            loss = (first.exp() + m(fake.to(DEVICE, dtype)).exp()).mean()
            loss.backward()
            losses.append(loss.detach())
        assert relative_error(losses[0], losses[2]) <= 2 * relative_error(losses[1], losses[2]) + 1e-5
        check_gradients(*map(gradients, (gm, eager, exact)))
        with torch.no_grad():
            for p in gm.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad


@HALF
def test_autocast_is_off_inside(dtype):
    """torch's own failed here (pytorch#125544)."""
    gm = transform(nn.Linear(64, 32).cuda())
    twin = copy.deepcopy(gm)
    x = torch.randn(4, 64, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        y = gm(x)
    twin(x)
    assert y.dtype == dtype
    assert torch.equal(gm.weight_u, twin.weight_u)
    y.sum().backward()
    assert gm.weight.grad.dtype == torch.float32


@HALF
@parametrize(MODELS)
def test_nothing_depends_on_autocast(case, dtype):
    """Not a bit of u, v and W / sigma, nor of what looks at them or moves them."""
    gm = transform(case.make().cuda(), update="step")
    twin, inputs = copy.deepcopy(gm), cuda(case.inputs())
    found = []
    for model, enabled in ((gm, True), (twin, False)):
        with torch.autocast(DEVICE, dtype=dtype, enabled=enabled):
            output = model(*inputs)
            update_(model)
            seen = [*normalized(model), *vectors(model), *sigmas(model).values()]
            warm_up_(model)
            rows = report(model).rows
            found.append([*seen, *vectors(model)])
        output.float().square().mean().backward()
        assert all(
            site.weight.grad.dtype == torch.float32 for site in model.sites() if site.weight.requires_grad
        )
    assert all_equal(*found)
    for row in rows:
        assert row.sigma == pytest.approx(row.exact, rel=1e-4)


@HALF
def test_second_derivative_under_autocast(dtype):
    """The whole of it inside, where the products of the gradient must not be rounded either."""
    gm = transform(nn.Linear(64, 32).cuda(), update="step")
    exact = copy.deepcopy(gm).double()
    grad = torch.randn(32, 64, device=DEVICE)
    found = []
    for model, g in ((gm, grad), (exact, grad.double())):
        with torch.autocast(DEVICE, dtype=dtype):
            (weight,) = normalized(model)
            (slope,) = torch.autograd.grad((weight * g).sum(), model.weight, create_graph=True)
            slope.square().sum().backward()
        found.append((slope, model.weight.grad))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-5


@HALF
@parametrize(LAYERS)
def test_models_in_half_precision(case, dtype):
    gm = transform(case.make()).to(DEVICE, dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in cuda(case.inputs())]
    gm(*inputs).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in gm.parameters() if p.grad is not None)
    warm_up_(gm)
    for row in report(gm).rows:
        assert row.sigma == pytest.approx(row.exact, rel=1e-4)
    check_formula(gm)


@pytest.mark.parametrize("value", [6e4, 6e-8])
def test_the_ends_of_fp16(value):
    """Of rank one, all elements of one size: sigma is the largest there is."""
    weight = (torch.outer(torch.randn(300).sign(), torch.randn(1024).sign()) * value).half()
    layer = nn.Linear(1024, 300).half().cuda()
    layer.weight.data.copy_(weight)
    gm = transform(layer, update="step")
    update_(gm)
    sigma = weight.double().norm().item()
    assert sigmas(gm)["weight"].item() == pytest.approx(sigma, rel=1e-6)
    assert report(gm).rows[0].exact == pytest.approx(sigma, rel=1e-4)
    grad = (torch.randn(300, 1024) * min(sigma, 1.0)).half()
    (result,) = normalized(gm)
    result.backward(grad.to(DEVICE))
    right, g = weight.double() / sigma, grad.double()
    want = (g - (g * right).sum() * right) / sigma
    eps = torch.finfo(torch.float16).eps
    assert relative_error(result.cpu(), right) <= 0.51 * eps
    room = eps * g.norm().item() / sigma + 3e-8 * want.numel() ** 0.5  # a subnormal rounds by 3e-8
    assert (gm.weight.grad.cpu().double() - want).norm().item() <= room
    warm_up_(gm)
    assert relative_error(freeze(gm.eval()).weight.cpu(), right) <= 0.51 * eps


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_step_that_grad_scaler_skips(update):
    gm = discriminator(update)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-3)
    if update == "step":
        update_after(optimizer, gm)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)

    def step(x):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = gm(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    (x,) = cuda((torch.randn(4, 3, 8, 8),))
    step(x)
    weights, before = [p.clone() for p in gm.parameters()], vectors(gm)
    step(torch.full_like(x, torch.inf))
    assert scaler.get_scale() == 2.0**9
    assert all_equal(gm.parameters(), weights)
    assert all_equal(vectors(gm), before) == (update == "step")
    gm.norm.reset_running_stats()  # of inf
    for _ in range(3):
        step(x)
    assert not all_equal(gm.parameters(), weights)
    assert all(p.isfinite().all() for p in (*gm.parameters(), *vectors(gm)))


@pytest.mark.parametrize(
    ("mode", "dtype"), [("default", torch.bfloat16), ("reduce-overhead", torch.float16)], ids=str
)
def test_compiled_with_amp(mode, dtype):
    """Against eager under autocast: what comes near the float64 truth is the rounding of the layers."""
    gm = transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3)).cuda())
    eager = copy.deepcopy(gm)
    model = torch.compile(gm, mode=mode, fullgraph=True)
    for _ in range(4):
        eager.load_state_dict(gm.state_dict())
        exact = copy.deepcopy(eager).double()
        (x,) = cuda((torch.randn(4, 3, 8, 8),))
        results = []
        for run, m, inputs in ((model, gm, x), (eager, eager, x), (exact, exact, x.double())):
            m.zero_grad()
            with torch.autocast(DEVICE, dtype=dtype):
                output = run(inputs)
            kept = output.detach().clone()  # a graph replay reuses its outputs
            output.to(torch.promote_types(output.dtype, torch.float32)).square().mean().backward()
            results.append([kept, *gradients(m)])
        for got, theirs, want in zip(*results, strict=True):
            allowed = 2 * relative_error(theirs, want) + 4 * torch.finfo(dtype).eps
            assert relative_error(got, want) <= allowed
        for a, b in zip(vectors(gm), vectors(eager), strict=True):
            assert relative_error(a, b) < 1e-5
        with torch.no_grad():
            for p in gm.parameters():
                p -= 0.05 * p.grad


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_no_wait_for_the_device_in_a_step(update, dtype, options):
    gm = discriminator(update)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-3, **options)
    if update == "step":
        update_after(optimizer, gm)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=dtype or torch.float16, enabled=dtype is not None):
            loss = gm(x).float().square().mean()
        loss.backward()
        optimizer.step()
        warm_up_(gm, n=2)
        return sigmas(gm)

    step()  # compiles the kernels and makes their tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_training_step_in_a_cuda_graph(update):
    """Replayed, against eager, in float64, where both agree to rounding."""
    gm = discriminator(update).double()
    twin = copy.deepcopy(gm)
    x = torch.randn(4, 3, 8, 8, device=DEVICE, dtype=torch.float64)
    # A bias before batch norm has no gradient but roundings; with a small eps Adam would make steps of them.
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2, eps=1e-3, capturable=True) for m in (gm, twin)]
    if update == "step":
        for m, optimizer in zip((gm, twin), optimizers, strict=True):
            update_after(optimizer, m)

    def step(m, optimizer):
        optimizer.zero_grad()
        m(x).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(gm, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    twin.load_state_dict(gm.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    start = vectors(gm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        step(gm, optimizers[0])
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        graph.replay()
        step(twin, optimizers[1])
        for (name, a), b in zip(gm.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name
    assert not all_equal(vectors(gm), start)


def on_streams(*functions):
    """Each on a stream of its own, all at once."""
    streams = [torch.cuda.Stream() for _ in functions]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for stream, function in zip(streams, functions, strict=True):
        with torch.cuda.stream(stream):
            function()
    torch.cuda.synchronize()


def wide(seed):
    torch.manual_seed(seed)
    return transform(nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 512)).cuda())


def test_two_models_on_two_streams():
    """u and v bit for bit as one after the other; the layers as exactly as cuBLAS does."""
    models = [wide(0), wide(1)]
    twins = [copy.deepcopy(m) for m in models]
    x = torch.randn(64, 2048, device=DEVICE)
    outputs = [[], []]

    def train(m, kept):
        for _ in range(20):
            y = m(x)
            y.square().mean().backward()
            kept.append(y.detach())

    on_streams(*(lambda m=m, kept=kept: train(m, kept) for m, kept in zip(models, outputs, strict=True)))
    for m, twin, kept in zip(models, twins, outputs, strict=True):
        serial = []
        train(twin, serial)
        assert all_equal(vectors(m), vectors(twin))
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(kept, serial, strict=True))
        assert all(relative_error(a, b) < 1e-4 for a, b in zip(gradients(m), gradients(twin), strict=True))


def test_one_eval_model_on_two_streams():
    gm = wide(0).eval()
    want = normalized(gm)
    before = vectors(gm)
    results = [[], []]

    def run(kept):
        with torch.no_grad():
            for _ in range(20):
                kept += normalized(gm)

    on_streams(*(lambda kept=kept: run(kept) for kept in results))
    for kept in results:
        assert all_equal(kept, want * 20)
    assert all_equal(vectors(gm), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    gm = transform(Discriminator().to("cuda:1"), update="step")
    gm.dropout.p = 0.0
    twin = copy.deepcopy(gm).to("cuda:0")
    assert torch.cuda.current_device() == 0
    x = torch.randn(4, 3, 8, 8)
    for m, device in ((gm, "cuda:1"), (twin, "cuda:0")):
        m(x.to(device)).square().mean().backward()
        update_(m)
    assert all_equal([v.cpu() for v in vectors(gm)], [v.cpu() for v in vectors(twin)])
    assert torch.cuda.current_device() == 0
    check_formula(gm)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_true_gradient_under_checkpointing(use_reentrant, dtype):
    """W / sigma is the same bits in forward and recompute; what is left is the order of cuDNN's sums."""
    gm = discriminator("step")
    gm.norm.momentum = 0.0
    for site in gm.sites():
        nn.init.normal_(site.weight)  # u and v are cold, where another iteration would show
    x = torch.randn(4, 3, 8, 8, device=DEVICE, requires_grad=True)
    found = []
    for run in (gm, lambda x: checkpoint(gm, x, use_reentrant=use_reentrant)):
        gm.zero_grad()
        with torch.autocast(DEVICE, dtype=dtype or torch.float16, enabled=dtype is not None):
            loss = run(x).float().square().mean()
        loss.backward()
        found.append(gradients(gm))
    scale = max(g.abs().max() for g in found[1])
    room = 1e-5 if dtype is None else 4 * torch.finfo(dtype).eps
    assert all((a - b).abs().max() / scale < room for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaging(use_buffers):
    gm = discriminator("step")
    averaged = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.02)
    update_after(optimizer, gm)
    for _ in range(20):
        optimizer.zero_grad()
        (gm(torch.randn(4, 3, 8, 8, device=DEVICE)) - 1).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(gm)
    check_formula(averaged)
    for site in resolve(averaged).sites():
        site.u.mul_(1e-3)
        site.v.mul_(1 + 8 * torch.finfo(torch.float32).eps)
    check_formula(averaged)
    nn.init.normal_(resolve(averaged).get_parameter("fc.weight"))
    assert max(row.residual for row in report(averaged).rows) > 0.1
    warm_up_(averaged)
    for row in report(averaged).rows:
        assert row.sigma == pytest.approx(row.exact, rel=1e-4)


@parametrize([case for case in MODELS if case.name in ("discriminator", "tied", "labelled")])
def test_moving_freezing_and_onnx(case, tmp_path):
    gm = transform(case.make()).cuda()
    inputs = cuda(case.inputs())
    gm(*inputs)
    gm.eval()
    assert torch.equal(freeze(gm)(*inputs), gm(*inputs))
    report = specnorm_fx.onnx.export(gm, inputs, tmp_path / "d.onnx", rtol=1e-4)
    assert report.batches == 3


def test_launches_do_not_grow_with_the_layers():
    """Of one training forward, u and v copied back: no more than six."""
    counts = []
    for depth in (2, 12):
        gm = transform(nn.Sequential(*[nn.Linear(64, 64) for _ in range(depth)]).cuda())
        call = gm.get_submodule(str(spectral_norm_node(gm).target))
        columns = [[getattr(site, name) for site in gm.sites()] for name in ("weight", "u", "v")]
        call(*columns)
        torch.cuda.synchronize()
        for _ in range(2):  # of the first, the profiler may miss the beginning
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call(*columns)
                torch.cuda.synchronize()
        counts.append(sum(event.device_type.name == "CUDA" for event in profile.events()))
    assert counts[0] == counts[1] <= 6


def with_torch_sn(case, sn):
    model = apply_torch_sn(case.make(), case.weights, sn).cuda()
    if hasattr(model, "dropout"):
        model.dropout.p = 0.0
    return model


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("sn", [torch_sn, hook_sn], ids=["parametrization", "hook"])
@parametrize([case for case in MODELS if case.name in ("discriminator", "called_twice")])
def test_backend_equals_eager_torch(case, sn, mode):
    """By Inductor, with and without CUDA graphs; what comes near the truth is torch's own error."""
    model = with_torch_sn(case, sn)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=specnorm_fx.specnorm, mode=mode)
    for _ in range(4):
        x = case.inputs(4)[0].cuda()
        outputs = []
        for m, inputs in ((compiled, x), (eager, x), (exact, x.double())):
            m.zero_grad()
            output = m(inputs)
            output.square().mean().backward()
            outputs.append(output.detach().clone())
        assert relative_error(outputs[0], outputs[2]) <= 2 * relative_error(outputs[1], outputs[2]) + 1e-6
        check_gradients(*map(gradients, (model, eager, exact)))
        for a, b in zip(model.buffers(), eager.buffers(), strict=True):
            assert relative_error(a, b) < 1e-5


@HALF
def test_backend_under_autocast(dtype):
    model = torch_sn(nn.Linear(64, 32)).cuda()
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=specnorm_fx.specnorm)
    x = torch.randn(4, 64, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        y = compiled(x)
    assert y.dtype == dtype
    assert relative_error(y, exact(x.double())) < 4 * torch.finfo(dtype).eps
    vectors = [m.parametrizations.weight[0]._u for m in (model, exact)]
    assert relative_error(vectors[0], vectors[1]) < 1e-6


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@parametrize([case for case in MODELS if case.name == "labelled"])
def test_gradient_penalty_in_a_compiled_step(case, mode):
    """Against double backward in eager mode."""
    gm = transform(case.make().cuda(), "*", update="step")
    exact = copy.deepcopy(gm).double()

    def loss(model, x, fake, label):
        penalty, score = gradient_penalty.r1(model, x, label, return_output=True)
        return torch.relu(1 - score).mean() + torch.relu(1 + model(fake, label)).mean() + 10 * penalty

    compiled = torch.compile(loss, mode=mode, fullgraph=True)
    for _ in range(3):
        x, label = cuda(case.inputs(4))
        found = []
        for run, model, real in ((compiled, gm, x), (loss, gm, x), (loss, exact, x.double())):
            model.zero_grad()
            run(model, real, real.flip(0), label).backward()
            found.append(gradients(model))
        check_gradients(*found)


@pytest.fixture
def one_rank():
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fsdp(one_rank, compiled):
    """Against the unsharded model; `update_` works on the shard, and waits for nothing."""
    gm = discriminator("step")
    twin = copy.deepcopy(gm)
    fully_shard(gm, mesh=one_rank)
    model = torch.compile(gm) if compiled else gm
    for m, each in ((gm, model), (twin, twin)):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        update_after(optimizer, m)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            each(torch.randn(4, 3, 8, 8, device=DEVICE)).square().mean().backward()
            optimizer.step()
    assert all(sharded.is_sharded(site.weight) for site in gm.sites())
    for name, want in twin.state_dict().items():
        if want.is_floating_point():
            assert relative_error(sharded.full(gm.state_dict()[name]), want) < 1e-4, name
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_(gm)
        sigmas(gm, residual=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row.fqn for row in report(gm).rows] == [row.fqn for row in report(twin).rows]
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    assert torch.equal(freeze(gm.eval())(x), gm(x))


def test_fsdp_with_shards_on_the_cpu(one_rank):
    gm = discriminator("step")
    twin = copy.deepcopy(gm)
    fully_shard(gm, mesh=one_rank, offload_policy=CPUOffloadPolicy())
    assert all(site.weight.device.type == "cpu" for site in gm.sites())
    for model in (gm, twin):
        update_(model)
    for got, want in zip(vectors(gm), vectors(twin), strict=True):
        assert relative_error(got, want) < 1e-5
    for row, want in zip(report(gm).rows, report(twin).rows, strict=True):
        assert row.sigma == pytest.approx(want.sigma, rel=1e-6)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    assert relative_error(freeze(gm.eval())(x), twin.eval()(x)) < 1e-5


def test_sigma_logger_waits_for_nothing():
    """What it has not yet got when a step is over a later call writes, or flush."""
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda tag, value, step: written.append((step, tag, value)))
    gm = discriminator()
    log = specnorm_fx.SigmaLogger(writer, gm)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    gm(x)
    expected = []
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            gm(x)
            log(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected += [(step, fqn, s.item()) for fqn, s in sigmas(gm).items()]
    log.flush()
    got = [(step, tag.removeprefix("sigma/"), value) for step, tag, value in written if "sigma/" in tag]
    assert got == expected
    assert len(written) == 2 * len(got)
