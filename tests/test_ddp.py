"""DDP around a transformed model: the gradients of one process, and the same u and v on every rank."""

import copy
import inspect
import os
import re
import signal
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from specnorm_fx import freeze, gradient_penalty, ops, sigmas, transform, update_, warm_up_
from specnorm_fx.graph_module import transformed
from tests.architectures import PatchGAN
from tests.models import Discriminator, relative_error
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

# Of gradients in float64, relative to the largest: the batch is summed in other parts.
TOLERANCE = 1e-12
BATCH = 4  # on each rank


class Critic(nn.Module):
    """Without batch norm: the gradient of the whole batch is then the mean of those of its parts."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc1 = nn.Linear(16, 8)
        self.fc2 = nn.Linear(8, 1)

    def forward(self, x):
        h = F.leaky_relu(self.conv(x), 0.2).flatten(1)
        return self.fc2(F.leaky_relu(self.fc1(h), 0.2))


class Wide(nn.Module):
    """More than the megabyte of DDP's first bucket, where Dynamo cuts a graph."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 400)
        self.middle = nn.Linear(400, 400)
        self.plain = nn.Linear(400, 400)
        self.last = nn.Linear(400, 1)

    def forward(self, x):
        for layer in (self.first, self.middle, self.plain):
            x = torch.tanh(layer(x.flatten(1)))
        return self.last(x)


class CriticLoss(nn.Module):
    """What has to be one forward of DDP: the loss with its gradient penalty."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, real, fake):
        penalty, scores = gradient_penalty.r1(self.critic, real, return_output=True)
        return F.softplus(-scores).mean() + F.softplus(self.critic(fake)).mean() + 5 * penalty


def distributed(model, **options):
    with warnings.catch_warnings():
        # torch 2.13 has deprecated it; nothing else leaves buffers alone when DDP is made, too.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(model, **options)


def logistic(model, real, fake):
    """Two forwards, one backward."""
    return F.softplus(-model(real)).mean() + F.softplus(model(fake)).mean()


def train(rank, wrapped, steps=3, alone=None, loss=logistic, shape=(1, 4, 4), dtype=torch.float64):
    """Train on this rank's part of each batch, and ``alone``, a model of one process, on the whole.

    Returns the largest difference of a gradient between the two, and the state at the end.
    """
    models = [wrapped] if alone is None else [wrapped, alone]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    generator = torch.Generator().manual_seed(1)  # the same batches on all ranks
    size = BATCH * torch.distributed.get_world_size()
    part = slice(rank * BATCH, (rank + 1) * BATCH)
    worst = 0.0
    for _ in range(steps):
        real, fake = (torch.randn(size, *shape, generator=generator, dtype=dtype) for _ in range(2))
        loss(wrapped, real[part], fake[part]).backward()
        if alone is not None:
            loss(alone, real, fake).backward()
            worst = max(worst, gradient_error(wrapped, alone))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            if next(iter(transformed(model).values())).sites()[0].config.update == "step":
                update_(model)
    (gm,) = transformed(wrapped).values()
    return worst, gm.state_dict()


def gradient_error(wrapped, alone):
    got, want = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (wrapped, alone))
    return relative_error(got, want)


def unequal(state, other):
    return {key for key, value in state.items() if not torch.equal(value, other[key])}


# --- Eager ---


def in_two_parts(model, real, fake):
    """The loss of the second half, after the first has left its gradients, which DDP did not synchronise."""
    if not isinstance(model, DistributedDataParallel):
        return logistic(model, real, fake)
    first, second = zip(real.chunk(2), fake.chunk(2), strict=True)
    with model.no_sync():
        (logistic(model, *first) / 2).backward()
    return logistic(model, *second) / 2


SETTINGS = {
    "forward": ({}, {}, 50),
    "step": ({"update": "step"}, {}, 50),
    "forward, no broadcast": ({}, {"broadcast_buffers": False}, 50),
    "step, no broadcast": ({"update": "step"}, {"broadcast_buffers": False}, 50),
    "reference, no broadcast": ({"implementation": "reference"}, {"broadcast_buffers": False}, 3),
    "static graph": ({}, {"static_graph": True}, 3),
    "gradients in buckets": ({}, {"gradient_as_bucket_view": True}, 3),
    "small buckets": ({}, {"bucket_cap_mb": 1e-4}, 3),
    "micro-batches": ({"update": "step"}, {}, 3),
}


def train_in_every_setting(rank, names):
    results = {}
    for name in names:
        options, ddp_options, steps = SETTINGS[name]
        torch.manual_seed(0)
        gm = transform(Critic().double(), **options)
        alone = copy.deepcopy(gm)
        loss = in_two_parts if name == "micro-batches" else logistic
        results[name] = train(rank, distributed(gm, **ddp_options), steps, alone, loss)
    return results


@pytest.mark.parametrize(
    ("world_size", "names"), [(2, tuple(SETTINGS)), (3, ("small buckets",)), (4, ("forward, no broadcast",))]
)
def test_gradients_are_those_of_one_process_and_vectors_the_same(world_size, names):
    ranks = run_ranks(train_in_every_setting, world_size, names)
    for name in names:
        for error, state in (results[name] for results in ranks):
            assert error < TOLERANCE, name
            assert not unequal(state, ranks[0][name][1]), name


def train_replicated(rank):
    from torch.distributed._composable.replicate import replicate

    gm = transform(Critic().double(), update="step")
    alone = copy.deepcopy(gm)
    error, state = train(rank, replicate(gm), 3, alone)
    assert list(freeze(gm.eval()).state_dict()) == list(freeze(alone.eval()).state_dict())
    return error, state


def test_ddp_by_replicate():
    """It has FSDP2's `set_requires_gradient_sync`, and nothing to reshard."""
    (error, state), (other_error, other) = run_ranks(train_replicated, 2)
    assert max(error, other_error) < TOLERANCE
    assert not unequal(state, other)


