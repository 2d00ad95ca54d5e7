"""The feed's two ends, loader and consumer, put together without a cluster."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from feed_cases import LATENTS, TEXT, plan_of, write_store

from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, PlanMismatch, StaleArtifact
from raydistill.trajectories.flow import feed, iter_batches
from raydistill.trajectories.lanes import Intervals, as_lanes
from raydistill.trajectories.loader import Loader

NUM_ROWS, OFFSETS = {"a": 7, "b": 3}, {"a": 0, "b": 1000}


@pytest.fixture
def stores(tmp_path):
    return {name: write_store(tmp_path / name, NUM_ROWS[name], OFFSETS[name]) for name in NUM_ROWS}


@pytest.fixture
def plan(stores):
    return plan_of(stores, {"a": 0.7, "b": 0.3}, seed=7, global_batch=8)


INTERVALS = Intervals(seed=3, first=0, count=4)


class Shard:
    """One rank's rows of the feed, in the plan's order, as Ray Data's iterator gives them."""

    def __init__(self, plan, stores, rank, world_size, start_step, num_steps, *, steps_per_block=1):
        paths = {name: str(path) for name, path in stores.items()}
        loader = Loader(
            as_lanes(plan),
            paths,
            range(start_step, start_step + num_steps),
            world_size,
            steps_per_block,
            3,
            INTERVALS,
        )
        tasks = range(-(-num_steps // steps_per_block * world_size) // 3 + 1)
        rows = [row for task in tasks for row in loader({"item": np.array([task])})]
        self.rows = rows[rank::world_size]

    def iter_batches(self, **_):
        yield from self.rows


def damage(stores, name, *rows):
    """Flip one bit in the latents of some rows."""
    for path in stores[name].glob("*.parquet"):
        data = path.read_bytes()
        for row in rows:
            payload = np.full(LATENTS, OFFSETS[name] + row, np.float32).tobytes()
            at = data.find(payload)
            if at >= 0:
                data = data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :]
        path.write_bytes(data)


def expected(plan, g):
    item = plan.item(g)
    return OFFSETS[item.source] + item.row


@pytest.mark.parametrize("steps_per_block", [1, 2, 5, 16])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 2), (4, 1)])
def test_every_rank_gets_its_samples_in_order(stores, plan, world_size, micro_batch, steps_per_block):
    """Whether a block holds one step of a worker, some, or more than there are."""
    seen = []
    for rank in range(world_size):
        shard = Shard(plan, stores, rank, world_size, 3, 5, steps_per_block=steps_per_block)
        assert len({row["latents"].shape for row in shard.rows}) == 1
        batches = list(iter_batches(shard, plan, rank, world_size, micro_batch, 3))
        assert len(batches) == 5 * 8 // world_size // micro_batch
        for batch in batches:
            assert batch.latents.shape == (micro_batch, *LATENTS)
            assert batch.text.shape == (micro_batch, *TEXT)
            for at, g in enumerate(batch.index.tolist()):
                assert batch.latents[at].unique().tolist() == [expected(plan, g)]
                assert batch.text[at].unique().tolist() == [expected(plan, g)]
        seen += [g for batch in batches for g in batch.index.tolist()]
    assert sorted(seen) == list(range(24, 64))


def test_batches_own_their_memory(stores, plan):
    shard = Shard(plan, stores, 0, 1, 0, 1)
    batch = next(iter_batches(shard, plan, 0, 1, 8, 0))
    batch.latents.zero_()
    again = next(iter_batches(shard, plan, 0, 1, 8, 0))
    assert not torch.equal(batch.latents, again.latents)
    assert (again.index.dtype, again.latents.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows.reverse(),
        lambda rows: rows.pop(1),
        lambda rows: rows.insert(1, rows[0]),
        lambda rows: rows[1].update(index=rows[1]["index"][..., ::-1]),
    ],
    ids=["order", "gap", "twice", "within"],
)
def test_other_samples_than_planned_are_refused(stores, plan, spoil):
    shard = Shard(plan, stores, 1, 2, 0, 4)
    spoil(shard.rows)
    with pytest.raises(PlanMismatch, match=r"step [01] on rank 1 of 2: the plan says samples"):
        list(iter_batches(shard, plan, 1, 2, 4, 0))


@pytest.mark.parametrize(("rank", "world_size", "start_step"), [(0, 2, 0), (1, 2, 1), (0, 1, 0)])
def test_another_place_than_the_shards_is_refused(stores, plan, rank, world_size, start_step):
    with pytest.raises(PlanMismatch):
        list(iter_batches(Shard(plan, stores, 1, 2, 0, 4), plan, rank, world_size, 4, start_step))


