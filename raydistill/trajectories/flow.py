"""Ray Data: the plan's samples, read ahead of the training and delivered in order.

A row of the feed is what one worker needs for one optimiser step, or for a few steps where samples are small,
and every row is a block of its own. Ray Train's splitter, told to preserve order and to split equally, gives
each next block to the worker with the fewest rows so far, the lowest rank first: block k goes to rank
k mod world size. Its documentation promises no order, so every row carries its global sample indices and
`iter_batches` compares them with the plan.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray.data
import ray.exceptions
from ray.data import DataContext, Dataset, TaskPoolStrategy

from raydistill.artifacts import canonical_json
from raydistill.errors import CorruptArtifact, InvalidValue, PlanMismatch
from raydistill.flow import Paced, raised_by_us
from raydistill.trajectories.lanes import IMAGE, RECORDED, Intervals, Lanes, as_lanes
from raydistill.trajectories.loader import NO_SAMPLE, TENSORS, Loader, checked_paths, row_bytes
from raydistill.trajectories.plan import Plan

if TYPE_CHECKING:
    from raydistill.types import Batch

logger = logging.getLogger(__name__)
for _handler in logging.getLogger("ray.data").handlers:
    # Here, because Ray Data runs in processes of its own, which all import this file to build a `Loader`.
    # Its log file keeps everything; the console has the training's progress bar.
    if _handler.get_name() == "console":
        _handler.setLevel(logging.ERROR)

BLOCK_BYTES = 2**20
"""A block costs Ray and its reader some 15 ms of CPU whatever its size: steps that need less share one."""
MOST_STEPS = 16
BLOCKS_PER_TASK = 4
"""Fewer make Ray's cost per task felt; more are read again when a loader is lost."""
MOST_TASKS = 1024
CPUS_PER_LOADER = 0.25
"""Reading is short and mostly waiting, and the training should have the cores."""
FEW_REPLACED, MOST_REPLACED = 16, 0.05
"""Damaged rows of a worker that are let pass, and the share of all samples above which they are not."""
PREFETCHED = 2
"""Blocks on their way to a worker while it trains on another."""


