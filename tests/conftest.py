import copy
import functools
import gc
import os
import sys

import pytest
import torch

# Many small operations: a second thread gains nothing, and on a busy machine each waits for the other.
torch.set_num_threads(1)
# cuDNN would else round what it multiplies in fp32 to ten bits, on GPUs that can.
torch.backends.cudnn.allow_tf32 = False

GPU_FILES = ("test_gpu.py", "test_triton_kernels.py")

# For Inductor with nothing in its cache, here and in other processes: C++ without vectors compiles in three
# quarters of the time, and to start a pool of processes takes longer than these models do.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
if not torch.cuda.is_available():
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` looks into no other file: a machine with a GPU may lack what the others import."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return collection_path.name not in GPU_FILES or None
    return None


def _fill_the_exporters_table_once():
    """torch.onnx.export reads the source of five hundred functions, each time: three quarters of its work."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    fill = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args, **options):
        registry = copy.copy(fill(*args, **options))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)


def pytest_collection_finish():
    if "onnxruntime" in sys.modules:
        _fill_the_exporters_table_once()
    # What is imported by now stays, and tracers make objects by the million: looking through all of them for
    # cycles, as often as Python does by default, takes a tenth of the time of the tests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_collection_modifyitems(items):
    # What torch has to say on CUDA (TF32, prototypes, capturable optimizers) depends on the GPU and its
    # build: there a warning is shown and no error.
    marker = pytest.mark.filterwarnings("default")
    if not torch.cuda.is_available():
        marker = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(marker)
