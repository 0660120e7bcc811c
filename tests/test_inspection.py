"""`inspect_model`, `inspect_checkpoint` and `inspect_onnx`, and what they are shown as."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import spectral_norm as hook_sn
from torch.nn.utils.parametrizations import spectral_norm as torch_sn

import specnorm_fx
from specnorm_fx import transform, warm_up_
from specnorm_fx.inspection import Inspection, Row, inspect_checkpoint, inspect_model, inspect_onnx
from specnorm_fx.onnx import weights_of
from tests.models import LAYERS, Discriminator, Labelled, Tied, apply_torch_sn, case_named, parametrize


def by_name(inspection):
    return {row.fqn: row for row in inspection.rows}


def exact_of(weight, dim=0):
    matrix = specnorm_fx.reference.weight_matrix(weight.detach(), dim)
    return torch.linalg.svdvals(matrix.double())


# --- Models ---


@parametrize(LAYERS)
def test_every_kind_of_layer(case):
    gm = transform(case.build())
    warm_up_(gm, tol=1e-9)
    (row,) = inspect_model(gm).rows
    values = exact_of(gm.weight, gm.sites()[0].config.dim)
    assert (row.fqn, row.shape, row.dtype, row.status) == (
        "weight",
        tuple(gm.weight.shape),
        "float32",
        "normalised",
    )
    assert row.exact == pytest.approx(values[0].item(), rel=1e-5)
    assert row.sigma == pytest.approx(row.exact, rel=1e-4)
    assert row.spectrum == pytest.approx(values.tolist(), rel=1e-3, abs=1e-5)
    assert row.condition == pytest.approx((values[0] / values[-1]).item(), rel=1e-3)
    assert row.why == ""


def test_what_is_normalised_would_be_or_is_skipped():
    state = torch.get_rng_state()
    model = Discriminator()
    plain = by_name(inspect_model(model))
    torch.set_rng_state(state)
    assert {row.status for name, row in plain.items() if name != "unused.weight"} == {"to be normalised"}
    assert all(row.sigma is None and row.residual is None for row in plain.values())
    assert (plain["unused.weight"].status, plain["unused.weight"].why) == (
        "skipped",
        "not used in the forward",
    )
    assert not any(isinstance(m, specnorm_fx.graph_module.SpectralNormGraphModule) for m in model.modules())

    ours = by_name(inspect_model(transform(Discriminator(), "fc")))
    assert ours["fc.weight"].status == "normalised"
    assert ours["blocks.0.conv1.weight"].why == "not selected"

    theirs = apply_torch_sn(Discriminator(), ("fc.weight",), torch_sn)
    found = by_name(inspect_model(theirs))["fc.weight"]
    u, v = theirs.fc.parametrizations.weight[0]._u, theirs.fc.parametrizations.weight[0]._v
    assert found.sigma == pytest.approx((u @ theirs.fc.parametrizations.weight.original @ v).item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_weight_that_a_layer_computes():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = nn.Sequential(nn.Linear(2, 3), normed, nn.utils.weight_norm(nn.ConvTranspose2d(4, 5, 2)))
    for given in (model[:2], transform(model, "0")):
        row = by_name(inspect_model(given))["1.weight"]
        assert (row.status, row.why[:30]) == ("skipped", "computed from other parameters")
        assert row.exact == pytest.approx(torch.linalg.matrix_norm(normed.weight, 2).item(), rel=1e-5)
    row = by_name(inspect_model(transform(model, "0")))["2.weight"]
    weight_mat = model[2].weight.transpose(0, 1).flatten(1)
    assert row.exact == pytest.approx(torch.linalg.matrix_norm(weight_mat, 2).item(), rel=1e-5)


def test_inspecting_draws_no_random_numbers():
    model, state = nn.Linear(3, 2), torch.get_rng_state()
    inspect_model(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_out_of_the_ordinary():
    gm = transform(nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)]))
    nn.init.normal_(gm.get_submodule("0").weight, std=9)
    gm.get_submodule("1").weight.data[0, 0] = torch.nan
    gm.get_submodule("2").weight_u[0] = torch.inf
    gm.get_submodule("3").weight.data.zero_()
    gm.get_submodule("4").weight.data[1:] = 0
    rows = by_name(inspect_model(gm))
    assert "not of this weight" in rows["0.weight"].why
    assert rows["0.weight"].residual > 0.5
    assert rows["1.weight"].why == "NaN or inf in the weight"
    assert rows["1.weight"].exact is None
    assert "NaN or inf in u or v" in rows["2.weight"].why
    assert rows["2.weight"].sigma is None
    assert (rows["3.weight"].sigma, rows["3.weight"].exact, rows["3.weight"].condition) == (0, 0, None)
    assert rows["4.weight"].condition is None  # of rank 1
    assert json.loads(inspect_model(gm).to_json())["weights"][1]["exact"] is None


def test_nan_and_meta_are_shown_in_a_model_that_transform_refuses():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"), nn.Linear(3, 2))
    model[0].weight.data[0, 0] = torch.nan
    rows = by_name(inspect_model(model))
    assert rows["0.weight"].why == "NaN or inf in the weight"
    assert "on the meta device" in rows["1.weight"].why
    assert {row.status for row in rows.values()} == {"to be normalised"}
    assert rows["2.weight"].exact == pytest.approx(exact_of(model[2].weight)[0].item(), rel=1e-6)
    assert model[0].weight.isnan().any()
    assert model[1].weight.is_meta


def test_a_tied_weight_with_nan_is_shown_once():
    model = Tied()
    model.encoder.weight.data[0, 0] = torch.nan
    assert [row.fqn for row in inspect_model(model).rows] == ["encoder.weight"]


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_singular_values_are_those_of_float64(shape, dtype):
    """And the rank is seen in fp32, in which the product with itself would have lost it."""
    layer = nn.Linear(*shape, bias=False, dtype=dtype)
    (row,) = inspect_model(layer).rows
    exact = torch.linalg.svdvals(layer.weight.detach().to(torch.complex128))
    assert row.spectrum == pytest.approx(exact.tolist(), rel=1e-12)
    left, right = (torch.linalg.qr(torch.randn(size, 6, dtype=torch.float64))[0] for size in shape)
    for smallest, condition in ((2e-5, 5e4), (1e-9, None)):
        values = torch.tensor([1, 1, 1, 1, 1, smallest], dtype=torch.float64)
        layer.weight.data = (right * values @ left.T).to(dtype)
        (row,) = inspect_model(layer).rows
        assert row.condition == (None if condition is None else pytest.approx(condition, rel=1e-2))
        assert ("singular" in str(inspect_model(layer))) == (condition is None)


def test_large_weights_by_power_iteration(monkeypatch):
    monkeypatch.setattr(specnorm_fx.inspection, "SPECTRUM_SIZE", 4)
    layer = nn.Linear(8, 6, bias=False)
    (row,) = inspect_model(layer).rows
    assert row.exact == pytest.approx(exact_of(layer.weight)[0].item(), rel=1e-4)
    assert (row.spectrum, row.condition) == ((), None)
    assert "by power iteration" in row.why
    # What can be mended is said first.
    gm = transform(layer)
    gm.weight_u.fill_(math.nan)
    (row,) = inspect_model(gm).rows
    assert row.why.startswith("NaN or inf in u or v")


# --- Checkpoints ---


@pytest.mark.parametrize("layout", ["specnorm_fx", "parametrizations", "hook", "oldest"])
def test_checkpoints_of_every_layout(tmp_path, layout):
    names = ("conv.weight", "fc.weight")
    if layout == "specnorm_fx":
        model = transform(Labelled())
    else:
        model = apply_torch_sn(Labelled(), names, torch_sn if layout == "parametrizations" else hook_sn)
    state = model.state_dict()
    if layout == "oldest":
        state = {key: x for key, x in state.items() if not key.endswith("_v")}
    torch.save(state, tmp_path / "c.pt")
    rows = by_name(inspect_checkpoint(tmp_path / "c.pt"))
    assert {name: row.status for name, row in rows.items()} == {
        "conv.weight": "normalised",
        "fc.weight": "normalised",
        "embed.weight": "plain",
    }
    for name in names:
        assert (rows[name].sigma is None) == (layout == "oldest")
        assert rows[name].exact > 0


def test_a_checkpoint_says_the_output_dimension_by_u(tmp_path):
    gm = transform(case_named("conv_transpose2d").build())
    torch.save(gm.state_dict(), tmp_path / "c.pt")
    (row,) = inspect_checkpoint(tmp_path / "c.pt").rows
    assert row.exact == pytest.approx(exact_of(gm.weight, 1)[0].item(), rel=1e-5)
    assert row.sigma == pytest.approx(row.exact, rel=0.2)


@pytest.mark.parametrize("layout", ["parametrizations", "oldest"])
def test_the_output_dimension_of_a_transposed_convolution(tmp_path, layout):
    """Of two equal sizes the wrong one gives next to nothing; without v there is the length of u."""
    channels = 8 if layout == "parametrizations" else 4
    model = (torch_sn if layout == "parametrizations" else hook_sn)(nn.ConvTranspose2d(channels, 8, 3))
    state = model.state_dict()
    if layout == "oldest":
        del state["weight_v"]
    torch.save(state, tmp_path / "c.pt")
    (row,) = inspect_checkpoint(tmp_path / "c.pt").rows
    stored = next(x for x in state.values() if x.ndim == 4)
    assert row.exact == pytest.approx(exact_of(stored, 1)[0].item(), rel=1e-6)
    if layout == "parametrizations":
        assert row.sigma == pytest.approx(row.exact, rel=0.05)
    assert row.why == ""


STRANGE_VECTORS = {
    "too_long": torch.ones(5),
    "matrix": torch.ones(2, 1),
    "integers": torch.ones(2, dtype=torch.int64),
    "no_tensor": 3,
    "sparse": torch.ones(2).to_sparse(),
}


@pytest.mark.parametrize("u", STRANGE_VECTORS.values(), ids=STRANGE_VECTORS)
def test_u_and_v_that_do_not_fit(tmp_path, u):
    state = transform(nn.Linear(3, 2)).state_dict()
    torch.save(state | {"weight_u": u}, tmp_path / "c.pt")
    (row,) = inspect_checkpoint(tmp_path / "c.pt").rows
    assert "do not fit" in row.why
    assert row.sigma is None


def test_nan_in_u_leaves_no_error_bar(tmp_path):
    state = transform(nn.Linear(3, 2)).state_dict()
    torch.save(state | {"weight_u": torch.full((2,), torch.nan)}, tmp_path / "c.pt")
    (row,) = inspect_checkpoint(tmp_path / "c.pt").rows
    assert (row.sigma, row.residual) == (None, None)
    assert "NaN or inf in u or v" in row.why


WITHOUT_VALUES = {
    "float8": lambda: torch.ones(3, 3).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.ones(3, 3, device="meta"),
}


@pytest.mark.parametrize("kind", WITHOUT_VALUES)
def test_tensors_without_singular_values_are_shown(tmp_path, kind):
    torch.save({"a": WITHOUT_VALUES[kind](), "b": torch.eye(3)}, tmp_path / "c.pt")
    rows = by_name(inspect_checkpoint(tmp_path / "c.pt"))
    assert "no singular values" in rows["a"].why
    assert (rows["a"].exact, rows["b"].exact) == (None, 1)


# --- ONNX files ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ConvTranspose2d(4, 5, 3),
        nn.Flatten(2),
        nn.Linear(64, 6),
        nn.Flatten(),
        nn.Linear(30, 2),
    )
    gm = transform(model)
    warm_up_(gm, tol=1e-9)
    path = tmp_path_factory.mktemp("inspection") / "d.onnx"
    specnorm_fx.onnx.export(gm.eval(), torch.randn(2, 3, 8, 8), path)
    return gm, path


def test_weights_of_an_onnx_file(exported):
    gm, path = exported
    found, _ = weights_of(path)
    frozen = specnorm_fx.frozen_state_dict(gm)
    assert {w.name for w in found} == {site.fqn for site in gm.sites()}
    for weight in found:
        want = specnorm_fx.reference.weight_matrix(frozen[weight.name], 1 if weight.name == "1.weight" else 0)
        got = specnorm_fx.reference.weight_matrix(weight.values, weight.dim)
        assert torch.linalg.svdvals(got).tolist() == pytest.approx(
            torch.linalg.svdvals(want).tolist(), rel=1e-4
        )


def test_a_divided_weight_has_sigma_1(exported):
    gm, path = exported
    inspection = inspect_onnx(path)
    sigmas = specnorm_fx.sigmas(gm)
    for row in inspection.rows:
        assert row.exact == pytest.approx(1, abs=1e-4)
        assert (row.status, row.why) == ("divided", "")
        assert row.sigma == pytest.approx(sigmas[row.fqn].item(), rel=1e-5)
    assert "specnorm_fx.version" in inspection.notes


def test_a_divided_weight_whose_sigma_is_not_1_is_pointed_out(exported, tmp_path):
    file = onnx.load(exported[1])
    (stored,) = (i for i in file.graph.initializer if i.name == "0.weight")
    stored.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(stored), stored.name))
    onnx.save(file, tmp_path / "d.onnx")
    why = {row.fqn: row.why for row in inspect_onnx(tmp_path / "d.onnx").rows if row.why}
    assert why == {"0.weight": "divided by sigma, and its largest singular value is 2"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_weight_that_took_in_a_batch_norm(tmp_path, precision):
    gm = transform(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)))
    warm_up_(gm)
    nn.init.constant_(gm.get_parameter("1.weight"), 3.0)
    x = torch.randn(2, 3, 8, 8)
    calibration = [x] if precision == "int8" else None
    specnorm_fx.onnx.export(gm.eval(), x, tmp_path / "d.onnx", precision=precision, calibration=calibration)
    first, second = inspect_onnx(tmp_path / "d.onnx").rows
    assert first.exact == pytest.approx(3, rel=0.05)
    assert first.why == "divided by sigma, then multiplied with the scales of a batch norm"
    assert (first.status, second.status, second.why) == ("divided", "divided", "")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_weights_of_every_precision(exported, tmp_path, precision):
    gm, _ = exported
    x = torch.randn(2, 3, 8, 8)
    calibration = [x] if precision == "int8" else None
    specnorm_fx.onnx.export(
        gm, x, tmp_path / "d.onnx", precision=precision, calibration=calibration, n_batches=1
    )
    inspection = inspect_onnx(tmp_path / "d.onnx")
    assert {row.fqn for row in inspection.rows} == {site.fqn for site in gm.sites()}
    for row in inspection.rows:
        # The Frobenius norm of the rounding: 2^-9 of each element, or 1/128 of its channel's largest.
        rounding = (
            2**-9 * math.hypot(*row.spectrum) if precision == "bf16" else math.prod(row.shape) ** 0.5 / 128
        )
        assert row.exact == pytest.approx(1, abs=rounding)
        assert row.status == "divided"


@pytest.mark.parametrize(
    "sigmas",
    ["[1]", "no json", '{"a": "1"}', '{"a": NaN}', f'{{"a": 1{"0" * 400}}}', '{"a": ' * 100_000],
    ids=["list", "text", "string", "nan", "huge", "nested"],
)
def test_metadata_that_is_none_of_ours(exported, tmp_path, sigmas):
    file = onnx.load(exported[1])
    (entry,) = (entry for entry in file.metadata_props if entry.key == "specnorm_fx.sigmas")
    entry.value = sigmas
    onnx.save(file, tmp_path / "d.onnx")
    with pytest.raises(ValueError, match="must be a JSON object of numbers"):
        inspect_onnx(tmp_path / "d.onnx")
    entry.key = "specnorm_fx.folded"
    onnx.save(file, tmp_path / "d.onnx")
    if sigmas != "[1]":
        with pytest.raises(ValueError, match="must be a JSON list of names"):
            inspect_onnx(tmp_path / "d.onnx")


@pytest.mark.parametrize("content", [b"", b"no onnx", b"\x08\x07"], ids=["empty", "text", "no_graph"])
def test_no_onnx_file(tmp_path, content):
    (tmp_path / "d.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no ONNX file"):
        inspect_onnx(tmp_path / "d.onnx")
    with pytest.raises(FileNotFoundError, match=r"There is no ONNX file .*none\.onnx"):
        inspect_onnx(tmp_path / "none.onnx")


def test_what_a_hostile_checkpoint_may_hold(tmp_path):
    """A weight without dimensions; and one element that claims to be 10^14."""
    state = {"a.weight": torch.tensor(1.0), "a.weight_u": torch.ones(1), "a.weight_v": torch.ones(1)}
    state["b"] = torch.ones(1, 1).expand(10**7, 10**7)
    state["c"] = torch.ones(0, 3)
    torch.save(state, tmp_path / "c.pt")
    rows = inspect_checkpoint(tmp_path / "c.pt").rows
    assert {row.fqn: row.why for row in rows} == {
        "a.weight": "u and v do not fit its shape",
        "b": "more elements than there are stored",
        "c": "empty",
    }
    assert all(row.exact is None for row in rows)


def dequantized(path, scale, zero=None, **attributes):
    """A file with one int8 weight, [2, 4], all 3."""
    helper, numpy = onnx.helper, onnx.numpy_helper
    initializers = [
        numpy.from_array(np.full((2, 4), 3, np.int8), "w_quantized"),
        numpy.from_array(scale.astype(np.float32), "w_scale"),
    ]
    if zero is not None:
        initializers.append(numpy.from_array(zero.astype(np.int8), "w_zero"))
    stored = [initializer.name for initializer in initializers]
    nodes = [
        helper.make_node("DequantizeLinear", stored, ["w"], **attributes),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializers)), path)


def test_int8_with_a_scale_for_each_block(tmp_path):
    dequantized(tmp_path / "d.onnx", np.array([[1.0], [3]]), axis=1, block_size=2**40)
    assert len(inspect_onnx(tmp_path / "d.onnx").rows) == 1
    dequantized(tmp_path / "d.onnx", np.array([[1.0, 2], [3, 4]]), axis=1, block_size=2)
    (row,) = inspect_onnx(tmp_path / "d.onnx").rows
    want = torch.tensor([[3.0, 3, 6, 6], [9, 9, 12, 12]])
    assert row.exact == pytest.approx(torch.linalg.matrix_norm(want, 2).item())


def test_int8_with_zero_points(tmp_path):
    dequantized(tmp_path / "d.onnx", np.ones(2), np.array([1, 3]), axis=0)
    (row,) = inspect_onnx(tmp_path / "d.onnx").rows
    assert row.spectrum == pytest.approx([4, 0])  # of rows of 2 and of 0


def test_the_table_of_an_embedding_in_an_onnx_file(tmp_path):
    helper, kinds = onnx.helper, onnx.TensorProto
    table = onnx.numpy_helper.from_array(np.diag([1, 2]).astype(np.float32), "embed.weight")
    gather = helper.make_node("Gather", ["embed.weight", "x"], ["y"])
    x, y = helper.make_tensor_value_info("x", kinds.INT64, [1]), helper.make_empty_tensor_value_info("y")
    onnx.save(helper.make_model(helper.make_graph([gather], "g", [x], [y], [table])), tmp_path / "d.onnx")
    (row,) = inspect_onnx(tmp_path / "d.onnx").rows
    assert (row.fqn, row.status, row.exact) == ("embed.weight", "plain", 2)


@pytest.mark.parametrize(
    ("size", "axis"), [((3,), 1), ((2,), 5), ((2, 2), 0)], ids=["size", "axis", "dimensions"]
)
def test_int8_with_scales_that_do_not_fit(tmp_path, size, axis):
    dequantized(tmp_path / "d.onnx", np.ones(size), axis=axis)
    with pytest.raises(ValueError, match=r"d.onnx is damaged: w_quantized cannot be read"):
        inspect_onnx(tmp_path / "d.onnx")


# --- As text, JSON, picture and page ---


class Page(HTMLParser):
    """The cells of the table, and what the page would load."""

    def __init__(self):
        super().__init__()
        self.cells, self.loaded, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def test_text_json_and_page_hold_every_weight(tmp_path):
    inspection = inspect_model(Discriminator())
    lines = str(inspection).splitlines()
    assert lines[0].split() == [
        "weight",
        "shape",
        "dtype",
        "status",
        "sigma",
        "exact",
        "residual",
        "condition",
    ]
    assert [line.split()[0] for line in lines[1:9]] == [row.fqn for row in inspection.rows]
    found = json.loads(inspection.to_json())
    assert found["source"] == "Discriminator"
    assert [weight["exact"] for weight in found["weights"]] == [row.exact for row in inspection.rows]

    inspection.html(tmp_path / "d.html")
    page = Page()
    page.feed((tmp_path / "d.html").read_text())
    assert not page.loaded
    assert len(page.cells) == 9 * (1 + len(inspection.rows))
    for row in inspection.rows:
        assert row.fqn in page.cells


def test_names_are_escaped_in_the_page(tmp_path):
    name = "<script>alert(1)</script>"
    torch.save({name: torch.ones(2, 2)}, tmp_path / "c.pt")
    inspect_checkpoint(tmp_path / "c.pt").html(tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text()
    assert name not in text
    page = Page()
    page.feed(text)
    assert name in page.cells


def test_what_is_said_of_a_weight_and_of_the_file_is_in_text_and_page(tmp_path):
    zero = Row("w", (3, 3), "float32", "plain", why="a & b", exact=0.0, spectrum=(0.0, 0.0, 0.0))
    inspection = Inspection("d.onnx", (zero,), {"precision": "<fp32>"})
    assert str(inspection).splitlines()[-2:] == ["w: a & b", "precision: <fp32>"]
    inspection.html(tmp_path / "d.html")
    text = (tmp_path / "d.html").read_text()
    assert "a &amp; b</div>" in text
    assert "<dt>precision</dt><dd>&lt;fp32&gt;</dd>" in text
    assert "<svg" not in text  # singular values of 0 have no curve
    inspection.plot(tmp_path / "d.png")


@pytest.mark.parametrize("depth", [1, 12])
def test_a_picture_has_room_for_every_weight(tmp_path, depth):
    inspection = inspect_model(transform(nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])))
    inspection.plot(tmp_path / "d.png")
    with Image.open(tmp_path / "d.png") as image:
        assert image.width > 1000
        assert image.height >= 26 * depth
        assert np.asarray(image.convert("L")).std() > 10


def test_files_replace_what_was_there_or_leave_it(tmp_path):
    inspection = inspect_model(nn.Linear(2, 2))
    with pytest.raises(OSError, match="cannot be written"):
        inspection.html(tmp_path / "no" / "d.html")
    (tmp_path / "d.html").write_text("old")
    inspection.html(tmp_path / "d.html")
    assert (tmp_path / "d.html").read_text().startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["d.html"]