def feed(
    plan: Lanes | Plan,
    stores: Mapping[str, str | Path],
    *,
    start_step: int,
    num_steps: int,
    world_size: int,
    micro_batch: int,
    steps_per_block: int | None = None,
    num_loaders: int | None = None,
    interval_of: Intervals | None = None,
) -> Dataset:
    """Return the samples of the steps from `start_step` to before `num_steps`, for `world_size` workers.

    `stores` names the artifact of each of the plan's sources, and may name others. To be given to Ray Train
    with `DataConfig(execution_options=ExecutionOptions(preserve_order=True))`; each worker reads its shard
    with `iter_batches`. Nothing is read before a worker asks, and memory does not grow with steps.

    `steps_per_block`: by default 1, more only where a worker's samples of a step take less than 1 MiB.
    `interval_of` says which two neighbouring states of its path a recorded sample needs.
    `num_loaders` tasks read at a time, each on a quarter of a CPU; by default half as many as there are
    workers, but 2 at least.

    Raises InvalidValue for sizes that do not divide, StaleArtifact if a store is not the plan's source,
    MissingArtifact or CorruptArtifact if it cannot be opened.
    """
    lanes = as_lanes(plan)
    lanes.require_divisible(world_size, micro_batch)
    if RECORDED in lanes.lanes and interval_of is None:
        raise InvalidValue("interval_of", None, "needed for recorded paths")
    if not 0 <= start_step < num_steps:
        raise InvalidValue("start_step", start_step, f"must be in [0, num_steps = {num_steps})")
    paths = checked_paths(lanes, stores)
    per_block = steps_per_block or _steps_per_block(lanes, world_size, paths)
    blocks = -(-(num_steps - start_step) // per_block) * world_size
    per_task = max(BLOCKS_PER_TASK, -(-blocks // MOST_TASKS))
    steps = range(start_step, num_steps)
    loader = Loader(lanes, paths, steps, world_size, per_block, per_task, interval_of)
    num_tasks = -(-blocks // per_task)
    tasks = ray.data.from_items(list(range(num_tasks)), override_num_blocks=num_tasks)
    at_a_time = min(num_loaders or max(2, world_size // 2), num_tasks)
    read = tasks.map_batches(
        cast(Any, loader),  # its own type says more than Ray's: a batch is a dict of arrays
        batch_size=1,
        batch_format="numpy",
        compute=TaskPoolStrategy(size=at_a_time),
        num_cpus=CPUS_PER_LOADER,
    )
    return _configured(read)


def iter_batches(
    shard: Any,
    plan: Lanes | Plan,
    rank: int,
    world_size: int,
    micro_batch: int,
    start_step: int,
    *,
    quarantine: str | Path | None = None,
) -> Iterator["Batch"]:
    """Yield a worker's micro-batches in the order of the plan, to the end of its shard of the feed.

    Samples that had to be replaced because their rows are damaged are logged, and written as lines of JSON to
    the file `quarantine` with the rank before its suffix. Raises InvalidValue for sizes that do not divide,
    PlanMismatch if other samples come than the plan says, CorruptArtifact if too many rows are damaged.
    """
    lanes = as_lanes(plan)
    lanes.require_divisible(world_size, micro_batch)
    return _batches(shard, lanes, (rank, world_size), micro_batch, start_step, quarantine)


def _batches(
    shard: Any,
    lanes: Lanes,
    place: tuple[int, int],
    micro_batch: int,
    start_step: int,
    quarantine: str | Path | None,
) -> Iterator["Batch"]:
    replaced = 0
    for step, loaded in zip(count(start_step), _steps(shard), strict=False):
        _require_planned(lanes.plan, "index", loaded, step, place)
        if lanes.images:
            _require_planned(lanes.images, "image_index", loaded, step, place)
        if loaded["notes"]:
            replaced += len(loaded["notes"])
            _report(loaded["notes"], replaced, place[0], quarantine)
            if replaced > max(FEW_REPLACED, MOST_REPLACED * (step + 1 - start_step) * len(loaded["index"])):
                raise CorruptArtifact(
                    f"{replaced} damaged rows by step {step} on rank {place[0]}, over {MOST_REPLACED:.0%}: "
                    f"prepare the latents again; the last one: {loaded['notes'][-1]['reasons'][-1]}"
                )
        rounds = len(loaded["index"]) // micro_batch
        for number in range(rounds):
            yield _micro_batch(loaded, number, rounds)


def _micro_batch(loaded: Mapping[str, Any], number: int, rounds: int) -> "Batch":
    """Cut one micro-batch of a step out; samples and images are dealt evenly."""
    import torch  # not above: a loader process needs no torch, and its import costs seconds and 300 MB

    from raydistill.types import Batch, Images

    def part(name: str) -> Any:
        values = loaded[name]
        size = len(values) // rounds
        return torch.from_numpy(values[number * size : (number + 1) * size].copy())

    images = None
    if "image_index" in loaded:
        images = Images(*(part(f"image_{name}") for name in ("index", "latents", "text")))
    return Batch(
        *(part(name) for name in ("index", "latents", "text")),
        origin=part("origin") if "origin" in loaded else None,
        x_r=part("x_r") if "x_r" in loaded else None,
        images=images,
    )


def _require_planned(
    plan: Plan, name: str, loaded: Mapping[str, Any], step: int, place: tuple[int, int]
) -> None:
    """Raise PlanMismatch if the feed delivered other samples than the plan says."""
    expected, found = plan.indices(step, *place), loaded[name].tolist()
    if found != list(expected):
        raise PlanMismatch(
            f"step {step} on rank {place[0]} of {place[1]}: the plan says samples {expected.start} to "
            f"{expected.stop - 1}, the feed delivered {found}"
        )


def _steps(shard: Any) -> Iterator[dict[str, Any]]:
    """Yield what the feed holds for each step."""
    for row in _rows(shard):
        notes = json.loads(str(row["notes"][0]))
        for at, index in enumerate(row["index"][0]):
            if index[0] == NO_SAMPLE:
                return
            tensors = {name: row[name][0, at] for name in TENSORS if name in row}
            yield {"index": index, "notes": notes[at], **tensors}


def _rows(shard: Any) -> Iterator[dict[str, np.ndarray]]:
    """Yield the feed's rows; errors that raydistill raised in a loader come back as they were."""
    try:
        yield from shard.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=PREFETCHED)
    except (ray.exceptions.RayError, RuntimeError) as failed:
        ours = raised_by_us(failed)
        if ours is None:
            raise
        raise ours from None


def _report(notes: list[dict[str, Any]], total: int, rank: int, quarantine: str | Path | None) -> None:
    for note in notes:
        logger.warning("damaged row, another takes its place (%d so far on rank %d): %s", total, rank, note)
    if quarantine is not None:
        path = Path(quarantine)
        path = path.with_name(f"{path.stem}-{rank:05d}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as lines:
            lines.write(b"".join(canonical_json(note) + b"\n" for note in notes))


def _steps_per_block(lanes: Lanes, world_size: int, paths: Mapping[str, str]) -> int:
    """Return how many steps fill a block with small samples; the files' size tells theirs well enough."""
    sizes = {name: row_bytes(name, path) for name, path in paths.items()}
    images = sizes.pop(IMAGE, 0.0) * (lanes.images.share(world_size) if lanes.images else 0)
    step = lanes.plan.share(world_size) * max(sizes.values()) + images
    return max(1, min(MOST_STEPS, int(BLOCK_BYTES / step)))


def _configured(dataset: Dataset) -> Dataset:
    """Make every row a block, and leave out progress bars."""
    context: DataContext = dataset.context
    # A block is closed as soon as it holds more bytes than this, so after each row. `repartition` to one row
    # would say it more plainly, but Ray does not fuse it into tasks of a fraction of a CPU: each row would go
    # twice through a task, the second asking for a whole CPU beside the training.
    context.target_max_block_size = 1
    context.custom_execution_callback_classes = [Paced]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return dataset
