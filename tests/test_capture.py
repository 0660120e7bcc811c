"""Capture: what symbolic trace follows, and what is refused with the line and the ways out."""

import contextlib
import copy
import random
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.utils.checkpoint import checkpoint

from specnorm_fx import frozen_state_dict, specnorm, transform
from specnorm_fx.capture import Tracer


class PeriodPad(nn.Module):
    """Pads by a remainder of its length, as HiFi-GAN's period discriminator does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, (3, 1))

    def forward(self, x):
        b, c, t = x.shape
        if t % 3 != 0:
            x = F.pad(x, (0, 3 - t % 3), "reflect")
        return self.conv(x.view(b, c, -1, 3))


@fx.wrap
def pad_to_multiple(x, period):
    t = x.shape[-1]
    return F.pad(x, (0, -t % period), "reflect") if t % period else x


class WrappedPad(PeriodPad):
    def forward(self, x):
        x = pad_to_multiple(x, 3)
        return self.conv(x.view(x.shape[0], 1, -1, 3))


def test_control_flow_on_values_names_the_line_and_the_module():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), PeriodPad())
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(TraceError) as error:
        transform(model)
    message = str(error.value)
    assert "cannot follow the forward of Sequential, in its module '1'" in message
    assert "test_capture.py" in message
    assert "if t % 3 != 0:" in message
    assert "torch.fx.wrap" in message
    assert "specnorm_fx.transform(model, example_inputs=...)" in message
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_both_ways_out_work():
    x = torch.randn(2, 1, 16)
    model = PeriodPad()
    torch.manual_seed(1)
    exported = transform(model, example_inputs=x)
    wrapped_model = WrappedPad()
    wrapped_model.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    wrapped = transform(wrapped_model)
    assert torch.equal(exported(x), wrapped(x))
    wrapped(torch.randn(1, 1, 20))  # another remainder


class ReadsTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x):
        return F.dropout(self.lin(x), 0.5, self.training)


def test_a_forward_that_reads_training_is_refused():
    with pytest.raises(TraceError, match=r"(?s)depends on self.training.*training = True.*training = False"):
        transform(ReadsTraining())
    with pytest.raises(TraceError, match=r"nn.Dropout instead of F.dropout"):
        transform(ReadsTraining().eval())


class AssignsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.register_buffer("center", torch.zeros(3))

    def forward(self, x):
        h = self.lin(x)
        self.center.data = 0.9 * self.center + h.mean(0)
        return h - self.center


def test_an_assignment_to_data_is_refused():
    """Of which neither fx nor torch.export leaves anything in its graph."""
    with pytest.raises(
        TraceError, match=r"assigned to \.data of a tensor.*copy_[\s\S]*self\.center\.data = "
    ):
        transform(AssignsData())
    with pytest.raises(ValueError, match=r"forward of AssignsData: .*assigned to \.data of a tensor"):
        transform(AssignsData(), example_inputs=torch.ones(2, 3))


class Buffers(nn.Module):
    """Computes on buffers, plain tensors, constants and parameters before they meet the input."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))
        self.gain = nn.Parameter(torch.ones(3))
        self.plain = torch.ones(3)

    def forward(self, x):
        return self.lin(x) * (self.scale + 1) * self.gain.exp() * self.plain + torch.tensor([1.0, 2.0, 3.0])


def test_buffers_and_parameters_are_read_at_run_time():
    model = Buffers()
    gm = transform(model).eval()
    x = torch.randn(2, 3)
    before = gm(x)
    gm.scale.fill_(3)  # 1 + 1 becomes 3 + 1
    gm.gain.data.fill_(1 + torch.log(torch.tensor(2.0)).item())
    constant = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(gm(x) - constant, (before - constant) * 4)
    assert set(gm.state_dict()) - set(model.state_dict()) == {"lin.weight_u", "lin.weight_v"}


def test_side_effects_of_the_trace_stay_off_the_model():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.layers = [self.lin]  # a plain list: not registered, but the same object

        def forward(self, x):
            self.last = x
            for layer in self.layers:
                x = layer(x)
            return x

    model = Remembers()
    gm = transform(model)
    assert not hasattr(model, "last")
    assert model.layers == [model.lin]
    assert gm.layers == [gm.lin]
    assert not hasattr(gm, "last")
    assert [site.fqn for site in gm.sites()] == ["lin.weight"]


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Sequential cannot be copied \(cannot pickle '_thread.lock'"):
        transform(model)


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, x):
        return self.up(x, output_size=[9, 9])


