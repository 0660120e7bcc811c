"""The demo runs from end to end, here with a few steps in place of thousands."""

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DEMO = Path(__file__).parent.parent / "demo" / "run.py"


def test_demo_leaves_its_results(tmp_path):
    # In a process of its own, as users run it.
    command = [sys.executable, DEMO, "--steps", "20", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    # 1 says that the critic does not tell digits from noise yet, which 20 steps need not achieve.
    assert run.returncode in (0, 1), run.stderr
    assert {"critic.onnx", "digits.png", "sigma.png", "summary.md"} <= {f.name for f in tmp_path.iterdir()}
    summary = (tmp_path / "summary.md").read_text()
    assert run.stdout.strip() == summary.strip()
    assert "agrees with the model on 3 batches" in summary
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert len(events.Scalars("sigma/layers.0.weight")) == 20
    assert "critic.onnx: 1 Conv, 3 Gemm, 3 LeakyRelu, 1 Mul, 1 Reshape" in summary
