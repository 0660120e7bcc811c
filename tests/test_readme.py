"""The code in the README and in docs/ runs, and the forwards the README prints are the real ones."""

import functools
import importlib.util
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import specnorm_fx
from specnorm_fx import cli
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run(name):
    """What the code blocks of a document define, run in order."""
    names = {}
    for number, code in enumerate(blocks((ROOT / name).read_text(), "python")):
        exec(compile(code, f"{name}, block {number}", "exec"), names)
    torch._dynamo.reset()
    return names


def without_inductor(patch):
    """Which takes long, and which test_compile.py, test_backend.py and test_gradient_penalty.py have."""
    torch_compile = torch.compile

    def compile_(*args, backend="aot_eager", options=None, **rest):
        options = {"inner": "aot_eager"} if backend == "specnorm" else options
        return torch_compile(*args, backend=backend, options=options, **rest)

    patch.setattr(torch, "compile", compile_)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        without_inductor(patch)
        names = run("README.md")
        assert Path("critic.onnx").is_file()
    return names


def test_the_page_on_gradient_penalties_runs(monkeypatch):
    without_inductor(monkeypatch)
    names = run("docs/gradient_penalty.md")
    assert all(p.isfinite().all() for p in names["critic"].parameters())


def run_the_page_on_training(rank, folder):
    os.chdir(folder)
    # Dynamo hides it, but not from a filter that makes it an error.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        patch.setattr(torch.distributed, "init_process_group", lambda backend: None)  # there is one
        names = run("docs/training.md")
    assert all(p.isfinite().all() for p in names["whole"].parameters())
    return {name: x.clone() for name, x in names["whole"].state_dict().items()}


def test_the_page_on_training_runs(tmp_path):
    """On two ranks, for its parts with several processes."""
    first, second = run_ranks(run_the_page_on_training, 2, str(tmp_path))
    saved = torch.load(tmp_path / "critic.pt", weights_only=True)
    assert first.keys() == second.keys() == saved.keys()
    assert all(torch.equal(first[name], x) and torch.equal(second[name], x) for name, x in saved.items())


def test_the_page_on_deployment_runs(tmp_path, monkeypatch, capsys):
    """Every command, in order, where it says what there is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    text = (ROOT / "docs" / "deploy.md").read_text()
    nets, training, serving = blocks(text, "python")
    Path("nets.py").write_text(nets)
    exec(compile(training, "docs/deploy.md, training", "exec"), {})
    np.save("real.npy", torch.randn(8, 3, 32, 32).numpy())
    Path("images").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (number * 40, 90, 200)).save(f"images/{number}.png")
    spec = importlib.util.spec_from_file_location("score", ROOT / "export" / "score.py")
    score = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(score)
    for line in "".join(blocks(text, "sh")).splitlines():
        program, *arguments = shlex.split(line)
        assert (program, arguments[0]) in {("python", "score.py")} or program == "specnorm-fx"
        code = cli.main(arguments) if program == "specnorm-fx" else score.main(arguments[1:])
        assert code == 0, (line, capsys.readouterr().err)
    exec(compile(serving, "docs/deploy.md, serving", "exec"), {})
    expected = {"critic.onnx", "critic.fp16.onnx", "critic.int8.onnx", "critic.png", "critic.html"}
    assert expected | {"scores.csv", "critic.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    assert len(Path("scores.csv").read_text().splitlines()) == 4


def printed(code):
    """Without the deletions of dead names that fx appends."""
    lines = [line.split(";")[0].rstrip() for line in code.strip().splitlines()]
    return "\n".join(line for line in lines if line.strip()) + "\n"


def test_the_printed_forwards_are_real(namespace):
    before, after = blocks(README, "text")
    assert printed(torch.fx.symbolic_trace(namespace["Critic"]()).code) == before
    assert printed(namespace["normalized"].code) == after


def test_the_loss_with_a_penalty_is_one_graph(namespace):
    # The README defines it only.
    got = namespace["critic_loss"](namespace["real"], namespace["fake"])
    got.backward()
    assert got.isfinite()
    torch._dynamo.reset()


def test_every_file_is_listed_and_exists():
    listed = re.findall(r"^\| `([^`]+)` \|", README, flags=re.MULTILINE)
    found = (ROOT / "specnorm_fx").rglob("*.py")
    files = [str(file.relative_to(ROOT)) for file in found if file.name != "__init__.py"]
    assert set(files) <= set(listed)
    for name in listed:
        assert (ROOT / name).exists(), name


def test_every_public_name_is_mentioned():
    for name in specnorm_fx.__all__:
        assert name in README, name
