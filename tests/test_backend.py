"""How ``torch.compile`` reaches the fusion: by name, by function, as a pass in Inductor; over processes."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

import specnorm_fx
from specnorm_fx import FuseSpectralNorm, backend, fuse, ops, reference
from tests.models import apply_torch_sn, case_named, relative_error
from tests.ranks import run_ranks

RANKS = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
APIS = pytest.mark.parametrize("sn", [torch_sn, hook_sn], ids=["parametrization", "hook"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Keep:
    """An inner backend that keeps what it is given."""

    def __init__(self):
        self.graphs, self.given = [], []

    def __call__(self, gm, example_inputs, **given):
        self.graphs.append(gm)
        self.given.append(given)
        return gm

    def fused_calls(self):
        return [node for gm in self.graphs for node in gm.graph.nodes if node.target is ops.normalize]


def two_steps_of_training(model, compiled, eager, batches):
    """D(real) - D(fake) with one backward; the largest error of outputs, gradients, u and v."""
    errors = []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, eager)]
    for real, fake in batches:
        losses = [(m(real).square() - m(fake)).mean() for m in (compiled, eager)]
        errors.append(relative_error(*losses))
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        gradients = [[p.grad for p in m.parameters() if p.grad is not None] for m in (model, eager)]
        scale = max(g.abs().max() for g in gradients[1])
        errors += [((a - b).abs().max() / scale).item() for a, b in zip(*gradients, strict=True)]
        for optimizer in optimizers:
            optimizer.step()
        errors += [relative_error(a, b) for a, b in zip(model.buffers(), eager.buffers(), strict=True)]
    return max(errors)


def test_found_by_name():
    assert "specnorm" in torch._dynamo.list_backends()


def test_training_by_inductor_in_float32():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = apply_torch_sn(layers, ("0.weight", "2.weight"), torch_sn)
    eager = copy.deepcopy(model)
    keys = [*model.state_dict()]
    batches = torch.randn(3, 2, 2, 3, 8, 8).unbind()
    compiled = torch.compile(model, backend="specnorm", fullgraph=True)
    assert two_steps_of_training(model, compiled, eager, batches[:2]) < 1e-6
    assert [*model.state_dict()] == keys
    (x, _) = batches[2]
    with torch.no_grad():
        assert relative_error(compiled.eval()(x), eager.eval()(x)) < 1e-6


def test_training_and_eval_are_captured_once_each():
    model = torch_sn(nn.Linear(4, 3))
    inner = Keep()
    compiled = torch.compile(model, backend="specnorm", options={"inner": inner})
    for mode in (True, False, True, False):
        compiled.train(mode)(torch.randn(2, 4))
    assert [call.args[3] for call in inner.fused_calls()] == [[1], [-1]]


def test_options_for_the_inner_backend():
    inner = Keep()
    options = {"inner": inner, "implementation": "reference", "level": 3}
    layer = torch_sn(nn.Linear(4, 3))
    torch.compile(layer, backend="specnorm", options=options)(torch.randn(2, 4))
    specnorm_fx.specnorm(torch.fx.symbolic_trace(nn.ReLU()), [], mode="fast", options={"inner": inner})
    assert inner.given == [{"options": {"level": 3}}, {"mode": "fast"}]
    assert not inner.fused_calls()
    assert options["inner"] is inner


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"implementation": "fast"}, ValueError, "implementation must be one of"),
        ({"no_such_option": 1}, RuntimeError, "Unexpected optimization option no_such_option"),
        ({"inner": "no_such_backend"}, torch._dynamo.exc.InvalidBackend, "no_such_backend"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    compiled = torch.compile(torch_sn(nn.Linear(4, 3)), backend=specnorm_fx.specnorm, options=options)
    with pytest.raises((error, torch._dynamo.exc.BackendCompilerFailed), match=message):
        compiled(torch.randn(2, 4))


# --- Inductor ---


@APIS
def test_pass_within_inductor(sn):
    case = case_named("called_twice")
    model = apply_torch_sn(case.make().double(), case.weights, sn)
    eager = copy.deepcopy(model)
    uses = []

    class Watched(FuseSpectralNorm):
        def __call__(self, graph):
            super().__call__(graph)
            uses.extend(node for node in graph.nodes if node.target is ops.normalize)

    # With a cache the pass would not run where it has run before.
    compiled = torch.compile(model, options={"pre_grad_custom_pass": Watched(), "fx_graph_cache": False})
    batches = [torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(2)]
    assert two_steps_of_training(model, compiled, eager, batches) < 1e-13
    assert len(uses) == 2  # one capture, in which the layer is called twice


def test_uuid_changes_with_code_and_options(monkeypatch, tmp_path):
    assert {Path(source) for source in backend._SOURCES} == {
        Path(module.__file__) for module in (fuse, ops, reference)
    }
    uuids = [FuseSpectralNorm().uuid(), FuseSpectralNorm("reference").uuid()]
    assert uuids[0] == FuseSpectralNorm("auto").uuid()
    monkeypatch.setattr(ops, "REVISION", "r0")
    uuids.append(FuseSpectralNorm().uuid())
    changed = tmp_path / "fuse.py"
    changed.write_text("other code")
    monkeypatch.setattr("specnorm_fx.backend._SOURCES", (str(changed),))
    uuids.append(FuseSpectralNorm().uuid())
    assert len(set(uuids)) == 4


def compile_with_the_pass(rank, folder):
    """The gradient, and what AOTAutograd has counted of its cache in a folder."""
    counters.clear()
    torch.manual_seed(0)
    model = torch_sn(nn.Linear(4, 3))
    fuse = {"pre_grad_custom_pass": FuseSpectralNorm()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        torch.compile(model, options=fuse)(torch.ones(2, 4)).sum().backward()
    gradient = model.parametrizations.weight.original.grad.flatten().tolist()
    return gradient, dict(counters["aot_autograd"])


@APIS
@pytest.mark.parametrize("training", [False, True])
@torch._inductor.config.patch(freezing=True)
def test_with_inductors_freezing(sn, training):
    """Dynamo then reads parameters where they are first used."""
    model = nn.Sequential(sn(nn.Linear(6, 6)), sn(nn.Linear(6, 2))).train(training)
    eager, x, inner = copy.deepcopy(model), torch.randn(3, 6), Keep()
    compiled = torch.compile(model, backend="specnorm", options={"inner": inner})
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(compiled(x), eager(x)) < 1e-6
    assert len(inner.fused_calls()) == 1


@RANKS
def test_a_second_process_finds_compiled_code(tmp_path):
    # Not in this process, in which other tests have compiled: what it compiles was once not found by another.
    ((gradient, counts),) = run_ranks(compile_with_the_pass, 1, str(tmp_path))
    ((cached_gradient, cached_counts),) = run_ranks(compile_with_the_pass, 1, str(tmp_path))
    assert "autograd_cache_hit" not in counts
    assert cached_counts.get("autograd_cache_hit") == 1, (counts, cached_counts)
    assert gradient == cached_gradient


# --- DDP ---


class Net(nn.Module):
    """More than the megabyte of DDP's first bucket: its graph is split, between sigma and W / sigma."""

    def __init__(self, sn):
        super().__init__()
        self.layers = nn.Sequential(*(sn(nn.Linear(400, 400)) for _ in range(3)), sn(nn.Linear(400, 1)))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def train_with_ddp(rank):
    results = {}
    for sn in (torch_sn, hook_sn):
        torch.manual_seed(0)
        model = Net(sn).double()
        eager = copy.deepcopy(model)
        inner = Keep()
        wrapped = [nn.parallel.DistributedDataParallel(m) for m in (model, eager)]
        compiled = torch.compile(wrapped[0], backend="specnorm", options={"inner": inner})
        torch.manual_seed(rank)
        batches = [(torch.randn(4, 400, dtype=torch.float64),) * 2 for _ in range(2)]
        error = two_steps_of_training(model, compiled, wrapped[1], batches)
        ours = [
            n
            for gm in inner.graphs
            for n in gm.graph.nodes
            if n.target in (ops.normalize, ops.power_iteration)
        ]
        results[sn.__module__] = (error, sum(len(node.args[0]) for node in ours))
    return results


@RANKS
def test_ddp():
    for results in run_ranks(train_with_ddp, 2):
        for error, fused in results.values():
            assert error < 1e-12
            assert fused >= 4