def test_output_size_is_refused_with_a_remedy():
    match = (
        r"The call of 'up' \(ConvTranspose2d\) cannot be followed.*output_padding instead, or leave it out"
    )
    with pytest.raises(TraceError, match=match):
        transform(Upsample())
    # Left out, the layer stays as it was, and so the model has nothing to normalise.
    with pytest.raises(ValueError, match="has no weight to normalise"):
        transform(Upsample(), {"up": None})


def test_keyword_arguments_of_a_layer():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            return self.lin(input=x)

    assert transform(Keyword())(torch.randn(2, 3)).shape == (2, 3)


def test_a_weight_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return F.linear(x, weight=self.projection)

    assert [site.fqn for site in transform(Keyword()).sites()] == ["projection"]


def test_several_inputs_and_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x, y=None, *, scale: float = 2.0):
            return {"score": self.a(x) * scale, "features": [x, self.a(y)]}

    out = transform(Pair())(torch.randn(2, 3), torch.randn(2, 3))
    assert out["features"][1].shape == (2, 3)


class Region(nn.Module):
    def __init__(self, region):
        super().__init__()
        self.features, self.head, self.region = nn.Linear(4, 4), nn.Linear(4, 1), region

    def forward(self, x):
        with self.region():
            x = self.features(x)
        return self.head(x)


