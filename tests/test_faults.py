"""What goes wrong in training: NaN, kills at any moment, threads at once; dead ranks are in test_ddp.py."""

import copy
import os
import re
import signal
import stat
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import specnorm_fx
from specnorm_fx import cpu_kernels, sigmas, transform, update_, warm_up_
from specnorm_fx.atomic import replaced

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """A weight of each form that the kernels know, and one in channels_last."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        self.fc = nn.Linear(24, 1)

    def forward(self, x):
        return self.fc(F.leaky_relu(self.conv(F.leaky_relu(self.up(x), 0.2)), 0.2).flatten(1))


def vectors(gm):
    return {key: value.clone() for key, value in gm.state_dict().items() if key.endswith(("_u", "_v"))}


def assert_equal(state, other):
    assert state.keys() == other.keys()
    assert not [key for key, value in state.items() if not torch.equal(value, other[key])]


# --- NaN and inf ---


def step(gm, seed, bad=None):
    """A step of training, of which ``bad`` gets into one element of every gradient."""
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).to(gm.fc.weight)
    gm(x).square().mean().backward()
    with torch.no_grad():
        for parameter in gm.parameters():
            if bad is not None:
                parameter.grad[(0,) * parameter.ndim] = bad
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_spoils_the_weights_and_not_u_and_v(implementation, dtype, update, bad):
    iterate = update_ if update == "step" else lambda gm: None
    gm = transform(Net().to(dtype), implementation=implementation, update=update)
    step(gm, 0)
    iterate(gm)
    twin, good = copy.deepcopy(gm), copy.deepcopy(gm.state_dict())
    step(gm, 1, bad)
    before = vectors(gm)
    for _ in range(2):
        iterate(gm)
        step(gm, 2)
    assert not any(parameter.isfinite().all() for parameter in gm.parameters())
    assert_equal(vectors(gm), before)
    warm_up_(gm)
    warm_up_(gm, n=2)
    assert_equal(vectors(gm), before)
    # With the weights restored training goes on as if nothing had been.
    gm.load_state_dict(good)
    for model in (gm, twin):
        for seed in range(2, 4):
            step(model, seed)
            iterate(model)
    assert_equal(gm.state_dict(), twin.state_dict())
    assert not [
        key for key, value in vectors(gm).items() if torch.equal(value, before[key]) and len(value) > 1
    ]


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("arguments", [{}, {"n": 200}])
def test_warm_up_mends_vectors_without_direction(value, arguments):
    gm = transform(Net().double())
    for site in gm.sites():
        site.u.fill_(value)
        site.v[0] = value
        if value == 0:
            site.v.fill_(0)
    drawn = torch.random.get_rng_state()
    warm_up_(gm, **arguments)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert_normalised(gm)


def assert_normalised(gm):
    exact = [torch.linalg.matrix_norm(site.matrix(), 2).item() for site in gm.sites()]
    assert [sigma.item() for sigma in sigmas(gm).values()] == pytest.approx(exact, rel=1e-4)


def test_a_model_that_torch_has_spoilt_is_taken_over():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4)))
    stored = model[0].parametrizations.weight.original
    good = stored.detach().clone()
    stored.data[0, 0] = torch.nan
    model(torch.randn(2, 6))
    stored.data.copy_(good)
    gm = transform(model)
    assert gm.get_buffer("0.weight_u").isnan().any()  # what torch has left
    warm_up_(gm)
    assert_normalised(gm)


# --- Kills ---


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action):
    """Run in a copy of this process, which is to end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert time.monotonic() < deadline
    assert os.WIFSIGNALED(waited[1])
    assert os.WTERMSIG(waited[1]) == signal.SIGKILL


# From Python 3.12 on; the copy starts no thread but those of ONNX Runtime.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def visible(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


@forks
def test_a_file_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "file.txt"

    def write(then):
        with replaced(path) as written:
            written.write_text("half of it")
            then()

    killed(partial(write, die))
    assert visible(tmp_path) == []
    path.write_text("before")
    killed(partial(write, die))
    assert path.read_text() == "before"
    with pytest.raises(ZeroDivisionError):
        write(lambda: 1 / 0)
    assert path.read_text() == "before"
    ordinary = stat.filemode(path.stat().st_mode)
    write(lambda: None)
    assert path.read_text() == "half of it"
    assert stat.filemode(path.stat().st_mode) == ordinary
    assert visible(tmp_path) == ["file.txt"]
    assert len(list(tmp_path.iterdir())) == 3  # the folders of the two that were killed


def test_every_file_is_written_so():
    writers = re.compile(r"write_text\(|write_bytes\(|savefig\(|imsave\(|\.save\(|open\(.*[\"'][wax]")
    found = [
        line.strip()
        for folder in ("specnorm_fx", "export", "benchmarks", "demo")
        for file in (ROOT / folder).rglob("*.py")
        for line in file.read_text().splitlines()
        if writers.search(line) and "/proc/" not in line and "SAVE_IT" not in line
    ]
    assert len(found) >= 9
    assert not [line for line in found if "written" not in line]


