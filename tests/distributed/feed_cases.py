"""Stores whose rows say who they are, and a reader of the feed that is set up as Ray Train does it."""

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import ray
from ray.data import Dataset, ExecutionOptions
from ray.train import DataConfig

from raydistill.artifacts import LatentStore
from raydistill.experts import checkpoint
from raydistill.experts.launch import Worker
from raydistill.latents.shards import latent_row, write_shard
from raydistill.shards import write_artifact
from raydistill.trajectories.flow import iter_batches
from raydistill.trajectories.loader import Loader
from raydistill.trajectories.plan import Plan, Source
from raydistill.types import Batch

LATENTS, TEXT = (2, 3, 2, 2), (2, 4)


def write_store(folder: Path, num_rows: int, offset: int, shape: Sequence[int] = LATENTS) -> Path:
    """Write a latents artifact of two shards in which every number of row i is offset + i."""
    shards = []
    for order, numbers in enumerate(np.array_split(np.arange(num_rows), 2)):
        rows = [
            latent_row(
                np.full(shape, offset + i, np.float32),
                np.full(TEXT, offset + i, np.float32),
                f"row {i}",
                str(i),
            )
            for i in numbers
        ]
        shards.append(write_shard(folder, f"part-{order}", rows, {"test": 1}, order=order, rows_per_group=1))
    write_artifact(folder, shards, {"test": 1})
    return folder


def plan_of(stores: dict[str, Path], weights: dict[str, float], **settings: int) -> Plan:
    """Return the plan over some stores."""
    opened = {name: LatentStore(path) for name, path in stores.items()}
    sources = tuple(
        Source(name=name, num_rows=len(store), weight=weights[name], digest=store.fingerprint)
        for name, store in opened.items()
    )
    return Plan(sources=sources, **settings)


def shards_of(dataset: Dataset, world_size: int) -> list:
    """Split a feed as Ray Train does, with the options that the launcher gives it."""
    config = DataConfig(execution_options=ExecutionOptions(preserve_order=True))
    nodes = [ray.nodes()[0]["NodeID"]] * world_size
    return [split["train"] for split in config.configure({"train": dataset}, world_size, None, nodes)]


def read_together(
    dataset: Dataset,
    plan: Plan,
    world_size: int,
    micro_batch: int,
    start_step: int,
    *,
    most: int | None = None,
) -> list[list[Batch]]:
    """Return every rank's batches, or the first of them, the ranks reading at the same time."""

    def read(rank: int) -> list[Batch]:
        return list(islice(iter_batches(shards[rank], plan, rank, world_size, micro_batch, start_step), most))

    shards = shards_of(dataset, world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(read, range(world_size)))


def samples_of(batches: Sequence[Batch]) -> Iterator[tuple[int, bytes]]:
    """Yield (g, bytes of the sample)."""
    for batch in batches:
        for at, g in enumerate(batch.index.tolist()):
            yield g, batch.latents[at].numpy().tobytes() + batch.text[at].numpy().tobytes()


def stream_sha(batches_by_rank: Sequence[Sequence[Batch]]) -> str:
    """Return one sha256 over the (g, sample) stream of all ranks, in the order of g."""
    samples = [pair for batches in batches_by_rank for pair in samples_of(batches)]
    digest = hashlib.sha256()
    for g, sample in sorted(samples):
        digest.update(g.to_bytes(8, "little") + sample)
    return digest.hexdigest()


def sha_by_plan(plan: Plan, stores: dict[str, Path], start: int, stop: int) -> str:
    """Return the same sha256, from the plan and the stores alone."""
    opened, digest = {name: LatentStore(path) for name, path in stores.items()}, hashlib.sha256()
    for item in map(plan.item, range(start, stop)):
        row = opened[item.source].row(item.row)
        digest.update(item.index.to_bytes(8, "little") + row.latents.tobytes() + row.text.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class MortalLoader(Loader):
    """A loader whose process is killed at one step, once, having delivered blocks of the same task before."""

    fatal: int = 0
    grave: str = ""

    def block(self, steps: range, rank: int) -> dict[str, np.ndarray]:
        if self.fatal in steps and not os.path.exists(self.grave):
            with open(self.grave, "x"):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().block(steps, rank)


def train_and_record(worker: Worker) -> None:
    """A training that only notes what it gets."""
    plan, micro_batch, num_steps = worker.config
    place = (worker.rank, worker.world_size, micro_batch, worker.start_step)
    seen = samples_of(list(iter_batches(worker.shard, plan, *place)))
    lines = [hashlib.sha256(b"%d:" % g + sample).hexdigest() for g, sample in seen]
    (worker.run_dir / f"rank-{worker.rank}").write_text("\n".join(lines))
    checkpoint.save(worker.run_dir, replace(worker.state, step=num_steps), parts={})
