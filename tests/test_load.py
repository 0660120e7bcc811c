"""Tests of loading: models by name, checkpoints from anywhere, example inputs."""

import functools
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations

import specnorm_fx
from specnorm_fx.checkpoint import LAYOUTS
from specnorm_fx.inputs import (
    Input,
    calibration_batches,
    example_inputs,
    file_inputs,
    one_row_more,
    program_inputs,
)
from specnorm_fx.load import (
    LoadError,
    build_model,
    load_model,
    read_checkpoint,
    sha256,
    strip_wrappers,
    write_checkpoint,
)
from tests.factories import FILE, NORMALIZED, SHAPE, normalized_by, train


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores what loading puts on sys.path


def build(factory="Discriminator", **kwargs):
    return build_model(f"{FILE}:{factory}", kwargs)


def assert_same_outputs(model, trained, tolerance=2e-6):
    images = torch.randn(SHAPE)
    with torch.no_grad():
        got, want = model(images), trained(images)
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# --- Models --------------------------------------------------------------------------------------


def test_module_from_the_current_folder():
    Path("factories_here").mkdir()
    Path("factories_here/small.py").write_text(FILE.read_text())
    model = build_model("factories_here.small:Factories.small", {})
    assert model.blocks[0].out_channels == 4


def test_two_files_of_one_name_and_one_that_fails():
    models = []
    for folder, width in (("a", 2), ("b", 3)):
        Path(folder).mkdir()
        Path(folder, "nets.py").write_text(
            f"import torch\nclass Net(torch.nn.Linear):\n def __init__(self): super().__init__({width}, 1)"
        )
        models.append(build_model(f"{folder}/nets.py:Net", {}))
    for model in models:  # each finds its own class again
        assert type(pickle.loads(pickle.dumps(model))) is type(model)
    Path("fails.py").write_text("1 / 0")
    before = set(sys.modules)
    with pytest.raises(LoadError, match="ZeroDivisionError"):
        build_model("fails.py:Net", {})
    assert set(sys.modules) == before


def test_program():
    model = train(build())
    example = torch.randn(SHAPE)
    torch.export.save(torch.export.export(model, (example,)), "disc.pt2")
    loaded = load_model("disc.pt2", {}, select=["fc"])
    assert [site.fqn for site in loaded.sites()] == ["fc.weight"]
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert torch.equal(program_inputs("disc.pt2")[0], example)
    # A checkpoint goes into a program as into a model.
    trained = normalized_by(parametrizations.spectral_norm, build())
    torch.save(trained.state_dict(), "disc.pt")
    assert_same_outputs(load_model("disc.pt2", {}, "disc.pt"), trained)
    with pytest.raises(LoadError, match="kwargs are for a factory"):
        build_model("disc.pt2", {"channels": 8})
    torch.export.save(torch.export.export(trained, (example,)), "disc.pt2")
    with pytest.raises(LoadError, match=r"carries spectral norm that torch\.export has spread out"):
        load_model("disc.pt2", {})


