"""What the CPU tests show, on a CUDA device: against float64 truths and against torch's own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

import specnorm_fx
from specnorm_fx import freeze, gradient_penalty, transform
from specnorm_fx.graph_module import spectral_norm_node
from tests.models import LAYERS, MODELS, apply_torch_sn, parametrize, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _full_fp32_precision():
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
    torch._dynamo.reset()


def cuda(inputs):
    return tuple(x.cuda() for x in inputs)


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
    for _ in range(5):
        (x,) = case.inputs()
        want = truth(x.double())
        errors = [relative_error(model(x.cuda()).cpu(), want) for model in (ours, theirs)]
        # The operations are the same; a kernel may round a bit here and there.
        assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@parametrize([case for case in MODELS if case.name == "discriminator"])
def test_compiled_equals_eager(case, mode):
    gm = transform(case.make().cuda())
    gm.dropout.p = 0.0
    eager = copy.deepcopy(gm)
    model = torch.compile(gm, mode=mode, fullgraph=True)
    for _ in range(5):
        eager.load_state_dict(gm.state_dict())
        real, fake = cuda(case.inputs(4)), cuda(case.inputs(4))
        losses = []
        for m in (model, eager):
            m.zero_grad()
            first = m(*real)
            if m is model and mode == "reduce-overhead":
                first = first.clone()  # a graph replay reuses its outputs
            loss = (first.exp() + m(*fake).exp()).mean()
            loss.backward()
            losses.append(loss.detach())
        assert relative_error(losses[0], losses[1]) < 1e-5
        grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (gm, eager)]
        scale = max(g.abs().max() for g in grads[1])
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() / scale < 1e-5
        with torch.no_grad():
            for p in gm.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
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


def test_no_wait_for_the_device_in_a_step():
    gm = transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)).cuda())
    x = torch.randn(2, 3, 8, 8, device="cuda")
    gm(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gm(x).sum().backward()
        specnorm_fx.sigmas(gm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
        grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (model, eager)]
        scale = max(g.abs().max() for g in grads[1])
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() / scale < 1e-5
        for a, b in zip(model.buffers(), eager.buffers(), strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
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

    def loss(x, fake, label):
        penalty, score = gradient_penalty.r1(gm, x, label, return_output=True)
        return torch.relu(1 - score).mean() + torch.relu(1 + gm(fake, label)).mean() + 10 * penalty

    compiled = torch.compile(loss, mode=mode, fullgraph=True)
    for _ in range(3):
        x, label = cuda(case.inputs(4))
        gradients = []
        for run in (loss, compiled):
            gm.zero_grad()
            run(x, x.flip(0), label).backward()
            gradients.append([p.grad.clone() for p in gm.parameters()])
        scale = max(g.abs().max() for g in gradients[0])
        for a, b in zip(*gradients, strict=True):
            assert (a - b).abs().max() / scale < 1e-5
