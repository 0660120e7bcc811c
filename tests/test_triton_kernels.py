"""The CUDA kernels against `reference`: on a GPU where there is one, else in Triton's interpreter."""

import contextlib
import copy
import gc
import importlib
import itertools
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import specnorm_fx
from specnorm_fx import memory, ops, reference, transform
from tests.accesses import Accesses, checked
from tests.models import Discriminator

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 1e-12


@pytest.fixture(scope="module")
def kernels():
    """`specnorm_fx.triton_kernels`, on a CPU a copy of the package that is interpreted.

    What `triton.jit` makes of a function is decided where it decorates: Triton's own functions (sum,
    zeros, ...) are compiled ones if triton was imported without TRITON_INTERPRET, by any other test. So
    these are exchanged as well, and put back at the end. The interpreter exchanges the rest of the language
    anew for each call of a function in a kernel, which takes longer than the call: here it does so once.
    """
    compiled = importlib.import_module("specnorm_fx.triton_kernels")
    if DEVICE == "cuda":
        yield compiled
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        for module in (tl, tl.core, tl.standard):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(module, name, interpreter.InterpretedFunction(function.fn))
        with pytest.MonkeyPatch.context() as swap:  # at its end `compiled` is again what an import gives
            swap.setattr(specnorm_fx, "triton_kernels", compiled)
            for name in [name for name in sys.modules if name.startswith(compiled.__name__)]:
                swap.delitem(sys.modules, name)
            interpreted = importlib.import_module(compiled.__name__)
        # Half as long again take: a table made anew for each look at a dtype, and looks for overflow whose
        # result counts with debug=True alone.
        look_up, known = interpreter._get_np_dtype, {}

        def np_dtype(dtype):
            if dtype.name not in known:
                known[dtype.name] = look_up(dtype)
            return known[dtype.name]

        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
        yield interpreted
        scope.restore()


def transposed(w):
    return w.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(w):
    return w.contiguous(memory_format=torch.channels_last)


def three_strides(w):
    """Columns in an order that no two strides describe."""
    return w.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)


def with_gaps(w):
    return torch.stack([w, w], -1)[..., 0]


def as_is(w):
    return w


# shape, dim, layout
SHAPES = {
    "row": ((1, 50), 0, as_is),
    "column": ((40, 1), 0, as_is),
    "number": ((1, 1), 0, as_is),
    "small": ((3, 27), 0, as_is),
    "first conv": ((64, 3, 3, 3), 0, as_is),
    "aligned short": ((70, 64), 0, as_is),
    "aligned long": ((9, 1032), 0, as_is),
    "odd": ((13, 259), 0, as_is),
    "conv transpose": ((6, 5, 4, 4), 1, as_is),
    "conv transpose odd": ((7, 9, 3, 3), 1, as_is),
    "conv transpose 1x1": ((6, 10, 1, 1), 1, as_is),
    "channels last": ((10, 8, 3, 3), 0, channels_last),
    "channels last transpose": ((10, 6, 3, 3), 1, channels_last),
    "channels last 1x1": ((10, 8, 1, 1), 0, channels_last),
    "transposed": ((33, 140), 0, transposed),
    "three strides": ((4, 3, 2, 5), 0, three_strides),
    "dim 2": ((3, 4, 5), 2, as_is),
    "gaps": ((4, 9), 0, with_gaps),
}
GENERAL = [name for name in SHAPES if name != "number"]  # 1 x 1: exactly 1, its gradient exactly 0