# --- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disc.pt", "disc.safetensors", "dïsc ø.safetensors"])
@pytest.mark.parametrize("sn", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_torch_checkpoint(sn, name):
    trained = normalized_by(sn, build(channels=6))
    write_checkpoint(trained.state_dict(), name)
    loaded = load_model(f"{FILE}:Discriminator", {"channels": 6}, name)
    assert [site.fqn for site in loaded.sites()] == list(NORMALIZED)
    assert_same_outputs(loaded, trained)


def test_own_checkpoint():
    trained = train(specnorm_fx.transform(build(), ["up", "fc"]))
    torch.save(trained.state_dict(), "disc.pt")
    assert_same_outputs(load_model(f"{FILE}:Discriminator", {}, "disc.pt"), trained, 0)


@pytest.mark.parametrize("select", [None, ["blocks.*", "fc"]])
def test_plain_checkpoint(caplog, select):
    trained = train(build())
    torch.save({"epoch": 3, "state_dict": trained.state_dict()}, "disc.pt")
    loaded = load_model(f"{FILE}:Discriminator", {}, "disc.pt", select)
    assert "There were no u and v to load" in caplog.text
    selected = ["blocks.0.weight", "blocks.2.weight", *([] if select else ["up.weight"]), "fc.weight"]
    assert [site.fqn for site in loaded.sites()] == selected
    with torch.no_grad():
        for fqn in selected:
            weight = trained.get_parameter(fqn)
            matrix = weight.transpose(0, 1) if fqn == "up.weight" else weight
            weight /= torch.linalg.matrix_norm(matrix.flatten(1), 2)
    # Up to where sigma rests: see CONVERGENCE_TOLERANCE.
    assert_same_outputs(loaded, trained, 1e-4)


def test_oldest_hook_checkpoint():
    trained = normalized_by(nn.utils.spectral_norm, build())
    state = {key: value for key, value in trained.state_dict().items() if not key.endswith("_v")}
    torch.save(state, "disc.pt")
    loaded = load_model(f"{FILE}:Discriminator", {}, "disc.pt")
    assert [site.fqn for site in loaded.sites()] == list(NORMALIZED)


def test_wrapped_checkpoint_of_a_model_with_torch_sn():
    trained = train(build("with_torch_sn"))
    state = {f"module._orig_mod.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"model": state}, "disc.pt")
    loaded = load_model(f"{FILE}:with_torch_sn", {}, "disc.pt")
    assert loaded.sites()[0].config.n_power_iterations == 2
    assert_same_outputs(loaded, trained)


def test_an_averaged_checkpoint_of_a_model_with_a_compiled_part():
    trained = train(build())
    averaged = torch.optim.swa_utils.AveragedModel(specnorm_fx.transform(trained), use_buffers=True)
    state = {name.replace("fc.", "fc._orig_mod."): value for name, value in averaged.state_dict().items()}
    assert "n_averaged" in state
    torch.save(state, "average.pt")
    loaded = load_model(f"{FILE}:Discriminator", {}, "average.pt")
    assert_same_outputs(loaded, averaged.module)


def test_names_that_are_not_the_models():
    state = specnorm_fx.transform(build()).state_dict()
    torch.save({f"D.{name}": value for name, value in state.items()}, "disc.pt")
    with pytest.raises(LoadError, match=r"disc.pt has spectral norm for D\.\S+, and the model has no such"):
        load_model(f"{FILE}:Discriminator", {}, "disc.pt")


@pytest.mark.parametrize(
    ("model", "wrapper"),
    [
        (lambda: nn.ModuleDict({"module": build()}), "_orig_mod."),
        (lambda: nn.ModuleDict({"my_orig_mod": build()}), "_orig_mod."),
        (lambda: torch.optim.swa_utils.AveragedModel(build()), "_orig_mod."),
        (lambda: nn.Sequential(torch.compile(build())), "module."),
    ],
    ids=["module", "my_orig_mod", "averaged", "compiled"],
)
def test_own_names_are_kept(model, wrapper):
    model = model()
    own = model.state_dict()
    assert strip_wrappers(own, model).keys() == own.keys()
    wrapped = {f"{wrapper}{key}": 0 for key in own}
    assert strip_wrappers(wrapped, model).keys() == own.keys()


def test_names_with_brackets():
    """Are names, and no globs."""
    Path("brackets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "  def __init__(self): super().__init__(); self.add_module('a[0]', torch.nn.Linear(3, 2))"
    )
    model = build_model("brackets.py:Net", {})
    parametrizations.spectral_norm(model.get_submodule("a[0]"))
    torch.save(model.state_dict(), "disc.pt")
    (site,) = load_model("brackets.py:Net", {}, "disc.pt").sites()
    assert site.fqn == "a[0].weight"


def test_extra_state_is_no_further_state_dict():
    state = {"weight": torch.ones(2), "_extra_state": {"scale": torch.ones(1)}}
    torch.save(state, "disc.pt")
    assert read_checkpoint("disc.pt").keys() == state.keys()


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("name", ["disc.pt", "disc.safetensors"])
def test_a_written_checkpoint_is_read_back(layout, name):
    state = specnorm_fx.convert_state_dict(specnorm_fx.transform(build()).state_dict(), to=layout)
    write_checkpoint(state, name)
    read = read_checkpoint(name)
    assert list(read) == list(state) or name.endswith(".safetensors")  # which sorts
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())
    if name.endswith(".pt"):
        assert read._metadata == state._metadata


def test_tied_weights_and_views_in_safetensors():
    shared = torch.randn(4, 6)
    state = {"a.weight": shared, "b.weight": shared, "c.weight": shared.T, "d": shared[1:]}
    write_checkpoint(state, "tied.safetensors")
    read = safetensors.torch.load_file("tied.safetensors")
    assert all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.eye(3).to_sparse(), "got a sparse one, or one without values under 'w'"),
        (torch.empty(2, device="meta"), "got a sparse one, or one without values under 'w'"),
        (torch.ones(1).expand(2**60), "'w' is too large to be written"),
    ],
    ids=["sparse", "meta", "huge"],
)
def test_what_safetensors_do_not_hold(value, why):
    with pytest.raises(LoadError, match=why):
        write_checkpoint({"w": value}, "disc.safetensors")
    assert not Path("disc.safetensors").exists()


@pytest.mark.parametrize("name", ["disc.pt", "disc.safetensors"])
def test_only_a_regular_file_is_replaced(name):
    os.mkfifo(name)  # as root, /dev/null would have become a file
    with pytest.raises(OSError, match="it is no regular file"):
        write_checkpoint({"weight": torch.zeros(2)}, name)
    assert Path(name).is_fifo()


def test_without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    Path("disc.safetensors").write_bytes(b"")
    for use in (read_checkpoint, functools.partial(write_checkpoint, {})):
        with pytest.raises(ImportError, match=r"pip install 'specnorm-fx\[safetensors\]'"):
            use("disc.safetensors")


def test_sha256():
    Path("abc").write_bytes(b"abc")
    assert sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- Inputs --------------------------------------------------------------------------------------


def test_example_inputs_by_order_and_by_name():
    model = specnorm_fx.transform(build("Labelled").double()).eval()
    image, label = Input(None, (2, 3, 6, 6)), Input(None, (2,), torch.int64)
    by_order = example_inputs(model, [image, label])
    by_name = example_inputs(model, [label._replace(name="label"), image._replace(name="image")])
    for images, labels in (by_order, by_name):
        assert (images.shape, images.dtype) == ((2, 3, 6, 6), torch.float64)
        assert (labels.shape, labels.dtype) == ((2,), torch.int64)
    with pytest.raises(LoadError, match="which are image, label, got image, class"):
        example_inputs(model, [image._replace(name="image"), label._replace(name="class")])
    with pytest.raises(
        LoadError, match="which are image, label, got one without a name, one without a name, o"
    ):
        example_inputs(model, [image, label, label])
    with pytest.raises(LoadError, match="does not run on an input of 2x3x6x6"):
        example_inputs(model, [image])


def write_onnx(path, *inputs):
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    outputs = [
        onnx.helper.make_tensor_value_info(f"{v.name}_out", i[1], i[2])
        for v, i in zip(values, inputs, strict=True)
    ]
    nodes = [onnx.helper.make_node("Identity", [v.name], [f"{v.name}_out"]) for v in values]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values, outputs)), path)


def test_inputs_of_a_file():
    float16, int64 = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
    write_onnx("two.onnx", ("image", float16, ["batch", 3]), ("label", int64, [2]))
    assert file_inputs(specnorm_fx.onnx.inputs_of("two.onnx"), 5) == [
        Input(None, (5, 3)),
        Input(None, (2,), torch.int64),
    ]
    write_onnx("open.onnx", ("image", float16, ["batch", 3, "height"]))
    with pytest.raises(LoadError, match="leaves the shape of its input 'image' open"):
        file_inputs(specnorm_fx.onnx.inputs_of("open.onnx"), 5)


def test_one_row_more():
    """But not of what has no rows."""
    image, scale, power = one_row_more((torch.ones(2, 3), torch.tensor(2.0), 2))
    assert (image.shape, scale.shape, power) == ((3, 3), (), 2)


def test_calibration_batches():
    Path("images").mkdir()
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    np.save("images/a.npy", rows[:5])
    np.save("images/b.npy", rows[5:])
    example = (torch.zeros(2, 3, dtype=torch.float64),)
    batches = [batch for (batch,) in calibration_batches("images", example)]
    assert torch.equal(torch.cat(batches), torch.tensor(rows[[0, 1, 2, 3, 5, 6]], dtype=torch.float64))
    np.savez("both.npz", rows, np.arange(8))
    both = list(calibration_batches("both.npz", (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))))
    assert [label.tolist() for _, label in both] == [[0, 1, 2, 3], [4, 5, 6, 7]]
