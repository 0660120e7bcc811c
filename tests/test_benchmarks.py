"""The benchmark runs from end to end, here on its smallest model; what it measures is not looked at."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(program, *arguments, **environment):
    # In a process of its own, as users run it. One thread: see conftest.py.
    command = [sys.executable, BENCHMARKS / program, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    what = ["--only", "step", "sn", "penalty", "onnx", "--modes", "eager"]
    printed = run("run.py", "--models", "mlp", *what, "--quick", "--out", out)
    (path,) = out.glob("cpu-*.json")
    return printed, path


def medians(tree):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from medians(value)
        elif key in ("median", "p20", "p80", "of_medians"):
            yield value


def test_measures_every_variant(measured):
    _, path = measured
    results = json.loads(path.read_text())
    model = results["models"]["mlp"]
    assert (model["parameters"], model["normalized_layers"]) == (335_617, 7)
    step, sn, penalty = (model[what]["eager"] for what in ("step", "sn", "penalty"))
    assert list(step) == list(penalty) == ["none", "torch", "legacy", "ours"]
    for variant in ("torch", "legacy", "ours"):
        assert step[variant]["over_none"].keys() == {"median", "p20", "p80", "of_medians"}
        assert penalty[variant]["over_none"].keys() == {"median", "p20", "p80", "of_medians"}
        for entry in sn[variant].values():
            assert {"samples", "over_copy"} <= entry.keys()  # no "fails"
    # step and penalty: 4 times, 3 ratios each to none, torch and ours. sn: 6 times, 4 ratios to torch, 4 to
    # ours, 6 to the copy; the copy.
    values = list(medians({what: model[what] for what in ("step", "sn", "penalty")}))
    assert len(values) == 3 * (2 * 4 + 6 + 1) + 4 * (2 * (3 + 3 + 3) + 4 + 4 + 6)
    assert min(values) > 0


def test_measures_onnx_files(measured):
    files = json.loads(measured[1].read_text())["models"]["mlp"]["onnx"]
    simplified = [name for name in ("onnxsim", "onnxslim") if importlib.util.find_spec(name)]
    assert list(files) == ["none", "torch", *simplified, "ours"]
    none, theirs, ours = files["none"], files["torch"], files["ours"]
    # Beside the seven Gemm and six LeakyRelu, what each layer's spectral norm leaves; ours leaves nothing.
    assert none["nodes"] == ours["nodes"] == 13 < theirs["nodes"]
    # 335,617 parameters in fp32, and names.
    assert 4 * 335_617 < ours["bytes"] < theirs["bytes"] < 1.05 * 4 * 335_617
    for entry in files.values():
        assert min(medians({name: entry[name] for name in ("latency", "loading")})) > 0
        assert {"over_none"} <= entry["latency"].keys() or entry is none


def test_tells_nothing_of_the_machine_but_its_kind(measured):
    _, path = measured
    results = json.loads(path.read_text())
    known = {"device", "date", "torch", "python", "cpu", "threads", "onnx", "onnxruntime", "onnxscript"}
    assert results["environment"].keys() - {"onnxsim", "onnxslim"} == known
    assert str(path.parent) not in path.read_text()
    assert os.uname().nodename not in path.read_text()


def test_prints_the_tables_it_leaves(measured):
    printed, path = measured
    text = path.with_suffix(".md").read_text()
    assert printed.strip() == text.strip()
    assert "| mlp | eager | forward + backward | " in text
    assert "## ONNX Runtime: latency, ms" in text
    assert "fails" not in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_reports_of_another_machine_and_of_failures(measured, tmp_path):
    results = json.loads(measured[1].read_text())
    results["environment"] |= {"device": "cuda", "gpu": "a GPU"}
    model = results["models"]["mlp"]
    for entry in model["step"]["eager"].values():
        entry["launches"] = {"kernels": 41, "copies": 2, "launches": 43}
    model["step"]["eager"]["legacy"] = {"fails": "RuntimeError: modified"}
    backend = model["step"]["eager"]["torch"] | {"over_ours": {"median": 1.03}}
    model["step"]["compiled"] = model["step"]["eager"] | {"backend": backend}
    compiled = {v: {**entry, "over_eager": {"median": 0.5}} for v, entry in model["penalty"]["eager"].items()}
    model["penalty"]["compiled"] = compiled
    path = tmp_path / "cuda.json"
    path.write_text(json.dumps(results))
    # A machine without matplotlib.
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    root = str(BENCHMARKS.parent)
    printed = run("report.py", path, PYTHONPATH=os.pathsep.join([str(tmp_path), root]))
    assert "| mlp | eager | step | 41 + 2 [43] | 41 + 2 [43] | fails | 41 + 2 [43] | - |" in printed
    assert re.search(r"\| mlp \| compiled \| .* \| 1.03 \|", printed)
    assert "- mlp / step / eager / legacy: RuntimeError: modified" in printed
    assert printed.count(" x0.500 |") == 4
    assert "No matplotlib here" in printed
    assert not path.with_suffix(".png").exists()


@pytest.fixture
def program(monkeypatch):
    """`run.py`, with a clock that stands still."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("run")
    module.clock = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: module.clock))
    monkeypatch.setattr(module, "pin_allocator", lambda: None)
    monkeypatch.setattr(module.report, "write", lambda path: None)
    return module


