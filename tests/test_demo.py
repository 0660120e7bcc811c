"""The demo runs from end to end, here with a few steps in place of thousands."""

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DEMO = Path(__file__).parent.parent / "demo" / "run.py"


# PyTorch's, where it captures the critic on images that the generator has made.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_demo_leaves_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(DEMO), "--steps", "20", "--out", str(tmp_path)])
    # Inductor is for test_compile.py; here it would take most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DEMO), run_name="__main__")
    torch._dynamo.reset()
    # 1 says that the critic does not tell digits from noise yet, which 20 steps need not achieve.
    assert ended.value.code in (0, 1)
    assert {"critic.onnx", "digits.png", "sigma.png", "summary.md"} <= {f.name for f in tmp_path.iterdir()}
    summary = (tmp_path / "summary.md").read_text()
    assert capsys.readouterr().out.strip() == summary.strip()
    assert "agrees with the model on 3 batches" in summary
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert len(events.Scalars("sigma/layers.0.weight")) == 20
    assert "critic.onnx: 1 Conv, 3 Gemm, 3 LeakyRelu, 1 Mul, 1 Reshape" in summary