def make(name, dtype=torch.float32, scale=1.0):
    shape, dim, layout = SHAPES[name] if isinstance(name, str) else name
    w = layout((torch.randn(shape, dtype=torch.float64) * scale).to(dtype)).to(DEVICE)
    kind = reference.compute_dtype(w)
    m = shape[dim]
    u, v = (
        torch.nn.functional.normalize(torch.randn(k), dim=0).to(DEVICE, kind) for k in (m, w.numel() // m)
    )
    return SimpleNamespace(w=w, u=u, v=v, dim=dim)


def run(kernels, cases, iterations=1, order="uv", eps=EPS, divide=True):
    """What the kernels say of each case: u, v, sigma, live, and W / sigma."""
    many = len(cases)
    orders = [order] * many if isinstance(order, str) else order
    counts = [iterations] * many if isinstance(iterations, int) else iterations
    call = kernels.normalize if divide else kernels.power_iteration
    vectors, sigmas, *rest = call(
        [c.w for c in cases], [c.u for c in cases], [c.v for c in cases],
        counts, [eps] * many, [c.dim for c in cases], orders,
    )  # fmt: skip
    assert vectors.shape == (sum(c.u.numel() + c.v.numel() for c in cases),)
    assert sigmas.shape == (many,)
    assert sigmas.dtype == torch.float64
    assert vectors.dtype == reference.compute_dtype(cases[0].w)
    parts = vectors.split([x.numel() for c in cases for x in (c.u, c.v)])
    results = []
    for i in range(many):
        out = rest[0][i] if rest else None
        results.append(SimpleNamespace(u=parts[2 * i], v=parts[2 * i + 1], sigma=sigmas[i], out=out))
    return results, vectors, sigmas


def expected(case, iterations=1, order="uv", eps=EPS, dtype=None):
    w, u, v = (x if dtype is None else x.to(dtype) for x in (case.w, case.u, case.v))
    u, v = reference.singular_vectors(w, u, v, iterations, eps, case.dim, order)
    return SimpleNamespace(u=u, v=v, out=reference.normalized(w, u, v, eps, case.dim))


def error(x, truth):
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def check(result, case, iterations=1, order="uv"):
    """No further from the float64 truth than twice the reference, and a few roundings."""
    truth = expected(case, iterations, order, dtype=torch.float64)
    theirs = expected(case, iterations, order)
    # In float64 the reference is the truth itself, so its own error counts as one of the few.
    few = (16 if case.w.dtype == torch.float64 else 4) * torch.finfo(result.u.dtype).eps
    if iterations <= 0:  # u^T W v of any u and v: terms as large as W may leave a small sum
        w = reference.weight_matrix(case.w.double(), case.dim)
        few *= max(1.0, (torch.linalg.matrix_norm(w, 2) / result.sigma.abs()).item())
    for name in ("u", "v", "out"):
        ours, right = getattr(result, name), getattr(truth, name)
        # A half result is rounded once more (and truncated in the interpreter, for bfloat16).
        rounding = torch.finfo(ours.dtype).eps if ours.dtype != result.u.dtype else 0.0
        assert error(ours, right) <= 2 * error(getattr(theirs, name), right) + few + rounding, name
    assert result.out.shape == case.w.shape
    assert result.out.stride() == torch.empty_like(case.w).stride()
    assert result.out.dtype == case.w.dtype


@pytest.mark.parametrize("order", ["uv", "vu"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_every_shape(kernels, iterations, order):
    cases = [make(name) for name in list(SHAPES)[:: 4 if iterations > 1 else 1]]  # interpreted, so slow
    results, _, sigmas = run(kernels, cases, iterations, order)
    for case, result in zip(cases, results, strict=True):
        check(result, case, iterations, order)
    assert (sigmas != 0).all()
    _, vectors, again = run(kernels, cases, iterations, order, divide=False)
    assert torch.equal(again, sigmas)
    assert torch.equal(vectors, torch.cat([x for r in results for x in (r.u, r.v)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("iterations", [0, 2])
def test_every_dtype(kernels, dtype, iterations):
    cases = [make(name, dtype) for name in ("small", "aligned short", "aligned long", "conv transpose")]
    cases += [make(name, dtype) for name in ("channels last", "transposed")]
    for case, result in zip(cases, run(kernels, cases, iterations)[0], strict=True):
        check(result, case, iterations)


def test_long_rows(kernels):
    case = make(((5, 14000), 0, as_is))
    check(run(kernels, [case])[0][0], case)


@pytest.fixture
def several_tiles(kernels, monkeypatch):
    """Weights of which a block has several tiles, as many rows make it have."""
    monkeypatch.setattr(kernels.tables, "MAX_BLOCKS", 2)
    kernels.tables.forward_plan.cache_clear()
    kernels.tables.backward_plan.cache_clear()
    yield [((200, 12), 0, as_is), ((50, 600), 0, as_is), ((11, 200), 0, transposed)]
    kernels.tables.forward_plan.cache_clear()
    kernels.tables.backward_plan.cache_clear()


def test_blocks_of_several_tiles(kernels, several_tiles):
    cases = [make(name) for name in several_tiles]
    for order in ("uv", "vu"):
        results, vectors, sigmas = run(kernels, cases, 2, order)
        for case, result in zip(cases, results, strict=True):
            check(result, case, 2, order)
    check_gradients(kernels, cases, vectors, sigmas)


def test_a_weight_anywhere_in_memory(kernels):
    """A pointer that 16 does not divide takes the other way of reading, with the same result."""
    case = make("aligned long")
    shifted = make("aligned long")
    shifted.w = torch.cat([case.w.new_zeros(1), case.w.flatten()])[1:].view_as(case.w)
    shifted.u, shifted.v = case.u, case.v
    (first, second), vectors, sigmas = run(kernels, [case, shifted])
    check(first, case)
    check(second, shifted)
    check_gradients(kernels, [case, shifted], vectors, sigmas)


def test_alone_or_among_others(kernels):
    cases = [make(name) for name in SHAPES if name != "aligned long"]
    counts = [i % 3 for i in range(len(cases))]
    orders = ["uv" if i % 4 else "vu" for i in range(len(cases))]
    together, _, sigmas = run(kernels, cases, counts, orders)
    for i, case in enumerate(cases):
        check(together[i], case, counts[i], orders[i])
        (alone,), _, sigma = run(kernels, [case], counts[i], orders[i])
        assert torch.equal(sigma[0], sigmas[i])
        for name in ("u", "v", "out"):
            assert torch.equal(getattr(alone, name), getattr(together[i], name)), name


def test_more_weights_than_one_launch_takes(kernels, monkeypatch):
    monkeypatch.setattr(kernels.tables, "MAX_WEIGHTS", 4)
    kernels.tables.forward_plan.cache_clear()
    kernels.tables.backward_plan.cache_clear()
    cases = [make(name) for name in ("small", "column", "odd", "dim 2", "row", "conv transpose")]
    results, vectors, sigmas = run(kernels, cases)
    for case, result in zip(cases, results, strict=True):
        check(result, case)
    check_gradients(kernels, cases, vectors, sigmas)
    kernels.tables.forward_plan.cache_clear()
    kernels.tables.backward_plan.cache_clear()


@pytest.fixture
def launches(kernels, monkeypatch):
    """The launchers that were called."""
    called, launch = [], kernels.launching._Launcher.__call__

    def call(self, *args):
        called.append(self)
        launch(self, *args)

    monkeypatch.setattr(kernels.launching._Launcher, "__call__", call)
    return called


@pytest.mark.parametrize("many", [1, 7])
@pytest.mark.parametrize(
    ("iterations", "order", "most"),
    [(0, "uv", 3), (1, "uv", 3), (1, "vu", 3), (3, "uv", 7), (1, "mixed", 3), ("mixed", "uv", 5)],
)
def test_launches_do_not_grow_with_the_weights(kernels, launches, many, iterations, order, most):
    cases = [make("small") for _ in range(many)]
    counts = [2, 0, 1, 2, 0, 1, 1][:many] if iterations == "mixed" else iterations
    orders = (["uv", "vu"] * many)[:many] if order == "mixed" else order
    _, vectors, sigmas = run(kernels, cases, counts, orders)
    assert len(launches) == most
    launches.clear()
    gradients(kernels, cases, [torch.ones_like(c.w) for c in cases], vectors, sigmas)
    assert len(launches) == 2


def test_every_launch_is_on_the_device_of_the_weights(kernels, monkeypatch):
    """Triton launches on the current one."""
    devices, launched = [], []

    @contextlib.contextmanager
    def on(device):
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(kernels.launching, "_on", on)
    launch = kernels.launching._Launcher.__call__

    def call(self, *args):
        launched.append(list(devices))
        launch(self, *args)

    monkeypatch.setattr(kernels.launching._Launcher, "__call__", call)
    case = make("small")
    _, vectors, sigmas = run(kernels, [case])
    gradients(kernels, [case], [torch.ones_like(case.w)], vectors, sigmas)
    assert launched == [[case.w.device]] * 5


def test_what_is_compiled_is_launched_past_the_lookup(kernels, monkeypatch):
    """By kind and flag, on the stream of its device; by Triton's own launch if somebody hooks on."""
    calls = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def __init__(self, name):
            self.name = name

        def run(self, *args):
            calls.append((self.name, args))

        def __getitem__(self, grid):
            return lambda *args: calls.append((self.name, grid, args))

    class Kernel:
        arg_names = ("table", "FIRST", "VEC", "L")
        makes: ClassVar = [Compiled(name) for name in "abc"]

        def __getitem__(self, grid):
            def launch(*args, **options):
                calls.append(("source", grid, args, options))
                return self.makes.pop(0)

            return launch

    driver = SimpleNamespace(get_current_stream=lambda index: f"stream {index}")
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    launcher = kernels.launching._Launcher(Kernel(), num_warps=4)
    first, second = (
        kernels.launching._Specialization(torch.device("cuda", i), torch.float16, torch.float32, 8)
        for i in range(2)
    )
    for kind, flag in ((first, True), (first, True), (first, False), (second, True), (second, True)):
        launcher(kind, 5, ("x",), flag)
    compiled, rest = {"num_warps": 4}, ("function", "metadata", None, None, None, "x", True, 8, 8)
    assert calls == [
        ("source", (5,), ("x", True, 8, 8), compiled),
        ("a", (5, 1, 1, "stream 0", *rest)),
        ("source", (5,), ("x", False, 8, 8), compiled),
        ("source", (5,), ("x", True, 8, 8), compiled),
        ("c", (5, 1, 1, "stream 1", *rest)),
    ]

    calls.clear()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with triton.knobs.runtime.scope():
            getattr(triton.knobs.runtime, name).add(print)
            launcher(first, 5, ("x",), True)
            getattr(triton.knobs.runtime, name).remove(print)
            setattr(triton.knobs.runtime, name, print)  # in the place of the chain
            launcher(first, 5, ("x",), True)
    assert calls == [("a", (5, 1, 1), ("x", True, 8, 8))] * 4

    calls.clear()
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.launch_enter_hook = triton.knobs.runtime.launch_exit_hook = None
        launcher(first, 5, ("x",), True)
    assert calls == [("a", (5, 1, 1, "stream 0", *rest))]


@pytest.mark.parametrize("call", ["normalize", "power_iteration"])
def test_a_weight_without_elements(kernels, call):
    weights = [torch.ones(2, 3, device=DEVICE), torch.ones(2, 0, device=DEVICE)]
    us, vs = [w.new_ones(2) for w in weights], [w.new_ones(w.shape[1]) for w in weights]
    with pytest.raises(ValueError, match="without elements has no sigma"):
        getattr(kernels, call)(weights, us, vs, [1, 1], [EPS] * 2, [0, 0], ["uv", "uv"])


def test_the_device_is_made_the_current_one(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert kernels.launching._on(torch.device("cuda", 1)).idx == 1
    assert kernels.launching._on(torch.device("cuda", 0)).__enter__() is None  # it is already


def test_tables_are_kept_for_good_and_made_on_another_thread(kernels, monkeypatch):
    """A recorded CUDA graph reads them; and nothing of this thread's may stay in its memory pool."""
    threads = []

    def tensor(*args, _tensor=torch.tensor, **kwargs):
        threads.append(threading.get_ident())
        return _tensor(*args, **kwargs)

    kernels.tables.forward_plan.cache_clear()
    monkeypatch.setattr(torch, "tensor", tensor)
    run(kernels, [make("small")])
    assert threads
    assert threading.get_ident() not in threads
    for plan in (kernels.tables.forward_plan, kernels.tables.backward_plan):
        assert plan.cache_info().maxsize is None


def test_tables_of_two_threads_at_once_are_both_kept(monkeypatch):
    """A cache keeps what the second has made, and the first goes on to launch kernels with its own."""
    tables = importlib.import_module("specnorm_fx.triton_kernels.tables")
    both, make_plan = threading.Barrier(2, timeout=60), tables._Table

    def at_once():
        both.wait()
        return make_plan()

    monkeypatch.setattr(tables, "_Table", at_once)
    site = (((3, 41),), ((41, 1),), (0,), (1,), ("uv",), (1e-12,))  # of no other test
    with ThreadPoolExecutor(2) as threads:
        calls = [
            threads.submit(tables.forward_plan, torch.device("cpu"), torch.float32, True, *site) for _ in "ab"
        ]
        made = [weakref.ref(call.result().chunks[0].tables[0]) for call in calls]
    del calls
    gc.collect()
    assert made[0]() is not made[1]()
    assert all(table() is not None for table in made)


def test_tables_are_built_once(kernels, monkeypatch):
    cases = [make("small"), make("odd")]
    first = run(kernels, cases)[1:]
    monkeypatch.setattr(torch, "tensor", None)  # a copy to the device
    second = run(kernels, cases)[1:]
    assert all(map(torch.equal, first, second))


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds NaN."""

    def poisoned(make):
        def fresh(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return fresh

    monkeypatch.setitem(memory._EMPTY, DEVICE, poisoned(memory._EMPTY[DEVICE]))


@pytest.mark.parametrize("counts", [[0] * 5, [1] * 5, [0, 1, 2, 3, 2]], ids=str)
def test_reads_no_memory_that_it_has_not_written(kernels, poison, counts):
    names = ("small", "aligned long", "column", "transposed", "channels last")
    cases = [make(name) for name in names]
    cases[2].w = torch.zeros_like(cases[2].w)
    results, vectors, sigmas = run(kernels, cases, counts)
    assert vectors.isfinite().all()
    assert sigmas.isfinite().all()
    assert all(r.out.isfinite().all() for r in results)
    dws = gradients(kernels, cases, [torch.ones_like(c.w) for c in cases], vectors, sigmas)
    assert all(dw.isfinite().all() for dw in dws)


# ---------------------------------------------------------------- programs and threads at once


IN_THE_INTERPRETER = pytest.mark.skipif(
    DEVICE == "cuda", reason="a GPU does not say what it reads and writes"
)


@IN_THE_INTERPRETER
def test_programs_and_threads_may_run_in_any_order(kernels, monkeypatch, several_tiles):
    cases = [make(name) for name in (*SHAPES, *several_tiles)]
    cases[3].w = torch.zeros_like(cases[3].w)  # the way of what has no direction
    counts = [(1, 2, 0, -1)[i % 4] for i in range(len(cases))]
    orders = ["uv" if i % 3 else "vu" for i in range(len(cases))]
    with checked(monkeypatch) as launches:
        _, vectors, sigmas = run(kernels, cases, counts, orders)
        gradients(kernels, cases, [torch.ones_like(c.w) for c in cases], vectors, sigmas)
    assert len(launches) == 2 * 2 + 1 + 2
    with (
        checked(monkeypatch, barriers=False),
        pytest.raises(AssertionError, match="no barrier between write and read"),
    ):
        run(kernels, [make(several_tiles[0])])


@IN_THE_INTERPRETER
@pytest.mark.parametrize(
    ("reads", "writes", "fault"),
    [
        ([], [(0, 0), (0, 8), (1, 8)], "two programs write one place"),
        ([(0, 0), (1, 8)], [(0, 8)], "a program reads what another one writes"),
        ([(0, 4000)], [(0, 0)], "a place is outside of every tensor"),
        ([(0, 2)], [(0, 0)], "a place is not aligned"),
    ],
    ids=["written twice", "read and written", "outside", "not aligned"],
)
def test_what_must_not_be_is_seen(reads, writes, fault):
    memory, left = torch.zeros(1000), [torch.ones(3).to_sparse()]  # what another test has left may be odd
    torch.func.grad(lambda x: (left.append(x), x)[1])(torch.ones(()))
    accesses = Accesses()
    for found, of_programs in ((accesses.reads, reads), (accesses.writes, writes)):
        accesses.note(found, np.zeros(0, np.int64), np.zeros(0), 4)
        for accesses.program, offset in of_programs:
            accesses.note(found, np.array([memory.data_ptr() + offset]), np.ones(1), 4)
    with pytest.raises(AssertionError, match=fault):
        accesses.check()


# ---------------------------------------------------------------- guards


@pytest.mark.parametrize("order", ["uv", "vu"])
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e-9, 1e12, 1e15])
def test_scales(kernels, scale, order):
    cases = [make(name, scale=scale) for name in ("odd", "transposed", "small")]
    for iterations in (0, 2) if order == "uv" else (1,):
        results, vectors, sigmas = run(kernels, cases, iterations, order)
        if scale * 100 < EPS:
            assert torch.equal(sigmas, torch.zeros_like(sigmas))
            for case, result in zip(cases, results, strict=True):
                # Without iteration they are brought to unit length, which they have up to rounding.
                rounding = 0 if iterations else torch.finfo(torch.float32).eps
                assert error(result.u, case.u) <= rounding
                assert error(result.v, case.v) <= rounding
                assert torch.equal(result.out, case.w)
        else:
            for case, result in zip(cases, results, strict=True):
                check(result, case, iterations, order)
        check_gradients(kernels, cases, vectors, sigmas)


@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_the_ends_of_fp32(kernels, scale):
    cases = [make(name, scale=scale) for name in ("aligned long", "small")]
    results, _, _ = run(kernels, cases, 2, eps=1e-36)
    for case, result in zip(cases, results, strict=True):
        truth = expected(case, 2, eps=1e-36, dtype=torch.float64)
        for name in ("u", "v", "out"):
            assert error(getattr(result, name), getattr(truth, name)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("order", ["uv", "vu"])
def test_a_bad_entry_leaves_everything_as_it_is(kernels, bad, order):
    """Also inf, where the reference makes inf / inf of one of the vectors."""
    cases = [make("odd"), make("small"), make("first conv")]
    cases[1].w[1, 2] = bad
    results, vectors, sigmas = run(kernels, cases, 2, order)
    check(results[0], cases[0], 2, order)
    check(results[2], cases[2], 2, order)
    assert torch.equal(results[1].u, cases[1].u)
    assert torch.equal(results[1].v, cases[1].v)
    assert torch.equal(results[1].out.nan_to_num(), cases[1].w.nan_to_num())
    assert sigmas[1] == 0
    grads = [torch.randn_like(c.w) for c in cases]
    assert torch.equal(gradients(kernels, cases, grads, vectors, sigmas)[1], grads[1])


@pytest.mark.parametrize("name", ["odd", "transposed", "channels last"])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("order", ["uv", "vu"])
def test_a_product_of_zero_keeps_one_vector_only(kernels, name, iterations, order):
    """The first product vanishes, the second one, of the vector that was kept, does not."""
    case = make(name)
    (case.v if order == "uv" else case.u).zero_()
    result = run(kernels, [case], iterations, order)[0][0]
    check(result, case, iterations, order)


@pytest.mark.parametrize("order", ["uv", "vu"])
def test_a_second_product_of_zero(kernels, order):
    """s is no longer than eps though t is: the other vector stays, and |sigma| is below eps."""
    case = make("small", scale=1e-3)
    for iterations in (1, 2):
        eps = 2 * torch.linalg.matrix_norm(reference.weight_matrix(case.w, 0), 2).item()
        (case.v if order == "uv" else case.u).mul_(1e3)  # longer than 1, so that t passes
        result = run(kernels, [case], iterations, order, eps=eps)[0][0]
        want = expected(case, iterations, order, eps=eps)
        assert error(result.u, want.u) < 1e-6
        assert error(result.v, want.v) < 1e-6
        assert error(result.out, want.out) < 1e-6


def test_u_and_v_as_they_are(kernels):
    cases = [make("small"), make("odd"), make("transposed"), make("aligned long"), make("small")]
    for case, factor in zip(cases, (3.0, 0.5, 1.0, 0.9, 2.0), strict=True):
        case.u *= factor
    counts = [reference.AS_STORED] * 4 + [1]
    results, _, _ = run(kernels, cases, counts)
    for case, result, count in zip(cases, results, counts, strict=True):
        check(result, case, count)
        if count == reference.AS_STORED:
            assert torch.equal(result.u, case.u)
            assert torch.equal(result.v, case.v)


def test_without_iteration_any_length_of_u_and_v_will_do(kernels):
    cases = [make("small"), make("odd"), make("transposed")]
    for case, factor in zip(cases, (3.0, 1 + 4e-7, 0.0), strict=True):
        case.u *= factor
    results, _, _ = run(kernels, cases, 0)
    check(results[0], cases[0], 0)
    check(results[1], cases[1], 0)  # an average may be of almost unit length
    assert torch.equal(results[2].out, cases[2].w)
    assert results[2].sigma.item() == 0


# ---------------------------------------------------------------- backward


def gradients(kernels, cases, grads, vectors, sigmas, contiguous=False):
    parts = vectors.split([x.numel() for c in cases for x in (c.u, c.v)])
    normalized = [
        # With the weight's strides, but for gaps.
        torch.empty_like(c.w).copy_(reference.normalized(c.w, u, v, EPS, c.dim))
        for c, u, v in zip(cases, parts[::2], parts[1::2], strict=True)
    ]
    count = len(cases)
    return kernels.normalize_backward(
        grads, normalized, vectors, sigmas, [EPS] * count, [c.dim for c in cases], [contiguous] * count
    )


def check_gradients(kernels, cases, vectors, sigmas, grads=None, contiguous=False):
    """Against autograd of the reference in float64, and no worse than autograd in the dtype itself."""
    grads = [torch.randn_like(c.w) for c in cases] if grads is None else grads
    dws = gradients(kernels, cases, grads, vectors, sigmas, contiguous)
    parts = vectors.split([x.numel() for c in cases for x in (c.u, c.v)])
    for i, (case, grad, dw) in enumerate(zip(cases, grads, dws, strict=True)):
        if grad is None:
            assert dw is None
            continue
        wanted = []
        for dtype in (torch.float64, case.w.dtype):
            w = case.w.to(dtype, copy=True).requires_grad_()
            kind = reference.compute_dtype(w)
            u, v = parts[2 * i].to(kind), parts[2 * i + 1].to(kind)
            reference.normalized(w, u, v, EPS, case.dim).backward(grad.to(dtype))
            wanted.append(w.grad.double())
        truth, theirs = wanted
        # What is subtracted may be larger than what is left.
        size = max(truth.norm().item(), grad.double().norm().item() / (abs(sigmas[i].item()) or 1.0))
        few = 8 * torch.finfo(vectors.dtype).eps + (dw.dtype != vectors.dtype) * torch.finfo(dw.dtype).eps
        mistake, allowed = (dw.double() - truth).norm().item(), (theirs - truth).norm().item()
        assert mistake <= 2 * allowed + few * size
        assert dw.shape == case.w.shape
        promised = torch.contiguous_format if contiguous else torch.preserve_format
        assert dw.stride() == torch.empty_like(case.w, memory_format=promised).stride()
        assert dw.dtype == case.w.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_every_shape(kernels, dtype):
    cases = [make(name, dtype) for name in GENERAL]
    _, vectors, sigmas = run(kernels, cases, divide=False)
    check_gradients(kernels, cases, vectors, sigmas)


def test_gradients_that_are_missing(kernels):
    cases = [make(name) for name in ("small", "odd", "column")]
    _, vectors, sigmas = run(kernels, cases)
    check_gradients(kernels, cases, vectors, sigmas, [None, torch.randn_like(cases[1].w), None])
    check_gradients(kernels, cases, vectors, sigmas, [None] * 3)


@pytest.mark.parametrize("name", ["first conv", "channels last", "conv transpose", "three strides"])
def test_gradients_of_any_strides(kernels, name):
    case = make(name)
    _, vectors, sigmas = run(kernels, [case])
    shape = case.w.shape
    backwards = torch.randn(shape[::-1], device=DEVICE).permute(3, 2, 1, 0)
    padded = torch.randn(*shape[:3], 2 * shape[3], device=DEVICE)[..., ::2]
    expanded = torch.randn(1, device=DEVICE).expand(shape)
    for grad in (torch.randn(shape, device=DEVICE), channels_last(torch.randn(shape, device=DEVICE))):
        check_gradients(kernels, [case], vectors, sigmas, [grad])
    for grad in (backwards, padded, expanded):
        check_gradients(kernels, [case], vectors, sigmas, [grad])


TURNED = ["channels last", "channels last transpose", "transposed", "three strides", "channels last 1x1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_contiguous_weights_are_contiguous(kernels, dtype):
    """Where Inductor has turned their W / sigma to channels_last."""
    cases = [make(name, dtype) for name in ("small", *TURNED)]
    _, vectors, sigmas = run(kernels, cases)
    for missing in (0, 2):
        grads = [torch.randn_like(case.w) for case in cases]
        grads[missing] = None
        check_gradients(kernels, cases, vectors, sigmas, grads, contiguous=True)


@pytest.mark.parametrize("name", TURNED)
def test_contiguous_gradients_from_any_strides(kernels, name):
    case = make(name)
    _, vectors, sigmas = run(kernels, [case])
    for order in itertools.permutations(range(case.w.ndim)):
        back = sorted(range(case.w.ndim), key=lambda d: order[d])
        grad = torch.randn_like(case.w).permute(order).contiguous().permute(back)
        check_gradients(kernels, [case], vectors, sigmas, [grad], contiguous=True)


def test_a_contiguous_gradient_takes_no_copy(kernels, monkeypatch):
    """It is written where it belongs: one tensor of the size of each weight is made, and the partial sums."""
    cases = [make(name) for name in TURNED if name not in ("three strides", "channels last 1x1")]
    grads = [torch.randn_like(case.w) for case in cases]
    _, vectors, sigmas = run(kernels, cases)
    gradients(kernels, cases, grads, vectors, sigmas, contiguous=True)  # makes the tables
    normalized = [case.w.clone() for case in cases]
    options = [EPS] * len(cases), [case.dim for case in cases], [True] * len(cases)
    monkeypatch.setattr(kernels.launching._Launcher, "__call__", lambda *_: None)  # the interpreter copies
    made, empty = [], memory.empty_on(torch.device(DEVICE))

    def allocate(*layout):
        made.append(layout)
        return empty(*layout)

    monkeypatch.setattr(memory, "empty_on", lambda device: allocate)
    with Operators() as operators:
        kernels.normalize_backward(grads, normalized, vectors, sigmas, *options)
    assert not operators.called
    *results, sums = made
    assert results == [(tuple(w.shape), w.contiguous().stride(), w.dtype) for w in normalized]
    assert sums[2] == torch.float64


class Operators(TorchDispatchMode):
    """Which operators of ATen are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_two_runs_give_the_same_bits(kernels):
    cases = [make(name) for name in ("aligned long", "transposed", "channels last")]
    grads = [torch.randn_like(c.w) for c in cases]
    runs = []
    for _ in range(2):
        results, vectors, sigmas = run(kernels, cases, 2)
        runs.append((*(r.out for r in results), vectors, *gradients(kernels, cases, grads, vectors, sigmas)))
    assert all(map(torch.equal, *runs))


@seed(0)
@settings(max_examples=8, deadline=None, database=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    data=st.data(),
    iterations=st.integers(0, 2),
    order=st.sampled_from(["uv", "vu"]),
)
def test_any_shape_and_layout(kernels, shape, data, iterations, order):
    torch.manual_seed(0)
    dim = data.draw(st.integers(0, len(shape) - 1))
    permutation = data.draw(st.permutations(range(len(shape))))
    back = sorted(range(len(shape)), key=lambda d: permutation[d])
    case = make((shape, dim, lambda w: w.permute(permutation).contiguous().permute(back)))
    (result,), vectors, sigmas = run(kernels, [case], iterations, order)
    check(result, case, iterations, order)
    check_gradients(kernels, [case], vectors, sigmas)
    check_gradients(kernels, [case], vectors, sigmas, contiguous=True)


# ---------------------------------------------------------------- the real compiler

# With a driver that launches nothing: a training step of two weights, twice, with two iterations.
LAUNCH = """
    import threading
    from types import SimpleNamespace

    import torch, triton
    from triton.backends.compiler import GPUTarget

    compiled, launched = [], []

    class Launcher:
        def __init__(self, source, metadata):
            self.name = source.fn.__name__

        def __call__(self, x, y, z, stream, function, *arguments):
            assert (y, z, stream, function) == (1, 1, 7, 2)
            launched.append((self.name, x, arguments[4:]))

    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        ),
    ))

    fails = None

    def compile(source, *, _compile=triton.compiler.compile, **options):
        if fails is not None:
            raise fails
        compiled.append((source.fn.__name__, threading.get_ident()))
        built = _compile(source, **options)
        assert built.asm["cubin"]
        return built

    triton.compiler.compile = compile
    from specnorm_fx.triton_kernels import launching, normalize, normalize_backward

    # Those of a GPU; of some Pythons the heap is so low that they would fit in 32 bits.
    HIGH = 2**40
    real = launching._addresses
    launching._addresses = lambda tensors: [address + HIGH for address in real(tensors)]

    ws = [torch.randn(4, 6), torch.randn(8, 3, 3, 3)]
    us, vs = [torch.randn(4), torch.randn(8)], [torch.randn(6), torch.randn(27)]
    arguments = (ws, us, vs, [2] * 2, [1e-12] * 2, [0] * 2, ["uv"] * 2)

    # A full disk, and Ctrl-C, leave nothing behind.
    for fails in (OSError("no space left"), KeyboardInterrupt()):
        launching._compile.cache_clear()
        try:
            normalize(*arguments)
        except (OSError, KeyboardInterrupt) as error:
            assert error is fails
        else:
            raise AssertionError("it did not fail")
    assert triton.runtime._async_compile.active_mode.get() is None
    fails = None

    for _ in range(2):
        vectors, sigmas, results = normalize(*arguments)
        # Of the second alone: its vectors begin where 16 does not divide.
        (dw,) = normalize_backward(results[1:], results[1:], vectors[10:], sigmas[1:], [1e-12], [0], [True])

    # Of each direction all at once, but for the pass of a further iteration.
    forward, further, backward = compiled[:3], compiled[3:4], compiled[4:]
    for found, names in ((forward, ["finish", "pass", "reduce"]), (backward, ["dot", "gradient"])):
        assert sorted(name for name, _ in found) == [name + "_kernel" for name in names]
        assert len({thread for _, thread in found} - {threading.get_ident()}) == len(names)
    assert further == [("pass_kernel", threading.get_ident())]
    steps = ["pass_kernel", "reduce_kernel"] * 2 + ["finish_kernel", "dot_kernel", "gradient_kernel"]
    assert [name for name, *_ in launched] == steps * 2
    addresses = tuple(w.data_ptr() + 1 + HIGH for w in (*ws, *ws[1:] * 6))
    assert [arguments[0] for name, _, arguments in launched if name == "pass_kernel"] == [addresses] * 4
    assert [programs for _, programs, _ in launched] == [2, 2, 2, 2, 2, 1, 1] * 2
    *_, (_, _, arguments) = launched
    assert arguments[1] == (dw.data_ptr() + 1 + HIGH,) * 8
    assert arguments[3].data_ptr() == vectors.data_ptr() + 40
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="every other test compiles and launches")
def test_compiles_and_launches_for_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    """Each kernel once, whatever failed before, those of a direction at once; then past Triton's lookup."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", textwrap.dedent(LAUNCH)], check=True, timeout=300)


@pytest.mark.parametrize("value", [6e4, 6e-8])
def test_the_ends_of_fp16(kernels, value):
    """Of rank one, all elements of one size: sigma is the largest there is."""
    cases = [make(((24, 40), 0, layout), torch.float16) for layout in (as_is, transposed)]
    for case in cases:
        case.w.copy_(torch.outer(torch.randn(24).sign(), torch.randn(40).sign()) * value)
    results, vectors, sigmas = run(kernels, cases, [1, 2])
    exact = [case.w.double().norm() for case in cases]
    grads = [(torch.randn(24, 40) * min(sigma.item(), 1.0)).half().to(DEVICE) for sigma in exact]
    dws = gradients(kernels, cases, grads, vectors, sigmas)
    for case, result, sigma, grad, dw in zip(cases, results, exact, grads, dws, strict=True):
        check(result, case)
        assert error(result.sigma, sigma) < 1e-6
        # (G - <G, W / sigma> u v^T) / sigma, where u v^T is W / sigma. W / sigma and the result have been
        # rounded to fp16: relatively, and a subnormal result by 3e-8.
        right, g = case.w.double() / sigma, grad.double()
        want = (g - (g * right).sum() * right) / sigma
        room = torch.finfo(torch.float16).eps * (g.norm() / sigma).item() + 3e-8 * want.numel() ** 0.5
        assert dw.isfinite().all()
        assert (dw.double() - want).norm().item() <= room


def test_u_and_v_in_half_precision(kernels):
    """As torch's own spectral norm has them after `model.half()`."""
    case = make("small", torch.float16)
    case.u, case.v = case.u.half(), case.v.half()
    (got,), _, _ = run(kernels, [case])
    case.u, case.v = case.u.float(), case.v.float()
    (want,), _, _ = run(kernels, [case])
    assert torch.equal(got.u, want.u)
    assert torch.equal(got.out, want.out)


def test_gradients_that_are_yet_to_be_negated(kernels):
    """As PyTorch has the imaginary part of a conjugate."""
    case = make("small")
    _, vectors, sigmas = run(kernels, [case])
    grad = torch.randn_like(case.w)
    (want,), (got,) = (
        gradients(kernels, [case], [g], vectors, sigmas) for g in (-grad, torch._neg_view(grad))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("short", ["u", "v"])
def test_u_and_v_of_another_length(kernels, short):
    """They would be read past their end."""
    case = make("small")
    setattr(case, short, getattr(case, short)[1:])
    with pytest.raises(ValueError, match="elements and need"):
        run(kernels, [case])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_trains_through_them(kernels, monkeypatch, compiled):
    """The whole way: operator, autograd, u and v copied back."""
    plain = Discriminator().to(DEVICE)
    plain.dropout.p = 0.0
    torch.manual_seed(1)
    by_reference = transform(plain, implementation="reference")
    torch.manual_seed(1)
    gm = transform(copy.deepcopy(plain))
    monkeypatch.setattr(ops, "_kernels", lambda weights: kernels)
    model = torch.compile(gm, backend="aot_eager", fullgraph=True) if compiled else gm
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (gm, by_reference)]
    for _ in range(2):
        real, fake = torch.randn(2, 4, 3, 8, 8, device=DEVICE)
        for m, optimizer in zip((model, by_reference), optimizers, strict=True):
            optimizer.zero_grad()
            (m(real).exp() + m(fake).exp()).mean().backward()
            optimizer.step()
    for (name, a), b in zip(gm.state_dict().items(), by_reference.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
    assert torch.allclose(gm.eval()(real), by_reference.eval()(real), rtol=1e-4, atol=1e-5)
