"""Laws of times: shift, grids, phases, splits and plans."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from raydistill.consistency.phases import Phases, split_times
from raydistill.consistency.schedule import SAME_TIME, TimeGrid, shift
from raydistill.errors import SamplingError
from raydistill.sampler import SamplingPlan, build_plan, plan_times, teacher_plan, with_head, with_tail

unit = st.floats(0, 1)
warps = st.floats(0.05, 20)
grids = st.builds(TimeGrid, st.integers(2, 60), warps)


@st.composite
def grids_with_boundary(draw):
    """A grid and one of its inner nodes."""
    grid = draw(grids)
    return grid, grid.nodes[draw(st.integers(1, grid.num_intervals - 1))]


@st.composite
def phases_and_times(draw):
    """Phases, and times that fall on edges as often as between them."""
    inner = sorted(draw(st.sets(st.integers(1, 99), max_size=4)), reverse=True)
    edges = (1.0, *(k / 100 for k in inner), 0.0)
    between = st.floats(0, 1, exclude_min=True).filter(lambda t: t > 2 * SAME_TIME)
    times = draw(st.lists(st.one_of(st.sampled_from(edges[:-1]), between), min_size=1, max_size=8))
    return Phases(edges), torch.tensor(times, dtype=torch.float64)


@given(warps)
def test_shift_fixes_data_and_noise(by):
    assert shift(0.0, by) == 0.0
    assert shift(1.0, by) == 1.0


@given(unit)
def test_shift_by_one_is_identity(t):
    assert shift(t, 1.0) == t


@given(unit, unit, warps)
def test_shift_is_increasing(a, b, by):
    assume(abs(a - b) > 1e-9)
    assert (shift(a, by) < shift(b, by)) == (a < b)


@given(unit, warps)
def test_shift_is_undone_by_its_inverse(t, by):
    assert shift(shift(t, by), 1 / by) == pytest.approx(t, abs=1e-12)


@given(grids)
def test_grids_decrease_and_know_their_nodes(grid):
    assert len(grid.nodes) == grid.num_intervals + 1
    assert grid.nodes[0] == 1.0
    assert all(a > b for a, b in pairwise(grid.nodes))
    assert [grid.node(t) for t in grid.nodes] == list(range(len(grid.nodes)))


@given(grids_with_boundary())
def test_experts_partition_the_intervals(pair):
    grid, boundary = pair
    semantic, detail = grid.intervals_in(1.0, boundary), grid.intervals_in(boundary, 0.0)
    assert [*semantic, *detail] == list(range(grid.num_intervals))
    t, r = grid.interval(torch.tensor([*semantic, *detail]))
    owner = Phases.dual(boundary).index(t)
    assert owner.tolist() == [0] * len(semantic) + [1] * len(detail)
    # t > r >= s: the teacher's step never leaves the phase
    assert bool((t > r).all())
    assert bool((r >= Phases.dual(boundary).end(t)).all())


@given(phases_and_times())
def test_every_time_has_one_phase_and_a_lower_end(pair):
    phases, t = pair
    index, end = phases.index(t), phases.end(t)
    edges = torch.tensor(phases.edges, dtype=torch.float64)
    assert bool((end < t).all())
    assert torch.equal(end, edges[index + 1])
    assert bool((t <= edges[index] + SAME_TIME).all())


@given(phases_and_times())
def test_float32_times_route_as_float64_times(pair):
    phases, t = pair
    edges = torch.tensor(phases.edges, dtype=torch.float64)
    # float32 may carry a time over a tolerance's width, only not over an edge it stood on
    assume(bool((((t[:, None] - edges).abs() - SAME_TIME).abs() > 1e-7).all()))
    assert torch.equal(phases.index(t.float()), phases.index(t))


@given(phases_and_times())
def test_routing_a_batch_is_routing_each_sample(pair):
    """Toy router of two fields: on a mixed batch every sample gets what it gets alone."""
    phases, t = pair
    x = torch.arange(len(t), dtype=torch.float64).view(-1, 1, 1, 1, 1) + 1
    fields = [lambda x, scale=k: x * (10.0**scale) for k in range(len(phases.edges) - 1)]

    def route(x, t):
        index, out = phases.index(t), torch.empty_like(x)
        for k, field in enumerate(fields):
            out[index == k] = field(x[index == k])
        return out

    alone = [route(x[i : i + 1], t[i : i + 1]) for i in range(len(t))]
    assert torch.equal(route(x, t), torch.cat(alone))


@given(grids_with_boundary(), st.integers(2, 60), st.sampled_from(["deterministic", "renoise"]))
def test_split_plans_stop_at_the_boundary_and_never_cross_it(pair, num_steps, path):
    grid, boundary = pair
    smaller = min(len(grid.intervals_in(1.0, boundary)), len(grid.intervals_in(boundary, 0.0)))
    assume(num_steps // 2 + num_steps % 2 <= smaller)
    plan = build_plan(num_steps, boundary, grid, path)
    stops = [1.0, *(one.s for one in plan.jumps)]
    assert len(plan.jumps) == num_steps == plan.passes()
    assert boundary in stops
    Phases.dual(boundary).require_no_crossing(stops)
    assert all(one.expert == ("semantic" if one.t > boundary else "detail") for one in plan.jumps)
    assert all(
        plan.landing(one) >= Phases.dual(boundary).end(torch.tensor([one.t]).double()) for one in plan.jumps
    )
    gaps = [grid.node(s) - grid.node(t) for t, s in pairwise(stops)]
    for side in (gaps[: stops.index(boundary)], gaps[stops.index(boundary) :]):
        assert max(side) - min(side) <= 1


@given(grids_with_boundary(), st.floats(0.001, 0.999))
def test_a_plan_without_the_boundary_is_refused(pair, t):
    _, boundary = pair
    assume(abs(t - boundary) > 2 * SAME_TIME)
    with pytest.raises(SamplingError, match="crosses the boundary"):
        plan_times((1.0, t, 0.0), boundary)


@given(grids_with_boundary(), st.integers(1, 8))
def test_plans_survive_json_and_count_their_passes(pair, num_steps):
    grid, boundary = pair
    above, below = len(grid.intervals_in(1.0, boundary)), len(grid.intervals_in(boundary, 0.0))
    plans = [teacher_plan(num_steps, grid), build_plan(1, boundary, grid)]
    assert [plan.passes() for plan in plans] == [2 * num_steps, 1]
    if num_steps <= above:
        plans.append(with_tail(num_steps, boundary, grid))
        assert plans[-1].passes() == num_steps + 2 * below
    if num_steps <= below:
        plans.append(with_head(num_steps, boundary, grid))
        assert plans[-1].passes() == 2 * above + num_steps
    assert [SamplingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) for plan in plans] == plans


@given(grids, st.integers(1, 60))
def test_a_single_phase_is_split_evenly(grid, num_steps):
    assume(num_steps <= grid.num_intervals)
    nodes = [grid.node(t) for t in split_times(Phases.single(), num_steps, grid)]
    gaps = [b - a for a, b in pairwise(nodes)]
    assert (nodes[0], nodes[-1]) == (0, grid.num_intervals)
    assert max(gaps) - min(gaps) <= 1
