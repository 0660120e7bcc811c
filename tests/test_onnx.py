"""ONNX export: the nodes and names of the model without spectral norm, dimensions, and every refusal."""

import copy
import logging
import math
import os
import subprocess
import sys
import warnings
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from specnorm_fx import freeze, transform
from specnorm_fx.onnx import VerificationError, export, verify
from specnorm_fx.onnx.batches import dynamic_dimensions, in_order_of, random_batches, tensor_names
from specnorm_fx.onnx.exporting import OWN
from specnorm_fx.onnx.external_data import remove_older
from tests.models import MODELS, Discriminator, Labelled, Tied, case_named
from tests.onnx_files import operators, plain_export, trained


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


@ALL
def test_nodes_names_and_values(make, inputs, tmp_path):
    gm = trained(make, inputs)
    args = inputs()
    report = export(gm, args, tmp_path / "ours.onnx")
    ours = onnx.load(tmp_path / "ours.onnx")
    plain = plain_export(make(), args, tmp_path / "plain.onnx")

    assert operators(ours) == operators(plain)
    assert report.nodes == operators(ours)
    for side in ("input", "output"):
        assert [i.name for i in getattr(ours.graph, side)] == [i.name for i in getattr(plain.graph, side)]

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


def test_initializers_of_one_shape_have_their_own_names(tmp_path):
    class Turned(nn.Module):
        """Called in another order than it has them."""

        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.last(self.first(x))

    gm = transform(Turned()).eval()
    export(gm, torch.randn(2, 5, 6), tmp_path / "t.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "t.onnx").graph.initializer}
    for name, weight in freeze(gm).named_parameters():
        np.testing.assert_array_equal(stored[name], weight.detach().numpy().T)


def test_the_stock_exporter_leaves_sigma_in(tmp_path):
    """What this module is for: torch's own spectral norm above 8192 elements (see docs/design.md)."""
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(128, 128)).eval()
    stock = operators(plain_export(model, (torch.randn(2, 128),), tmp_path / "stock.onnx"))
    assert stock["Div"] == 1
    assert stock["MatMul"] == 2
    report = export(transform(model), torch.randn(2, 128), tmp_path / "ours.onnx")
    assert report.nodes == {"Gemm": 1}


def test_a_frozen_model_exports_too_and_the_model_is_left_as_it_is(tmp_path):
    gm = transform(Tied()).eval()
    code, state = gm.code, {key: value.clone() for key, value in gm.state_dict().items()}
    export(freeze(gm), torch.randn(2, 6), tmp_path / "f.onnx")
    export(torch.compile(gm, backend="eager"), torch.randn(2, 6), tmp_path / "g.onnx")
    assert gm.code == code
    assert all(torch.equal(value, state[key]) for key, value in gm.state_dict().items())
    verify(tmp_path / "f.onnx", gm, torch.randn(2, 6))
    verify(tmp_path / "g.onnx", freeze(gm), torch.randn(2, 6))
    keys = {prop.key.removeprefix("specnorm_fx.") for prop in onnx.load(tmp_path / "f.onnx").metadata_props}
    assert keys == {*OWN} - {"folded", "sigmas"}  # of which there are none


def test_in_fp16_a_frozen_model_is_left_as_it_is(tmp_path):
    frozen = freeze(transform(Tied()).eval())
    code = frozen.code
    export(frozen, torch.randn(2, 6), tmp_path / "f.onnx", precision="fp16")
    assert frozen.code == code
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.float32}


def test_labels_are_drawn_from_the_example(tmp_path, capfd):
    """An index outside the embedding would fail in both runtimes."""
    gm = transform(Labelled(), "*").eval()
    export(gm, (torch.randn(2, 1, 6, 6), torch.tensor([9, 3])), tmp_path / "l.onnx", n_batches=10)
    with pytest.raises(VerificationError, match=r"ONNX Runtime cannot run .*l\.onnx"):
        verify(tmp_path / "l.onnx", gm, (torch.randn(2, 1, 6, 6), torch.tensor([99, 3])))
    assert capfd.readouterr().err == ""  # the error says what ONNX Runtime would log