# --- Batch norm, dropout, a layer without use ---


# torch 2.11 cannot go back through batch norm once DDP has broadcast its buffers, whatever the model.
BROADCAST = (True, False) if torch.__version__ >= "2.13" else (False,)
NORMED = {
    (make.__name__, broadcast): (make, {"broadcast_buffers": broadcast, **options})
    for make, options in ((PatchGAN, {}), (Discriminator, {"find_unused_parameters": True}))
    for broadcast in BROADCAST
}


def train_with_batch_norm(rank):
    states = {}
    for name, (make, options) in NORMED.items():
        torch.manual_seed(0)
        gm = transform(make())
        torch.manual_seed(rank)  # dropout differs from rank to rank
        wrapped = distributed(gm, **options)
        _, states[name] = train(rank, wrapped, shape=(3, 16, 16), dtype=torch.float32)
    return states


def test_models_with_batch_norm():
    states, others = run_ranks(train_with_batch_norm, 2)
    for name, state in states.items():
        # Statistics are of each rank's own samples, and a broadcast comes before a forward, not after it.
        assert unequal(state, others[name]) == {key for key in state if "running_" in key}, name


# --- Compiled ---


def compiled(rank, backend, around_ddp, select, steps):
    """As `train`, and how many calls the operator has in each part that Dynamo has cut the graph into."""
    calls = []

    def count(graph_module, inputs):
        calls.append([node.target for node in graph_module.graph.nodes].count(ops.normalize))
        return torch._dynamo.lookup_backend(backend)(graph_module, inputs)

    gm = transform(Wide().double(), select)
    alone = copy.deepcopy(gm)
    if around_ddp:
        wrapped = torch.compile(distributed(gm), backend=count)
    else:
        wrapped = distributed(torch.compile(gm, backend=count))
    return *train(rank, wrapped, steps, alone, shape=(16,)), calls


# With every weight at the head there is nothing to cut; a large layer beside them is cut off.
COMPILED = {
    "around DDP": (("inductor", True, None, 50), [1]),
    "inside DDP, cut": (("aot_eager", False, ["first", "middle", "last"], 3), [1, 0]),
}


def compiled_in_both_orders(rank):
    results = {}
    for name, (arguments, _) in COMPILED.items():
        torch._dynamo.reset()
        results[name] = compiled(rank, *arguments)
    return results


def test_compiled_inside_ddp_and_around_it():
    ranks = run_ranks(compiled_in_both_orders, 2)
    for name, (_, expected) in COMPILED.items():
        for error, state, calls in (results[name] for results in ranks):
            assert error < TOLERANCE, name
            assert not unequal(state, ranks[0][name][1]), name
            assert calls == expected, name


# --- Gradient penalty ---


PENALISED = {
    "eager, DDP inside": lambda gm: CriticLoss(distributed(gm)),
    "eager, DDP around": lambda gm: distributed(CriticLoss(gm)),
    "compiled": lambda gm: distributed(in_one_graph(CriticLoss(gm))),
}