def test_a_damaged_row_is_replaced_and_nothing_else_moves(stores, plan, tmp_path, caplog):
    whole = list(iter_batches(Shard(plan, stores, 1, 2, 0, 6), plan, 1, 2, 4, 0))
    damage(stores, "a", 5)
    log = tmp_path / "logs" / "quarantine.jsonl"
    batches = list(iter_batches(Shard(plan, stores, 1, 2, 0, 6), plan, 1, 2, 4, 0, quarantine=log))
    assert all(torch.equal(a.index, b.index) for a, b in zip(batches, whole, strict=True))
    notes = [
        json.loads(line) for line in (tmp_path / "logs" / "quarantine-00001.jsonl").read_text().splitlines()
    ]
    hit = [g for batch in whole for g in batch.index.tolist() if plan.item(g)[1::2] == ("a", 5)]
    assert [note["index"] for note in notes] == hit
    assert len(hit) >= 2
    for batch, before in zip(batches, whole, strict=True):
        for at, g in enumerate(batch.index.tolist()):
            wanted = next(plan.substitutes(g)) if g in hit else before.latents[at].max()
            assert batch.latents[at].unique().tolist() == [wanted]
    assert all(note["replaced_by"] == next(plan.substitutes(note["index"])) for note in notes)
    assert f"({len(hit)} so far on rank 1)" in caplog.text


def test_substitutes_are_the_same_on_other_workers(stores, plan):
    damage(stores, "a", 1, 2)
    two = [list(iter_batches(Shard(plan, stores, rank, 2, 0, 6), plan, rank, 2, 4, 0)) for rank in range(2)]
    one = list(iter_batches(Shard(plan, stores, 0, 1, 0, 6), plan, 0, 1, 8, 0))
    for step, batch in enumerate(one):
        assert torch.equal(batch.latents, torch.cat([two[0][step].latents, two[1][step].latents]))


def test_a_store_that_is_largely_damaged_ends_the_run(stores, plan):
    damage(stores, "a", 0, 1, 2)
    with pytest.raises(CorruptArtifact, match=r"damaged rows by step \d+ on rank 0, over 5%: prepare"):
        list(iter_batches(Shard(plan, stores, 0, 1, 0, 20), plan, 0, 1, 8, 0))


def test_a_source_without_a_good_row_ends_the_run(stores, plan):
    damage(stores, "b", *range(NUM_ROWS["b"]))
    with pytest.raises(CorruptArtifact, match="source 'b': 3 rows in turn cannot be read"):
        Shard(plan, stores, 0, 1, 0, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3}, "global_batch"),
        ({"micro_batch": 3}, "micro_batch"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"start_step": 5}, "start_step"),
        ({"start_step": -1}, "start_step"),
    ],
)
def test_sizes_that_make_no_feed(stores, plan, changes, message):
    with pytest.raises(InvalidValue, match=message):
        feed(plan, stores, **{"start_step": 0, "num_steps": 5, "world_size": 2, "micro_batch": 4} | changes)


def test_stores_that_are_not_the_plans(stores, plan, tmp_path):
    sizes = {"start_step": 0, "num_steps": 5, "world_size": 2, "micro_batch": 4}
    with pytest.raises(InvalidValue, match="stores"):
        feed(plan, {"a": stores["a"]}, **sizes)
    with pytest.raises(StaleArtifact, match="fingerprint"):
        feed(plan, stores | {"a": write_store(tmp_path / "other", NUM_ROWS["a"], 50)}, **sizes)
    fewer = replace(plan, sources=(replace(plan.sources[0], num_rows=6, digest=""), plan.sources[1]))
    with pytest.raises(StaleArtifact, match="7 rows"):
        feed(fewer, stores, **sizes)
    with pytest.raises(MissingArtifact):
        feed(plan, stores | {"b": tmp_path / "nothing"}, **sizes)


def test_sources_of_different_sizes_are_named(stores, plan, tmp_path):
    wider = stores | {"b": write_store(tmp_path / "wider", NUM_ROWS["b"], 0, shape=(2, 3, 2, 4))}
    with pytest.raises(StaleArtifact, match=r"wider.*\(2, 3, 2, 4\)"):
        Shard(plan, wider, 0, 1, 0, 4)


def test_sizes_are_checked_before_the_first_batch(stores, plan):
    with pytest.raises(InvalidValue, match="micro_batch"):
        iter_batches(Shard(plan, stores, 0, 1, 0, 1), plan, 0, 1, 3, 0)


def test_the_feed_may_end_with_its_steps(stores, plan):
    batches = iter_batches(Shard(plan, stores, 0, 1, 0, 2), plan, 0, 1, 8, 0)
    assert [batch.index[0].item() for batch in batches] == [0, 8]
