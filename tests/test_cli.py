"""Tests of the command specnorm-fx, in this process: what it hands on, what it prints, and how it fails."""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.nn.utils import parametrizations

import specnorm_fx
from specnorm_fx import cli
from specnorm_fx.load import read_checkpoint, sha256
from tests import factories
from tests.factories import FILE, NORMALIZED, SHAPE, Discriminator, normalized_by

MODEL = f"{FILE}:Discriminator"
LOADED = (MODEL, "--checkpoint", "disc.pt")
SHAPED = (*LOADED, "--input", "2x3x16x16")
EXPORT = ("export", *SHAPED, "-o", "out.onnx")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return normalized_by(parametrizations.spectral_norm, Discriminator())


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A folder with a checkpoint and its ONNX file, and what the export printed."""
    folder = tmp_path_factory.mktemp("exported")
    torch.save(trained.state_dict(), folder / "disc.pt")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        assert run(*EXPORT[:-1], "disc.onnx", "--dynamic-batch", "--batches", "2") == 0
    return folder, out.getvalue()


@pytest.fixture
def folder(exported, tmp_path, monkeypatch):
    """A copy of it, where the test runs."""
    shutil.copytree(exported[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores what loading puts on sys.path
    monkeypatch.setattr(cli, "PROGRESS_AFTER", 1e6)
    return tmp_path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


# --- export and verify ---------------------------------------------------------------------------


def test_export(exported, trained):
    folder, out = exported
    assert f"Divided by sigma: {', '.join(NORMALIZED)}\n" in out
    assert "agrees with the model on 2 batches" in out
    session = ort.InferenceSession(folder / "disc.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, *SHAPE[1:])
    want = trained(images).detach().numpy()
    assert np.abs(session.run(None, {"image": images.numpy()})[0] - want).max() <= 2e-6 * np.abs(want).max()
    model = onnx.load(folder / "disc.onnx")
    # The nodes of the model without spectral norm, and the names of its parameters.
    assert [n.op_type for n in model.graph.node if n.op_type in ("Mul", "Div", "MatMul", "Sqrt")] == []
    assert {i.name for i in model.graph.initializer} >= {*Discriminator().state_dict()}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["specnorm_fx.source_checkpoint_sha256"] == sha256(folder / "disc.pt")


def test_the_scorer_reads_the_file(exported, folder, trained, capsys):
    spec = importlib.util.spec_from_file_location("score", FILE.parents[1] / "export" / "score.py")
    score = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(score)
    images = torch.randn(3, *SHAPE[1:])
    np.save("images.npy", images.numpy())
    assert score.main(["disc.onnx", "images.npy", "--format", "jsonl"]) == 0
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert scores == pytest.approx(trained(images).flatten().tolist(), rel=1e-5, abs=1e-6)


def test_the_same_command_writes_the_same_file(folder, capsys):
    # A plain checkpoint: u and v start at random.
    torch.save(Discriminator().state_dict(), "plain.pt")
    for name in ("a.onnx", "b.onnx"):
        assert run("export", MODEL, "--checkpoint", "plain.pt", "--input", "1x3x16x16", "-o", name) == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


@pytest.fixture
def handed_on(folder, monkeypatch):
    """What the command calls `specnorm_fx.onnx.export` with."""
    calls = []

    def export(*args, **options):
        calls.append((args, options))
        options["calibration"] = options["calibration"] and list(options["calibration"])
        return types.SimpleNamespace(to_json=lambda: "{}")

    monkeypatch.setattr(specnorm_fx.onnx, "export", export)
    return calls


def test_options_of_the_export(handed_on, capsys):
    torch.save(factories.Labelled().state_dict(), "labelled.pt")
    np.savez("rows.npz", np.ones((2, 3, 6, 6), np.float32), np.ones(2, np.int64))
    code = run(
        *("export", f"{FILE}:Labelled", "--checkpoint", "labelled.pt", "-o", "out.onnx", "--json"),
        *("--input", "label=1:int64", "--input", "image=1x3x6x6", "--select", "conv"),
        *(
            "--axes",
            "image=0:batch,2:height",
            "--axes",
            "label=0:batch",
            "--axes",
            "image=3",
            "--opset",
            "20",
        ),
        *("--input-names", "a,b", "--output-names", "c,d", "--batches", "7", "--rtol", "0.01"),
        *("--precision", "int8", "--calibration", "rows.npz", "--external-data"),
    )
    assert code == 0
    (((model, example, path), options),) = handed_on
    assert list(specnorm_fx.sigmas(model)) == ["conv.weight"]
    assert [(x.shape, x.dtype) for x in example] == [((1, 3, 6, 6), torch.float32), ((1,), torch.int64)]
    assert path == Path("out.onnx")
    assert len(options.pop("calibration")) == 2
    assert options == {
        "dynamic_batch": False,
        "axes": {"image": {0: "batch", 2: "height", 3: None}, "label": {0: "batch"}},
        "input_names": ["a", "b"],
        "output_names": ["c", "d"],
        "opset_version": 20,
        "n_batches": 7,
        "rtol": 0.01,
        "precision": "int8",
        "external_data": True,
        "metadata": {"source_checkpoint_sha256": sha256("labelled.pt")},
    }
    assert capsys.readouterr().out == "{}\n"


def test_a_program_brings_weights_and_inputs(handed_on):
    images = torch.randn(SHAPE)
    torch.export.save(torch.export.export(Discriminator().eval(), (images,)), "disc.pt2")
    assert run("export", "disc.pt2", "-o", "out.onnx", "--json") == 0
    (((model, example, _), options),) = handed_on
    assert torch.equal(example[0], images)
    assert [site.fqn for site in model.sites()] == sorted(
        [*NORMALIZED, "blocks.2.weight"], key=list(model.state_dict()).index
    )
    assert options["metadata"] == {"source_checkpoint_sha256": sha256("disc.pt2")}
    assert options["axes"] is options["external_data"] is options["calibration"] is None


def test_a_program_for_one_batch_size(folder, capsys):
    torch.export.save(torch.export.export(Discriminator().eval(), (torch.randn(SHAPE),)), "disc.pt2")
    assert_fails(capsys, ("export", "disc.pt2", "-o", "out.onnx", "--dynamic-batch"), "an input of 3x3x16x16")


def test_verify(folder, capsys):
    assert run("verify", "disc.onnx", "--model", *LOADED, "--batches", "2") == 0
    out = capsys.readouterr().out
    assert "agrees with the model on 2 batches" in out
    assert re.search(r"\nrelative errors by decade: \S+: \d+", out)
    assert run("verify", "disc.onnx", "--model", *SHAPED, "--batches", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 1


def test_verify_int8_on_data(folder, capsys):
    """In a range that random batches leave."""
    np.save("small.npy", 0.01 * np.random.default_rng(0).standard_normal((8, *SHAPE[1:]), np.float32))
    int8 = ("--dynamic-batch", "--precision", "int8", "--calibration", "small.npy")
    assert run("export", MODEL, "--checkpoint", "disc.pt", "--input", "4x3x16x16", *int8, "-o", "q.onnx") == 0
    assert run("verify", "q.onnx", "--model", *LOADED, "--data", "small.npy", "--batches", "5") == 0
    assert "agrees with the model on 5 batches" in capsys.readouterr().out
    assert run("verify", "q.onnx", "--model", *LOADED) == 1
    assert "int8 is right in the range of its calibration" in capsys.readouterr().err


def test_a_difference_is_exit_code_1(folder, capsys):
    state = torch.load("disc.pt")
    state["fc.bias"] += 1
    torch.save(state, "other.pt")
    assert run("verify", "disc.onnx", "--model", MODEL, "--checkpoint", "other.pt") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("specnorm-fx: error: disc.onnx disagrees with")
    assert err.count("\n") == 1


def test_an_export_that_differs_is_exit_code_1_and_no_file(folder, capsys):
    assert run(*EXPORT, "--rtol", "1e-12") == 1
    assert "out.onnx disagrees with" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"disc.onnx", "disc.pt"}


def test_what_a_model_prints_is_no_result(folder, capsys):
    assert (
        run("verify", "disc.onnx", "--model", f"{FILE}:prints", *LOADED[1:], "--batches", "1", "--json") == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out)["batches"] == 1
    assert err == "building\n"


# --- inspect and convert -------------------------------------------------------------------------


def test_inspect(folder, exported, capsys):
    assert run("inspect", "disc.onnx", "--plot", "out.png", "--html", "out.html") == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out.html").read_text().startswith("<!doctype html>")
    assert "divided" in capsys.readouterr().out
    shutil.copy("disc.pt", "a:b.pt")  # no MODEL, where there is such a file
    for what in (["disc.pt"], ["a:b.pt"], LOADED):
        assert run("inspect", *what, "--json") == 0
        weights = json.loads(capsys.readouterr().out)["weights"]
        assert [w["fqn"] for w in weights if w["status"] == "normalised"] == list(NORMALIZED)
    assert run("inspect", f"{FILE}:Labelled", "--json") == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert {w["status"] for w in weights} == {"to be normalised", "skipped"}
    assert run("inspect", MODEL, "--kwargs", '{"channels": 6}', "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"][0]["shape"][0] == 6


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_convert(folder, trained, capsys, suffix):
    assert run("convert", "disc.pt", f"own.{suffix}", "--to", "specnorm_fx") == 0
    assert (
        f"own.{suffix}: 14 entries, u and v for blocks.0.weight, up.weight, fc.weight"
        in capsys.readouterr().out
    )
    assert run("convert", f"own.{suffix}", f"torch's.{suffix}", "--to", "parametrizations") == 0
    assert run("convert", f"torch's.{suffix}", "back.pt", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(result.pop("with_u_and_v")) == sorted(NORMALIZED)  # safetensors sorts
    assert result == {"path": "back.pt", "tensors": 14}
    back = read_checkpoint("back.pt")
    assert all(torch.equal(back[key], value) for key, value in trained.state_dict().items())
    normalized_by(parametrizations.spectral_norm, Discriminator()).load_state_dict(back, strict=True)


# --- Help and progress ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["export", "verify", "inspect", "convert"])
def test_help_has_examples_that_parse(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    text = capsys.readouterr().out.replace("\\\n", "")
    examples = [line for line in text.splitlines() if line.startswith(f"  specnorm-fx {command} ")]
    assert len(examples) >= 2
    for example in examples:
        assert cli._parser().parse_args(shlex.split(example)[1:]).command == command


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "start", "end"),
    [
        (io.StringIO(), "specnorm-fx: export ...\n", "export ...\n"),
        (Terminal(), "\rspecnorm-fx: export ... 0 s", "\r\x1b[K"),
    ],
)
def test_progress(monkeypatch, stderr, start, end):
    monkeypatch.setattr(sys, "stderr", stderr)
    with cli._progress("export"):
        pass
    assert stderr.getvalue() == ""
    monkeypatch.setattr(cli, "PROGRESS_AFTER", 0)
    with cli._progress("export"):
        while not stderr.getvalue():
            time.sleep(0.001)
    assert stderr.getvalue().startswith(start)
    assert stderr.getvalue().endswith(end)


def test_interrupted(folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "write_checkpoint", interrupt)
    assert run("convert", "disc.pt", "out.pt") == 130
    assert capsys.readouterr() == ("", "")


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "specnorm_fx", "convert", "missing.pt", tmp_path / "out.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FILE.parents[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "specnorm-fx: error: The checkpoint missing.pt cannot be read: No such file or directory. "
        "Give the path of a file.\n"
    )


# --- Faults --------------------------------------------------------------------------------------


class Code:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("the code has run",)


def saved(state):
    return lambda: torch.save(state, "bad.pt")


def edited(**entries):
    """The checkpoint with other values under some keys, dots as underscores; None takes the key away."""

    def write():
        state = torch.load("disc.pt")
        for name, value in entries.items():
            (key,) = [key for key in state if key.replace(".", "_") == name] or [name]
            state[key] = value(state[key]) if callable(value) else value
        torch.save({key: value for key, value in state.items() if value is not None}, "bad.pt")

    return write


def filled(value):
    return lambda tensor: tensor.clone().index_fill_(0, torch.tensor([0]), value)


def cut(source, target, length):
    def write():
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: int(length * len(content)) if abs(length) < 1 else length])

    return write


def copied(source, target):
    return lambda: shutil.copy(source, target)


def written(name, content=b""):
    return lambda: Path(name).write_bytes(content)


def array(name, value):
    return lambda: np.save(name, value)


def nothing():
    pass


def bad(make, message, id):
    return pytest.param(make, (*EXPORT, "--checkpoint", "bad.pt"), message, id=id)


def bad_safetensors(make, message, id):
    def write():
        run("convert", "disc.pt", "good.safetensors")
        make()

    return pytest.param(write, (*EXPORT, "--checkpoint", "bad.safetensors"), message, id=id)


def argument(arguments, message, id, make=nothing):
    return pytest.param(make, (*EXPORT, *arguments), message, id=id)


def factory(spec, message, id, make=nothing, out="out.onnx"):
    return pytest.param(make, ("export", spec, *SHAPED[1:], "-o", out), message, id=id)


NETS = f"from {factories.__name__} import Discriminator as net".encode()


def shape(text, message, id):
    return pytest.param(nothing, ("export", *LOADED, "--input", text, "-o", "out.onnx"), message, id=id)


def converted(source, arguments, message, id, make=nothing):
    return pytest.param(make, ("convert", source, *arguments), message, id=id)


def bad_onnx(make, message, id):
    return pytest.param(make, ("verify", "bad.onnx", "--model", *LOADED), message, id=id)


ORIGINAL = "fc_parametrizations_weight_original"
FAULTS = [
    # Checkpoints that are no whole file of tensors.
    argument(["--checkpoint", "missing.pt"], "missing.pt cannot be read: No such file", "no checkpoint"),
    argument(["--checkpoint", "."], "cannot be read: Is a directory", "a folder as checkpoint"),
    argument(["--checkpoint", "disc.pt/x"], "cannot be read: Not a directory", "a path below a file"),
    argument(["--checkpoint", "naïve ø.pt"], "naïve ø.pt cannot be read", "a missing unicode path"),
    bad(written("bad.pt"), "bad.pt is damaged or no checkpoint (EOFError", "0 bytes"),
    bad(written("bad.pt", b"hello"), "is damaged or no checkpoint", "text"),
    bad(written("bad.pt", b"PK\3\4" + bytes(99)), "bad.pt is damaged", "the start of a zip file"),
    bad(cut("disc.pt", "bad.pt", 10), "is damaged or no checkpoint", "cut after 10 bytes"),
    bad(cut("disc.pt", "bad.pt", 0.3), "is damaged or no checkpoint", "cut after 30 %"),
    bad(cut("disc.pt", "bad.pt", 0.9), "is damaged or no checkpoint", "cut after 90 %"),
    bad(cut("disc.pt", "bad.pt", -1), "is damaged or no checkpoint", "cut by a byte"),
    bad(saved(Code()), "unpickling objects can run any code. Save the state dict alone", "code"),
    bad(edited(fc_bias=Code()), "unpickling objects can run any code", "code among tensors"),
    bad(
        written("bad.pt", pickle.dumps({}, protocol=4)), "or is no checkpoint. It is refused", "a bare pickle"
    ),
    bad(saved(Discriminator()), "unpickling objects can run any code", "a whole model"),
    bad(
        saved(torch.zeros(2)),
        "must hold a state dict, itself or under 'state_dict' or 'model', got Tensor",
        "a tensor",
    ),
    bad(saved({"weights": {}, "epoch": 3}), "got a dict of weights, epoch", "no state dict"),
    bad(saved({}), "got a dict of nothing", "nothing"),
    bad(
        saved({"netD": {"fc.bias": torch.zeros(2)}, "step": torch.tensor(3)}),
        "got a dict of netD, step",
        "a state dict under another name, beside a tensor",
    ),
    bad_safetensors(written("bad.safetensors"), "is damaged or no safetensors file", "safetensors: 0 bytes"),
    bad_safetensors(
        cut("good.safetensors", "bad.safetensors", 0.1), "is damaged or no", "safetensors: cut at 10 %"
    ),
    bad_safetensors(
        cut("good.safetensors", "bad.safetensors", -1), "is damaged or no", "safetensors: cut by a byte"
    ),
    bad_safetensors(copied("disc.pt", "bad.safetensors"), "is damaged or no", "a pickle named safetensors"),
    # Checkpoints that are not of this model.
    bad(edited(fc_bias=None), 'Missing key(s) in state_dict: "fc.bias"', "missing key"),
    bad(edited(tail_bias=torch.zeros(2)), 'Unexpected key(s) in state_dict: "tail_bias"', "unexpected key"),
    bad(edited(**{ORIGINAL: torch.zeros(2, 256)}), "size mismatch for fc.weight", "wrong shape"),
    bad(
        edited(fc_parametrizations_weight_0__u=torch.zeros(7)),
        "size mismatch for fc.weight_u",
        "wrong shape of u",
    ),
    bad(
        edited(fc_bias=torch.Tensor.int),
        "fc.bias must be floating point as in the model, got torch.int32",
        "integers",
    ),
    bad(
        edited(fc_bias=torch.Tensor.cfloat),
        "fc.bias must be floating point as in the model, got torch.complex64",
        "complex",
    ),
    bad(edited(fc_bias=filled(torch.nan)), "fc.bias must be finite, got NaN or inf in bad.pt", "NaN"),
    bad(edited(**{ORIGINAL: filled(torch.nan)}), "fc.weight must be finite", "NaN in a normalised weight"),
    bad(edited(**{ORIGINAL: filled(-torch.inf)}), "fc.weight must be finite", "inf"),
    bad(edited(fc_parametrizations_weight_0__u=filled(torch.nan)), "fc.weight_u must be finite", "NaN in u"),
    argument(
        ["--select", "fc"],
        "disc.pt does not fit the model",
        "selected fewer than stored",
    ),
    argument(
        ["--select", "bloks.*"], "'bloks.*' matches no weight. Did you mean", "a pattern that matches nothing"
    ),
    # Models.
    factory(
        "model.py",
        "must be package.module:factory, file.py:factory or a .pt2 file, got 'model.py'",
        "no factory",
    ),
    factory("missing.py:net", "There is no file missing.py", "no model file"),
    factory("missing.package:net", "No module named 'missing'", "no module"),
    factory(f"{FILE}:nothing", "has no 'nothing'; the names in it are: sys, Path", "unknown factory"),
    factory(f"{FILE}:no_model", "must give a torch.nn.Module, got a int", "no module from the factory"),
    factory(f"{FILE}:fails", "failed (OSError: no space for a model)", "a factory that raises"),
    factory(f"{FILE}:leaves", "failed (it calls sys.exit(bye))", "a factory that exits"),
    factory(
        "broken.py:net", "cannot be imported (SyntaxError", "syntax error", written("broken.py", b"def net(")
    ),
    factory(
        "broken.py:net", "(ModuleNotFoundError: No mod", "import error", written("broken.py", b"import nix")
    ),
    factory(
        "broken.py:net",
        "cannot be imported (it calls sys",
        "an import that exits",
        written("broken.py", b"exit(3)"),
    ),
    factory(
        f"{FILE}:Branch",
        "Spectral norm cannot be put on the model: Symbolic trace",
        "a forward that branches",
    ),
    factory(f"{FILE}:Mode", "The model cannot be exported to ONNX", "an operator that ONNX has not"),
    factory("missing.pt2", "There is no program missing.pt2", "no program"),
    factory("bad.pt2", "bad.pt2 is damaged or no program", "program: 0 bytes", written("bad.pt2")),
    factory(
        "bad.pt2",
        "bad.pt2 is damaged or no program",
        "a checkpoint as program",
        copied("disc.pt", "bad.pt2"),
    ),
    # Arguments.
    pytest.param(nothing, (), "required: COMMAND; see specnorm-fx --help", id="no command"),
    pytest.param(nothing, ("deploy",), "invalid choice: 'deploy'", id="unknown command"),
    pytest.param(
        nothing, ("export", MODEL), "required: -o/--output; see specnorm-fx export --help", id="no output"
    ),
    pytest.param(
        nothing,
        ("export", MODEL, "-o", "out.onnx", "--input", "1x3x16x16"),
        "--checkpoint must be given",
        id="no --checkpoint",
    ),
    pytest.param(
        nothing, ("export", *LOADED, "-o", "out.onnx"), "--input must give the shape", id="no --input"
    ),
    argument(["--quick"], "unrecognized arguments: --quick", "unknown option"),
    argument(["--kwargs", "{channels: 8}"], "is not JSON", "kwargs: no JSON"),
    argument(["--kwargs", "[8]"], "is not a JSON object", "kwargs: a list"),
    argument(["--kwargs", '{"width": 8}'], "unexpected keyword argument 'width'", "kwargs: unknown"),
    argument(["--kwargs", '{"channels": 6}'], "disc.pt does not fit the model", "kwargs of another model"),
    argument(["--opset", "new"], "invalid int value", "opset: no number"),
    argument(["--opset", "3"], "opset", "opset: too old"),
    argument(["--batches", "0"], "'0' is not a number above 0", "no batches"),
    argument(["--axes", "image:batch"], "does not name axes", "axes"),
    argument(["--precision", "int4"], "invalid choice: 'int4'", "unknown precision"),
    shape("2x3x0x16", "is not a shape", "shape: a zero"),
    shape("2,3,16,16", "is not a shape", "shape: commas"),
    shape("2x3x16x16:float12", "is not a shape", "shape: unknown dtype"),
    shape("2x5x16x16", "does not run on an input of 2x5x16x16", "shape: of another model"),
    shape("2x3x16x16:int64", "does not run on an input of 2x3x16x16", "shape: integers"),
    shape(
        "img=2x3x16x16", "the first arguments of the forward, which are image, got img", "shape: unknown name"
    ),
    # Calibration data.
    argument(
        ["--calibration", "missing.npy"],
        "must be an array from numpy.save (FileNotFound",
        "calibration: missing",
    ),
    argument(
        ["--calibration", "data"],
        "must hold .npy or .npz files",
        "calibration: empty",
        lambda: os.mkdir("data"),
    ),
    argument(
        ["--calibration", "x.npy"],
        "must hold inputs of the shape",
        "calibration: shape",
        array("x.npy", np.ones((2, 3))),
    ),
    argument(
        ["--calibration", "x.npy"],
        "must hold inputs of the shape",
        "calibration: uint8",
        array("x.npy", np.ones(SHAPE, "u1")),
    ),
    argument(
        ["--calibration", "x.npy"],
        "one batch, got fewer",
        "calibration: one row",
        array("x.npy", np.ones((1, 3, 16, 16))),
    ),
    argument(
        ["--calibration", "x.npy"],
        "must be an array",
        "calibration: code",
        lambda: np.save("x.npy", [Code()]),
    ),
    argument(["--calibration", "disc.pt"], "disc.pt must be an array", "calibration: a checkpoint"),
    # Where to write.
    argument(["-o", "missing/out.onnx"], "missing/out.onnx cannot be written", "output: no folder"),
    argument(["-o", "."], "it is a folder", "output: a folder"),
    argument(["-o", "disc.pt/out.onnx"], "cannot be written: Not a directory", "output: below a file"),
    argument(["-o", "disc.pt"], "--output must be another file than disc.pt", "output: the checkpoint"),
    factory(
        "nets.py:net", "another file than nets.py", "output: the model", written("nets.py", NETS), "nets.py"
    ),
    argument(["-o", "pipe"], "it is no regular file", "output: a pipe", lambda: os.mkfifo("pipe")),
    converted("disc.pt", ["missing/out.pt"], "missing/out.pt cannot be written", "convert: no folder"),
    converted(
        "disc.pt", ["disc.pt/out.safetensors"], "cannot be written: Not a directory", "convert: below a file"
    ),
    # convert.
    converted("missing.pt", ["out.pt"], "missing.pt cannot be read", "convert: no checkpoint"),
    converted("bad.pt", ["out.pt"], "unpickling objects can run any code", "convert: code", saved(Code())),
    converted("disc.pt", ["out.pt", "--to", "jax"], "invalid choice: 'jax'", "convert: unknown layout"),
    converted(
        "bad.pt",
        ["out.pt", "--to", "hook"],
        "holds no u and v",
        "convert: no u and v",
        saved(Discriminator().state_dict()),
    ),
    converted(
        "bad.pt",
        ["out.safetensors"],
        "tensors alone, got a int under 'epoch'",
        "convert: a number",
        edited(epoch=3),
    ),
    # inspect.
    pytest.param(nothing, ("inspect", "disc.pt", "--select", "fc"), "are for a MODEL", id="inspect: select"),
    pytest.param(
        nothing, ("inspect", "disc.pt", "--kwargs", '{"a": 1}'), "are for a MODEL", id="inspect: kwargs"
    ),
    pytest.param(
        nothing,
        ("inspect", "disc.onnx", "--checkpoint", "disc.pt"),
        "are for a MODEL",
        id="inspect: checkpoint",
    ),
    pytest.param(
        nothing,
        ("inspect", "disc.pt", "--plot", "p.png", "--html", "missing/page.html"),
        "No such file",
        id="inspect: one of two files",
    ),
    pytest.param(
        nothing,
        ("inspect", "disc.pt", "--plot", "page", "--html", "./page"),
        "--plot and --html must be two files, got page for both",
        id="inspect: one file for both",
    ),
    pytest.param(
        nothing,
        ("inspect", "disc.pt", "--plot", "disc.pt"),
        "--plot must be another file than disc.pt",
        id="plot: the checkpoint",
    ),
    pytest.param(
        nothing,
        ("inspect", *LOADED, "--html", "disc.pt"),
        "--html must be another file than disc.pt",
        id="page: the checkpoint of a model",
    ),
    # verify.
    bad_onnx(nothing, "There is no ONNX file bad.onnx", "no ONNX file"),
    bad_onnx(lambda: os.mkdir("bad.onnx"), "There is no ONNX file bad.onnx", "a folder as ONNX file"),
    bad_onnx(written("bad.onnx"), "bad.onnx is not a valid ONNX model", "ONNX: 0 bytes"),
    bad_onnx(written("bad.onnx", b"hello"), "bad.onnx is not a valid ONNX model", "ONNX: text"),
    bad_onnx(cut("disc.onnx", "bad.onnx", 0.1), "bad.onnx is not a valid ONNX model", "ONNX: cut after 10 %"),
    bad_onnx(cut("disc.onnx", "bad.onnx", 0.5), "bad.onnx is not a valid ONNX model", "ONNX: cut after 50 %"),
    bad_onnx(cut("disc.onnx", "bad.onnx", -1), "bad.onnx is not a valid ONNX model", "ONNX: cut by a byte"),
    bad_onnx(copied("disc.pt", "bad.onnx"), "bad.onnx is not a valid ONNX model", "a checkpoint as ONNX"),
    pytest.param(
        nothing,
        ("verify", "disc.onnx", "--model", f"{FILE}:WithBessel", "--checkpoint", "disc.pt"),
        "The operators cannot be compared",
        id="a model that the exporter cannot write",
    ),
    pytest.param(
        nothing,
        ("verify", "disc.onnx", "--model", *LOADED, "--rtol", "small"),
        "invalid float",
        id="rtol: no number",
    ),
]


def contents():
    """Of all files here."""
    return {
        path: path.is_file() and path.read_bytes()
        for path in Path().rglob("*")
        if "__pycache__" not in path.parts
    }


def assert_fails(capsys, arguments, message):
    """With one line, exit code 2, and no file written, changed or left over."""
    before = contents()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("specnorm-fx: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err
    assert contents() == before


@pytest.mark.parametrize(("make", "arguments", "message"), FAULTS)
def test_faults(folder, capsys, make, arguments, message):
    for name in ("out.onnx", "out.pt"):
        Path(name).write_text("what stood there before")
    make()
    capsys.readouterr()
    assert_fails(capsys, arguments, message)


@pytest.mark.parametrize(
    "arguments",
    [EXPORT, ("convert", "disc.pt", "out.pt"), ("convert", "disc.pt", "out.safetensors")],
    ids=["export", "pt", "safetensors"],
)
def test_a_full_disk(folder, capsys, arguments):
    """No file may become longer than 2000 bytes: to a program, that is how a full disk looks."""
    Path(arguments[-1]).write_text("what stood there before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert_fails(capsys, arguments, f"{arguments[-1]} cannot be written: ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
