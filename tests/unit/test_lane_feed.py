"""The feed of several lanes: clips, captions alone, recorded paths, and images beside them."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from feed_cases import LATENTS, TEXT, write_store

from raydistill.artifacts import LatentStore
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, PlanMismatch, StaleArtifact
from raydistill.shards import tensor_columns, write_artifact, write_table
from raydistill.trajectories.flow import feed, iter_batches
from raydistill.trajectories.lanes import Intervals, Rows, build_lanes
from raydistill.trajectories.loader import Loader, checked_paths
from raydistill.trajectories.store import TrajectoryStore, node_column, schema
from raydistill.types import Origin

NODES = 5
INTERVALS = Intervals(seed=9, first=1, count=3)


def write_paths(folder, count=6, shape=LATENTS):
    """Recorded paths in which every number of path i at node k is 1000 + 10 i + k."""
    identity = {"grid": {"num_intervals": NODES - 1}, "teacher": "t", "guidance_range": [2.0, 2.0]}
    rows = [
        {
            "sample_id": str(i),
            "caption": f"path {i}",
            "guidance_scale": 2.0,
            **tensor_columns("text", np.full(TEXT, i, np.float32)),
            **{
                name: value
                for k in range(NODES)
                for name, value in tensor_columns(
                    node_column(k), np.full(shape, 1000 + 10 * i + k, np.float32)
                ).items()
            },
        }
        for i in range(count)
    ]
    table = pa.Table.from_pylist(rows, schema=schema(NODES))
    about = {"order": 0, "rows_per_group": 1, "rows_digest": "d"}
    shard = write_table(folder, "paths", table, identity, kind="trajectories", about=about)
    write_artifact(folder, [shard], identity, kind="trajectories")
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    video = write_store(root / "video", 20, 0)
    return {
        "video": video,
        "simulated": video,
        "recorded": write_paths(root / "paths"),
        "image": write_store(root / "images", 9, 500, (LATENTS[0], 1, *LATENTS[2:])),
    }


def lanes_of(stores, *, images=True, real=0.5, recorded=0.25, per="sample", most=0):
    def rows(store, most=0):
        return Rows(most or len(store), store.fingerprint)

    return build_lanes(
        1,
        8,
        rows(LatentStore(stores["video"])),
        real_share=real,
        recorded_share=recorded,
        per=per,
        recorded=rows(TrajectoryStore(stores["recorded"])) if recorded else None,
        images=rows(LatentStore(stores["image"]), most) if images else None,
        images_per_step=4,
    )


class Shard:
    """One rank's rows, as Ray Data's iterator gives them."""

    def __init__(self, lanes, stores, rank, world_size, steps, steps_per_block=1):
        paths = checked_paths(lanes, stores)
        loader = Loader(lanes, paths, steps, world_size, steps_per_block, 1, INTERVALS)
        blocks = -(-len(steps) // steps_per_block)
        self.rows = [
            row for k in range(blocks) for row in loader({"item": np.array([k * world_size + rank])})
        ]

    def iter_batches(self, **_):
        yield from self.rows


def read(lanes, stores, *, steps=range(6), world_size=1, micro_batch=8, steps_per_block=1):
    return [
        list(
            iter_batches(
                Shard(lanes, stores, rank, world_size, steps, steps_per_block),
                lanes,
                rank,
                world_size,
                micro_batch,
                steps.start,
            )
        )
        for rank in range(world_size)
    ]


def samples(batches_by_rank):
    """Everything of each sample, by its index."""
    return {
        int(g): (
            int(b.origin[i]),
            float(b.latents[i].mean()),
            float(b.x_r[i].mean()),
            float(b.text[i].mean()),
        )
        for batches in batches_by_rank
        for b in batches
        for i, g in enumerate(b.index)
    }


def pictures(batches_by_rank):
    return {
        int(g): float(b.images.latents[i].mean())
        for batches in batches_by_rank
        for b in batches
        for i, g in enumerate(b.images.index)
    }


def test_each_sample_is_what_its_lane_says(stores):
    lanes = lanes_of(stores)
    found = samples(read(lanes, stores))
    assert len(found) == 48
    for g, (origin, latents, x_r, text) in found.items():
        item = lanes.plan.item(g)
        if item.source == "recorded":
            k = INTERVALS([g])[0]
            expected = (Origin.RECORDED, 1000 + 10 * item.row + k, 1000 + 10 * item.row + k + 1, item.row)
        else:
            lane = Origin.SIMULATED if item.source == "simulated" else Origin.VIDEO
            expected = (lane, item.row, 0.0, item.row)
        assert (origin, latents, x_r, text) == tuple(map(float, expected)), item
    kinds = [origin for origin, *_ in found.values()]
    assert [kinds.count(lane) for lane in Origin] == [24, 12, 12]


@pytest.mark.parametrize(("world_size", "micro_batch", "steps_per_block"), [(2, 2, 1), (4, 2, 4), (1, 4, 16)])
def test_workers_micro_batches_and_blocks_change_nothing(stores, world_size, micro_batch, steps_per_block):
    lanes = lanes_of(stores)
    how = {"world_size": world_size, "micro_batch": micro_batch, "steps_per_block": steps_per_block}
    whole, parts = read(lanes, stores), read(lanes, stores, **how)
    assert samples(parts) == samples(whole)
    assert pictures(parts) == pictures(whole)
    assert {len(b.images.index) for batches in parts for b in batches} == {4 * micro_batch // 8}


def test_a_resumed_feed_goes_on_with_the_same_samples(stores):
    lanes = lanes_of(stores)
    whole, rest = read(lanes, stores), read(lanes, stores, steps=range(4, 6), world_size=2, micro_batch=4)
    assert samples(rest) == {g: s for g, s in samples(whole).items() if g >= 32}
    assert pictures(rest) == {g: p for g, p in pictures(whole).items() if g >= 16}


def test_clips_alone_come_without_lanes(stores):
    lanes = lanes_of(stores, images=False, real=1.0, recorded=0.0)
    (batches,) = read(lanes, stores)
    assert all(b.origin is None and b.x_r is None and b.images is None for b in batches)


def test_only_the_first_images_are_used_where_so_asked(stores):
    seen = pictures(read(lanes_of(stores, most=3), stores))
    assert set(seen.values()) == {500.0, 501.0, 502.0}


def test_other_images_than_planned_are_refused(stores):
    lanes = lanes_of(stores)
    shard = Shard(lanes, stores, 0, 1, range(2))
    shard.rows[1] = {**shard.rows[1], "image_index": shard.rows[0]["image_index"]}
    with pytest.raises(PlanMismatch, match="the plan says samples 4 to 7"):
        list(iter_batches(shard, lanes, 0, 1, 8, 0))


def test_stores_are_checked_before_anything_is_read(stores, tmp_path):
    lanes = lanes_of(stores)
    how = {"start_step": 0, "num_steps": 2, "world_size": 1, "micro_batch": 8}
    with pytest.raises(InvalidValue, match="needed for recorded paths"):
        feed(lanes, stores, **how)
    with pytest.raises(InvalidValue, match="must name the plan's sources, \\['image'\\]"):
        feed(lanes, {k: v for k, v in stores.items() if k != "image"}, **how, interval_of=INTERVALS)
    other = write_store(tmp_path / "other", 9, 7, (LATENTS[0], 1, *LATENTS[2:]))
    with pytest.raises(StaleArtifact, match="fingerprint"):
        feed(lanes, {**stores, "image": other}, **how, interval_of=INTERVALS)
    with pytest.raises(MissingArtifact):
        feed(lanes, {**stores, "recorded": tmp_path / "gone"}, **how, interval_of=INTERVALS)


def test_a_store_of_paths_reads_two_states_and_knows_what_it_is(stores):
    store = TrajectoryStore(stores["recorded"])
    assert (len(store), store.num_nodes) == (6, NODES)
    row, x_r = store.pair(4, 2)
    assert (row.latents.mean(), x_r.mean(), row.caption) == (1042, 1043, "path 4")
    assert store.row(4).latents.mean() == 1044
    with pytest.raises(IndexError):
        store.pair(4, NODES - 1)
    store.require_run({"teacher": "t"})
    with pytest.raises(StaleArtifact, match="teacher: 't' != 'other'"):
        store.require_run({"teacher": "other"})
    with pytest.raises(StaleArtifact, match="holds latents, not trajectories"):
        TrajectoryStore(stores["video"])
    with pytest.raises(StaleArtifact, match="holds trajectories, not latents"):
        LatentStore(stores["recorded"])


def test_a_damaged_path_is_replaced_and_noted(stores, tmp_path, caplog):
    paths = write_paths(tmp_path / "paths")
    (file,) = paths.glob("*.parquet")
    data = bytearray(file.read_bytes())
    for k in range(NODES):
        number = np.full(LATENTS, 1000 + 20 + k, np.float32).tobytes()
        data[data.find(number)] ^= 1
    file.write_bytes(data)
    broken = {**stores, "recorded": paths}
    lanes = lanes_of(stores)
    with pytest.raises(CorruptArtifact):
        TrajectoryStore(paths).pair(2, 1)
    (batches,) = read(lanes, broken)
    items = [lanes.plan.item(int(g)) for b in batches for g in b.index]
    bad = [i.index for i in items if i.source == "recorded" and i.row == 2]
    assert bad
    assert "damaged row" in caplog.text
    found, whole = samples([batches]), samples(read(lanes, stores))
    assert {g for g in found if found[g] != whole[g]} == set(bad)


def test_a_loader_draws_intervals_without_torch():
    check = (
        "import sys; from raydistill.trajectories.loader import Intervals; "
        "print(Intervals(9, 1, 3)([0, 1, 2]), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{INTERVALS([0, 1, 2])} False"


def test_a_path_of_the_same_name_but_other_sizes_is_refused(stores, tmp_path):
    lanes = lanes_of(stores)
    paths = write_paths(tmp_path / "paths", shape=(2, 3, 2, 4))
    recorded = Rows(6, TrajectoryStore(paths).fingerprint)
    sources = tuple(
        replace(s, digest=recorded.digest) if s.name == "recorded" else s for s in lanes.plan.sources
    )
    lanes = replace(lanes, plan=replace(lanes.plan, sources=sources))
    with pytest.raises(StaleArtifact, match="different shapes"):
        read(lanes, {**stores, "recorded": paths})
