"""What the feed's tasks do: read the plan's samples from their artifacts. Without torch: it costs seconds."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.artifacts import LatentRow, LatentStore, canonical_json
from raydistill.errors import CorruptArtifact, InvalidValue, StaleArtifact
from raydistill.trajectories.lanes import IMAGE, RECORDED, SIMULATED, Intervals, Lanes
from raydistill.trajectories.plan import Item, Plan
from raydistill.trajectories.store import TrajectoryStore

SUBSTITUTES_TRIED = 16
NO_SAMPLE = -1
"""Index of what fills up a row after the last step, so that all rows have one shape."""
ORIGINS = {SIMULATED: 1, RECORDED: 2}
"""Values of `types.Origin`, whose module knows torch; 0 is a video."""
TENSORS = ("latents", "text", "origin", "x_r", "image_index", "image_latents", "image_text")
"""Columns of a row besides `index` and `notes`."""


@dataclass(frozen=True)
class Loader:
    """Task k of a feed reads blocks k * per_task to (k + 1) * per_task - 1, rank by rank."""

    lanes: Lanes
    paths: Mapping[str, str]
    steps: range
    world_size: int
    steps_per_block: int
    blocks_per_task: int
    interval_of: Intervals | None = None

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
        step of what is not as planned. origin (1, s, b) where not all are clips, x_r like latents where paths
        are recorded, image_index, image_latents and image_text where there is an image lane.
        """
        notes: list[list[dict[str, Any]]] = [[] for _ in steps]
        columns = self._columns(self.lanes.plan, steps, rank, notes)
        if self.lanes.images:
            images = self._columns(self.lanes.images, steps, rank, notes)
            columns |= {f"image_{name}": images[name] for name in ("index", "latents", "text")}
        missing = self.steps_per_block - len(steps)
        filled = {name: values + values[:1] * missing for name, values in columns.items()}
        filled["index"] = columns["index"] + [np.full_like(columns["index"][0], NO_SAMPLE)] * missing
        row = {name: np.stack(values)[None] for name, values in filled.items()}
        return {**row, "notes": np.array([canonical_json(notes + notes[:1] * missing).decode()])}

    def _columns(
        self, plan: Plan, steps: range, rank: int, notes: list[list[dict[str, Any]]]
    ) -> dict[str, list[np.ndarray]]:
        """Read a plan's samples, one array per step and column. What is not as planned goes to `notes`."""
        columns: dict[str, list[np.ndarray]] = defaultdict(list)
        for at, step in enumerate(steps):
            items = [plan.item(g) for g in plan.indices(step, rank, self.world_size)]
            read = [self._read(plan, item) for item in items]
            notes[at] += [one.note for one in read if one.note]
            _require_one_shape([one.row for one in read], self.paths.values())
            columns["index"].append(np.array([item.index for item in items], dtype=np.int64))
            columns["latents"].append(np.stack([one.row.latents for one in read]))
            columns["text"].append(np.stack([one.row.text for one in read]))
            if self.lanes.lanes & {SIMULATED, RECORDED}:
                origin = [ORIGINS.get(item.source, 0) for item in items]
                columns["origin"].append(np.array(origin, dtype=np.int64))
            if RECORDED in self.lanes.lanes and plan is self.lanes.plan:
                states = [np.zeros_like(one.row.latents) if one.x_r is None else one.x_r for one in read]
                columns["x_r"].append(np.stack(states))
        return columns

    def _read(self, plan: Plan, item: Item) -> "_Read":
        """Read a row of a source, or the first readable one of its substitutes and a note of it."""
        reasons: list[str] = []
        for row in (item.row, *islice(plan.substitutes(item.index), SUBSTITUTES_TRIED)):
            try:
                found, x_r = self._row(item, row)
            except CorruptArtifact as damaged:
                reasons.append(f"row {row}: {damaged}")
            else:
                note = {**item._asdict(), "replaced_by": row, "reasons": reasons}
                return _Read(found, x_r, note if reasons else None)
        raise CorruptArtifact(
            f"source '{item.source}': {len(reasons)} rows in turn cannot be read: {reasons[0]}"
        )

    def _row(self, item: Item, row: int) -> tuple[LatentRow, np.ndarray | None]:
        """A clip or an image; or x_t and x_r of a recorded path."""
        store = _opened(item.source, self.paths[item.source])
        if not isinstance(store, TrajectoryStore):
            return store.row(row), None
        assert self.interval_of is not None
        return store.pair(row, self.interval_of([item.index])[0])


@dataclass(frozen=True)
class _Read:
    """One sample as it was read."""

    row: LatentRow
    x_r: np.ndarray | None
    note: dict[str, Any] | None


def _require_one_shape(rows: list[LatentRow], paths: Iterable[str]) -> None:
    """Name the stores whose rows cannot be in one batch, where stacking would only speak of arrays."""
    shapes = {(row.latents.shape, row.text.shape) for row in rows}
    if len(shapes) > 1:
        raise StaleArtifact(
            f"{', '.join(sorted(paths))} hold latents and text of different shapes, {sorted(shapes)}: "
            "prepare the sources of one run with the same clip and text sizes"
        )


def checked_paths(lanes: Lanes, stores: Mapping[str, str | Path]) -> dict[str, str]:
    """Return absolute paths of the sources' artifacts, which must be what the plan was made for.

    Of images the plan may use the first rows only.
    """
    if missing := sorted(lanes.lanes - set(stores)):
        raise InvalidValue("stores", sorted(stores), f"must name the plan's sources, {missing} too")
    paths = {}
    for plan in (lanes.plan, lanes.images) if lanes.images else (lanes.plan,):
        for source in plan.sources:
            store = _opened(source.name, str(stores[source.name]))
            found, digest = len(store), store.fingerprint if source.digest else ""
            few = source.name == IMAGE and source.num_rows < found
            if not (few or found == source.num_rows) or digest != source.digest:
                raise StaleArtifact(
                    f"{stores[source.name]} has {found} rows and fingerprint {digest!r}; the plan's source "
                    f"'{source.name}' has {source.num_rows} and {source.digest!r}"
                )
            paths[source.name] = str(store.folder.resolve())
    return paths


def row_bytes(source: str, path: str) -> float:
    """Mean size of an artifact's rows on disk; of recorded paths, of the two states that are read."""
    store = _opened(source, path)
    size = sum(entry["bytes"] for entry in store.manifest.files.values()) / len(store)
    return 2 * size / store.num_nodes if isinstance(store, TrajectoryStore) else size


@lru_cache(maxsize=8)
def _opened(source: str, path: str) -> LatentStore:
    """Open a store once per process: its handles and checked footers serve many tasks."""
    return TrajectoryStore(path) if source == RECORDED else LatentStore(path)