def write_all(folder):
    """A file of each kind."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gm = transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32))).eval()
    x = torch.randn(2, 3, 8, 8)
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


# --- Dimensions ---


def test_dynamic_batch(tmp_path):
    gm = trained(Labelled, partial(case_named("labelled").inputs, 2))
    export(gm, case_named("labelled").inputs(2), tmp_path / "d.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    assert [i.shape[0] for i in session.get_inputs()] == ["batch", "batch"]
    for batch in (1, 2, 7):
        args = case_named("labelled").inputs(batch)
        (got,) = session.run(None, dict(zip(("x", "label"), (a.numpy() for a in args), strict=True)))
        torch.testing.assert_close(torch.from_numpy(got), gm(*args).detach(), rtol=2e-5, atol=2e-6)


def test_random_batches():
    args, free = (torch.randn(2, 4), torch.tensor([9, 3])), [{0: "batch", 1: None}, {0: "batch"}]
    batches = random_batches(args, free, 6)
    assert [x.shape for x, _ in batches] == [(n, 3 + n) for n in range(1, 7)]
    assert [len(labels) for _, labels in batches] == list(range(1, 7))
    assert {*torch.cat([labels for _, labels in batches]).tolist()} == {3, 9}
    assert len({x[0, 0].item() for x, _ in batches}) == 6
    torch.testing.assert_close(random_batches(args, free, 6), batches, rtol=0, atol=0)


def test_random_batches_keep_sizes_without_names_together():
    """Which may have to be the same."""
    args, free = (torch.randn(2, 4), torch.randn(4, 2)), [{0: None, 1: None}] * 2
    shapes = [[x.shape for x in batch] for batch in random_batches(args, free, 3)]
    assert shapes == [[(n, n)] * 2 for n in (1, 2, 3)]


def test_equal_matrices_keep_their_own_names(tmp_path):
    """Each stored transposed for MatMul. And what the exporter has to say is as loud as before."""
    layers = nn.Sequential(nn.Linear(96, 96, bias=False), nn.ReLU(), nn.Linear(96, 96, bias=False))
    gm = transform(layers).eval()
    for name in ("weight", "weight_u", "weight_v"):
        getattr(gm.get_submodule("2"), name).data.copy_(getattr(gm.get_submodule("0"), name))
    talker = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = talker.level
    warnings.simplefilter("error")  # those that pytest is told to ignore, too
    export(gm, torch.randn(1, 2, 96), tmp_path / "d.onnx")
    assert talker.level == before
    stored = onnx.load(tmp_path / "d.onnx").graph.initializer
    assert {tensor.name for tensor in stored if len(tensor.dims) == 2} == {"0.weight", "2.weight"}


class Alike(nn.Module):
    """A weight and a bias that are used, and equal ones that are not."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(self.used(x).unsqueeze(1)) * torch.arange(6.0)


@pytest.mark.parametrize("fill", [nn.init.eye_, nn.init.normal_])
def test_names_are_those_of_what_is_used(fill, tmp_path):
    frozen = freeze(transform(Alike()).eval())
    with torch.no_grad():
        fill(frozen.used.weight)
        frozen.unused.weight.copy_(frozen.used.weight.T)
        frozen.unused.bias.copy_(torch.arange(6))
    export(frozen, torch.randn(2, 6), tmp_path / "a.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "a.onnx").graph.initializer}
    for name, parameter in frozen.used.named_parameters():
        np.testing.assert_array_equal(stored[f"used.{name}"], parameter.detach().numpy())
    assert not [name for name in stored if name.startswith("unused")]


def test_axes_come_before_dynamic_batch():
    args, axes = (torch.randn(2, 4), torch.tensor(1.0), torch.randn(2)), {"x": {0: "rows", 1: None}}
    free = dynamic_dimensions(args, ["x", "scale", "y"], axes, dynamic_batch=True)
    assert free == [{0: "rows", 1: None}, {}, {0: "batch"}]


Pair = namedtuple("Pair", ["first", "second"])


def test_names_of_inputs():
    class Several(nn.Module):
        def forward(self, x, *others):
            return x

    x = torch.ones(1)
    names = tensor_names(Several(), ({"a": x, "b": [x, 3, x]}, Pair(x, x), x, x), ["given"])
    assert names == ["given", "x_b_0", "x_b_2", "others_first", "others_second", "args_2", "args_3"]


def test_a_batch_in_the_order_of_the_example():
    example = {"a": 1, "b": [{"x": 2, "y": 3}], "pair": Pair(*torch.ones(2)), "list": [{"x": 1, "y": 2}] * 2}
    batch = OrderedDict(
        list=[{"y": 2, "x": 1}], more=4, pair=Pair(*torch.ones(2)), b=({"y": 3, "x": 2},), a=1
    )
    ordered = in_order_of(example, batch)
    assert [*ordered] == ["a", "b", "pair", "list", "more"]
    assert [*ordered["b"][0]] == ["x", "y"]
    assert type(ordered) is OrderedDict
    assert ordered == OrderedDict((key, batch[key]) for key in ordered)
    assert ordered["list"] is batch["list"]  # of another length
    assert [*batch] == ["list", "more", "pair", "b", "a"]


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


def test_two_names_of_one_size(tmp_path):
    """The first stands for both."""
    axes = {"x": {0: "rows"}, "y": {0: "others"}}
    export(transform(Two()).eval(), (torch.randn(2, 4),) * 2, tmp_path / "t.onnx", axes=axes)
    graph = onnx.load(tmp_path / "t.onnx").graph
    names = [value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)]
    assert names == ["rows"] * 3


