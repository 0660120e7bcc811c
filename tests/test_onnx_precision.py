"""ONNX files in every precision: what they hold, how exact they are, what they say of themselves."""

import importlib.metadata
import json
import logging
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import nn

import specnorm_fx
from specnorm_fx import freeze, transform
from specnorm_fx.onnx import VerificationError, export, verify
from specnorm_fx.onnx.exporting import OWN
from specnorm_fx.onnx.precision import opset_for
from specnorm_fx.onnx.verification import LIMITS, _File
from tests.models import Tied
from tests.onnx_files import plain_export, trained


class Folded(nn.Module):
    """Batch norm that the exporter folds into the convolution, and an input that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.skip = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x)) + self.skip(x)).mean((2, 3)))


IMAGES = (3, 8, 8)


@pytest.fixture(scope="module")
def folded():
    """Trained, and the same in float64 with its weights frozen."""
    torch.manual_seed(0)
    gm = trained(Folded, lambda: (torch.randn(4, *IMAGES),))
    return gm, freeze(gm).double()


@pytest.fixture(scope="module")
def files(folded, tmp_path_factory):
    """One file of each precision, and what export said."""
    torch.manual_seed(1)
    folder, x = tmp_path_factory.mktemp("precision"), torch.randn(4, *IMAGES)
    options = {"int8": {"calibration": (torch.randn(4, *IMAGES) for _ in range(4))}}
    return {
        precision: export(
            folded[0],
            x,
            folder / f"{precision}.onnx",
            precision=precision,
            dynamic_batch=True,
            metadata={"source_checkpoint_sha256": "ab12"},
            **options.get(precision, {}),
        )
        for precision in ("fp32", "fp16", "bf16", "int8")
    }


PRECISIONS = {"fp16": (TensorProto.FLOAT16, torch.float16), "bf16": (TensorProto.BFLOAT16, torch.bfloat16)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_inside_and_fp32_outside(precision, files, folded):
    report, (stored, dtype) = files[precision], PRECISIONS[precision]
    graph = onnx.load(report.path).graph
    assert {i.type.tensor_type.elem_type for i in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
    weights = {i.name: i for i in graph.initializer if i.data_type != TensorProto.INT64}
    assert {i.data_type for i in weights.values()} == {stored}
    frozen = freeze(folded[0]).skip.weight.to(dtype).float().detach().numpy()
    np.testing.assert_array_equal(numpy_helper.to_array(weights["skip.weight"]).astype(np.float32), frozen)
    assert report.nodes == files["fp32"].nodes | {"Cast": 2}
    # Rounded, and no more: within the limit of the truth, and not within that of fp32.
    x = torch.randn(9, *IMAGES)
    (got,) = _File(report.path).outputs((x,))
    truth = folded[1](x.double()).detach().numpy()
    error = np.abs(got - truth).max() / np.abs(truth).max()
    assert LIMITS["fp32"] < error < 2 * torch.finfo(dtype).eps
    assert report.rtol == LIMITS[precision] == 16 * torch.finfo(dtype).eps
    with pytest.raises(VerificationError, match="disagrees"):
        verify(report.path, folded[0], x, rtol=LIMITS["fp32"])


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (lambda: nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d, torch.randn(2, *IMAGES)),
        (lambda: nn.Linear(3, 8), nn.BatchNorm1d, torch.randn(2, 3)),
    ],
    ids=["ConvTranspose", "Gemm"],
)
def test_bf16_of_what_is_folded_in_fp32(layer, norm, x, tmp_path):
    gm = transform(nn.Sequential(layer(), norm(8))).eval()
    export(gm, x, tmp_path / "b.onnx", precision="bf16", opset_version=22)
    stored = {i.name: i.data_type for i in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert "0.weight" in stored
    assert {*stored.values()} == {TensorProto.BFLOAT16}


@pytest.mark.parametrize(
    ("precision", "asked", "opset"),
    [("fp16", 18, 18), ("int8", None, None), ("bf16", None, 22), ("bf16", 23, 23)],
)
def test_opset_of_a_precision(precision, asked, opset):
    assert opset_for(precision, asked) == opset


def test_bf16_is_run_by_the_reference_evaluator(files):
    """Until ONNX Runtime has bf16 on the CPU."""
    assert files["bf16"].evaluator == "onnx's reference evaluator"
    assert {files[precision].evaluator for precision in ("fp32", "fp16", "int8")} == {"ONNX Runtime"}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented):
        onnxruntime.InferenceSession(files["bf16"].path)


def test_int8_per_channel(files, folded):
    report = files["int8"]
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(report.path).graph.initializer}
    assert stored["skip.weight_quantized"].dtype == np.int8
    assert stored["skip.weight_scale"].shape == (8,)
    # A step of each channel is its largest weight by 64, so that two products by 8 bits fit into 16.
    weight = freeze(folded[0]).skip.weight.detach().numpy()
    np.testing.assert_allclose(stored["skip.weight_scale"], np.abs(weight).max((1, 2, 3)) / 64, rtol=1e-6)
    assert 2 * 255 * np.abs(stored["skip.weight_quantized"].astype(int)).max() < 2**15
    assert LIMITS["fp32"] < report.max_rel_error < report.rtol == LIMITS["int8"] == 0.1
    assert report.batches == 3
    assert {name: report.nodes[name] for name in ("Conv", "Gemm")} == {"Conv": 2, "Gemm": 1}
    with pytest.raises(VerificationError, match=r"limit 1.000e-04. int8 .* larger rtol. No file was written"):
        export(
            folded[0],
            torch.randn(4, *IMAGES),
            report.path.with_name("never.onnx"),
            precision="int8",
            calibration=[torch.randn(4, *IMAGES)],
            rtol=1e-4,
        )
    assert not report.path.with_name("never.onnx").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_is_written_in_fp32(dtype, tmp_path):
    gm = transform(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))).to(dtype).eval()
    x = torch.randn(3, 6, dtype=dtype)
    report = export(gm, x, tmp_path / "m.onnx")
    assert (report.precision, report.evaluator) == ("fp32", "ONNX Runtime")
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds | {i.data_type for i in graph.initializer} == {TensorProto.FLOAT}
    assert {parameter.dtype for parameter in gm.parameters()} == {dtype}
    of_dtype = {torch.float64: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert report.rtol == LIMITS[of_dtype]


class ScoreInFp32(nn.Module):
    """The whole in half precision, or the body alone: it goes on in the dtype of the head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x):
        return self.head(self.body(x).relu().to(self.head.weight.dtype)).float()


