"""Ray Data: the plan's samples, read ahead of the training and delivered in order.

A row of the feed is what one worker needs for one optimiser step, or for a few steps where samples are small,
and every row is a block of its own. Ray Train's splitter, told to preserve order and to split equally, gives
each next block to the worker with the fewest rows so far, the lowest rank first: block k goes to rank
k mod world size. Its documentation promises no order, so every row carries its global sample indices and
`iter_batches` compares them with the plan.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray.data
import ray.exceptions
from ray.data import DataContext, Dataset, TaskPoolStrategy

from raydistill.artifacts import LatentRow, LatentStore, canonical_json
from raydistill.errors import CorruptArtifact, InvalidValue, PlanMismatch, StaleArtifact
from raydistill.flow import Paced, raised_by_us
from raydistill.trajectories.plan import Item, Plan

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
SUBSTITUTES_TRIED = 16
FEW_REPLACED, MOST_REPLACED = 16, 0.05
"""Damaged rows of a worker that are let pass, and the share of all samples above which they are not."""
PREFETCHED = 2
"""Blocks on their way to a worker while it trains on another."""
NO_SAMPLE = -1
"""Index of what fills up a row after the last step, so that all rows have one shape."""


def feed(
    plan: Plan,
    stores: Mapping[str, str | Path],
    *,
    start_step: int,
    num_steps: int,
    world_size: int,
    micro_batch: int,
    steps_per_block: int | None = None,
    num_loaders: int | None = None,
) -> Dataset:
    """Return the samples of the steps from `start_step` to before `num_steps`, for `world_size` workers.

    `stores` names the latents of each of the plan's sources. To be given to Ray Train with
    `DataConfig(execution_options=ExecutionOptions(preserve_order=True))`; each worker reads its shard with
    `iter_batches`. Nothing is read before a worker asks, and memory does not grow with steps.

    `steps_per_block`: by default 1, more only where a worker's samples of a step take less than 1 MiB.
    `num_loaders` tasks read at a time, each on a quarter of a CPU; by default half as many as there are
    workers, but 2 at least.

    Raises InvalidValue for sizes that do not divide, StaleArtifact if a store is not the plan's source,
    MissingArtifact or CorruptArtifact if it cannot be opened.
    """
    _require_divisible(plan, world_size, micro_batch)
    if not 0 <= start_step < num_steps:
        raise InvalidValue("start_step", start_step, f"must be in [0, num_steps = {num_steps})")
    paths = _checked(plan, stores)
    per_block = steps_per_block or _steps_per_block(plan.share(world_size), paths.values())
    blocks = -(-(num_steps - start_step) // per_block) * world_size
    per_task = max(BLOCKS_PER_TASK, -(-blocks // MOST_TASKS))
    loader = Loader(plan, paths, range(start_step, num_steps), world_size, per_block, per_task)
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


@dataclass(frozen=True)
class Loader:
    """What the tasks do: task k reads blocks k * per_task to (k + 1) * per_task - 1, rank by rank."""

    plan: Plan
    paths: Mapping[str, str]
    steps: range
    world_size: int
    steps_per_block: int
    blocks_per_task: int

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the blocks of the task whose number is given, one at a time."""
        first = int(batch["item"][0]) * self.blocks_per_task
        for block in range(first, first + self.blocks_per_task):
            group, rank = divmod(block, self.world_size)
            steps = self.steps[group * self.steps_per_block : (group + 1) * self.steps_per_block]
            if steps:
                yield self.block(steps, rank)

    def block(self, steps: range, rank: int) -> dict[str, np.ndarray]:
        """Return a worker's samples of s successive steps as one row, filled up to `steps_per_block`.

        index (1, s, b), latents (1, s, b, c, f, h, w), text (1, s, b, l, d), and notes (1,): JSON, a list per
        step of what is not as planned.
        """
        read = [[self._read(self.plan.item(g)) for g in self._indices(step, rank)] for step in steps]
        _require_one_shape([row for step in read for row, _ in step], self.paths.values())
        missing = self.steps_per_block - len(steps)
        filled = read + read[:1] * missing
        index = [list(self._indices(step, rank)) for step in steps]
        index += [[NO_SAMPLE] * len(index[0])] * missing
        return {
            "index": np.array([index], dtype=np.int64),
            "latents": np.stack([[row.latents for row, _ in step] for step in filled])[None],
            "text": np.stack([[row.text for row, _ in step] for step in filled])[None],
            "notes": np.array(
                [canonical_json([[note for _, note in step if note] for step in filled]).decode()]
            ),
        }

    def _indices(self, step: int, rank: int) -> range:
        return self.plan.indices(step, rank, self.world_size)

    def _read(self, item: Item) -> tuple[LatentRow, dict[str, Any] | None]:
        """Read a row of a source, or the first readable one of its substitutes and a note of it."""
        store, reasons = _opened(self.paths[item.source]), []
        for row in (item.row, *islice(self.plan.substitutes(item.index), SUBSTITUTES_TRIED)):
            try:
                read = store.row(row)
            except CorruptArtifact as damaged:
                reasons.append(f"row {row}: {damaged}")
            else:
                note = {**item._asdict(), "replaced_by": row, "reasons": reasons}
                return read, note if reasons else None
        raise CorruptArtifact(
            f"source '{item.source}': {len(reasons)} rows in turn cannot be read: {reasons[0]}"
        )


