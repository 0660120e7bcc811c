"""The whole way with models that people train: captured, torch's numbers, compiled, frozen."""

import copy

import pytest
import torch
from torch.fx.proxy import TraceError
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn
from torch.utils._pytree import tree_leaves

import specnorm_fx
from specnorm_fx import freeze, frozen_state_dict, transform
from specnorm_fx.adopt import find_torch_sn
from specnorm_fx.capture import KINDS
from tests.architectures import ARCHITECTURES
from tests.models import apply_torch_sn, parametrize, relative_error

BY_TRACE, BY_EXPORT = ([a for a in ARCHITECTURES if way in a.captures] for way in ("trace", "export"))
CAPTURED = pytest.mark.parametrize(
    ("case", "capture"),
    [
        pytest.param(case, capture, id=f"{case.name}-{capture}")
        for capture, cases in (("trace", BY_TRACE), ("export", BY_EXPORT))
        for case in cases
    ],
)


def captured(case, capture, model, select=None, **options):
    """The model transformed, by way of a capture, for any batch size."""
    if capture == "export":
        with torch.random.fork_rng(devices=[]):  # whichever the capture, u and v start from the same seed
            args = case.inputs()
        batch = torch.export.Dim("batch")
        options |= {"example_inputs": args, "dynamic_shapes": tuple({0: batch} for _ in args)}
    return transform(model, select, **options)


def outputs(model, batch):
    """All the tensors that a model gives, feature maps too, in one."""
    return torch.cat([tensor.flatten() for tensor in tree_leaves(model(*batch))])


def layers(model):
    return [fqn for fqn, module in model.named_modules() if isinstance(module, KINDS)]


def with_torch_sn(model, sn=torch_sn):
    return apply_torch_sn(model, [f"{layer}.weight" for layer in layers(model)], sn)


@parametrize([a for a in ARCHITECTURES if a not in BY_TRACE])
def test_symbolic_trace_refuses_the_others(case):
    with pytest.raises(TraceError, match=r"architectures\.py:\d+: if "):
        transform(case.build(), "*")


@pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="torch 2.11 compiles nothing parametrized any more in a process where an export failed so",
)
@parametrize([a for a in ARCHITECTURES if a not in BY_EXPORT])
def test_export_refuses_the_others(case):
    with pytest.raises(RuntimeError, match="data-dependent"):
        captured(case, "export", case.build(), "*")


@parametrize([a for a in ARCHITECTURES if a not in BY_EXPORT])
def test_the_others_module_by_module(case):
    model = case.build()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    theirs = with_torch_sn(twin)
    torch.manual_seed(1)
    for name, child in list(model.named_children()):
        setattr(model, name, transform(child, "*", implementation="reference"))
    for batch in (case.inputs(), case.inputs()[:1], case.inputs()):
        assert torch.equal(outputs(model, batch), outputs(theirs, batch))


@pytest.mark.parametrize(
    ("case", "sn"),
    [pytest.param(case, torch_sn, id=case.name) for case in ARCHITECTURES]
    + [pytest.param(case, hook_sn, id=f"{case.name}-hook") for case in ARCHITECTURES if case not in BY_TRACE],
)
# PyTorch 2.13, when it goes on after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_backend_takes_every_model_as_it_is(case, sn):
    """In float64, where rounding is no matter: equal to eager torch over steps, and every layer fused."""
    torch._dynamo.reset()
    model = with_torch_sn(case.build().double(), sn)
    twin = copy.deepcopy(model)
    batch = [x.double() if x.is_floating_point() else x for x in case.inputs(3)]
    fused = find_torch_sn(model)
    if "export" not in case.captures:
        explanation = specnorm_fx.explain(model, *batch)
        assert {use.fqn for graph in explanation.graphs for use in graph.fused} == set(fused)
        assert len(explanation.breaks) == 1
    graphs = []

    def inner(gm, inputs):
        graphs.append(gm.graph)
        return gm.forward  # test_fuse.py goes on to AOTAutograd

    compiled = torch.compile(model, backend="specnorm", options={"inner": inner})
    optimizers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (model, twin)]
    for _ in range(2):
        results = [outputs(m, batch) for m in (compiled, twin)]
        assert relative_error(*results) < 1e-12
        for result, optimizer in zip(results, optimizers, strict=True):
            optimizer.zero_grad()
            result.square().mean().backward()
            optimizer.step()
    if "export" in case.captures:
        (calls,) = (
            [node for node in graph.nodes if node.target is specnorm_fx.ops.normalize] for graph in graphs
        )
        assert sum(len(call.args[0]) for call in calls) == len(fused)
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert relative_error(value.double(), other.double()) < 1e-12, name
    torch._dynamo.reset()


@CAPTURED
def test_training_is_torchs_bit_for_bit(case, capture):
    model = case.build()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    theirs = with_torch_sn(twin)
    torch.manual_seed(1)
    ours = captured(case, capture, model, "*", implementation="reference")
    assert [site.fqn for site in ours.sites()] == [f"{layer}.weight" for layer in layers(model)]
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3, betas=(0.0, 0.9)) for m in (theirs, ours)]
    for _ in range(5):
        batch = case.inputs(3)
        results = [outputs(m, batch) for m in (theirs, ours)]
        assert torch.equal(*results)
        for result, optimizer in zip(results, optimizers, strict=True):
            optimizer.zero_grad()
            torch.relu(1 - result).mean().backward()
            optimizer.step()
    if capture == "trace":  # torch.export has fixed the mode of batch norm
        assert torch.equal(*(outputs(m.eval(), batch) for m in (theirs, ours)))


@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
@CAPTURED
def test_adopted_frozen_and_loaded_into_the_plain_class(case, capture, sn):
    theirs = with_torch_sn(case.build(), sn)
    if capture == "export":  # which fixes the mode of batch norm
        theirs.eval()
    gm = captured(case, capture, theirs, implementation="reference")
    assert [site.fqn for site in gm.sites()] == [f"{layer}.weight" for layer in layers(case.make())]
    batch = case.inputs(3)
    assert torch.equal(outputs(gm, batch), outputs(theirs, batch))
    want = outputs(gm.eval(), batch)
    assert torch.equal(outputs(freeze(gm), batch), want)
    plain = case.make().eval()
    plain.load_state_dict(frozen_state_dict(gm), strict=True)
    assert torch.equal(outputs(plain, batch), want)


def test_compiled_in_one_graph():
    (case,) = (a for a in ARCHITECTURES if a.name == "multi_period")
    gm = captured(case, "export", case.build(), "*")
    eager = copy.deepcopy(gm)
    compiled = torch.compile(gm, fullgraph=True)
    batch = case.inputs()
    with torch.no_grad():  # Inductor compiles the backward at once, and test_compile.py looks at gradients
        assert relative_error(outputs(compiled, batch), outputs(eager, batch)) < 1e-6
    torch._dynamo.reset()
