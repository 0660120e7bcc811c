"""Tests of the exporting script, export/export_discriminator.py."""

import importlib.util
import json
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import specnorm_fx

FOLDER = Path(__file__).parents[1] / "export"
SHAPE = (2, 3, 16, 16)
MODEL = """
    from torch import nn

    class Discriminator(nn.Module):
        def __init__(self, channels=8):
            super().__init__()
            self.blocks = nn.Sequential(
                nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
                nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            )
            self.up = nn.ConvTranspose2d(channels, 4, 2, stride=2)
            self.fc = nn.Linear(4 * 8 * 8, 1)

        def forward(self, image):
            return self.fc(self.up(self.blocks(image)).flatten(1))

    def untraceable():
        class Branch(Discriminator):
            def forward(self, image):
                return super().forward(image) if image.sum() > 0 else image
        return Branch()

    def unexportable():
        class Sorted(Discriminator):
            def forward(self, image):
                return super().forward(image).mode(0).values
        return Sorted()

    def with_torch_sn():
        from torch.nn.utils.parametrizations import spectral_norm
        model = Discriminator()
        spectral_norm(model.fc, n_power_iterations=2)
        return model

    class Factories:
        small = staticmethod(lambda: Discriminator(4))

    def no_model():
        return 3
"""
WEIGHTS = ("blocks.0.weight", "blocks.2.weight", "up.weight", "fc.weight")
NORMALIZED = {"blocks.0": "blocks.0.weight", "fc": "fc.weight", "up": "up.weight"}  # blocks.2 is not


def _import_script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _import_script("export_discriminator")
score = _import_script("score")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.py"
    path.write_text(textwrap.dedent(MODEL))
    return path


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores what the script puts on sys.path


def build(model_file, factory="Discriminator", **kwargs):
    return script.build_model(f"{model_file}:{factory}", kwargs)


