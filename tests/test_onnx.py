"""ONNX: the nodes and names of the model without spectral norm, verified values, and every refusal."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial

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
from specnorm_fx.onnx import LIMITS, VerificationError, export, verify
from tests.architectures import ProjectionDiscriminator
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


def plain_export(model, args, path, **options):
    """The stock exporter on the model without spectral norm."""
    specnorm = specnorm_fx.onnx
    with specnorm._quiet_exporter():
        torch.onnx.export(
            model.eval(), args, path, dynamo=True, verbose=False, external_data=False, **options
        )
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


def test_dynamic_batch(tmp_path):
    gm = trained(Labelled, partial(case_named("labelled").inputs, 2))
    export(gm, case_named("labelled").inputs(2), tmp_path / "d.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    assert [i.shape[0] for i in session.get_inputs()] == ["batch", "batch"]
    for batch in (1, 2, 7):
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


# --- Precision ---


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
    _, run = specnorm_fx.onnx._evaluator(report.path, precision)
    (got,) = run(None, {"x": x.numpy()})
    truth = folded[1](x.double()).detach().numpy()
    error = np.abs(got - truth).max() / np.abs(truth).max()
    assert LIMITS["fp32"] < error < 2 * torch.finfo(dtype).eps
    assert report.rtol == LIMITS[precision] == 16 * torch.finfo(dtype).eps
    with pytest.raises(VerificationError, match="disagrees"):
        verify(report.path, folded[0], x, rtol=LIMITS["fp32"])


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
    # A step of each channel is its largest weight by 127.
    weight = freeze(folded[0]).skip.weight.detach().numpy()
    np.testing.assert_allclose(stored["skip.weight_scale"], np.abs(weight).max((1, 2, 3)) / 127, rtol=1e-6)
    assert LIMITS["fp32"] < report.max_rel_error < report.rtol == LIMITS["int8"]
    assert report.batches == 3
    assert {name: report.nodes[name] for name in ("Conv", "Gemm")} == {"Conv": 2, "Gemm": 1}
    with pytest.raises(VerificationError, match=r"limit 1.000e-04. Calibrate on .* No file was written"):
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


# --- Structure ---


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_structure_is_that_without_spectral_norm(precision, files, folded):
    batches = [torch.randn(batch, *IMAGES) for batch in (1, 4)]
    report = verify(files[precision].path, folded[0], batches, structure=True)
    assert report.nodes == files[precision].nodes


def test_structure_refuses_what_the_stock_exporter_leaves(tmp_path):
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(128, 128)).eval()
    x = torch.randn(2, 128)
    plain_export(model, (x,), tmp_path / "stock.onnx")
    gm = transform(model)
    verify(tmp_path / "stock.onnx", gm, x)
    match = r"stock.onnx has other operators .* without spectral norm: 1 Div for 0, .*2 MatMul for 0"
    with pytest.raises(VerificationError, match=match):
        verify(tmp_path / "stock.onnx", gm, x, structure=True)


# --- What the file and the report say ---


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_metadata(precision, files, folded):
    report = files[precision]
    proto = onnx.load(report.path)
    props = {p.key.removeprefix("specnorm_fx."): p.value for p in proto.metadata_props if "specnorm" in p.key}
    sigmas = {fqn: sigma.item() for fqn, sigma in specnorm_fx.sigmas(folded[0]).items()}
    assert json.loads(props.pop("sigmas")) == sigmas
    assert props == {
        "version": __import__("importlib.metadata").metadata.version("specnorm-fx"),
        "opset": str(proto.opset_import[0].version),
        "precision": precision,
        "max_rel_error": f"{report.max_rel_error:.2e}",
        "source_checkpoint_sha256": "ab12",
    }
    if precision != "bf16":
        session = onnxruntime.InferenceSession(report.path)
        assert session.get_modelmeta().custom_metadata_map["specnorm_fx.precision"] == precision


def test_histogram_and_json(files, folded):
    batches = [torch.randn(batch, *IMAGES) for batch in (2, 5)]
    report = verify(files["fp16"].path, folded[0], batches)
    assert sum(report.histogram.values()) == (2 + 5) * 4
    assert list(report.histogram) == sorted(report.histogram, key=float)
    largest = float(list(report.histogram)[-1])
    assert largest <= report.max_rel_error < 10 * largest
    read = json.loads(report.to_json())
    assert read["histogram"] == report.histogram
    assert (read["path"], read["precision"]) == (str(files["fp16"].path), "fp16")
    same = verify(files["fp32"].path, freeze(folded[0]), torch.zeros(0, *IMAGES))
    assert same.histogram == {"0": 0}


def write_all(folder):
    """A file of each kind."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gm = transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32))).eval()
    x = torch.randn(2, *IMAGES)
    for precision, external_data in (("fp32", False), ("fp16", False), ("int8", True)):
        path = f"{folder}/{precision}{external_data}.onnx"
        calibration = [x] if precision == "int8" else None
        options = {"calibration": calibration, "external_data": external_data, "dynamic_batch": True}
        export(gm, x, path, precision=precision, **options)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    """In another process, with another hash seed and folder."""
    folders = [tmp_path / "a", tmp_path / "another"]
    for folder in folders:
        folder.mkdir()
    seed = str(1 + int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")))
    code = "import sys; from tests.test_onnx import write_all; write_all(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", code, folders[1]],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONWARNINGS": "ignore"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        write_all(folders[0])
        _, said = process.communicate()
    assert process.returncode == 0, said
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert len(first) == 4
    assert first == second
    assert not any(str(tmp_path).encode() in content for content in first.values())


