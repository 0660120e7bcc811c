"""Sharded weights: FSDP2 and tensor parallel, on several ranks; against the unsharded model in float64."""

import copy
import itertools
import os
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from specnorm_fx import (
    convert_state_dict,
    freeze,
    frozen_state_dict,
    gradient_penalty,
    reference,
    report,
    sharded,
    sigmas,
    transform,
    update_,
    update_after,
    warm_up_,
)
from tests.models import LAYERS, case_named, relative_error
from tests.ranks import run_ranks


def state_error(sharded_model, model):
    """The largest of the parameters' and buffers' errors; the names must be equal."""
    states = [m.state_dict() for m in (sharded_model, model)]
    assert list(states[0]) == list(states[1])
    pairs = ((sharded.full(states[0][name]), x) for name, x in states[1].items() if x.is_floating_point())
    return max(relative_error(got, want) for got, want in pairs)


def same_on_all_ranks(tensors):
    flat = torch.cat([x.detach().flatten() for x in tensors])
    gathered = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, flat)
    return all(torch.equal(x, gathered[0]) for x in gathered)


# --- The power iteration of shards ---


def spread(whole, mesh, placements):
    """Without communication: all ranks have the same."""
    return distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)


def iterate_shards(rank, mesh_shape):
    """Each layer along each dimension, or two; shards of uneven size and empty ones among them."""
    mesh = init_device_mesh("cpu", mesh_shape)
    sites = []
    layers = {1: LAYERS[::2], 2: (LAYERS[0], LAYERS[-3])}
    for case in layers[mesh.ndim]:
        weight = case.build(torch.float64).weight.detach()
        dim = 1 if "transpose" in case.name else 0
        for placements in itertools.product([Replicate(), *map(Shard, range(weight.ndim))], repeat=mesh.ndim):
            start = [torch.randn(k, dtype=torch.float64) for k in reference.weight_matrix(weight, dim).shape]
            # No product is above 1e3: u and v stay.
            eps = 1e3 if len(sites) % 7 == 4 else 1e-12
            options = (0, 1, 3)[len(sites) % 3], ("uv", "vu")[len(sites) % 2], eps
            sites.append((case.name, weight, dim, placements, start, *options))
    matrices = [sharded.matrix(spread(w, mesh, p), dim) for _, w, dim, p, *_ in sites]
    *_, starts, counts, orders, epsilons = zip(*sites, strict=True)
    us, vs = zip(*starts, strict=True)
    us, vs = sharded.power_iteration(matrices, us, vs, counts, epsilons, orders)
    assert same_on_all_ranks([*us, *vs])
    for (name, weight, dim, placements, start, n, order, eps), matrix, u, v in zip(
        sites, matrices, us, vs, strict=True
    ):
        where = (name, placements, n, order, eps)
        want = reference.singular_vectors(weight, *start, n, eps, dim, order)
        assert max(map(relative_error, (u, v), want)) < 1e-13, where
        got = torch.stack(reference.residual(matrix, u, v, 1e-12))
        truth = torch.stack(reference.residual(reference.weight_matrix(weight, dim), u, v, 1e-12))
        assert relative_error(got, truth) < 1e-13, where

        grad = torch.randn_like(weight)
        leaves = weight.clone().requires_grad_(), spread(weight, mesh, placements).requires_grad_()
        normalized = [
            f(x, *want, 1e-12, dim)
            for f, x in zip((reference.normalized, sharded.normalized), leaves, strict=True)
        ]
        normalized[0].backward(grad)
        normalized[1].backward(spread(grad, mesh, placements))
        assert normalized[1].placements == placements, where
        for got, truth in ((normalized[1], normalized[0]), (leaves[1].grad, leaves[0].grad)):
            error = (got.to_local() - spread(truth, mesh, got.placements).to_local()).abs().sum()
            assert error / truth.abs().max() < 1e-12, where


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)], ids=str)
def test_power_iteration_of_shards(mesh_shape):
    run_ranks(iterate_shards, torch.Size(mesh_shape).numel(), mesh_shape)


def second_derivative(normalized, weight):
    """Of something that is not linear in the result."""
    (first,) = torch.autograd.grad(normalized(weight).pow(3).sum(), weight, create_graph=True)
    return torch.autograd.grad(first.square().sum(), weight)[0]


