"""An exported file where people serve it: three runtimes give the model's scores, and threads share one."""

import itertools
import threading
import time

import numpy as np
import onnxruntime
import openvino
import torch
from onnx.reference import ReferenceEvaluator
from torch.utils._pytree import tree_leaves

import specnorm_fx
from tests.architectures import ARCHITECTURES, PatchGAN
from tests.models import parametrize


def by_onnx_runtime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def by_openvino(path):
    # Where the processor has bf16 it computes in it, unless told not to.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda feeds: [compiled(feeds)[output] for output in compiled.outputs]


def by_reference(path):
    evaluator = ReferenceEvaluator(str(path))
    return lambda feeds: evaluator.run(None, feeds)


def in_float64(module, batch):
    """All that a model gives, computed in float64."""
    with torch.no_grad():
        outputs = module.double()(*(x.double() if x.is_floating_point() else x for x in batch))
    return [output.numpy() for output in tree_leaves(outputs)]


def worst(got, truth):
    """The largest difference of an output, relative to its largest value."""
    for g, t in zip(got, truth, strict=True):
        assert g.shape == t.shape
    return max(np.abs(g - t).max() / np.abs(t).max() for g, t in zip(got, truth, strict=True))


def tolerance(model):
    """Of fp32 outputs: n roundings of a sum of n products add up, at random, to about sqrt(n) units.

    Spectral norm sees to it that a layer hardly enlarges the errors of those before, so layers add up.
    """
    return np.finfo(np.float32).eps * sum(site.weight[0].numel() ** 0.5 for site in model.sites())


RUNTIMES = (by_onnx_runtime, by_openvino, by_reference)


@parametrize([case for case in ARCHITECTURES if "export" in case.captures])
def test_every_runtime_gives_the_scores_of_the_model(case, tmp_path):
    """By trace where that works, else by torch.export; at batch sizes of which the exporter knew nothing."""
    options = {}
    if "trace" not in case.captures:
        options = {"example_inputs": case.inputs(), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    model = specnorm_fx.transform(case.build().eval(), "*", **options)
    path = tmp_path / "d.onnx"
    specnorm_fx.onnx.export(model, case.inputs(), path, dynamic_batch=True)
    frozen, limit = specnorm_fx.freeze(model), tolerance(model)
    names = [node.name for node in onnxruntime.InferenceSession(path).get_inputs()]
    runtimes = {runtime.__name__: runtime(path) for runtime in RUNTIMES}
    for size in (1, 9):
        batch = case.inputs(size)
        feeds = {name: x.numpy() for name, x in zip(names, batch, strict=True)}
        outputs, truth = {name: run(feeds) for name, run in runtimes.items()}, in_float64(frozen, batch)
        errors = {name: worst(got, truth) for name, got in outputs.items()}
        assert max(errors.values()) < limit, errors
    # The check can fail: a weight that is off by a thousandth is found.
    frozen.get_parameter(model.sites()[-1].fqn).data *= 1.001
    nearly = in_float64(frozen, batch)
    assert all(worst(got, nearly) > limit for got in outputs.values())


def test_every_runtime_gives_them_in_half_precision(tmp_path):
    model = specnorm_fx.transform(PatchGAN().eval())
    x = torch.randn(3, 3, 32, 32)
    specnorm_fx.onnx.export(model, x, tmp_path / "d.onnx", dynamic_batch=True, precision="fp16")
    truth, fp32 = in_float64(specnorm_fx.freeze(model), (x,)), tolerance(model)
    errors = {run.__name__: worst(run(tmp_path / "d.onnx")({"x": x.numpy()}), truth) for run in RUNTIMES}
    # Of weights in half precision at the least; of runtimes that add in it, at the most.
    assert min(errors.values()) > fp32, errors
    assert max(errors.values()) < fp32 * np.finfo(np.float16).eps / np.finfo(np.float32).eps, errors


REQUESTS, THREADS = 5000, 32


def test_threads_share_a_session(tmp_path):
    """5,000 requests of their own on 32 threads: each gets the answer that it gets alone, bit for bit."""
    torch.manual_seed(0)
    critic = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 4, 2, 1), torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(8, 16, 4, 2, 1)),
        *(torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), torch.nn.Linear(16 * 4 * 4, 1)),
    )
    model = specnorm_fx.transform(critic).eval()
    path = tmp_path / "critic.onnx"
    specnorm_fx.onnx.export(model, torch.randn(2, 3, 16, 16), path, dynamic_batch=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the requests are the parallel part
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (node.name for node in session.get_inputs())
    # Of one image to three: the session's buffers change with the size.
    images = np.random.default_rng(0).standard_normal((REQUESTS + 2, 3, 16, 16), np.float32)
    requests = [images[i : i + 1 + i % 3] for i in range(REQUESTS)]

    def answer(request):
        (scores,) = session.run(None, {name: request})
        return scores

    alone = [answer(request) for request in requests]
    assert len({scores.tobytes() for scores in alone}) == REQUESTS  # so a mixed one is found
    answers, spans, begin = [None] * REQUESTS, [None] * REQUESTS, threading.Barrier(THREADS)

    def serve(first):
        begin.wait()
        for i in range(first, REQUESTS, THREADS):
            start = time.perf_counter()
            answers[i] = answer(requests[i])
            spans[i] = start, time.perf_counter()

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(answers, alone, strict=True):
        np.testing.assert_array_equal(got, expected)
    # They did meet in the session: some request began before the one begun just before it had ended.
    spans.sort()
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))