def train(model, shape=SHAPE):
    """Two steps, so that weights, u and v are none that a start would give."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    return model.eval()


def normalized_by(sn, model):
    for fqn in NORMALIZED:
        sn(model.get_submodule(fqn))
    return train(model)


def run(*arguments):
    return script.main([str(argument) for argument in arguments])


def export(model_file, *arguments, checkpoint="disc.pt", factory="Discriminator", shape="2x3x16x16"):
    return run(
        *("--model", f"{model_file}:{factory}", "--checkpoint", checkpoint, "--input", shape),
        *("-o", "disc.onnx", *arguments),
    )


def outputs(images):
    session = ort.InferenceSession("disc.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def assert_computes(model, tolerance, n=SHAPE[0]):
    images = torch.randn(n, *SHAPE[1:])
    want = model(images).detach().numpy()
    assert np.abs(outputs(images) - want).max() <= tolerance * np.abs(want).max()


def assert_refused(capsys, code, message):
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("export_discriminator.py: error:")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("disc.onnx").exists()
    assert not list(Path().glob(".disc.onnx*"))


@pytest.mark.parametrize("sn", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_torch_checkpoint(model_file, capsys, sn):
    trained = normalized_by(sn, build(model_file, channels=6))
    torch.save(trained.state_dict(), "disc.pt")
    assert export(model_file, "--kwargs", '{"channels": 6}', "--dynamic-batch") == 0
    assert_computes(trained, 2e-6, n=5)
    out = capsys.readouterr().out
    assert "Divided by sigma: blocks.0.weight, up.weight, fc.weight\n" in out
    assert "disc.onnx: " in out
    assert "agrees with the model on 3 batches" in out
    assert "plain" not in out


def test_own_checkpoint(model_file):
    trained = train(specnorm_fx.transform(build(model_file), ["up", "fc"]))
    torch.save(trained.state_dict(), "disc.pt")
    assert export(model_file) == 0
    assert_computes(trained, 2e-6)


def test_plain_checkpoint(model_file, capsys):
    trained = train(build(model_file))
    torch.save(trained.state_dict(), "disc.pt")
    assert export(model_file) == 0
    assert "The checkpoint is plain" in capsys.readouterr().out
    with torch.no_grad():
        for fqn in WEIGHTS:
            weight = trained.get_parameter(fqn)
            matrix = weight.transpose(0, 1) if fqn == "up.weight" else weight
            weight /= torch.linalg.matrix_norm(matrix.flatten(1), 2)
    # sigma has converged to 1e-6 a step: see CONVERGENCE_TOLERANCE.
    assert_computes(trained, 1e-4)


def test_oldest_hook_checkpoint(model_file, capsys):
    trained = normalized_by(nn.utils.spectral_norm, build(model_file))
    state = {key: value for key, value in trained.state_dict().items() if not key.endswith("_v")}
    torch.save(state, "disc.pt")
    assert export(model_file) == 0
    out = capsys.readouterr().out
    assert "Divided by sigma: blocks.0.weight, up.weight, fc.weight\n" in out
    assert "plain" not in out


def test_select_and_the_file(model_file):
    trained = train(build(model_file))
    torch.save({"epoch": 3, "state_dict": trained.state_dict()}, "disc.pt")
    assert export(model_file, "--select", "blocks.*", "--select", "fc") == 0
    graph = onnx.load("disc.onnx").graph
    # The nodes of the model without spectral norm, and the names of its parameters.
    assert [n.op_type for n in graph.node if n.op_type in ("Mul", "Div", "MatMul", "Sqrt")] == []
    assert {i.name for i in graph.initializer} >= set(trained.state_dict())
    (up,) = (i for i in graph.initializer if i.name == "up.weight")
    assert np.array_equal(onnx.numpy_helper.to_array(up), trained.up.weight.detach().numpy())


def test_same_command_same_file(model_file):
    torch.save({"model": build(model_file).state_dict()}, "disc.pt")
    files = []
    for _ in range(2):
        assert export(model_file) == 0
        files.append(Path("disc.onnx").read_bytes())
    assert files[0] == files[1]


def test_wrapped_checkpoint_of_a_model_with_torch_sn(model_file):
    trained = train(build(model_file, "with_torch_sn"))
    state = {f"module._orig_mod.{key}": value for key, value in trained.state_dict().items()}
    torch.save(state, "disc.pt")
    assert export(model_file, factory="with_torch_sn") == 0
    assert_computes(trained, 2e-6)


def test_own_prefix_is_kept(model_file):
    model = nn.ModuleDict({"module": build(model_file)})
    assert script.strip_wrappers(dict(model.state_dict()), model).keys() == model.state_dict().keys()
    wrapped = {f"_orig_mod.{key}": 0 for key in model.state_dict()}
    assert script.strip_wrappers(wrapped, model).keys() == model.state_dict().keys()


def test_module_from_the_current_folder(model_file):
    Path("factories_here").mkdir()
    Path("factories_here/small.py").write_text(model_file.read_text())
    model = script.build_model("factories_here.small:Factories.small", {})
    assert model.fc.in_features == 4 * 8 * 8


def test_score_of_the_file(model_file, capsys):
    trained = normalized_by(parametrizations.spectral_norm, build(model_file))
    torch.save(trained.state_dict(), "disc.pt")
    assert export(model_file, "--dynamic-batch") == 0
    images = torch.randn(3, *SHAPE[1:])
    np.save("images.npy", images.numpy())
    capsys.readouterr()
    assert score.main(["disc.onnx", "images.npy", "--format", "jsonl"]) == 0
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert scores == pytest.approx(trained(images).flatten().tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model.py", "is not of the form"),
        ("missing.py:net", "no such file"),
        ("missing.package:net", "No module named 'missing'"),
        ("{file}:nothing", "has no 'nothing'; the names in it are: nn, Discriminator"),
        ("{file}:no_model", "gives a int; it must give a torch.nn.Module"),
        ("{file}:untraceable", "Symbolic trace cannot follow"),
        ("broken.py:net", "SyntaxError"),
    ],
)
def test_bad_model(model_file, capsys, spec, message):
    torch.save(build(model_file).state_dict(), "disc.pt")
    Path("broken.py").write_text("def net(")
    code = run(
        *("--model", spec.format(file=model_file), "--checkpoint", "disc.pt", "--input", "2x3x16x16"),
        *("-o", "disc.onnx"),
    )
    assert_refused(capsys, code, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kwargs", "{channels: 8}"], "is not JSON"),
        (["--kwargs", "[8]"], "is not a JSON object"),
        (["--kwargs", '{"width": 8}'], "unexpected keyword argument 'width'"),
        (["--kwargs", '{"channels": 6}'], "the checkpoint does not fit the model"),
        (["--input", "2x3x0x16"], "is not a shape"),
        (["--input", "2,3,16,16"], "is not a shape"),
        (["--input", "2x5x16x16"], "does not run on an input of 2x5x16x16"),
        (["--select", "bloks.*"], "select pattern 'bloks.*' matches no weight. Did you mean"),
        (["--opset", "new"], "invalid int value"),
        (["-o", "missing/disc.onnx"], "cannot be written"),
        (["--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_bad_argument(model_file, capsys, arguments, message):
    torch.save(build(model_file).state_dict(), "disc.pt")
    assert_refused(capsys, export(model_file, *arguments), message)


def test_missing_arguments(capsys):
    assert_refused(capsys, script.main([]), "required: --model, --checkpoint, --input, -o/--output")


class Pickled:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (Pickled(), "unpickling objects can run any code"),
        ({"weights": {}, "epoch": 3}, "holds a dict of weights, epoch, not a state dict"),
        (torch.zeros(2), "holds Tensor, not a state dict"),
        ({"fc.weight": torch.zeros(1, 256)}, "Missing key(s) in state_dict"),
    ],
)
def test_bad_checkpoint(model_file, capsys, saved, message):
    torch.save(saved, "disc.pt")
    assert_refused(capsys, export(model_file), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "EOFError"), (b"hello", "or no checkpoint"), ("cut", "is damaged")],
)
def test_damaged_checkpoint(model_file, capsys, content, message):
    if content == "cut":
        torch.save(build(model_file).state_dict(), "disc.pt")
        content = Path("disc.pt").read_bytes()[:-200]
    if content is not None:
        Path("disc.pt").write_bytes(content)
    assert_refused(capsys, export(model_file), message)


def test_select_that_leaves_normalised_weights_out(model_file, capsys):
    trained = normalized_by(parametrizations.spectral_norm, build(model_file))
    torch.save(trained.state_dict(), "disc.pt")
    assert_refused(capsys, export(model_file, "--select", "fc"), "does not fit the model")


def test_weights_that_are_not_finite(model_file, capsys):
    state = build(model_file).state_dict()
    state["fc.bias"].fill_(torch.nan)
    torch.save(state, "disc.pt")
    assert_refused(capsys, export(model_file), "check that the weights of the checkpoint are finite")


def test_operator_without_onnx(model_file, capsys):
    torch.save(build(model_file).state_dict(), "disc.pt")
    assert_refused(capsys, export(model_file, factory="unexportable"), "cannot be exported to ONNX")


def test_existing_file_outlives_an_error(model_file):
    Path("disc.onnx").write_text("before")
    assert export(model_file) == 2
    assert Path("disc.onnx").read_text() == "before"