def differentiate_twice(rank):
    mesh = init_device_mesh("cpu", (2,))
    weight, u, v = (torch.randn(size, dtype=torch.float64) for size in ((5, 3, 2), (3,), (10,)))
    u, v = u / u.norm(), v / v.norm()
    want = second_derivative(
        lambda w: reference.normalized(w, u, v, 1e-12, 1), weight.clone().requires_grad_()
    )
    for d in range(3):
        leaf = spread(weight, mesh, [Shard(d)]).requires_grad_()
        got = second_derivative(lambda w: sharded.normalized(w, u, v, 1e-12, 1), leaf)
        assert relative_error(got.full_tensor(), want) < 1e-12, d


def test_second_derivatives_of_shards():
    run_ranks(differentiate_twice, 2)


def iterate_special(rank):
    mesh = init_device_mesh("cpu", (2,))
    u, v = torch.ones(4) / 2, torch.ones(6) / 6**0.5
    for fill in (0.0, torch.nan, torch.inf):
        spread = distribute_tensor(torch.full((4, 6), fill), mesh, [Shard(0)])
        moved = sharded.power_iteration([sharded.matrix(spread, 0)], [u], [v], [2], [1e-12], ["uv"])
        assert torch.equal(moved[0][0], u)
        assert torch.equal(moved[1][0], v)
    spread = distribute_tensor(torch.zeros(4, 6), mesh, [Shard(0)]).requires_grad_()
    y = sharded.normalized(spread, u, v, 1e-12, 0)
    assert torch.equal(y.full_tensor(), torch.zeros(4, 6))
    y.sum().backward()
    assert torch.equal(spread.grad.full_tensor(), torch.ones(4, 6))
    half = distribute_tensor(torch.randn(4, 6).bfloat16(), mesh, [Shard(0)])
    (u,), (v,) = sharded.power_iteration([sharded.matrix(half, 0)], [u], [v], [1], [1e-12], ["uv"])
    assert u.dtype == v.dtype == torch.float32
    assert sharded.normalized(half, u, v, 1e-12, 0).dtype == torch.bfloat16
    from torch.distributed.tensor import Partial

    pending = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()])
    with pytest.raises(ValueError, match="must be sharded or replicated, got placements"):
        sharded.matrix(pending, 0)
    with pytest.raises(ValueError, match="u and v must be whole on every rank"):
        sharded.local(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))


def normalize_complex(rank):
    mesh = init_device_mesh("cpu", (2,))
    weight, u, v = (torch.randn(size, dtype=torch.complex128) for size in ((5, 4), (5,), (4,)))
    for d in range(2):
        leaf = spread(weight, mesh, [Shard(d)])
        (got_u,), (got_v,) = sharded.power_iteration(
            [sharded.matrix(leaf, 0)], [u], [v], [2], [1e-12], ["uv"]
        )
        want_u, want_v = reference.singular_vectors(weight, u, v, 2, 1e-12, 0, "uv")
        assert relative_error(torch.cat([got_u, got_v]), torch.cat([want_u, want_v])) < 1e-13
        got = sharded.normalized(leaf, want_u, want_v, 1e-12, 0).full_tensor()
        assert relative_error(got, reference.normalized(weight, want_u, want_v, 1e-12, 0)) < 1e-13


def test_complex_weights():
    run_ranks(normalize_complex, 2)


def test_zero_nan_half_and_what_is_refused():
    run_ranks(iterate_special, 2)


# --- FSDP2 ---


def critic(name, **options):
    """A model of the zoo and an equal one; without what draws at random or depends on the batch."""
    torch.manual_seed(0)
    case = case_named(name)
    gm = transform(case.build(torch.float64).double(), **options)
    for module in gm.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    return case, gm, copy.deepcopy(gm)


def optimizer_of(model, update="step"):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    if update == "step":
        update_after(optimizer, model)
    return optimizer


def train(model, optimizer, case, steps, share=slice(None)):
    """On the rank's share of each batch, which is the same on all ranks."""
    for step in steps:
        torch.manual_seed(step)
        batch = case.inputs(12, torch.float64)
        optimizer.zero_grad()
        model(*(x[share] for x in batch)).square().mean().backward()
        optimizer.step()


def share_of(rank):
    size = 12 // torch.distributed.get_world_size()
    return slice(rank * size, (rank + 1) * size)