def test_outputs_that_are_an_input_or_a_parameter(tmp_path):
    """Of feature maps the first is often the input."""

    class Maps(nn.Linear):
        def forward(self, x):
            return super().forward(x), x, self.bias

    gm = transform(nn.Sequential(Maps(4, 3))).eval()
    export(gm, torch.randn(2, 4), tmp_path / "d.onnx", dynamic_batch=True)
    graph = onnx.load(tmp_path / "d.onnx").graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output][1:] == ["input_output", "0.bias"]
    assert {"0.weight", "0.bias"} <= {initializer.name for initializer in graph.initializer}


def test_named_dimensions_beside_numbers(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x, scale, y):
            return scale * self.lin(x).relu() + self.lin(y["of"]), torch.cat([x, x])

    gm = transform(Scaled()).eval()
    args = (torch.randn(2, 4), 2.0, {"of": torch.randn(2, 4), "by": 3})
    export(gm, args, tmp_path / "s.onnx", axes={"x": {0: "rows"}, "y_of": {0: "rows"}})
    graph = onnx.load(tmp_path / "s.onnx").graph
    names = [value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)]
    assert names == ["rows", "rows", "rows", "2*rows"]


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


def test_of_older_weights_those_of_the_same_graph_are_removed(tmp_path):
    older, current = (f"d[1].onnx.{digit * 16}.data" for digit in "0a")
    others = ["d[1].onnx.notes.data", f"d1.onnx.{'0' * 16}.data", f"d[1].onnx.{'0' * 16}"]
    for name in (older, current, *others):
        (tmp_path / name).touch()
    remove_older(tmp_path / "d[1].onnx", current)
    assert {file.name for file in tmp_path.iterdir()} == {current, *others}
    remove_older(tmp_path / "d[1].onnx", None)  # a graph with its weights in itself
    assert {file.name for file in tmp_path.iterdir()} == {*others}


def test_large_weights_stand_in_a_file_of_their_own(tmp_path, monkeypatch):
    gm = transform(nn.Linear(64, 64)).eval()
    monkeypatch.setattr("specnorm_fx.onnx.external_data.EXTERNAL_ABOVE", 64 * 64 * 4)
    with pytest.raises(
        ValueError, match=r"external_data must be None or True above .* GiB, got 0.0 GiB of weights"
    ):
        export(gm, torch.randn(2, 64), tmp_path / "d.onnx", external_data=False)
    for _ in range(2):
        nn.init.normal_(gm.weight)
        export(gm, torch.randn(2, 64), tmp_path / "d.onnx")
        assert len(list(tmp_path.iterdir())) == 2  # the older weights are gone


