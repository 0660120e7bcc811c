"""`specnorm_fx.onnx.verify`: it fails where it must, and nowhere else."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from specnorm_fx import freeze, transform
from specnorm_fx.onnx import VerificationError, export, verify
from specnorm_fx.onnx.verification import LIMITS, _size_of_terms
from tests.architectures import ProjectionDiscriminator
from tests.models import Discriminator, case_named
from tests.onnx_files import plain_export, trained


@pytest.fixture(scope="module")
def discriminator(tmp_path_factory):
    torch.manual_seed(0)
    gm = trained(Discriminator, case_named("discriminator").inputs)
    path = tmp_path_factory.mktemp("exported") / "d.onnx"
    export(gm, case_named("discriminator").inputs(), path)
    return gm, path


@pytest.fixture
def exported(discriminator, tmp_path):
    """The model, and a copy of its file to break."""
    gm, path = discriminator
    (tmp_path / "d.onnx").write_bytes(path.read_bytes())
    return gm, tmp_path / "d.onnx"


def edit(path, change):
    proto = onnx.load(path)
    change(proto.graph)
    onnx.save(proto, path)


@pytest.mark.parametrize("name", ["fc.weight", "blocks.0.conv1.weight", "blocks.1.skip.weight", "fc.bias"])
@pytest.mark.parametrize("change", [0.01, np.nan])
def test_a_wrong_weight_makes_verify_fail(exported, name, change):
    gm, path = exported
    batches = [case_named("discriminator").inputs() for _ in range(3)]
    verify(path, gm, batches)

    def plant(graph):
        for initializer in graph.initializer:
            if initializer.name == name:
                array = numpy_helper.to_array(initializer).copy()
                array.flat[0] += change
                initializer.CopyFrom(numpy_helper.from_array(array, name))

    edit(path, plant)
    with pytest.raises(VerificationError, match=r"disagrees with Discriminator on batch 0.*max abs error"):
        verify(path, gm, batches)


def test_verify_refuses_other_models_and_broken_files(exported, tmp_path):
    gm, path = exported
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(VerificationError, match=r"takes 1 inputs \(x\), and the batch has 2"):
        verify(path, gm, (x, x))
    with pytest.raises(VerificationError, match="gives an output of shape"):
        verify(path, nn.Flatten().eval(), x)
    with pytest.raises(VerificationError, match=r"gives an output of shape \(2, 1\), and the model \(2,\)"):
        verify(path, nn.Sequential(gm, nn.Flatten(0)).eval(), x)
    with pytest.raises(VerificationError, match="has 1 outputs, and the model has 2"):
        verify(path, transform(nn.Sequential(nn.Conv2d(3, 2, 8), Split())).eval(), x)
    with pytest.raises(VerificationError, match="ONNX Runtime cannot run"):
        verify(path, gm, torch.randn(5, 3, 8, 8))
    (tmp_path / "broken.onnx").write_bytes(path.read_bytes()[:500])
    with pytest.raises(VerificationError, match=r"broken.onnx is not a valid ONNX model"):
        verify(tmp_path / "broken.onnx", gm, x)
    with pytest.raises(FileNotFoundError, match="There is no ONNX file"):
        verify(tmp_path / "none.onnx", gm, x)
    with pytest.raises(ValueError, match="at least one batch"):
        verify(path, gm, [])
    with pytest.raises(RuntimeError, match=r"Discriminator is in training mode.*Call .eval\(\) first"):
        verify(path, copy.deepcopy(gm).train(), x)
    edit(path, lambda graph: graph.output.append(graph.input[0]))
    with pytest.raises(VerificationError, match="has 2 outputs, and the model has 1"):
        verify(path, gm, x)


def test_the_figures_are_the_largest_of_all_batches(tmp_path):
    gm = transform(nn.Linear(4, 3)).eval()
    before = freeze(gm)
    export(gm, torch.randn(2, 4), tmp_path / "d.onnx", dynamic_batch=True)
    with torch.no_grad():
        gm.get_parameter("weight")[0] += 0.01
    batches = [scale * torch.randn(2, 4) for scale in (1, 100, 0.01)]
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "d.onnx", gm, batches)
    report = verify(tmp_path / "d.onnx", gm, batches, rtol=0.5)
    with torch.no_grad():
        absolute = [(before(x) - gm(x)).abs().max().item() for x in batches]
        relative = [error / gm(x).abs().max().item() for error, x in zip(absolute, batches, strict=True)]
    assert report.max_abs_error == pytest.approx(max(absolute), rel=1e-3)
    assert report.max_rel_error == pytest.approx(max(relative), rel=1e-3)
    assert report.rtol == 0.5


def test_an_output_of_zeros_is_held_to_zeros(tmp_path):
    """Which no difference is relative to."""
    gm = transform(nn.Sequential(nn.Linear(4, 3), nn.ReLU())).eval()
    x = torch.randn(8, 4)
    export(gm, x, tmp_path / "d.onnx")
    with torch.no_grad():
        gm.get_parameter("0.bias")[:] = -100
    assert not gm(x).any()
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "d.onnx", gm, x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.jit.trace, lambda model, x: nn.DataParallel(model).eval()])
def test_modules_that_functional_call_takes_only_as_a_part(tmp_path, wrap):
    gm, x = transform(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    export(gm, x, tmp_path / "d.onnx")
    model = wrap(freeze(gm), x)
    verify(tmp_path / "d.onnx", model, x)
    with torch.no_grad():
        next(model.parameters())[0] += 1
    wrong = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "d.onnx", model, x)
    for parameter, before in zip(model.parameters(), wrong, strict=True):
        torch.testing.assert_close(parameter, before, rtol=0, atol=0)


class Split(nn.Module):
    def forward(self, x):
        return x[:, :1], x[:, 1:]


class Decision(nn.Module):
    def __init__(self, kind="class"):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.kind = kind

    def forward(self, x):
        scores = self.lin(x)
        if self.kind == "signs":
            return scores > 0
        return (scores, scores.argmax(1)) if self.kind == "both" else scores.argmax(1)


@pytest.mark.parametrize("kind", ["class", "signs"])
def test_outputs_without_fractions_must_be_equal(tmp_path, kind):
    gm = transform(Decision(kind)).eval()
    report = export(gm, torch.randn(8, 4), tmp_path / "d.onnx")
    assert (report.rtol, report.max_abs_error) == (0.0, 0.0)
    other = transform(Decision(kind)).eval()
    with pytest.raises(VerificationError, match=r"limit 0.000e\+00"):
        verify(tmp_path / "d.onnx", other, torch.randn(8, 4))


def test_the_limit_reported_is_the_largest_of_the_outputs(tmp_path):
    report = export(transform(Decision("both")).eval(), torch.randn(8, 4), tmp_path / "d.onnx")
    assert report.max_rel_error <= report.rtol == LIMITS["fp32"]


def test_structure_refuses_what_the_stock_exporter_leaves(tmp_path):
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(128, 128)).eval()
    x = torch.randn(2, 128)
    plain_export(model, (x,), tmp_path / "stock.onnx")
    gm = transform(model)
    verify(tmp_path / "stock.onnx", gm, x)
    match = r"stock.onnx has other operators .* without spectral norm: 1 Div for 0, .*2 MatMul for 0"
    with pytest.raises(VerificationError, match=match):
        verify(tmp_path / "stock.onnx", gm, x, structure=True)


def rename_first_dimension(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "size of batch"


def test_structure_is_that_of_the_opset_of_the_file(tmp_path):
    """GELU is an operator from 20 on."""
    gm, x = transform(nn.Sequential(nn.Linear(4, 3), nn.GELU())).eval(), torch.randn(2, 4)
    assert "Gelu" in export(gm, x, tmp_path / "d.onnx", opset_version=20).nodes
    assert "Erf" in export(gm, x, tmp_path / "d.onnx", opset_version=18, dynamic_batch=True).nodes
    edit(tmp_path / "d.onnx", rename_first_dimension)  # to what no Dim can be called
    assert "Erf" in verify(tmp_path / "d.onnx", gm, x, structure=True).nodes


# --- A score near zero is the small difference of large terms ---


@pytest.fixture(scope="module")
def near_zero(tmp_path_factory):
    """A BigGAN, an image and its label whose score is near zero, and the file."""
    torch.manual_seed(0)
    gm = transform(ProjectionDiscriminator(), "*").eval()
    args = torch.randn(1, 3, 16, 16), torch.tensor([3])
    with torch.no_grad():
        gm.linear.bias -= freeze(gm).double()(args[0].double(), args[1])[0] - 1e-6
    path = tmp_path_factory.mktemp("near_zero") / "d.onnx"
    export(gm, (torch.randn(1, 3, 16, 16), torch.tensor([3])), path)
    return gm, args, path


def test_a_score_near_zero_is_held_to_the_size_of_its_terms(near_zero):
    gm, args, path = near_zero
    exact, session = freeze(gm).double(), onnxruntime.InferenceSession(path)
    errors = []
    for i in range(16):  # the roundings of one score are one draw, and another on another processor
        image, label = args[0] * (1 + i * 2**-20), args[1]
        truth = exact(image.double(), label).item()
        (got,) = session.run(None, {"x": image.numpy(), "label": label.numpy()})
        errors += abs(got.item() - truth), abs(gm(image, label).item() - truth)
    # As relative to the score, eager fp32 fails by itself, and the file is about as exact as it is.
    assert errors[1] > LIMITS["fp32"] * abs(exact(args[0].double(), args[1]).item())
    report = verify(path, gm, args)
    # What the score is held to is a few hundred times what fp32 leaves of it, and no more.
    size = report.max_abs_error / report.max_rel_error
    assert max(errors) < report.rtol * size < 500 * max(errors)


@pytest.mark.parametrize("name", ["linear.weight", "blocks.0.conv1.weight"])
def test_a_wrong_weight_fails_near_zero_too(near_zero, name):
    gm, args, path = near_zero
    wrong = copy.deepcopy(gm)
    with torch.no_grad():
        wrong.get_parameter(name).flatten()[0] += 0.01
    with pytest.raises(VerificationError, match="disagrees"):
        verify(path, wrong, args)


def beside_a_parameter_in_float64(model):
    model.unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
    return model


@pytest.mark.parametrize(
    ("model", "x", "moves"),
    [
        (nn.Embedding(4, 3), torch.tensor([2]), True),
        (nn.ReLU(), torch.ones(2), True),
        (beside_a_parameter_in_float64(nn.Embedding(4, 3).half()), torch.tensor([2]), True),
        (nn.Flatten(), torch.ones(2, 2, dtype=torch.int64), False),
        (nn.Linear(3, 2), torch.ones(0, 3), False),
    ],
    ids=["labels", "no parameters", "half", "integers", "nothing"],
)
def test_the_size_of_terms_is_of_parameters_and_inputs(model, x, moves):
    assert (_size_of_terms(model, (x,), 0) > 0) == moves


class Cancelled(nn.Module):
    """A score near zero beside -inf, and another output."""

    def __init__(self, n):
        super().__init__()
        self.lin = nn.Linear(n, 1)

    def forward(self, x):
        return x[:, :1], torch.cat([self.lin(x), x[:, :1].log()], 1)


def test_of_several_outputs_each_is_held_to_its_own_terms(tmp_path):
    gm, x = transform(Cancelled(4096)).eval(), torch.randn(1, 4096)
    x[0, 0] = 0
    with torch.no_grad():
        gm.get_parameter("lin.bias").fill_(0)
        gm.get_parameter("lin.bias").copy_(1e-7 - gm(x)[1][0, :1])
    assert gm(x)[1][0, 0].abs() < 1e-5
    export(gm, torch.randn(1, 4096), tmp_path / "c.onnx")
    verify(tmp_path / "c.onnx", gm, x)


class Jump(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return torch.sign(self.out(torch.relu(self.hidden(x)))) / 64


def test_an_output_that_jumps_is_not_excused(tmp_path):
    """How far it moves when the weights do says nothing of the size of its terms."""
    gm, other = transform(Jump()).eval(), transform(Jump()).eval()
    x = torch.randn(64, 8)
    export(gm, x, tmp_path / "j.onnx", dynamic_batch=True)
    with pytest.raises(VerificationError, match=r"disagrees .* max abs error 3.125e-02"):
        verify(tmp_path / "j.onnx", other, x)
    for rows in (64, 16_384):  # of so many some jump by the smaller of two steps, too
        with pytest.raises(VerificationError, match="disagrees"):
            verify(tmp_path / "j.onnx", other, torch.randn(rows, 8), rtol=0.1)


def test_a_batch_of_zero_says_nothing(tmp_path):
    gm, other = (transform(nn.Sequential(nn.Linear(8, 3))).eval() for _ in range(2))
    none = torch.randn(0, 8)
    export(gm, torch.randn(2, 8), tmp_path / "m.onnx", dynamic_batch=True)
    with pytest.raises(VerificationError, match="or no value at all"):
        verify(tmp_path / "m.onnx", other, none)
    verify(tmp_path / "m.onnx", gm, [none, torch.randn(3, 8)])
    with pytest.raises(VerificationError, match=r"or no value at all.*No file was written"):
        export(gm, none, tmp_path / "none.onnx")


def test_a_file_without_outputs_says_nothing(tmp_path):
    """ONNX Runtime takes none; the reference evaluator, which runs bf16, does."""

    class Silent(nn.Linear):
        def forward(self, x):
            return ()

    helper, path = onnx.helper, tmp_path / "silent.onnx"
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "silent",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])],
        [],
        [helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [1], [1.0])],
    )
    opset = helper.make_opsetid("", 22)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    with pytest.raises(VerificationError, match="or no value at all"):
        verify(path, Silent(4, 3).eval(), torch.randn(2, 4))


def test_nan_that_agrees(tmp_path):
    class Spread(nn.Linear):
        def forward(self, x):
            centred = x - x.mean(0)
            return super().forward(x) * (centred / centred.norm(dim=0)).square().sum()

    gm = transform(nn.Sequential(Spread(4, 3))).eval()
    one = torch.randn(1, 4)
    assert gm(one).isnan().all()
    export(gm, torch.randn(4, 4), tmp_path / "s.onnx", dynamic_batch=True)  # of which the first batch is one
    with pytest.raises(VerificationError, match="gives nothing but NaN on these inputs"):
        verify(tmp_path / "s.onnx", gm, one)
    other = transform(nn.Sequential(nn.Linear(4, 3))).eval()
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "s.onnx", other, one)


@pytest.mark.parametrize("fill", [-torch.inf, torch.nan])
def test_nan_and_inf_in_some_places(tmp_path, fill):
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(x[:, :3] > 0, fill)

    gm, plain = (transform(nn.Sequential(kind(4, 3))).eval() for kind in (Masked, nn.Linear))
    plain.load_state_dict(gm.state_dict())
    x = torch.randn(16, 4)
    assert not gm(x).isfinite().all()
    export(gm, x, tmp_path / "m.onnx")
    export(plain, x, tmp_path / "p.onnx")
    with torch.no_grad():
        moved = copy.deepcopy(gm)
        moved.get_parameter("0.bias")[0] += 1
    for name, model in (("m", moved), ("m", plain), ("p", gm)):
        with pytest.raises(VerificationError, match="disagrees"):
            verify(tmp_path / f"{name}.onnx", model, x)
