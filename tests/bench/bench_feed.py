"""What Ray Data costs: the plan's rows through the feed, over the same rows read from the store directly.

    python tests/bench/bench_feed.py [steps] [workers]

Small-world rows of 5 kB, 16 per worker and step: the worst case, since the cost is per block. Ratios of one
run; read them on an idle machine. The feed's first blocks come seconds after its start and count apart.
"""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import ray
from ray.data import ExecutionOptions
from ray.train import DataConfig

from raydistill.artifacts import LatentStore
from raydistill.flow import connect
from raydistill.latents.shards import latent_row, write_shard
from raydistill.shards import write_artifact
from raydistill.trajectories.flow import feed, iter_batches
from raydistill.trajectories.plan import Plan, Source

LATENTS, TEXT, ROWS, PER_WORKER = (4, 16, 4, 4), (8, 32), 256, 16


def write_rows(folder: Path) -> LatentStore:
    """Write latents of noise."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal
    rows = [
        latent_row(normal(LATENTS, np.float32), normal(TEXT, np.float32), f"row {i}", str(i))
        for i in range(ROWS)
    ]
    shard = write_shard(folder, "part-0", rows, {"bench": 1}, order=0, rows_per_group=1)
    write_artifact(folder, [shard], {"bench": 1})
    return LatentStore(folder)


def cpu_seconds() -> dict[int, float]:
    """CPU seconds of this process and of each of its descendants, by process id."""
    used = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        used[process.pid] = times.user + times.system
    return used


def direct(plan: Plan, store: LatentStore, steps: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, per row of a loop over the plan that opens the store once."""
    began, cpu = time.perf_counter(), time.process_time()
    count = steps * plan.global_batch
    for g in range(count):
        store.row(plan.item(g).row)
    return (time.perf_counter() - began) / count, (time.process_time() - cpu) / count


def fed(plan: Plan, store: LatentStore, steps: int, workers: int) -> tuple[float, float, float]:
    """Seconds to the first step, then seconds and CPU seconds per row, with readers that do nothing else."""
    data = feed(
        plan,
        {"bench": store.folder},
        start_step=0,
        num_steps=steps,
        world_size=workers,
        micro_batch=PER_WORKER,
    )
    config = DataConfig(execution_options=ExecutionOptions(preserve_order=True))
    nodes = [ray.nodes()[0]["NodeID"]] * workers
    shards = [split["train"] for split in config.configure({"train": data}, workers, None, nodes)]
    began = time.perf_counter()

    def read(rank: int) -> tuple[float, dict[int, float]]:
        batches = iter_batches(shards[rank], plan, rank, workers, PER_WORKER, 0)
        next(batches)
        first, cpu = time.perf_counter(), cpu_seconds()
        for _ in batches:
            pass
        return first, cpu

    with ThreadPoolExecutor(workers) as pool:
        firsts = list(pool.map(read, range(workers)))
    ended, after = time.perf_counter(), cpu_seconds()
    first, before = max(firsts, key=lambda pair: pair[0])
    rows = (steps - 1) * plan.global_batch
    used = sum(now - before.get(pid, 0.0) for pid, now in after.items())
    return first - began, (ended - first) / rows, used / rows


def main() -> None:
    """Print the ratios."""
    steps, workers = (int(a) for a in (*sys.argv[1:], *("300", "2")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        store = write_rows(Path(folder))
        source = Source(name="bench", num_rows=ROWS, digest=store.fingerprint)
        plan = Plan(seed=0, global_batch=PER_WORKER * workers, sources=(source,))
        wall, cpu = direct(plan, store, steps)
        with connect(num_cpus=2, object_store_mib=200):
            fed(plan, store, 4, workers)  # Ray starts its processes
            start, fed_wall, fed_cpu = fed(plan, store, steps, workers)
    extra = 1e3 * (fed_cpu - cpu) * PER_WORKER
    print(f"direct: {1 / wall:.0f} rows/s, {1e3 * cpu:.2f} ms of CPU per row")
    print(
        f"feed:   {1 / fed_wall:.0f} rows/s, {1e3 * fed_cpu:.2f} ms of CPU per row; began after {start:.1f} s"
    )
    print(f"feed over direct: {wall / fed_wall:.2f} in rows/s, {fed_cpu / cpu:.2f} in CPU")
    print(f"a worker's step of {PER_WORKER} rows takes {extra:.1f} ms of CPU more than reading them")


if __name__ == "__main__":
    main()