# --- export refuses ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"axes": {"y": {0: "n"}}}, r"axes must name inputs \(x\), got y"),
        ({"axes": {"x": {2: "n"}}}, r"axes\['x'\] must name dimensions from 0 to 1, got 2"),
        ({"axes": {"x": {-1: "n"}}}, r"axes\['x'\] must name dimensions from 0 to 1, got -1"),
        ({"axes": {"x": {0: "a b"}}}, r"axes\['x'\]\[0\] must be a Python identifier or None, got 'a b'"),
        ({"axes": {"x": {0: torch.export.Dim("n")}}}, r"must be a Python identifier or None, got .*Dim"),
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
            {"precision": "int8", "calibration": [torch.ones(2, 4), (torch.ones(2, 4), torch.ones(2))]},
            r"calibration must hold batches like args \(x\), got 2 tensors in batch 1",
        ),
        (
            {"precision": "int8", "calibration": [torch.ones(2, 5)]},
            "calibration must hold finite batches of the shapes of args: ",
        ),
        pytest.param(
            {"precision": "int8", "calibration": [torch.full((2, 4), math.nan)]},
            "calibration must hold finite batches of the shapes of args: ",
            marks=pytest.mark.filterwarnings("ignore:All-NaN"),  # numpy's
        ),
        ({"precision": "bf16", "opset_version": 20}, "opset_version must be at least 22 for bf16.*got 20"),
        ({"metadata": {"sigmas": "1"}}, "metadata must have other keys than the file's own, got sigmas"),
        ({"metadata": {"epoch": 3}}, "metadata must be text, got another type under epoch"),
        ({"axes": {"x": [0]}}, r"axes\['x'\] must be a mapping such as \{0: 'batch'\}, got \[0\]"),
        ({"n_batches": 0}, "n_batches must be at least 1, got 0"),
        ({"rtol": math.nan}, "rtol must be 0 or larger, got nan"),
        ({"input_names": "x"}, "input_names must be a list of names, got 'x'"),
        ({"output_names": "score"}, "output_names must be a list of names, got 'score'"),
        ({"output_names": ["a", "b"]}, "output_names must name 1 outputs at most, got a, b"),
        ({"output_names": ["x"]}, "must be none of the names in the graph, got x"),
        ({"input_names": ["lin.weight"]}, "must be none of the names in the graph, got lin.weight"),
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


