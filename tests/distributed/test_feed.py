"""The feed on a real Ray cluster, split as Ray Train splits it: exact, resumable, deaf to lost loaders."""

import hashlib
import logging
from functools import partial

import feed_cases
import numpy as np
import pytest
import ray
from feed_cases import (
    LATENTS,
    MortalLoader,
    plan_of,
    read_together,
    sha_by_plan,
    stream_sha,
    train_and_record,
    write_store,
)

from raydistill.artifacts import LatentStore
from raydistill.config.distill import ScaleConfig
from raydistill.errors import CorruptArtifact
from raydistill.experts.checkpoint import TrainState
from raydistill.experts.launch import launch
from raydistill.flow import connect
from raydistill.trajectories import flow
from raydistill.trajectories.flow import feed

ray.cloudpickle.register_pickle_by_value(feed_cases)  # Ray's workers do not have this folder on their path
pytestmark = pytest.mark.distributed
BATCH, NUM_STEPS = 8, 20


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Three CPUs whatever the machine has: two training workers and their loaders must fit."""
    with connect(num_cpus=3, object_store_mib=200):
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {"a": write_store(folder / "a", 37, 0), "b": write_store(folder / "b", 11, 1000)}


@pytest.fixture(scope="module")
def plan(stores):
    return plan_of(stores, {"a": 0.7, "b": 0.3}, seed=7, global_batch=BATCH)


@pytest.mark.parametrize(
    ("world_size", "start", "steps_per_block"),
    [(1, 0, 1), (2, 0, 1), (4, 0, 1), (1, 13, 4), (2, 7, None), (4, 11, 2)],
)
def test_the_stream_is_the_plans_from_any_step_on(stores, plan, world_size, start, steps_per_block):
    data = feed(
        plan,
        stores,
        start_step=start,
        num_steps=NUM_STEPS,
        world_size=world_size,
        micro_batch=2,
        steps_per_block=steps_per_block,
    )
    seen = read_together(data, plan, world_size, 2, start)
    assert all(len(batches) == (NUM_STEPS - start) * BATCH // world_size // 2 for batches in seen)
    assert stream_sha(seen) == sha_by_plan(plan, stores, start * BATCH, NUM_STEPS * BATCH)


def test_stopped_on_two_workers_resumed_on_four(stores, plan):
    """The feed is left with rows on their way; what was not trained on comes again, and nothing else."""
    stopped_at = 6
    first = feed(plan, stores, start_step=0, num_steps=NUM_STEPS, world_size=2, micro_batch=2)
    before = read_together(first, plan, 2, 2, 0, most=stopped_at * 2)
    rest = feed(plan, stores, start_step=stopped_at, num_steps=NUM_STEPS, world_size=4, micro_batch=1)
    after = read_together(rest, plan, 4, 1, stopped_at)
    assert stream_sha(before + after) == sha_by_plan(plan, stores, 0, NUM_STEPS * BATCH)


def test_a_killed_loader_loses_nothing(stores, plan, tmp_path, monkeypatch):
    """The third of the four blocks that its task had to read is never delivered by it."""
    grave = tmp_path / "grave"
    monkeypatch.setattr(flow, "Loader", partial(MortalLoader, fatal=7, grave=str(grave)))
    sizes = {"start_step": 0, "num_steps": NUM_STEPS, "world_size": 2, "micro_batch": 4}
    seen = read_together(feed(plan, stores, **sizes, steps_per_block=1), plan, 2, 4, 0)
    assert grave.exists(), "nobody was killed"
    assert stream_sha(seen) == sha_by_plan(plan, stores, 0, NUM_STEPS * BATCH)


def test_ray_train_delivers_the_same(stores, plan, tmp_path):
    """Worker processes, and the launcher's own data settings."""
    launch(
        train_and_record,
        config=(plan, 2, NUM_STEPS),
        scale=ScaleConfig(num_workers=2, cpus_per_worker=0.5, max_failures=0),
        state=TrainState(stage="semantic", step=0),
        num_steps=NUM_STEPS,
        run_dir=tmp_path,
        feed=lambda start: feed(
            plan, stores, start_step=start, num_steps=NUM_STEPS, world_size=2, micro_batch=2
        ),
    )
    opened = {name: LatentStore(path) for name, path in stores.items()}
    for rank in range(2):
        expected = []
        for step in range(NUM_STEPS):
            for item in map(plan.item, plan.indices(step, rank, 2)):
                row = opened[item.source].row(item.row)
                sample = b"%d:" % item.index + row.latents.tobytes() + row.text.tobytes()
                expected.append(hashlib.sha256(sample).hexdigest())
        assert (tmp_path / f"rank-{rank}").read_text().splitlines() == expected


def test_a_source_beyond_repair_ends_the_run_with_its_own_error(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "ray")
    store = write_store(tmp_path / "a", 4, 0)
    plan = plan_of({"a": store}, {"a": 1.0}, seed=0, global_batch=2)
    for path in store.glob("*.parquet"):
        data = path.read_bytes()
        for row in range(4):
            payload = np.full(LATENTS, row, np.float32).tobytes()
            data = data.replace(payload, payload[:-1] + b"\xff")
        path.write_bytes(data)
    data = feed(plan, {"a": store}, start_step=0, num_steps=3, world_size=1, micro_batch=2)
    with pytest.raises(CorruptArtifact, match="source 'a': 4 rows in turn cannot be read"):
        read_together(data, plan, 1, 2, 0)
