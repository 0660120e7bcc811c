"""The package as a whole: what an import loads, what is public, that it is documented."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import specnorm_fx

# But for the C library, which is no Python module, and for `python -m`.
OTHERS = ("_cpu_kernels", "__main__")
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(specnorm_fx.__path__, "specnorm_fx.")
    if name.split(".")[1] not in OTHERS
]


def test_import_needs_torch_alone():
    heavy = {"onnx", "onnxruntime", "onnxscript", "triton", "torch._inductor", "torch._dynamo"}
    heavy |= {"torch.distributed.tensor"}
    show = "print(*sys.modules)"
    # torch takes numpy where it is, and does without it.
    alone = "import sys; sys.modules['numpy'] = None; import specnorm_fx; del sys.modules['numpy']"
    code = f"{alone}; specnorm_fx.onnx.export; {show}; import onnx; {show}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, with_onnx = (set(line.split()) for line in run.stdout.splitlines())
    assert not loaded & heavy
    # The check can fail:
    assert "onnx" in with_onnx


def test_the_command_says_that_it_needs_numpy():
    code = "import sys; sys.modules['numpy'] = None; from specnorm_fx.__main__ import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    # After what torch says about NumPy.
    assert run.stderr.endswith("specnorm-fx: error: it needs NumPy: pip install 'specnorm-fx[onnx]'.\n")


def test_public_names():
    assert specnorm_fx.__all__ == sorted(specnorm_fx.__all__)
    assert set(specnorm_fx.__all__) == {
        "FuseSpectralNorm",
        "SigmaLogger",
        "SpectralNormConfig",
        "SpectralNormPass",
        "convert_state_dict",
        "explain",
        "freeze",
        "frozen_state_dict",
        "gradient_penalty",
        "onnx",
        "report",
        "sigmas",
        "specnorm",
        "transform",
        "update_",
        "update_after",
        "warm_up_",
    }
    for name in specnorm_fx.__all__:
        assert getattr(specnorm_fx, name) is not None


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            doc = inspect.getdoc(value)
            assert doc, public
            if inspect.isfunction(value) and inspect.signature(value).parameters:
                for parameter in inspect.signature(value).parameters:
                    assert f"{parameter}:" in doc, f"{public} does not document {parameter}"


def test_unknown_options_are_refused_by_the_pass_as_well():
    with pytest.raises(TypeError, match=r"unknown option 'iterations'. Did you mean 'n_power_iterations'"):
        specnorm_fx.SpectralNormPass(iterations=3)
