"""ONNX: the nodes and names of the model without spectral norm, verified values, and every refusal."""

from collections import Counter
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

import specnorm_fx
from specnorm_fx import freeze, transform
from specnorm_fx.onnx import VerificationError, export, verify
from tests.models import MODELS, Discriminator, Labelled, Tied, case_named, parametrize


class Attention(nn.Module):
    """Linear layers on sequences, which become MatMul with transposed weights, above 8192 elements."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(96, 3 * 96)
        self.out = nn.Linear(96, 96, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(torch.softmax(q @ k.transpose(1, 2) / 96**0.5, dim=-1) @ v)


class Large(nn.Module):
    """Every layer above 8192 elements, up to which the stock exporter folds sigma by itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 128, 3, padding=1)
        self.norm = nn.BatchNorm2d(128)
        self.down = nn.Conv2d(128, 64, 4, stride=2, bias=False)
        self.up = nn.ConvTranspose2d(64, 64, 4, stride=2)
        self.fc = nn.Linear(64, 130)

    def forward(self, x):
        h = F.leaky_relu(self.norm(self.conv(x)), 0.2)
        return self.fc(F.relu(self.up(self.down(h))).mean((2, 3)))


CASES = [
    *((case.name, case.make, case.inputs) for case in MODELS),
    ("attention", Attention, lambda: (torch.randn(2, 5, 96),)),
    ("large", Large, lambda: (torch.randn(2, 3, 8, 8),)),
]
ALL = pytest.mark.parametrize(("make", "inputs"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


def plain_export(model, args, path):
    """The stock exporter on the model without spectral norm."""
    specnorm = specnorm_fx.onnx
    with specnorm._quiet_exporter():
        torch.onnx.export(model.eval(), args, path, dynamo=True, verbose=False, external_data=False)
    return onnx.load(path)


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


def trained(make, inputs):
    gm = transform(make(), "*" if make is Labelled else None)
    for _ in range(2):
        gm(*inputs())
    return gm.eval()


@ALL
def test_nodes_names_and_values(make, inputs, tmp_path):
    gm = trained(make, inputs)
    args = inputs()
    report = export(gm, args, tmp_path / "ours.onnx")
    ours = onnx.load(tmp_path / "ours.onnx")
    plain = plain_export(make(), args, tmp_path / "plain.onnx")

    assert operators(ours) == operators(plain)
    assert report.nodes == operators(ours)
    assert [i.name for i in ours.graph.input] == [i.name for i in plain.graph.input]

    # Every parameter that is used stands there under its own name.
    names = {initializer.name for initializer in ours.graph.initializer}
    for site in gm.sites():
        assert names & set(site.names)  # the exporter keeps one name of a tied weight
    assert not {name for name in names if name.endswith(("weight_u", "weight_v"))}

    # Two sessions, several batches: figures as reported.
    session = onnxruntime.InferenceSession(tmp_path / "ours.onnx")
    got = session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)})
    want = gm(*args).detach()
    assert np.abs(got[0] - want.numpy()).max() <= 128 * torch.finfo(torch.float32).eps * want.abs().max()
    assert 0 <= report.max_rel_error <= report.rtol
    assert report.batches == 3
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["ours.onnx", "plain.onnx"]


