"""The mix of lanes: exact at every prefix, the same on any number of workers, images in step with it."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill import draws
from raydistill.errors import InvalidValue
from raydistill.trajectories.lanes import Intervals, Rows, build_lanes
from raydistill.trajectories.plan import Plan, Source

VIDEO, PATHS, IMAGES = Rows(50, "v"), Rows(7, "p"), Rows(11, "i")
tenths = st.integers(0, 10)


def lanes_of(seed=0, real=5, recorded=2, per="sample", images=None):
    return build_lanes(
        seed,
        24,
        VIDEO,
        real_share=real / 10,
        recorded_share=recorded / 10,
        per=per,
        recorded=PATHS,
        images=images,
        images_per_step=12 if images else 0,
    )


shares = st.tuples(tenths, tenths).filter(lambda pair: sum(pair) <= 10)


@settings(max_examples=25)
@given(shares, st.integers(0, 2**40), st.integers(1, 200))
def test_every_lane_has_its_share_at_every_prefix(shares, seed, length):
    real, recorded = shares
    plan, counts = lanes_of(seed, real, recorded).plan, Counter()
    expected = {"video": real / 10, "recorded": recorded / 10, "simulated": 1 - (real + recorded) / 10}
    for n in range(1, length + 1):
        counts[plan.item(n - 1).source] += 1
        assert all(abs(counts[name] - share * n) < 1 for name, share in expected.items())


@settings(max_examples=25)
@given(shares, st.integers(0, 2**40), st.integers(1, 60))
def test_per_step_a_step_has_one_lane_and_steps_are_shared_exactly(shares, seed, steps):
    real, recorded = shares
    plan, counts = lanes_of(seed, real, recorded, per="step").plan, Counter()
    for step in range(steps):
        lanes = {plan.item(g).source for g in plan.indices(step, 0, 1)}
        assert len(lanes) == 1
        counts[lanes.pop()] += 1
        assert abs(counts["video"] - real / 10 * (step + 1)) < 1
        assert abs(counts["recorded"] - recorded / 10 * (step + 1)) < 1


@settings(max_examples=15)
@given(st.sampled_from(["sample", "step"]), st.integers(0, 99), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_workers_and_resume_change_no_sample_and_no_image(per, step, world_size):
    lanes = lanes_of(3, per=per, images=IMAGES)
    for plan in (lanes.plan, lanes.images):
        shared = [plan.item(g) for rank in range(world_size) for g in plan.indices(step, rank, world_size)]
        assert shared == [plan.item(g) for g in plan.indices(step, 0, 1)]


@given(st.sampled_from(["sample", "step"]))
def test_rows_of_a_lane_come_once_per_epoch(per):
    plan = lanes_of(1, per=per).plan
    seen = Counter((i.source, i.epoch, i.row) for i in map(plan.item, range(24 * 20)))
    assert set(seen.values()) == {1}


def test_a_plan_of_clips_alone_is_what_it_was_before_there_were_lanes():
    old = Plan(seed=4, global_batch=24, sources=(Source(name="video", num_rows=50, digest="v"),))
    new = build_lanes(4, 24, VIDEO)
    assert new.state(0) == old.state(0)
    assert [new.plan.item(g) for g in range(60)] == [old.item(g) for g in range(60)]


def test_what_shapes_the_mix_is_in_its_state():
    states = [
        lanes_of().state(0),
        lanes_of(real=4).state(0),
        lanes_of(per="step").state(0),
        lanes_of(images=IMAGES).state(0),
        lanes_of(images=Rows(11, "j")).state(0),
    ]
    assert all(a != b for i, a in enumerate(states) for b in states[:i])


@pytest.mark.parametrize(("real", "recorded"), [(1.1, 0.0), (-0.1, 0.0), (0.7, 0.4), (0.5, float("nan"))])
def test_shares_that_are_none_are_refused(real, recorded):
    with pytest.raises(InvalidValue, match="1 at most together"):
        build_lanes(0, 24, VIDEO, real_share=real, recorded_share=recorded, recorded=PATHS)


@given(st.integers(1, 60), st.data())
def test_shares_are_the_fractions_they_stand_for(whole, data):
    real = data.draw(st.integers(0, whole))
    recorded = data.draw(st.integers(0, whole - real))
    lanes = build_lanes(
        0, 24, VIDEO, real_share=real / whole, recorded_share=recorded / whole, recorded=PATHS
    )
    parts = {"video": real, "recorded": recorded, "simulated": whole - real - recorded}
    assert lanes.plan.proportions == {name: Fraction(n, whole) for name, n in parts.items() if n}


def test_an_image_lane_without_images_per_step_is_refused():
    with pytest.raises(InvalidValue, match="images_per_step"):
        build_lanes(0, 24, VIDEO, images=IMAGES)


def test_recorded_paths_need_an_artifact():
    with pytest.raises(InvalidValue, match="an artifact of recorded paths"):
        build_lanes(0, 24, VIDEO, real_share=0.5, recorded_share=0.5)


def test_images_must_divide_among_workers_and_micro_batches():
    lanes = lanes_of(images=IMAGES)
    lanes.require_divisible(2, 4)  # 3 rounds of 2 images
    with pytest.raises(InvalidValue, match="2 workers x 12 micro-batches"):
        lanes.require_divisible(2, 1)


@given(st.integers(0, 2**40), st.integers(0, 5), st.integers(1, 50))
def test_the_loaders_interval_is_the_segments(seed, first, count):
    index = torch.arange(40)
    expected = draws.integers(seed, index, "time", count) + first
    assert Intervals(seed, first, count)(index.tolist()) == expected.tolist()