def train_with_fsdp(rank, name, update, compiled):
    case, gm, twin = critic(name, update=update)
    fully_shard(gm)
    assert all(isinstance(site.weight, DTensor) for site in gm.sites())
    model = torch.compile(gm, backend="aot_eager") if compiled else gm
    train(model, optimizer_of(gm, update), case, range(4), share_of(rank))
    train(twin, optimizer_of(twin, update), case, range(4))
    assert state_error(gm, twin) < 1e-10  # of Adam, which divides by the root of squares
    assert same_on_all_ranks(x for site in gm.sites() for x in (site.u, site.v))

    assert list(sigmas(gm)) == list(sigmas(twin))
    for got, want in zip(sigmas(gm).values(), sigmas(twin).values(), strict=True):
        assert relative_error(got, want) < 1e-9
    ours, theirs = (sigmas(m, residual=True).values() for m in (gm, twin))
    for got, want in zip(ours, theirs, strict=True):
        assert abs(got.residual - want.residual) < 1e-9
    for got, want in zip(report(gm).rows, report(twin).rows, strict=True):
        assert (got.fqn, got.shape) == (want.fqn, want.shape)
        assert got.exact == pytest.approx(want.exact, rel=1e-10)
    assert report(gm).skipped == report(twin).skipped

    warm_up_(gm)
    warm_up_(twin)
    inputs = case.inputs(2, torch.float64)
    frozen = freeze(gm.eval())
    assert not any(isinstance(p, DTensor) for p in frozen.parameters())
    assert all(isinstance(site.weight, DTensor) for site in gm.sites())
    assert torch.equal(frozen(*inputs), gm(*inputs))
    assert relative_error(frozen(*inputs), freeze(twin.eval())(*inputs)) < 1e-9
    assert list(frozen_state_dict(gm)) == list(frozen_state_dict(twin))
    assert type(frozen).__name__ == type(freeze(twin)).__name__
    copy.deepcopy(frozen)  # nothing of FSDP2 is left in it
    return frozen


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize(
    ("name", "compiled"), [("discriminator", False), ("tied", False), ("labelled", True)]
)
def test_fsdp_trains_as_unsharded(name, update, compiled):
    first, second = run_ranks(train_with_fsdp, 2, name, update, compiled)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def train_blocks(rank):
    """As for a model too large for one device: block by block transformed and sharded."""
    torch.manual_seed(0)
    blocks = [transform(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), update="step") for _ in range(3)]
    model = nn.Sequential(*blocks).double()
    twin = copy.deepcopy(model)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    train(model, optimizer_of(model), case_named("functional"), range(3), share_of(rank))
    train(twin, optimizer_of(twin), case_named("functional"), range(3))
    assert state_error(model, twin) < 1e-10
    assert list(sigmas(model)) == list(sigmas(twin)) == [f"{i}.0.weight" for i in range(3)]


def test_fsdp_block_by_block():
    run_ranks(train_blocks, 2)


def train_in_bf16(rank):
    """FSDP2's own mixed precision: bf16 in the forward, fp32 in shards; u and v stay fp32."""
    torch.manual_seed(0)
    gm = transform(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)), update="step")
    fully_shard(gm, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = optimizer_of(gm)
    for _ in range(3):
        optimizer.zero_grad()
        gm(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    for site in gm.sites():
        assert site.weight.dtype == site.u.dtype == torch.float32
        exact = torch.linalg.matrix_norm(sharded.full(site.weight.detach()).double(), 2)
        assert sigmas(gm)[site.fqn].item() == pytest.approx(exact.item(), rel=0.05)
    # A forward without backward leaves the weights whole and in bf16: they are read as they are stored.
    before = frozen_state_dict(gm.eval())
    with torch.no_grad():
        gm(torch.randn(4, 16))
    assert all(torch.equal(x, before[name]) for name, x in frozen_state_dict(gm).items())


def test_fsdp_mixed_precision():
    run_ranks(train_in_bf16, 2)


class Traffic(TorchDispatchMode):
    """What the ranks exchange: the name and the bytes of every collective call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.calls.append((func._schema.name, sum(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


def count_traffic(rank, mesh_shape, iterations):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(30, 64, 3), nn.ConvTranspose2d(64, 48, 4), nn.Linear(99, 50, bias=False))
    gm = transform(model, update="step", n_power_iterations=iterations)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    fully_shard(gm, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    with Traffic() as traffic:
        update_(gm)
    numbers = sum(site.u.numel() + site.v.numel() for site in gm.sites())
    weights = sum(site.weight.numel() for site in gm.sites())
    assert numbers < weights / 20  # or it would show nothing
    return traffic.calls, 4 * numbers


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2)], ids=["2", "4", "replicated"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_update_communicates_vectors(mesh_shape, iterations):
    """m + n numbers a layer and iteration, in two calls for all layers; the weight stays where it is."""
    for calls, size in run_ranks(count_traffic, torch.Size(mesh_shape).numel(), mesh_shape, iterations):
        assert [name for name, _ in calls] == ["c10d::allreduce_"] * (2 * iterations)
        assert sum(nbytes for _, nbytes in calls) == size * iterations


# --- Checkpoints ---


def save_sharded(rank, folder, name):
    case, gm, _ = critic(name, update="step")
    fully_shard(gm)
    optimizer = optimizer_of(gm)
    train(gm, optimizer, case, range(3), share_of(rank))
    model_state, optimizer_state = get_state_dict(gm, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(gm, optimizer, case, range(3, 6), share_of(rank))
    return {fqn: sharded.full(x) for fqn, x in gm.state_dict().items()}


def resume_sharded(rank, folder, name):
    case, gm, _ = critic(name, update="step")
    for parameter in gm.parameters():
        parameter.data.normal_()
    fully_shard(gm)
    optimizer = optimizer_of(gm)
    model_state, optimizer_state = get_state_dict(gm, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(gm, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(gm, optimizer, case, range(3, 6), share_of(rank))
    return {fqn: sharded.full(x) for fqn, x in gm.state_dict().items()}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("name", ["labelled", "tied"])
def test_sharded_checkpoint_resumes_on_any_number_of_ranks(tmp_path, name):
    (want, *_) = run_ranks(save_sharded, 2, str(tmp_path), name)
    for world_size in (1, 2, 3):
        (got, *_) = run_ranks(resume_sharded, world_size, str(tmp_path), name)
        assert list(got) == list(want)
        for fqn, x in want.items():
            if world_size == 2:
                assert torch.equal(got[fqn], x)
            elif x.is_floating_point():  # another number of ranks sums in another order
                assert relative_error(got[fqn], x) < 1e-9


def load_without_vectors(rank, folder):
    _, gm, twin = critic("discriminator")
    fully_shard(gm)
    plain = torch.load(f"{folder}/plain.pt", weights_only=True)
    twin.load_state_dict(plain)
    gm.load_state_dict(
        {
            fqn: distribute_tensor(x, gm.state_dict()[fqn].device_mesh, [Shard(0)])
            if isinstance(gm.state_dict()[fqn], DTensor)
            else x
            for fqn, x in plain.items()
        }
    )
    assert state_error(gm, twin) < 1e-9


def test_a_checkpoint_without_u_and_v_converges_on_shards(tmp_path):
    torch.save(case_named("discriminator").build(torch.float64).double().state_dict(), tmp_path / "plain.pt")
    run_ranks(load_without_vectors, 2, str(tmp_path))


# --- Tensor parallel ---


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 4, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def parallelize(gm, mesh, local=True):
    """Columns of the first layer, rows of the second; the rest is replicated, u and v among it.

    ``local``: inputs and outputs are plain tensors.
    """

    def distribute(name, module, mesh):
        places = {"up": {"weight": 0, "bias": 0}, "down": {"weight": 1}}.get(name, {})
        for parameter, d in places.items():
            whole = module.get_parameter(parameter).detach()
            module.register_parameter(parameter, nn.Parameter(distribute_tensor(whole, mesh, [Shard(d)])))

    if not local:
        return distribute_module(gm, mesh, distribute)
    return distribute_module(
        gm,
        mesh,
        distribute,
        input_fn=lambda _, inputs, mesh: tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs),
        output_fn=lambda _, output, mesh: output.full_tensor().clone(),  # FSDP2 warns of views
    )


def train_tensor_parallel(rank, update):
    torch.manual_seed(0)
    gm = transform(Mlp().double(), update=update)
    twin = copy.deepcopy(gm)
    parallelize(gm, init_device_mesh("cpu", (2,)))
    assert [site.weight.placements for site in gm.sites()] == [(Shard(0),), (Shard(1),)]
    train(gm, optimizer_of(gm, update), case_named("functional"), range(4))
    train(twin, optimizer_of(twin, update), case_named("functional"), range(4))
    assert state_error(gm, twin) < 1e-10
    assert same_on_all_ranks(x for site in gm.sites() for x in (site.u, site.v))
    rows = zip(report(gm).rows, report(twin).rows, strict=True)
    assert all(got.sigma == pytest.approx(want.sigma, rel=1e-12) for got, want in rows)

    x = torch.ones(4, 6, dtype=torch.float64)
    if update == "forward":
        with pytest.raises(RuntimeError, match="runs within a backward pass"):
            checkpoint(gm, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
        twin(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Dynamo, after the break of the graph at the shards.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", "Dynamo does not know how to trace the builtin")
        y = torch.compile(gm, backend="aot_eager")(x)
    assert relative_error(y, twin(x)) < 1e-12
    frozen = freeze(gm.eval())
    assert relative_error(frozen(x), freeze(twin.eval())(x)) < 1e-12
    assert relative_error(frozen(x), gm(x)) < 1e-12


@pytest.mark.parametrize("update", ["forward", "step"])
def test_tensor_parallel_trains_as_unsharded(update):
    run_ranks(train_tensor_parallel, 2, update)


def penalise_tensor_parallel(rank):
    torch.manual_seed(0)
    gm = transform(Mlp().double())
    twin = copy.deepcopy(gm)
    mesh = init_device_mesh("cpu", (2,))
    parallelize(gm, mesh, local=False)
    x = torch.randn(4, 6, dtype=torch.float64)
    for model, samples in ((gm, spread(x, mesh, [Replicate()])), (twin, x)):
        penalty, scores = gradient_penalty.r1(model, samples, return_output=True)
        (penalty + scores.square().mean()).backward()
    for got, want in zip(gm.parameters(), twin.parameters(), strict=True):
        assert relative_error(sharded.full(got.grad), want.grad) < 1e-10


def test_gradient_penalty_of_a_tensor_parallel_model_by_dtensors():
    run_ranks(penalise_tensor_parallel, 2)


def load_into_tensor_parallel(rank):
    torch.manual_seed(0)
    gm, other = (transform(Mlp().double()) for _ in range(2))
    whole = copy.deepcopy(other)
    for model in (gm, other):
        parallelize(model, init_device_mesh("cpu", (2,)))
    gm.load_state_dict(other.state_dict())
    assert state_error(gm, whole) == 0
    gm.load_state_dict(convert_state_dict(other.state_dict(), to="plain"))
    whole.load_state_dict(convert_state_dict(whole.state_dict(), to="plain"))
    assert state_error(gm, whole) < 1e-9


def test_checkpoints_with_u_and_v_and_without_for_tensor_parallel():
    run_ranks(load_into_tensor_parallel, 2)


def train_in_two_dimensions(rank):
    torch.manual_seed(0)
    gm = transform(Mlp().double(), update="step")
    twin = copy.deepcopy(gm)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize(gm, mesh["tp"])
    fully_shard(gm, mesh=mesh["dp"])
    share = slice(0, 6) if rank < 2 else slice(6, 12)
    train(gm, optimizer_of(gm), case_named("functional"), range(4), share)
    train(twin, optimizer_of(twin), case_named("functional"), range(4))
    assert state_error(gm, twin) < 1e-10
    x = torch.ones(4, 6, dtype=torch.float64)
    assert relative_error(freeze(gm.eval())(x), freeze(twin.eval())(x)) < 1e-10


def test_fsdp_and_tensor_parallel_together():
    run_ranks(train_in_two_dimensions, 4)


# --- What cannot be ---


def refuse(rank):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    fully_shard(model)
    with pytest.raises(TypeError, match=r"transform comes before FSDPSequential"):
        transform(model)
    spread = nn.Linear(4, 4)
    spread.weight = nn.Parameter(distribute_tensor(spread.weight.detach(), init_device_mesh("cpu", (2,))))
    with pytest.raises(ValueError, match=r"'weight' is sharded already.*fully_shard\(transform\(model\)\)"):
        transform(spread)


def test_transform_comes_first():
    run_ranks(refuse, 2)


def die_in_update(rank):
    _, gm, _ = critic("labelled", update="step")
    fully_shard(gm)
    update_(gm)
    if rank == 1:
        os._exit(1)
    update_(gm)


def test_a_dead_rank_is_an_error():
    error, dead = run_ranks(die_in_update, 2, check=False, backend_timeout=5)
    assert dead == "died"
    assert "in update_" in error
    assert "RuntimeError" in error or "DistBackendError" in error