def _require_one_shape(rows: list[LatentRow], paths: Iterable[str]) -> None:
    """Name the stores whose rows cannot be in one batch, where stacking would only speak of arrays."""
    shapes = {(row.latents.shape, row.text.shape) for row in rows}
    if len(shapes) > 1:
        raise StaleArtifact(
            f"{', '.join(sorted(paths))} hold latents and text of different shapes, {sorted(shapes)}: "
            "prepare the sources of one run with the same clip and text sizes"
        )


def iter_batches(
    shard: Any,
    plan: Plan,
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
    _require_divisible(plan, world_size, micro_batch)
    return _batches(shard, plan, (rank, world_size), micro_batch, start_step, quarantine)


def _batches(
    shard: Any,
    plan: Plan,
    place: tuple[int, int],
    micro_batch: int,
    start_step: int,
    quarantine: str | Path | None,
) -> Iterator["Batch"]:
    import torch  # not above: a loader process needs no torch, and its import costs seconds and 300 MB

    from raydistill.types import Batch

    replaced = 0
    for step, loaded in zip(count(start_step), _steps(shard), strict=False):
        index, expected = loaded["index"], plan.indices(step, *place)
        if index.tolist() != list(expected):
            raise PlanMismatch(
                f"step {step} on rank {place[0]} of {place[1]}: the plan says samples {expected.start} to "
                f"{expected.stop - 1}, the feed delivered {index.tolist()}"
            )
        if loaded["notes"]:
            replaced += len(loaded["notes"])
            _report(loaded["notes"], replaced, place[0], quarantine)
            if replaced > max(FEW_REPLACED, MOST_REPLACED * (step + 1 - start_step) * len(index)):
                raise CorruptArtifact(
                    f"{replaced} damaged rows by step {step} on rank {place[0]}, over {MOST_REPLACED:.0%}: "
                    f"prepare the latents again; the last one: {loaded['notes'][-1]['reasons'][-1]}"
                )
        for at in range(0, len(index), micro_batch):
            part = slice(at, at + micro_batch)
            yield Batch(
                *(torch.from_numpy(loaded[name][part].copy()) for name in ("index", "latents", "text"))
            )


def _steps(shard: Any) -> Iterator[dict[str, Any]]:
    """Yield what the feed holds for each step."""
    for row in _rows(shard):
        notes = json.loads(str(row["notes"][0]))
        for at, index in enumerate(row["index"][0]):
            if index[0] == NO_SAMPLE:
                return
            tensors = {name: row[name][0, at] for name in ("latents", "text")}
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


def _require_divisible(plan: Plan, world_size: int, micro_batch: int) -> None:
    share = plan.share(world_size)
    if micro_batch < 1 or share % micro_batch:
        raise InvalidValue("micro_batch", micro_batch, f"must divide the {share} samples per worker and step")


def _checked(plan: Plan, stores: Mapping[str, str | Path]) -> dict[str, str]:
    """Return absolute paths of the sources' stores, which must be what the plan was made for."""
    names = {source.name for source in plan.sources}
    if set(stores) != names:
        raise InvalidValue("stores", sorted(stores), f"must be of the plan's sources, {sorted(names)}")
    paths = {}
    for source in plan.sources:
        store = LatentStore(stores[source.name])
        found = (len(store), store.fingerprint if source.digest else "")
        if found != (source.num_rows, source.digest):
            raise StaleArtifact(
                f"{stores[source.name]} has {found[0]} rows and fingerprint {found[1]!r}; the plan's source "
                f"'{source.name}' has {source.num_rows} and {source.digest!r}"
            )
        paths[source.name] = str(store.folder.resolve())
    return paths


def _steps_per_block(share: int, paths: Iterable[str]) -> int:
    """Return how many steps fill a block with small samples; the files' size tells theirs well enough."""
    sizes = []
    for store in map(LatentStore, paths):
        sizes.append(sum(entry["bytes"] for entry in store.manifest.files.values()) / len(store))
    return max(1, min(MOST_STEPS, int(BLOCK_BYTES / (share * max(sizes)))))


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


@lru_cache(maxsize=8)
def _opened(path: str) -> LatentStore:
    """Open a store once per loader process: its handles and checked footers serve many tasks."""
    return LatentStore(path)