# --- External data ---


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_external_data_on_request(precision, tmp_path):
    gm, x = transform(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    calibration = [x] if precision == "int8" else None
    options = {"precision": precision, "calibration": calibration}
    export(gm, x, tmp_path / "d.onnx", external_data=True, **options)
    data, graph = sorted(tmp_path.iterdir(), key=lambda file: file.suffix)
    assert graph.name == "d.onnx"
    stored = onnx.load(graph, load_external_data=False).graph.initializer
    (weight,) = (i for i in stored if i.name.startswith("weight") and len(i.dims) == 2)
    assert {e.key: e.value for e in weight.external_data}["location"] == data.name
    verify(graph, gm, x)
    data.unlink()
    with pytest.raises(VerificationError, match="not a valid ONNX model"):
        verify(graph, gm, x)


def test_large_weights_stand_in_a_file_of_their_own(tmp_path, monkeypatch):
    gm = transform(nn.Linear(64, 64)).eval()
    monkeypatch.setattr(specnorm_fx.onnx, "EXTERNAL_ABOVE", 64 * 64 * 4)
    with pytest.raises(
        ValueError, match=r"external_data must be None or True above .* GiB, got 0.0 GiB of weights"
    ):
        export(gm, torch.randn(2, 64), tmp_path / "d.onnx", external_data=False)
    export(gm, torch.randn(2, 64), tmp_path / "d.onnx")
    assert len(list(tmp_path.iterdir())) == 2


# --- Dimensions ---


class Crossed(nn.Module):
    """Several inputs, in a list too, and several outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)

    def forward(self, x, pair):
        return self.conv(x).mean(1), pair[0] * pair[1]


def crossed(length, rows, columns):
    return torch.randn(rows, 2, length), [torch.randn(rows, columns), torch.randn(columns)]


def test_named_dimensions(tmp_path):
    gm = transform(Crossed()).eval()
    axes = {"x": {0: "rows", 2: None}, "pair_0": {0: "rows", 1: "columns"}, "pair_1": {0: "columns"}}
    report = export(gm, crossed(9, 2, 3), tmp_path / "c.onnx", axes=axes, output_names=["score", "product"])
    graph = onnx.load(tmp_path / "c.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["x"][:2] == ["rows", 2]
    assert isinstance(shapes["x"][2], str)
    assert (shapes["pair_0"], shapes["pair_1"]) == (["rows", "columns"], ["columns"])
    assert shapes["product"] == ["rows", "columns"]
    batches = [crossed(9, 1, 3), crossed(33, 5, 2)]
    assert verify(tmp_path / "c.onnx", gm, batches, structure=True).nodes == report.nodes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"axes": {"y": {0: "n"}}}, r"axes must name inputs \(x\), got y"),
        ({"axes": {"x": {2: "n"}}}, r"axes\['x'\] must name dimensions from 0 to 1, got 2"),
        ({"axes": {"x": {0: "a b"}}}, r"axes\['x'\]\[0\] must be a Python identifier or None, got 'a b'"),
        (
            {"axes": {"x": {1: "n"}}},
            "Dynamic dimensions must be free in the model.*1 of 'x' is always 4 there",
        ),
        ({"axes": {}, "dynamic_shapes": ({},)}, "dynamic_batch and axes, or dynamic_shapes, not both"),
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16, int8, got 'fp8'"),
        ({"precision": "int8"}, "calibration must be given for precision='int8'"),
        (
            {"calibration": [torch.ones(2, 4)]},
            "calibration must be given for precision='int8', and for no other",
        ),
        ({"precision": "int8", "calibration": []}, "calibration must hold at least one batch"),
        (
            {"precision": "int8", "calibration": [(torch.ones(2, 4), torch.ones(2))]},
            r"calibration must hold batches like args \(x\), got 2 tensors in batch 0",
        ),
        (
            {"precision": "int8", "calibration": [torch.ones(2, 5)]},
            "calibration must hold batches of the shapes of args: ",
        ),
        ({"precision": "bf16", "opset_version": 20}, "opset_version must be at least 22 for bf16.*got 20"),
        ({"metadata": {"sigmas": "1"}}, "metadata must have other keys than the file's own, got sigmas"),
    ],
)
def test_export_refuses_options(options, match, tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x):
            return self.lin(x)

    with pytest.raises(ValueError, match=match):
        export(transform(Layer()).eval(), torch.randn(2, 4), tmp_path / "d.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_write(tmp_path):
    gm = transform(nn.Sequential(nn.Linear(4, 4), nn.AdaptiveMaxPool1d(3))).eval()
    match = r"Sequential cannot be written by the exporter of torch .*adaptive_max_pool"
    with pytest.raises(RuntimeError, match=match) as caught:
        export(gm, torch.randn(2, 4), tmp_path / "d.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


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
    truth = freeze(gm).double()(args[0].double(), args[1]).item()
    (got,) = onnxruntime.InferenceSession(path).run(None, {"x": args[0].numpy(), "label": args[1].numpy()})
    errors = abs(got.item() - truth), abs(gm(*args).item() - truth)
    # As relative to the score, eager fp32 fails by itself, and the file is about as exact as it is.
    assert errors[1] > LIMITS["fp32"] * abs(truth)
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


# --- verify fails where it must ---


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
        verify(path, copy.deepcopy(gm).train(), x)


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
    with pytest.raises(ValueError, match="dynamic_batch and axes, or dynamic_shapes, not both"):
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
