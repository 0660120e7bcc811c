"""What the programs of a Triton kernel read and write, seen in the interpreter.

It runs one program after the other, each as one thread. A GPU runs programs in any order and at once, and the
threads of each as well, but for its barriers: every launch is looked through for what could then go wrong.
"""

import contextlib
import gc
from types import SimpleNamespace

import numpy as np
import torch

MOST_BARRIERS = 256


def memory(x):
    """Where the elements of a tensor begin and end; None for all else that compilers and tests have left."""
    if type(x) is not torch.Tensor or x.device.type != "cpu":
        return None
    try:
        storage = x.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    except (NotImplementedError, RuntimeError):  # sparse, functional, a wrapper of torch.func
        return None


class Accesses:
    """Of one launch: every element that is read or written, where, by which program and when."""

    def __init__(self):
        self.program = self.barriers = self.time = 0
        self.reads, self.writes = [], []

    def note(self, accesses, pointers, mask, size):
        places = pointers[mask.astype(bool)].astype(np.int64)
        self.time += 1
        when = np.array([[self.program], [self.barriers], [self.time]])
        accesses.append(np.vstack([when.repeat(places.size, 1), places, places + size]))

    def check(self):
        """Raise an AssertionError where a GPU might do otherwise than the interpreter."""
        reads, writes = np.hstack(self.reads), np.hstack(self.writes)
        begins, ends = np.array(sorted({*filter(None, map(memory, gc.get_objects()))})).T
        for *_, places, places_end in (reads, writes):
            assert (places % (places_end - places) == 0).all(), "a place is not aligned"
            inside = places_end <= ends[np.searchsorted(begins, places, "right") - 1]
            assert inside.all(), "a place is outside of every tensor"

        written, first = np.unique(writes[3], return_index=True)
        writer = writes[0][first]
        assert (writer[np.searchsorted(written, writes[3])] == writes[0]).all(), (
            "two programs write one place"
        )
        nearest = np.searchsorted(written, reads[3]).clip(max=written.size - 1)
        is_written = written[nearest] == reads[3]
        assert (writer[nearest] == reads[0])[is_written].all(), "a program reads what another one writes"

        # What a program has written it may read behind a barrier only: another thread may have written it.
        assert self.barriers < MOST_BARRIERS
        written, first = np.unique(writes[3] * MOST_BARRIERS + writes[1], return_index=True)
        read = reads[3] * MOST_BARRIERS + reads[1]
        nearest = np.searchsorted(written, read).clip(max=written.size - 1)
        later = (written[nearest] == read) & (writes[2][first][nearest] < reads[2])
        assert not later.any(), "no barrier between write and read"


@contextlib.contextmanager
def checked(monkeypatch, barriers=True):
    """Every launch within is checked at its end; without ``barriers`` as if the kernels had none."""
    from triton.runtime import interpreter

    real, builder = interpreter._interpreter, interpreter.interpreter_builder
    launch, set_program = interpreter.GridExecutor.__call__, builder.set_grid_idx
    launches = []

    def load(pointers, mask, other, dtype):
        launches[-1].note(launches[-1].reads, pointers, mask, np.dtype(dtype).itemsize)
        return real.load(pointers, mask, other, dtype)

    def store(pointers, value, mask):
        launches[-1].note(launches[-1].writes, pointers, mask, value.dtype.itemsize)
        return real.store(pointers, value, mask)

    def set_grid_idx(x, y, z):
        launches[-1].program, launches[-1].barriers = x, 0
        set_program(x, y, z)

    def create_barrier():
        launches[-1].barriers += barriers

    def call(self, *args, **kwargs):
        launches.append(Accesses())
        launch(self, *args, **kwargs)
        launches[-1].check()

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
        patch.setattr(builder, "set_grid_idx", set_grid_idx)
        patch.setattr(builder, "create_barrier", create_barrier)
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        yield launches
