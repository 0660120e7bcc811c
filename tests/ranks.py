"""A function on several ranks: processes of this machine, connected by gloo."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from datetime import timedelta

import torch

# One process imports all that takes long, and the ranks are forked from it: starting them takes a tenth of a
# second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch._inductor.compile_fx",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "pytest",
        "specnorm_fx",
        "tests.models",
    ]
)


def run_ranks(function, world_size, *args, check=True, timeout=60, backend_timeout=30):
    """``function(rank, *args)`` on every rank, in a process group.

    Args:
        function: At the head of a module, so that it can be pickled; so can what it returns.
        world_size: How many ranks.
        args: Passed on.
        check: Raise what a rank has raised. Else return it in place of the result (a traceback), and
            None for a rank that died.
        timeout: Seconds after which the ranks are killed, and the test fails.
        backend_timeout: Seconds that gloo waits for another rank.

    Returns:
        The results, by rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _context.Process(
                target=_rank, args=(rank, world_size, folder, backend_timeout, writer, function, args)
            )
            for rank, (_, writer) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        deadline = time.monotonic() + timeout
        try:
            outcomes = [_outcome(reader, deadline) for reader, _ in pipes]
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()
    if check:
        for rank, (_, error) in enumerate(outcomes):
            assert error is None, f"rank {rank}:\n{error}"
    return [value if error is None else error for value, error in outcomes]


def _outcome(reader, deadline):
    assert reader.poll(max(0, deadline - time.monotonic())), "a rank hangs"
    try:
        return pickle.loads(reader.recv_bytes())
    except EOFError:
        return None, "died"


def _rank(rank, world_size, folder, backend_timeout, writer, function, args):
    warnings.simplefilter("error")
    # torch 2.13 using, inside itself, what it has deprecated; as in pyproject.toml.
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=backend_timeout),
    )
    try:
        outcome = function(rank, *args), None
        torch.distributed.barrier()  # a rank that leaves early breaks the connections of the others
        torch.distributed.destroy_process_group()
    except BaseException:
        outcome = None, traceback.format_exc()
    writer.send_bytes(pickle.dumps(outcome))
