"""The whole way with discriminators that people train: torch's numbers, compiled, frozen, served."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

import specnorm_fx
from specnorm_fx import freeze, frozen_state_dict, transform
from specnorm_fx.capture import KINDS
from tests.architectures import PatchGAN, ProjectionDiscriminator, ScaleDiscriminator, UNetDiscriminator
from tests.models import relative_error

ALL = pytest.mark.parametrize(
    ("make", "shape"),
    [
        (ProjectionDiscriminator, (3, 16, 16)),
        (PatchGAN, (3, 32, 32)),
        (ScaleDiscriminator, (1, 256)),
        (UNetDiscriminator, (3, 16, 16)),
    ],
)


def inputs(make, shape, batch=2):
    x = torch.randn(batch, *shape)
    return (x, torch.randint(10, (batch,))) if make is ProjectionDiscriminator else (x,)


def score(output):
    return output[0] if isinstance(output, tuple) else output


def with_torch_sn(model, sn=torch_sn):
    for module in [m for m in model.modules() if isinstance(m, KINDS)]:
        sn(module)
    return model


@ALL
def test_training_is_torchs_bit_for_bit(make, shape):
    model = make()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    theirs = with_torch_sn(twin)
    torch.manual_seed(1)
    ours = transform(model, "*", implementation="reference")
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3, betas=(0.0, 0.9)) for m in (theirs, ours)]
    for _ in range(5):
        batch = inputs(make, shape)
        outputs = [score(m(*batch)) for m in (theirs, ours)]
        assert torch.equal(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            torch.relu(1 - output).mean().backward()
            optimizer.step()
    assert torch.equal(*(score(m.eval()(*batch)) for m in (theirs, ours)))


@pytest.mark.parametrize("sn", [torch_sn, hook_sn])
@ALL
def test_adopted_frozen_and_loaded_into_the_plain_class(make, shape, sn):
    theirs = with_torch_sn(make(), sn)
    gm = transform(theirs, implementation="reference")
    assert len(gm.sites()) == sum(isinstance(m, KINDS) for m in make().modules())
    batch = inputs(make, shape)
    assert torch.equal(score(gm(*batch)), score(theirs(*batch)))
    gm.eval()
    plain = make().eval()
    plain.load_state_dict(frozen_state_dict(gm), strict=True)
    want = score(gm(*batch))
    assert torch.equal(score(freeze(gm)(*batch)), want)
    assert torch.equal(score(plain(*batch)), want)


@ALL
def test_compiled_in_one_graph(make, shape):
    gm = transform(make(), "*")
    eager = copy.deepcopy(gm)
    compiled = torch.compile(gm, fullgraph=True)
    batch = inputs(make, shape)
    assert relative_error(score(compiled(*batch)), score(eager(*batch))) < 1e-6
    torch._dynamo.reset()


@ALL
def test_onnx_with_any_batch_size(make, shape, tmp_path):
    gm = transform(make(), "*").eval()
    report = specnorm_fx.onnx.export(gm, inputs(make, shape), tmp_path / "d.onnx", dynamic_batch=True)
    assert report.max_rel_error < report.rtol
    specnorm_fx.onnx.verify(tmp_path / "d.onnx", gm, [inputs(make, shape, batch) for batch in (1, 9)])


def test_exported_capture_agrees():
    make, shape = ProjectionDiscriminator, (3, 16, 16)
    model = make()
    exported = torch.export.export(model, inputs(make, shape)).module()
    torch.manual_seed(1)
    via_export = transform(exported, "*")
    torch.manual_seed(1)
    direct = transform(model, "*")
    batch = partial(inputs, make, shape)()
    assert torch.equal(via_export(*batch), direct(*batch))