def in_one_graph(loss):
    return torch.compile(loss, backend="aot_eager", fullgraph=True)


def train_with_penalty(rank):
    errors = {}
    for name, wrap in PENALISED.items():
        torch._dynamo.reset()
        gm = transform(Critic().double())
        alone = CriticLoss(copy.deepcopy(gm))
        errors[name], _ = train(rank, wrap(gm), 3, alone, lambda model, *batch: model(*batch))
    loss = in_one_graph(CriticLoss(distributed(transform(Critic()))))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"parallel/distributed\.py"):
        loss(*torch.randn(2, BATCH, 1, 4, 4))
    return errors


def test_gradient_penalty_with_ddp_around_it_and_not_inside_what_is_compiled():
    for errors in run_ranks(train_with_penalty, 2):
        assert errors.keys() == PENALISED.keys()
        assert not {name: error for name, error in errors.items() if error > TOLERANCE}


# --- Ranks that do not start alike ---


def sigma_errors(gm):
    """Relative to the exact value, of each weight."""
    exact = [torch.linalg.matrix_norm(site.matrix(), 2) for site in gm.sites()]
    return [abs(1 - s / e).item() for s, e in zip(sigmas(gm).values(), exact, strict=True)]


def different_seeds(rank, options, warm):
    torch.manual_seed(rank)
    gm = transform(Critic().double())
    wrapped = distributed(gm, **options)
    if warm:
        warm_up_(wrapped)
    start = copy.deepcopy(gm.state_dict()), sigma_errors(gm)
    _, end = train(rank, wrapped, 50)
    return start, (end, sigma_errors(gm))


def different_seeds_in_every_way(rank):
    # From torch 2.13 on buffers can be broadcast when DDP is made and never again.
    once = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    never = {"broadcast_buffers": False}
    ways = [({"forward_sync_buffers": False} if once else {}, False), (never, False), (never, True)]
    return [different_seeds(rank, *way) for way in ways]


@pytest.fixture(scope="module")
def differently_seeded():
    return list(zip(*run_ranks(different_seeds_in_every_way, 2), strict=True))


def test_different_seeds_are_made_one_by_the_broadcast_when_ddp_is_made(differently_seeded):
    for (state, errors), (other, other_errors) in zip(*differently_seeded[0], strict=True):
        assert not unequal(state, other)
        assert errors == other_errors


@pytest.mark.parametrize("warm", [False, True])
def test_different_seeds_without_any_broadcast(differently_seeded, warm):
    (start, end), (other_start, other_end) = differently_seeded[1 + warm]
    vectors = sorted(key for key in start[0] if key.endswith(("_u", "_v")))
    # The weights are rank 0's from the start, and stay one; u and v are each rank's own.
    assert unequal(start[0], other_start[0]) <= set(vectors)
    assert unequal(end[0], other_end[0]) <= set(vectors)
    assert max(start[1]) < 0.01
    # They belong to weights that are gone, so sigma is wrong until they have followed, or been warmed up.
    if warm:
        assert max(other_start[1]) < 1e-4
    else:
        assert max(other_start[1]) > 0.5
    assert max(*end[1], *other_end[1]) < 1e-3
    # Then they are the same up to a sign, which u and v of a weight share.
    signs = [torch.dot(end[0][key], other_end[0][key]).item() for key in vectors]
    assert [abs(x) for x in signs] == pytest.approx([1] * len(signs), abs=1e-6)
    assert [x > 0 for x in signs[::2]] == [x > 0 for x in signs[1::2]]


# --- Ranks that die ---


def train_until_a_rank_dies(rank):
    wrapped = distributed(transform(Critic()))
    for number in range(5):
        if rank == 1 and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            wrapped(torch.randn(2, 1, 4, 4)).sum().backward()
        except RuntimeError as error:
            raise RuntimeError(f"step {number} failed after {time.monotonic() - start:.3f} s") from error


def test_a_killed_rank_is_an_error_on_the_others_within_the_timeout():
    timeout = 10
    outcomes = run_ranks(train_until_a_rank_dies, 3, check=False, backend_timeout=timeout)
    assert outcomes[1] == "died"
    for outcome in (outcomes[0], outcomes[2]):
        (seconds,) = re.findall(r"step 2 failed after ([\d.]+) s", outcome)
        assert float(seconds) < timeout