def test_initializers_are_the_frozen_weights(tmp_path):
    gm = trained(Attention, lambda: (torch.randn(2, 5, 96),))
    export(gm, torch.randn(2, 5, 96), tmp_path / "a.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "a.onnx").graph.initializer}
    frozen = freeze(gm).state_dict()
    # Stored transposed for MatMul, under the parameter's own name.
    for name in ("qkv.weight", "out.weight"):
        np.testing.assert_array_equal(stored[name], frozen[name].numpy().T)


def test_the_stock_exporter_leaves_sigma_in(tmp_path):
    """What this module is for: torch's own spectral norm above 8192 elements (see docs/design.md)."""
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(128, 128)).eval()
    stock = operators(plain_export(model, (torch.randn(2, 128),), tmp_path / "stock.onnx"))
    assert stock["Div"] == 1
    assert stock["MatMul"] == 2
    report = export(transform(model), torch.randn(2, 128), tmp_path / "ours.onnx")
    assert report.nodes == {"Gemm": 1}


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_dynamic_batch(batch, tmp_path):
    gm = trained(Labelled, partial(case_named("labelled").inputs, 2))
    export(gm, case_named("labelled").inputs(2), tmp_path / "d.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    assert [i.shape[0] for i in session.get_inputs()] == ["batch", "batch"]
    args = case_named("labelled").inputs(batch)
    (got,) = session.run(None, dict(zip(("x", "label"), (a.numpy() for a in args), strict=True)))
    torch.testing.assert_close(torch.from_numpy(got), gm(*args).detach(), rtol=2e-5, atol=2e-6)


def test_dynamic_shapes_names_and_opset(tmp_path):
    conv = transform(nn.Sequential(nn.Conv1d(1, 4, 3))).eval()
    length = torch.export.Dim("length")
    export(
        conv,
        torch.randn(2, 1, 20),
        tmp_path / "c.onnx",
        dynamic_shapes=({2: length},),
        input_names=["audio"],
        output_names=["score"],
        opset_version=20,
    )
    proto = onnx.load(tmp_path / "c.onnx")
    assert proto.graph.input[0].name == "audio"
    assert proto.graph.output[0].name == "score"
    assert proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param == "length"
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [20]
    verify(tmp_path / "c.onnx", conv, [torch.randn(2, 1, n) for n in (5, 33)])


def test_a_frozen_model_exports_too_and_the_model_is_left_as_it_is(tmp_path):
    gm = transform(Tied()).eval()
    code, state = gm.code, {key: value.clone() for key, value in gm.state_dict().items()}
    export(freeze(gm), torch.randn(2, 6), tmp_path / "f.onnx")
    export(torch.compile(gm, backend="eager"), torch.randn(2, 6), tmp_path / "g.onnx")
    assert gm.code == code
    assert all(torch.equal(value, state[key]) for key, value in gm.state_dict().items())
    verify(tmp_path / "f.onnx", gm, torch.randn(2, 6))
    verify(tmp_path / "g.onnx", freeze(gm), torch.randn(2, 6))


def test_no_paths_of_this_machine_in_the_file(tmp_path):
    export(transform(Discriminator()).eval(), torch.randn(2, 3, 8, 8), tmp_path / "d.onnx")
    content = (tmp_path / "d.onnx").read_bytes()
    assert b".py" not in content
    assert str(tmp_path).encode() not in content


def test_the_report_reads_well(tmp_path):
    report = export(transform(nn.Linear(4, 3)).eval(), torch.randn(2, 4), tmp_path / "l.onnx")
    lines = str(report).splitlines()
    assert lines[0] == f"{tmp_path / 'l.onnx'}: 1 Gemm"
    assert lines[1].startswith("agrees with the model on 3 batches: max abs error ")


# --- verify fails where it must ---


@pytest.fixture
def exported(tmp_path):
    gm = trained(Discriminator, case_named("discriminator").inputs)
    export(gm, case_named("discriminator").inputs(), tmp_path / "d.onnx")
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


def test_export_leaves_nothing_behind_when_verification_fails(tmp_path):
    gm = transform(Discriminator()).eval()
    (tmp_path / "d.onnx").write_bytes(b"an older file")
    match = rf"^{tmp_path}/d.onnx disagrees.*limit 0.000e\+00. No file was written."
    with pytest.raises(VerificationError, match=match):
        export(gm, torch.randn(2, 3, 8, 8), tmp_path / "d.onnx", rtol=0.0)
    assert (tmp_path / "d.onnx").read_bytes() == b"an older file"
    assert len(list(tmp_path.iterdir())) == 1


def test_verify_refuses_other_models_and_broken_files(exported, tmp_path):
    gm, path = exported
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(VerificationError, match=r"takes 1 inputs \(x\), and the batch has 2"):
        verify(path, gm, (x, x))
    with pytest.raises(VerificationError, match="gives an output of shape"):
        verify(path, nn.Flatten().eval(), x)
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
        verify(path, gm.train(), x)


class Split(nn.Module):
    def forward(self, x):
        return x[:, :1], x[:, 1:]


# --- export refuses ---


def test_export_refuses_training_mode(tmp_path):
    gm = transform(Discriminator())
    with pytest.raises(RuntimeError, match=r"Discriminator is in training mode.*Call .eval\(\) first"):
        export(gm, torch.randn(2, 3, 8, 8), tmp_path / "d.onnx")
    gm.eval().norm.train()
    with pytest.raises(RuntimeError, match="in training mode"):
        export(gm, torch.randn(2, 3, 8, 8), tmp_path / "d.onnx")
    assert not list(tmp_path.iterdir())


def test_export_refuses_paths_it_cannot_write(tmp_path):
    gm = transform(nn.Linear(4, 3)).eval()
    x = torch.randn(2, 4)
    with pytest.raises(
        FileNotFoundError, match=r"missing/d.onnx cannot be written: No such file or directory. Give"
    ):
        export(gm, x, tmp_path / "missing" / "d.onnx")
    with pytest.raises(IsADirectoryError, match="cannot be written: it is a folder"):
        export(gm, x, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot be written"):
        export(gm, x, tmp_path / "file" / "d.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_export_refuses_other_arguments(tmp_path):
    gm = transform(nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match="at least one tensor"):
        export(gm, (), tmp_path / "d.onnx")
    with pytest.raises(ValueError, match="dynamic_batch or dynamic_shapes, not both"):
        export(gm, torch.randn(2, 4), tmp_path / "d.onnx", dynamic_batch=True, dynamic_shapes=({0: 1},))
    with pytest.raises(TypeError, match="holds no transformed model"):
        export(nn.Linear(4, 3).eval(), torch.randn(2, 4), tmp_path / "d.onnx")


@pytest.mark.parametrize("opset", [5, 99])
def test_export_refuses_an_opset_it_cannot_write(opset, tmp_path, capfd):
    gm = transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU())).eval()
    with pytest.raises(ValueError, match=f"opset_version={opset} cannot be had.*writes opset"):
        export(gm, torch.randn(2, 3, 8, 8), tmp_path / "d.onnx", opset_version=opset)
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in capfd.readouterr().err


def test_integer_outputs_must_be_equal(tmp_path):
    class Decision(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x):
            return self.lin(x).argmax(1)

    gm = transform(Decision()).eval()
    report = export(gm, torch.randn(8, 4), tmp_path / "d.onnx")
    assert (report.rtol, report.max_abs_error) == (0.0, 0.0)
    other = transform(Decision()).eval()
    with pytest.raises(VerificationError, match=r"limit 0.000e\+00"):
        verify(tmp_path / "d.onnx", other, torch.randn(8, 4))


def test_labels_are_drawn_from_the_example(tmp_path):
    """An index outside the embedding would fail in both runtimes."""
    gm = transform(Labelled(), "*").eval()
    export(gm, (torch.randn(2, 1, 6, 6), torch.tensor([9, 3])), tmp_path / "l.onnx", n_batches=10)


@parametrize(MODELS[:1])
def test_a_missing_extra_is_named(case, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r"specnorm_fx.onnx needs onnxruntime: pip install 'specnorm-fx\[onnx\]'"
    ):
        export(transform(case.make()).eval(), case.inputs(), tmp_path / "d.onnx")