def half(program, path, **_):
    Path(path).write_bytes(program.model_proto.SerializeToString()[:100])
    die()


def second_time(function):
    calls = []

    def called(*args):
        calls.append(args)
        return die() if len(calls) == 2 else function(*args)

    return called


# Where the export is killed, and which model stands at the path then.
PHASES = {
    "while writing": (torch.onnx.ONNXProgram, "save", half, "old"),
    "before verification": (specnorm_fx.onnx.exporting, "verify", die, "old"),
    "before the weights move": (Path, "replace", die, "old"),
    "between weights and graph": (Path, "replace", second_time(Path.replace), "old"),
    "before the old weights go": (Path, "unlink", die, "new"),
}


@forks
def test_an_export_killed_anywhere_leaves_a_good_file(tmp_path, monkeypatch):
    path, x = tmp_path / "net.onnx", torch.randn(2, 3, 2, 2)
    models = {name: transform(Net()).eval() for name in ("old", "new")}
    export = torch.onnx.export
    specnorm_fx.onnx.export(models["old"], x, path, external_data=True)
    first = visible(tmp_path)
    assert [re.sub(r"[0-9a-f]{16}", "HASH", name) for name in first] == ["net.onnx", "net.onnx.HASH.data"]
    programs = []
    monkeypatch.setattr(
        torch.onnx, "export", lambda *a, **k: programs.append(export(*a, **k)) or programs[-1]
    )
    specnorm_fx.onnx.export(models["new"], x, tmp_path / "other.onnx")
    # The exporter takes a second: once is enough.
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: programs[0])

    for phase, (owner, name, fault, stands) in PHASES.items():

        def export_until_killed(owner=owner, name=name, fault=fault):
            setattr(owner, name, fault)
            specnorm_fx.onnx.export(models["new"], x, path, external_data=True)

        killed(export_until_killed)
        onnx.checker.check_model(path, full_check=True)
        assert specnorm_fx.onnx.verify(path, models[stands], x), phase
    specnorm_fx.onnx.export(models["new"], x, path, external_data=True)
    left = [name for name in visible(tmp_path) if name.startswith("net")]
    assert len(left) == 2
    assert left[1] != first[1]


# --- Threads ---


def in_threads(actions):
    """The results, all begun at once."""
    results = [None] * len(actions)
    barrier = threading.Barrier(len(actions))

    def run(index, action):
        barrier.wait()
        with torch.no_grad():
            results[index] = action()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def forget_plans():
    """As in a new process."""
    parts = (cpu_kernels._library, cpu_kernels._function, cpu_kernels._plan, cpu_kernels._places)
    for cached in (cpu_kernels.available, *parts):
        cached.cache_clear()


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("n_models", [1, 4])
@pytest.mark.parametrize("warm", [False, True])
def test_threads_get_equal_results(implementation, n_models, warm):
    models = [transform(Net(), implementation=implementation).eval() for _ in range(n_models)]
    x = torch.randn(2, 3, 2, 2)
    states = [copy.deepcopy(model.state_dict()) for model in models]
    with torch.no_grad():
        expected = [model(x) for model in models]
    for _ in range(5):
        if not warm:
            forget_plans()
        results = in_threads([partial(models[i % n_models], x) for i in range(8)])
        assert all(torch.equal(result, expected[i % n_models]) for i, result in enumerate(results))
    for model, state in zip(models, states, strict=True):
        assert_equal(model.state_dict(), state)


# torch 2.11 crashes where threads compile at once, whatever the model.
@pytest.mark.parametrize("warm", (False, True) if torch.__version__ >= "2.13" else (True,))
def test_threads_get_equal_results_of_a_compiled_model(warm):
    torch._dynamo.reset()
    gm = transform(Net()).eval()
    compiled = torch.compile(gm, backend="aot_eager")
    x = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        expected = (compiled if warm else gm)(x)
    results = in_threads([partial(compiled, x)] * 8)
    torch._dynamo.reset()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not cpu_kernels.available(), reason="the C library is not built")
def test_a_plan_keeps_what_it_gives_to_the_library():
    """Of two threads that fill the cache at once the second throws out what the first has taken."""
    forget_plans()
    weight = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).weight
    plan, _ = cpu_kernels._planned([weight], [0], ["uv"], [1], [1e-12], [False])
    places = cpu_kernels._places((6, 4, 3, 3), (2, 3, 1))
    assert plan.sites[0].places == places.data_ptr()
    kept = weakref.ref(places)
    del places
    cpu_kernels._places.cache_clear()
    assert kept() is not None