@pytest.mark.parametrize(
    "region",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", enabled=False)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad])
def test_regions_that_a_graph_does_not_keep(region, around):
    message = r"does not keep what is inside torch\.(no_grad|autocast)(.|\n)*self.features"
    with around(), pytest.raises(TraceError, match=message):
        transform(Region(region))
    assert transform(Region(contextlib.nullcontext)).sites()


class Harmless(nn.Module):
    """Regions in which nothing has a gradient or another precision."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("place", torch.ones(4))
        self.register_buffer("width", torch.ones(4))

    def forward(self, x):
        with torch.no_grad():
            self.steps.add_(1)
            mask = (x > 0) * self.place
        with torch.autocast("cpu", enabled=False):
            scale = torch.ones(4) * 2
            width = self.width
        return self.last(checkpoint(self.first, x * mask, use_reentrant=True) * scale * width)


def test_regions_that_make_no_difference():
    model = Harmless().double()
    gm = transform(model, implementation="reference").eval()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    steps = gm.steps.item()
    model.load_state_dict(frozen_state_dict(gm))
    assert torch.equal(gm(x), model(x))
    gm(x).sum().backward()
    assert gm.steps == steps + 3  # one tensor, which `transform` shares
    assert gm.first.weight.grad.any()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.last(checkpoint(self.first, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("capture", ["trace", "export"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_in_the_forward_just_runs(use_reentrant, capture, caplog):
    x = torch.randn(2, 4)
    gm = transform(Checkpointed(use_reentrant), example_inputs=x if capture == "export" else None)
    (said,) = (record.message for record in caplog.records if record.name == "specnorm_fx.capture")
    assert said.startswith("the forward of Checkpointed uses activation checkpointing")
    gm(x).sum().backward()
    assert gm.first.weight.grad.any()


def test_a_method_of_the_model_as_a_hook():
    model = nn.Linear(3, 3)
    model.register_forward_hook(model.extra_repr)
    with pytest.raises(
        ValueError, match=r"'extra_repr', a method of its own, as a hook.*Register a function"
    ):
        transform(model)


class Remembers(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3), how
        self.features, self.by_name = [], {}
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        h = self.layer(x)
        getattr(self, self.how)(h)
        return h - self.mean

    def assign(self, h):
        self.mean = 0.9 * self.mean + h.detach().mean(0)

    def write(self, h):
        self.mean.copy_(0.9 * self.mean + h.detach().mean(0))

    def append(self, h):
        self.features = [h]
        if not self.training:
            self.by_name["h"] = h


def test_a_buffer_that_the_forward_assigns():
    with pytest.raises(TraceError, match=r"assigns 0\.mean, .*in place: buffer\.copy_"):
        transform(nn.Sequential(Remembers("assign")))
    gm = transform(nn.Sequential(Remembers("write")))
    gm(torch.randn(2, 3))
    assert gm.get_buffer("0.mean").any()


def test_attributes_that_the_forward_sets_are_named(caplog):
    transform(nn.Sequential(Remembers("append")))
    assert "sets 0.features, 0.by_name, which" in caplog.text
    caplog.clear()
    transform(nn.Sequential(Remembers("write")))
    assert not caplog.records


def _sevenfold(layer, x):
    return 7 * F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("part", ["", "0"], ids=["the model", "a layer"])
def test_a_forward_that_was_set(part):
    model = nn.Sequential(nn.Linear(4, 3)) if part else nn.Linear(4, 3)
    layer = model.get_submodule(part)
    layer.forward = types.MethodType(_sevenfold, layer)
    with pytest.raises(ValueError, match=r"Linear.* has a forward of its own.*example_inputs"):
        transform(model)
    x = torch.randn(2, 4)
    gm = transform(model, example_inputs=x)
    weights = frozen_state_dict(gm.eval()).values()
    torch.testing.assert_close(gm(x), 7 * F.linear(x, *weights))


def test_a_call_of_its_own():
    class Scaled(nn.Linear):
        def __call__(self, x):
            return 7 * super().__call__(x)

    model, x = Scaled(4, 3), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"Scaled has a __call__ of its own.*example_inputs"):
        transform(model)
    for gm in (transform(model, example_inputs=x), transform(nn.Sequential(model))):
        weights = frozen_state_dict(gm.eval()).values()
        torch.testing.assert_close(gm(x), 7 * F.linear(x, *weights))


def test_a_forward_that_was_set_of_a_layer_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].forward = types.MethodType(_sevenfold, model[0])
    x = torch.randn(2, 4)
    gm = transform(model, "1").eval()
    weight = frozen_state_dict(gm)["1.weight"]
    torch.testing.assert_close(gm(x), F.linear(model[0](x), weight, model[1].bias))


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad])
def test_export_keeps_them(around):
    x = torch.randn(2, 4)
    with around():
        gm = transform(Region(torch.no_grad), example_inputs=x)
    gm(x).sum().backward()
    assert gm.features.weight.grad is None
    assert gm.head.weight.grad is not None


def test_other_threads_may_enter_regions_meanwhile():
    class Slow(nn.Linear):
        def forward(self, x):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return super().forward(x)

    def elsewhere():
        with torch.autocast("cpu"):
            seen.append(torch.is_autocast_enabled("cpu"))

    seen = []
    transform(nn.Sequential(Slow(3, 3)))
    assert seen == [True] * len(seen) != []
    elsewhere()
    assert seen[-1]


def test_traces_in_two_threads_leave_autocast_as_it_was():
    """One after the other: each would put back what it has found."""
    begun, ended, enter = threading.Event(), threading.Event(), torch.autocast.__enter__

    class First(nn.Linear):
        def forward(self, x):
            thread.start()
            begun.wait(0.2)  # in vain
            return super().forward(x)

    class Second(nn.Linear):
        def forward(self, x):
            begun.set()
            ended.wait(5)
            return super().forward(x)

    thread = threading.Thread(target=lambda: Tracer().trace(Second(3, 3)))
    Tracer().trace(First(3, 3))
    ended.set()
    thread.join()
    assert torch.autocast.__enter__ is enter


GENERATOR = torch.Generator()


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.fc = nn.Linear(4, 1)
        self.draw = draw

    def forward(self, x):
        return self.fc(x + self.draw())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(4),
        lambda: torch.empty(4).uniform_(),
        lambda: 1.0 if torch.rand(()) < 0.5 else 2.0,
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: torch.randn(4, generator=GENERATOR),
    ],
)
def test_random_numbers_that_a_trace_would_fix(draw):
    with pytest.raises(TraceError, match=r"a trace would fix (the random numbers|what the forward draws)"):
        transform(Noisy(draw))


class Penalized(nn.Module):
    """Adds something to the output that it computes from its own tensors."""

    def __init__(self, penalty):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("offset", torch.zeros(4))
        self.weights = [self.fc.weight]
        self.penalty = penalty

    def forward(self, x):
        return self.fc(x) + self.penalty(self)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda model: sum(p.square().sum() for p in model.parameters()),
        lambda model: dict(model.named_parameters())["fc.weight"].T,
        lambda model: model.fc._parameters["weight"].norm(),
        lambda model: model.state_dict()["fc.weight"].norm(),
        lambda model: torch.linalg.norm(model.weights[0]),
        lambda model: 2 * next(model.buffers()),
        lambda model: next(model.buffers()).add_(1),
        lambda model: next(model.buffers()).__setitem__(0, 1) or 0,
        lambda model: next(model.buffers()).__iadd__(1),
    ],
)
def test_tensors_that_a_trace_would_fix(penalty):
    """fx computes them while it traces, and the graph would have the numbers of that moment."""
    model, x = Penalized(penalty), torch.randn(4, 4)
    with pytest.raises(TraceError, match=r"(?s)would fix what is computed here.*test_capture.py.*model"):
        transform(model)
    assert not model.offset.any()
    gm = transform(model, example_inputs=x, implementation="reference").eval()
    with torch.no_grad():  # so that a number of the capture would show
        for tensor in (*model.parameters(), model.offset):
            tensor.add_(0.5)
    plain = Penalized(penalty)
    plain.load_state_dict(frozen_state_dict(gm))
    plain.weights = [plain.fc.weight]
    assert torch.equal(gm(x), plain(x))


@pytest.mark.parametrize(
    "number", [lambda x: x[0].item(), lambda x: x.tolist()[0], lambda x: float(x), lambda x: 1 if x else 2]
)
def test_numbers_that_a_trace_would_fix(number):
    model = Penalized(lambda model: number(next(model.buffers())))
    model.offset = torch.zeros(1)
    with pytest.raises(TraceError, match="would fix what is computed here"):
        transform(model)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda model: sum(p.numel() for p in model.parameters() if p.dim() > 1 and p.requires_grad),
        lambda model: nn.functional.linear(model.fc(model.weights[0]), next(model.parameters())),
    ],
)
def test_tensors_that_a_trace_follows(penalty):
    model, x = Penalized(penalty), torch.randn(4, 4)
    by_trace = transform(model, implementation="reference").eval()
    vectors = {key: value for key, value in by_trace.state_dict().items() if key.endswith(("_u", "_v"))}
    by_export = transform(model, example_inputs=x, implementation="reference").eval()
    by_export.load_state_dict(model.state_dict() | vectors)
    assert torch.equal(by_trace(x), by_export(x))
    plain = Penalized(penalty)
    plain.load_state_dict(frozen_state_dict(by_trace))
    assert torch.equal(by_trace(x), plain(x))


class Scales(nn.Module):
    """With a name that no code can have."""

    def __init__(self):
        super().__init__()
        self.by_scale = nn.ModuleDict({"global": nn.Linear(4, 4), "local": nn.Linear(4, 4)})

    def forward(self, x):
        return self.by_scale["local"](self.by_scale["global"](x))


@pytest.mark.parametrize("example_inputs", [None, torch.randn(2, 4)])
def test_names_that_are_keywords(example_inputs):
    with pytest.raises(ValueError, match=r"^'by_scale\.global.*: 'global' is a keyword of Python.*Rename it"):
        transform(Scales(), example_inputs=example_inputs)


def test_the_backend_takes_names_that_are_keywords():
    model, x = Scales(), torch.randn(2, 4)
    nn.utils.parametrizations.spectral_norm(model.by_scale["global"])
    options = {"inner": "eager", "implementation": "reference"}
    compiled = torch.compile(copy.deepcopy(model), backend=specnorm, options=options, fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_random_numbers_as_of_the_input():
    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Dropout(), nn.Linear(4, 1))

        def forward(self, x):
            return self.fc(x + torch.randn_like(x))

    gm, x = transform(Augmented()).eval(), torch.randn(2, 4)
    assert not torch.equal(gm(x), gm(x))


def test_random_numbers_by_export():
    gm, x = (
        transform(Noisy(lambda: torch.randn(4)), example_inputs=torch.randn(2, 4)).eval(),
        torch.randn(2, 4),
    )
    assert not torch.equal(gm(x), gm(x))