@pytest.mark.parametrize("part", ["body", ""])
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_score_in_fp32_of_a_model_in_half_precision(precision, dtype, part, tmp_path):
    """The model has rounded to half; what the file, in fp32, is held to is what that can make of it."""
    model = ScoreInFp32()
    model.get_submodule(part).to(dtype)
    gm, x = transform(model).eval(), torch.randn(8, 64, dtype=dtype)
    report = export(gm, x, tmp_path / "m.onnx")
    assert report.precision == "fp32"
    assert LIMITS["fp32"] < report.max_rel_error < report.rtol == LIMITS[precision]
    with torch.no_grad():
        gm.get_parameter("head.bias")[:] += 1
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "m.onnx", gm, x)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_buffer_of_another_dtype(precision, tmp_path):
    model = nn.Linear(6, 5)
    model.register_buffer("factor", torch.full((5,), 2.0, dtype=torch.float64))
    model.register_forward_hook(lambda module, inputs, output: output * module.factor)
    x = torch.randn(3, 6)
    report = export(transform(model, example_inputs=x).eval(), x, tmp_path / "m.onnx", precision=precision)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert report.precision == precision


def test_verify_takes_foreign_files_with_bf16_inputs_and_outputs(tmp_path):
    """Numpy has no bf16: what stock torch.onnx.export writes for a model in it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).bfloat16().eval()
    x = torch.randn(2, *IMAGES, dtype=torch.bfloat16)
    plain_export(model, (x,), tmp_path / "b.onnx", opset_version=22)
    report = verify(tmp_path / "b.onnx", model, x)
    assert (report.precision, report.rtol) == ("bf16", LIMITS["bf16"])
    with torch.no_grad():
        model[0].weight[0] += 1
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "b.onnx", model, x)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_structure_is_that_without_spectral_norm(precision, files, folded):
    batches = [torch.randn(batch, *IMAGES) for batch in (1, 4)]
    report = verify(files[precision].path, folded[0], batches, structure=True)
    assert report.nodes == files[precision].nodes


def test_structure_of_a_foreign_file_in_fp64(tmp_path):
    gm = transform(nn.Sequential(nn.Linear(6, 5), nn.ReLU())).double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    plain_export(freeze(gm), (x,), tmp_path / "d.onnx")
    report = verify(tmp_path / "d.onnx", gm, x, structure=True)
    assert (report.precision, report.rtol) == ("fp64", LIMITS["fp64"])
    assert report.nodes == {"Gemm": 1, "Relu": 1}
    with torch.no_grad():
        gm.get_parameter("0.bias")[:] += 1e-10
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "d.onnx", gm, x)


def test_a_foreign_file_in_fp64_whose_scores_are_in_fp32(tmp_path):
    model, x = ScoreInFp32().double().eval(), torch.randn(2, 64, dtype=torch.float64)
    plain_export(model, (x,), tmp_path / "d.onnx")
    report = verify(tmp_path / "d.onnx", model, x)
    assert (report.precision, report.rtol) == ("fp64", LIMITS["fp32"])


# --- What the file and the report say ---


def test_a_source_tree_that_is_not_installed(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    export(transform(nn.Linear(3, 2)).eval(), torch.randn(2, 3), tmp_path / "d.onnx")
    (version,) = (
        p.value for p in onnx.load(tmp_path / "d.onnx").metadata_props if p.key == "specnorm_fx.version"
    )
    assert version == "unknown"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_metadata(precision, files, folded):
    report = files[precision]
    proto = onnx.load(report.path)
    props = {p.key.removeprefix("specnorm_fx."): p.value for p in proto.metadata_props if "specnorm" in p.key}
    assert {*props} == {*OWN, "source_checkpoint_sha256"}
    sigmas = {fqn: sigma.item() for fqn, sigma in specnorm_fx.sigmas(folded[0]).items()}
    assert json.loads(props.pop("sigmas")) == sigmas
    assert json.loads(props.pop("folded")) == ["conv.weight"]
    assert props == {
        "version": importlib.metadata.version("specnorm-fx"),
        "opset": str(proto.opset_import[0].version),
        "precision": precision,
        "max_rel_error": f"{report.max_rel_error:.2e}",
        "source_checkpoint_sha256": "ab12",
    }
    if precision != "bf16":
        session = onnxruntime.InferenceSession(report.path)
        assert session.get_modelmeta().custom_metadata_map["specnorm_fx.precision"] == precision


def test_no_paths_of_this_machine_in_the_file(files):
    for report in files.values():
        content = report.path.read_bytes()
        assert b".py" not in content
        assert str(report.path.parent).encode() not in content


def test_the_report_reads_well(files):
    lines = str(files["fp16"]).splitlines()
    assert lines[0] == f"{files['fp16'].path}: 1 Add, 2 Cast, 2 Conv, 1 Gemm, 1 ReduceMean, 1 Relu"
    assert lines[1].startswith("agrees with the model on 3 batches: max abs error ")
    assert lines[1].endswith(" (limit 1.56e-02, fp16, ONNX Runtime)")


def test_histogram_and_json(files, folded):
    batches = [torch.randn(batch, *IMAGES) for batch in (2, 5)]
    report = verify(files["fp16"].path, folded[0], batches)
    assert sum(report.histogram.values()) == (2 + 5) * 4
    assert list(report.histogram) == sorted(report.histogram, key=float)
    assert all(re.fullmatch(r"0|1e[-+]\d\d", key) for key in report.histogram)
    largest = float(list(report.histogram)[-1])
    assert largest <= report.max_rel_error < 10 * largest
    read = json.loads(report.to_json())
    assert read["histogram"] == report.histogram
    assert (read["path"], read["precision"]) == (str(files["fp16"].path), "fp16")
    one_empty = verify(files["fp16"].path, folded[0], [torch.zeros(0, *IMAGES), batches[0]])
    assert sum(one_empty.histogram.values()) == 2 * 4


def test_int8_leaves_grouped_transposed_convolutions(tmp_path, caplog):
    """Those alone. And takes one tensor for one batch."""
    grouped, plain = nn.ConvTranspose2d(4, 8, 4, 2, 1, groups=2), nn.ConvTranspose2d(8, 4, 3)
    gm = transform(nn.Sequential(grouped, plain, nn.Conv2d(4, 4, 3, groups=2))).eval()
    x = torch.randn(8, 4, 5, 5)
    verification = export(gm, x, tmp_path / "g.onnx", precision="int8", calibration=x)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert verification.nodes["ConvTranspose"] == 2
    assert verification.precision == "int8"
    stored = {
        i.name: i.data_type for i in onnx.load(tmp_path / "g.onnx").graph.initializer if len(i.dims) > 1
    }
    assert stored == {
        "0.weight": TensorProto.FLOAT,
        "1.weight_quantized": TensorProto.INT8,
        "2.weight_quantized": TensorProto.INT8,
    }


def test_int8_leaves_logging_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.DEBUG)
    handlers = [*logging.root.handlers]
    gm, x = transform(nn.Linear(8, 3)).eval(), torch.randn(4, 8)
    export(gm, x, tmp_path / "q.onnx", precision="int8", calibration=x)
    assert logging.root.manager.disable == logging.DEBUG
    assert logging.root.handlers == handlers


def test_int8_ranges_are_those_of_all_batches(tmp_path):
    gm, batches = transform(nn.Linear(8, 3)).eval(), [scale * torch.randn(4, 8) for scale in (1, 9, 0.1)]
    export(gm, batches[0], tmp_path / "q.onnx", precision="int8", calibration=batches, n_batches=1, rtol=1)
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "q.onnx").graph.initializer}
    everything = torch.cat(batches)
    assert stored["input_scale"] == pytest.approx((everything.max() - everything.min()).item() / 255)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.lin(x), lambda x: -self.lin(x), (x,)) + 1


@pytest.mark.parametrize(
    ("make", "x", "captured"),
    [
        (Branches, torch.randn(2, 4), True),
        (lambda: nn.ConvTranspose1d(4, 4, 3, groups=2), torch.randn(2, 4, 5), False),
    ],
    ids=["branches", "grouped"],
)
def test_int8_that_quantizes_no_weight(tmp_path, make, x, captured):
    gm = transform(make(), example_inputs=x if captured else None).eval()
    with pytest.raises(ValueError, match="must find a weight to quantize, and found none"):
        export(gm, x, tmp_path / "b.onnx", precision="int8", calibration=[x])
    assert list(tmp_path.iterdir()) == []


def test_sigma_under_every_name_of_a_tied_weight(tmp_path):
    gm = transform(Tied()).eval()
    export(gm, torch.randn(2, 6), tmp_path / "t.onnx")
    props = {p.key: p.value for p in onnx.load(tmp_path / "t.onnx").metadata_props}
    written = json.loads(props["specnorm_fx.sigmas"])
    (sigma,) = specnorm_fx.sigmas(gm).values()
    assert written == dict.fromkeys(("encoder.weight", "decoder.weight"), sigma.item())
