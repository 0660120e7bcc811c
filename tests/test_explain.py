"""What `explain` says of a model, and that it leaves it as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

from specnorm_fx import explain


class Part(nn.Module):
    """With a graph break between the two layers, as of a line that logs."""

    def __init__(self):
        super().__init__()
        self.first = torch_sn(nn.Linear(4, 6), n_power_iterations=2)
        self.last = hook_sn(nn.Linear(6, 4))

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()
        self.norm = nn.BatchNorm1d(4)
        self.noise = nn.Dropout()
        self.phase = torch_sn(nn.Linear(4, 4, dtype=torch.complex64))
        self.unused = torch_sn(nn.Linear(3, 3))

    def forward(self, x):
        x = self.noise(self.norm(self.part(x)))
        return self.phase(torch.complex(x, x)).abs()


TEXT = """\
graph 1: 1 fused, 0 passed through
  fused   part.first.weight  6 x 4, dim 0, n_power_iterations 2
graph 2: 1 fused, 0 passed through
  fused   part.last.weight  4 x 6, dim 0, n_power_iterations 1
graph 3: 0 fused, 1 passed through
  passed  phase.weight  the weight is complex, for which there is no operator
in no graph: unused.weight  not used by this call, or in code that Dynamo leaves to Python
graph break: Call to `torch._dynamo.graph_break()`"""


# PyTorch 2.13, when it goes on after a graph break.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_weight_is_accounted_for_and_nothing_changes(compiled):
    model = Model()
    x = torch.randn(5, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert str(explain(torch.compile(model) if compiled else model, x)) == TEXT
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), generator)


def test_eval_and_keyword_arguments():
    layer = torch_sn(nn.Linear(4, 3)).eval()
    assert "3 x 4, dim 0, eval" in str(explain(layer, input=torch.randn(2, 4)))


def test_a_model_without_spectral_norm():
    (graph,) = explain(nn.Linear(4, 3), torch.randn(2, 4)).graphs
    assert (graph.fused, graph.passed) == ((), ())


def test_an_error_of_the_model_is_its_own():
    layer = torch_sn(nn.Linear(4, 3))
    u = layer.parametrizations.weight[0]._u
    before = u.clone()
    with pytest.raises(RuntimeError):
        explain(layer, torch.randn(2, 5))
    assert torch.equal(u, before)


class Reassigning(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch_sn(nn.Linear(4, 4))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        self.steps = self.steps + 1
        self.last = x.detach()
        return self.first(x)


def test_buffers_that_the_forward_replaces_are_put_back():
    model = Reassigning()
    steps = model.steps
    explain(model, torch.randn(2, 4))
    assert model.steps is steps
    assert steps == 0
    assert model.last is None


def test_the_weight_that_the_old_hook_sets_is_put_back():
    layer = hook_sn(nn.Linear(4, 3))
    weight = layer.weight
    explain(layer, torch.randn(2, 4))
    assert layer.weight is weight
    copy.deepcopy(layer)  # which the graph's own weight would not let


@pytest.mark.parametrize("compile_part", [False, True])
def test_a_module_that_is_compiled_in_place(compile_part):
    model = nn.Sequential(Part())
    (model[0] if compile_part else model).compile(backend="eager")
    before = [module._compiled_call_impl for module in model.modules()]
    said = explain(model, torch.randn(2, 4))
    assert [use.fqn for graph in said.graphs for use in graph.fused] == ["0.first.weight", "0.last.weight"]
    assert [module._compiled_call_impl for module in model.modules()] == before


def test_what_dynamo_does_with_recurrent_layers():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.lstm = torch_sn(nn.Linear(4, 4)), nn.LSTM(4, 4)

        def forward(self, x):
            return self.lstm(self.head(x))[0]

    x = torch.randn(3, 2, 4)
    (missing,) = explain(Recurrent(), x).missing
    assert missing.fqn == "head.weight"
    assert "nn.RNN, LSTM or GRU: torch._dynamo.config.allow_rnn" in missing.reason
    with torch._dynamo.config.patch(allow_rnn=True):
        assert explain(Recurrent(), x).missing == ()


def test_no_name_of_a_tied_weight_is_missing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for layer in model:
        torch_sn(layer)
    said = explain(model, torch.randn(2, 4))
    assert len([use for graph in said.graphs for use in graph.fused]) == 2
    assert said.missing == ()


@pytest.mark.parametrize("first", [orthogonal, weight_norm])
def test_a_weight_that_other_parametrizations_compute(first):
    said = explain(nn.Sequential(torch_sn(first(nn.Linear(4, 4)))), torch.randn(2, 4))
    assert [use.fqn for graph in said.graphs for use in graph.fused] == ["0.weight"]
    assert said.missing == ()


@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
def test_a_pruned_weight(sn):
    model = nn.Sequential(sn(nn.Linear(4, 4)))
    owner, name = (
        (model[0], "weight_orig") if sn is hook_sn else (model[0].parametrizations.weight, "original")
    )
    prune.random_unstructured(owner, name, 0.5)
    said = explain(model, torch.randn(2, 4))
    assert len(said.graphs[0].fused) == 1
