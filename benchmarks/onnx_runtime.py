"""What spectral norm leaves in an ONNX file: size, nodes, and the time ONNX Runtime takes."""

import importlib.metadata
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleave
from models import Case
from torch import Tensor, nn
from variants import build

import specnorm_fx

__all__ = ["ONNX_LABELS", "measure_files", "versions"]

ONNX_LABELS = {
    "none": "no SN",
    "torch": "torch SN",
    "onnxsim": "torch SN, onnxsim",
    "onnxslim": "torch SN, onnxslim",
    "ours": "specnorm_fx",
}
SIMPLIFIERS = ("onnxsim", "onnxslim")  # of the extra `bench`; left out where they are not installed


def measure_files(case: Case, repetitions: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Latency of a batch of one, loading, size and nodes, by variant.

    Args:
        case: The model.
        repetitions: Rounds at most, of latency and of loading.
        seconds: Budget of each.
    """
    import onnx

    inputs = case.inputs(1, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        paths = _export(case, inputs, Path(folder))
        load = {variant: _loading(path) for variant, path in paths.items()}
        run = {variant: _running(load[variant](), inputs) for variant in paths}
        latency = interleave(run, "cpu", repetitions, seconds)
        loading = interleave(load, "cpu", repetitions, seconds)
        return {
            variant: {
                "latency": latency[variant].summary(over_none=latency["none"]),
                "loading": loading[variant].summary(over_none=loading["none"]),
                "bytes": path.stat().st_size,
                "nodes": len(onnx.load(path).graph.node),
            }
            for variant, path in paths.items()
        }


def versions() -> dict[str, str]:
    """Of the packages that take part, those that are installed."""
    packages = ("onnx", "onnxruntime", "onnxscript", *SIMPLIFIERS)
    return {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}


def _export(case: Case, inputs: tuple[Tensor, ...], folder: Path) -> dict[str, Path]:
    """The file of each variant, in the order of the labels."""
    paths = {variant: folder / f"{variant}.onnx" for variant in ONNX_LABELS}
    for variant in ("none", "torch"):
        _by_the_stock_exporter(build(case, variant, "cpu").eval(), inputs, paths[variant])
    for simplifier in SIMPLIFIERS:
        if simplifier in versions():
            _simplified(simplifier, paths["torch"], paths[simplifier])
        else:
            del paths[simplifier]
    specnorm_fx.onnx.export(build(case, "ours", "cpu").eval(), inputs, paths["ours"], n_batches=1)
    return paths


def _by_the_stock_exporter(model: nn.Module, inputs: tuple[Tensor, ...], written: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it says about itself
        torch.onnx.export(model, inputs, dynamo=True, verbose=False).save(written)


def _simplified(simplifier: str, source: Path, written: Path) -> None:
    import onnx

    if simplifier == "onnxsim":
        import onnxsim

        simple, _ = onnxsim.simplify(onnx.load(source))
    else:
        import onnxslim

        simple = onnxslim.slim(onnx.load(source))
    onnx.save(simple, written)


def _loading(path: Path) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # As on a server with many requests. To wake a second thread would be most of what the MLP takes.
    options.intra_op_num_threads = 1
    return lambda: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _running(session: Any, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    names = [node.name for node in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return lambda: session.run(None, feeds)