def test_on_cuda_what_is_wanted_most_comes_first(program):
    args = program.parse(["--device", "cuda", "--models", "patchgan", "mlp"])
    assert (args.minutes, args.seconds) == (9.0, 3.0)
    parts = list(map(str, program.parts(args)))
    assert parts[:9] == [
        *("mlp: sn eager", "mlp: step eager", "patchgan: sn eager", "patchgan: step eager"),
        *("mlp: sn compiled", "mlp: step compiled", "mlp: sn reduce-overhead", "mlp: step reduce-overhead"),
        "patchgan: sn compiled",
    ]
    # sn, step and memory in each of three modes; penalty and compile once.
    assert len(set(parts)) == len(parts) == 2 * (3 * 3 + 2)
    assert "mlp: penalty eager, compiled, reduce-overhead" in parts
    assert parts[-1] == "patchgan: memory reduce-overhead"


def test_variants_that_are_left_out(program):
    args = program.parse(["--quick", "--modes", "eager", "--without", "legacy"])
    mlp = program.CASES["mlp"]
    assert list(program.measure_step(mlp, args)["eager"]) == ["none", "torch", "ours"]
    assert list(program.measure_sn(mlp, args)["eager"]) == ["torch", "ours"]


def test_a_run_ends_in_time_and_goes_on(program, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(what, case, args):
        program.clock += 25
        measured.append(what)
        return {mode: {} for mode in args.modes}

    for what in ("step", "sn", "penalty"):
        monkeypatch.setitem(program.MEASUREMENTS, what, partial(measure, what))
    command = [*("--models", "mlp", "--only", "step", "sn", "penalty"), "--out", str(tmp_path)]

    def runs():
        return json.loads(next(tmp_path.glob("*.json")).read_text())["runs"]

    program.main([*command, "--minutes", "1"])  # a third part would take until 75 s
    assert measured == ["step", "sn"]
    assert runs()[0]["left_out"] == ["mlp: penalty eager, compiled"]
    assert "--models mlp --only penalty --modes eager compiled --out" in capsys.readouterr().err
    program.main(command)
    assert measured == ["step", "sn", "penalty"]
    assert runs()[1]["left_out"] == []
    program.main(command)
    assert len(measured) == 3
    program.main([*command, "--again"])
    assert len(measured) == 6


def test_the_first_call_and_transform_are_timed(program, monkeypatch):
    fresh = importlib.import_module("fresh")
    monkeypatch.setattr("torch.compile", lambda function: function)
    measured = fresh.first_compile(program.CASES["mlp"], "ours", "eager", "cpu")
    assert measured.keys() == {"seconds", "transform"}
    assert min(measured.values()) > 0


def test_memory_is_that_of_the_fresh_process():
    (line,) = run("fresh.py", "memory", "mlp", "none", "eager", "cpu").splitlines()
    # Python with torch, in bytes.
    assert 2**26 < json.loads(line)["bytes"] < 2**32