@pytest.mark.parametrize(
    ("layer", "dynamic_shapes", "why"),
    [
        (nn.AdaptiveMaxPool1d(3), None, "adaptive_max_pool"),
        (nn.ReLU(), ({0: torch.export.Dim("n", min=5)},), r"2 not in range \[5"),
    ],
    ids=["operator", "dimension"],
)
def test_what_the_exporter_cannot_write(layer, dynamic_shapes, why, tmp_path):
    gm = transform(nn.Sequential(nn.Linear(4, 4), layer)).eval()
    match = f"Sequential cannot be written by the exporter of torch .*{why}"
    with pytest.raises(RuntimeError, match=match) as caught:
        export(gm, torch.randn(2, 4), tmp_path / "d.onnx", dynamic_shapes=dynamic_shapes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_export_leaves_nothing_behind_when_verification_fails(tmp_path):
    gm = transform(Discriminator()).eval()
    (tmp_path / "d.onnx").write_bytes(b"an older file")
    match = rf"^{tmp_path}/d.onnx disagrees.*limit 0.000e\+00. No file was written."
    with pytest.raises(VerificationError, match=match):
        export(gm, torch.randn(2, 3, 8, 8), tmp_path / "d.onnx", rtol=0.0)
    assert (tmp_path / "d.onnx").read_bytes() == b"an older file"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"opset_version": 18}, "Leave opset_version out: the exporter can have"),
        ({"precision": "fp16"}, "If the forward makes fp32 tensors of its own"),
    ],
    ids=["opset", "fp16"],
)
def test_a_failed_verification_says_what_may_help(options, remedy, tmp_path):
    gm = transform(Discriminator()).eval()
    with pytest.raises(VerificationError, match=f"limit 0.000e.00. {remedy}.* No file was written"):
        export(gm, torch.randn(2, 3, 8, 8), tmp_path / "d.onnx", rtol=0.0, **options)


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
def test_export_refuses_an_opset_it_cannot_write(opset, tmp_path, capfd, caplog):
    gm = transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU())).eval()
    with pytest.raises(ValueError, match=f"opset_version={opset} cannot be had.*writes opset"):
        export(gm, torch.randn(2, 3, 8, 8), tmp_path / "d.onnx", opset_version=opset)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    gm, x, path = transform(nn.Linear(4, 3)).eval(), torch.randn(2, 4), tmp_path / "d.onnx"
    export(gm, x, path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call in (lambda: export(gm, x, path), lambda: verify(path, gm, x)):
        with pytest.raises(
            ImportError, match=r"specnorm_fx.onnx needs onnxruntime: pip install 'specnorm-fx\[onnx\]'"
        ):
            call()


# --- What is given as arguments ---


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.lin(inputs["a"]) + self.lin(inputs["b"])


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_dict_alone(tmp_path, dynamic_batch):
    gm = transform(OfDict()).eval()
    batch = ({"a": torch.randn(2, 4), "b": torch.randn(2, 4)},)
    export(gm, batch, tmp_path / "d.onnx", dynamic_batch=dynamic_batch)
    names = [i.name for i in onnxruntime.InferenceSession(tmp_path / "d.onnx").get_inputs()]
    assert names == ["inputs_a", "inputs_b"]


class OfKeys(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.lin(inputs["A.b"]) - 2 * self.lin(inputs["a"])


class OfNested(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.lin(inputs["a_b"]) - 2 * self.lin(inputs["a"]["b"])


def test_keys_that_make_one_name(tmp_path):
    """Two inputs have names of the exporter's then."""
    gm = transform(OfNested()).eval()
    batch = ({"a_b": torch.randn(2, 4), "a": {"b": torch.randn(2, 4)}},)
    export(gm, batch, tmp_path / "n.onnx")
    verify(tmp_path / "n.onnx", gm, batch)


def test_dicts_with_their_keys_in_another_order(tmp_path):
    gm = transform(OfKeys()).eval()
    a, b = torch.randn(2, 4), 100 * torch.randn(4)
    export(gm, ({"A.b": a, "a": b},), tmp_path / "d.onnx", axes={"inputs_A.b": {0: "rows"}})
    for model in (gm, torch.optim.swa_utils.AveragedModel(gm)):
        verify(tmp_path / "d.onnx", model.eval(), ({"a": b, "A.b": a[:1]},), structure=True)


@pytest.mark.parametrize("input_names", [None, ["first", "second"]])
def test_calibration_in_dicts_with_their_keys_in_another_order(tmp_path, input_names):
    gm = transform(OfKeys()).eval()
    example = {"A.b": torch.randn(2, 4), "a": 100 * torch.randn(2, 4)}
    turned = {"a": example["a"], "more": 3, "A.b": example["A.b"]}
    export(
        gm,
        (example,),
        tmp_path / "d.onnx",
        precision="int8",
        calibration=[(turned,)],
        input_names=input_names,
    )


def test_inputs_without_keys_are_in_order(tmp_path):
    Pair = namedtuple("Pair", "x y")
    gm, x = transform(Two()).eval(), torch.randn(2, 4)
    export(gm, Pair(x, 2 * x), tmp_path / "p.onnx")
    verify(tmp_path / "p.onnx", gm, Pair(x, x))
    with pytest.raises(VerificationError, match=r"takes 2 inputs \(x, y\), and the batch has 0"):
        verify(tmp_path / "p.onnx", gm, ({},))


def test_one_tensor_twice(tmp_path):
    gm = transform(Two()).eval()
    x = torch.randn(2, 4)
    export(gm, (x, x), tmp_path / "t.onnx")
    verify(tmp_path / "t.onnx", gm, (x, x + 1))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.lin(x) - 2 * self.lin(y)


def test_dynamic_shapes_left_to_the_exporter(tmp_path):
    gm, x = transform(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    export(gm, x, tmp_path / "d.onnx", dynamic_shapes=({0: torch.export.Dim.AUTO},))
    verify(tmp_path / "d.onnx", gm, torch.randn(7, 4))


def test_dynamic_shapes_that_the_model_fixes(tmp_path):
    class Fixed(Two):
        def forward(self, x):
            return self.lin(x) + torch.ones(4, 1)

    gm = transform(Fixed()).eval()
    with pytest.raises(ValueError, match="of the 1 in dynamic_shapes 1 have one size"):
        export(gm, torch.randn(4, 4), tmp_path / "f.onnx", dynamic_shapes={"x": {0: torch.export.Dim("b")}})
    with pytest.raises(ValueError, match="input_names must name 1 inputs at most, got a, b"):
        export(gm, torch.randn(4, 4), tmp_path / "f.onnx", input_names=["a", "b"])
    assert list(tmp_path.iterdir()) == []


def test_threads_export_one_after_the_other(tmp_path):
    before = logging.getLogger("onnxscript.version_converter").level
    gm = transform(Two()).eval()
    x = torch.randn(2, 4)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(export, copy.deepcopy(gm), (x, x), tmp_path / f"{i}.onnx") for i in range(3)]
        assert all(job.result().batches == 3 for job in jobs)
    assert logging.getLogger("onnxscript.version_converter").level == before


@pytest.mark.parametrize("before", [False, True])
def test_forward_hooks_of_the_model_are_no_part_of_the_file(before, tmp_path):
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    if before:
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1000,))
    else:
        model.register_forward_hook(lambda module, inputs, output: output + 1000)
    with pytest.raises(ValueError, match="has forward hooks, which torch's exporter leaves out"):
        export(transform(model).eval(), x, tmp_path / "h.onnx")
    export(transform(model, example_inputs=x).eval(), x, tmp_path / "h.onnx")
