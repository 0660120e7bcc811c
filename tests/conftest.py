import os

import pytest
import torch

# Many small operations: a second thread gains nothing, and on a busy machine each waits for the other.
torch.set_num_threads(1)

# For Inductor with nothing in its cache, here and in other processes: which vectors there are the processor
# says; to try them by compiling takes longer than these models do, and so does to start a pool of processes.
os.environ |= {"TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
