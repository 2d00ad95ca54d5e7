"""Run a function on several spawned ranks that form a gloo group, and collect what each returns."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

TIMEOUT_S = 280


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return what `function(*args)` returned on each rank; results travel by pickle, so no tensors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, answers, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, result, trouble = answers.get(timeout=TIMEOUT_S)
            assert trouble is None, f"rank {rank}:\n{trouble}"
            results[rank] = result
        for process in ranks:
            process.join(30)
    except Empty:
        raise AssertionError(f"ranks {set(range(world_size)) - set(results)} gave no answer") from None
    finally:
        for process in ranks:
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(function, rank, world_size, port, answers, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        answers.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise
