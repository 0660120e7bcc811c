"""The README's code runs, and the forwards it prints are the real ones."""

import re
from pathlib import Path

import pytest
import torch

import specnorm_fx

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """What the README's code blocks define, run in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        names = {}
        for number, code in enumerate(blocks("python")):
            exec(compile(code, f"README.md, block {number}", "exec"), names)
        assert Path("critic.onnx").is_file()
    torch._dynamo.reset()
    return names


def printed(code):
    """Without the deletions of dead names that fx appends."""
    lines = [line.split(";")[0].rstrip() for line in code.strip().splitlines()]
    return "\n".join(line for line in lines if line.strip()) + "\n"


def test_the_printed_forwards_are_real(namespace):
    before, after = blocks("text")
    assert printed(torch.fx.symbolic_trace(namespace["Critic"]()).code) == before
    assert printed(namespace["normalized"].code) == after


def test_every_file_is_listed_and_exists():
    listed = re.findall(r"^\| `([^`]+)` \|", README, flags=re.MULTILINE)
    files = [f"specnorm_fx/{p.name}" for p in (ROOT / "specnorm_fx").glob("*.py") if p.name != "__init__.py"]
    assert set(files) <= set(listed)
    for name in listed:
        assert (ROOT / name).exists(), name


def test_every_public_name_is_mentioned():
    for name in specnorm_fx.__all__:
        assert name in README, name
