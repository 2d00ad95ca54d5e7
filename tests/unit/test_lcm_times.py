"""The times at which motion students are sampled, against diffusers' scheduler and the paper's code."""

import pytest
import torch
from diffusers import LCMScheduler

from raydistill.consistency.function import jump, reach
from raydistill.consistency.phases import lcm_times
from raydistill.consistency.schedule import RectifiedFlow, TimeGrid, VariancePreserving
from raydistill.errors import SamplingError
from raydistill.sampler import plan_lcm

GRID = TimeGrid(50)


def timesteps(num_steps, grid=GRID):
    """Timestep k of a table of 1000 is t = (k + 1) / 1000."""
    return [round(1000 * t) - 1 for t in lcm_times(num_steps, 1.0, grid.last, grid)[:-1]]


def test_mcms_lists():
    assert timesteps(1) == [999]
    assert timesteps(2) == [999, 499]
    assert timesteps(4) == [999, 759, 499, 259]
    assert timesteps(8) == [999, 879, 759, 639, 499, 379, 259, 139]


@pytest.mark.parametrize("num_steps", [*range(1, 11), 25, 50])
def test_diffusers_scheduler_has_the_same(num_steps):
    scheduler = LCMScheduler(original_inference_steps=50)
    scheduler.set_timesteps(num_steps, original_inference_steps=50)
    assert scheduler.timesteps.tolist() == timesteps(num_steps)


@pytest.mark.parametrize("num_steps", [1, 4, 7, 50])
def test_a_grid_that_ends_above_the_data_has_the_same_starts(num_steps):
    grid = TimeGrid(50, last=0.001)  # timestep 0, where MCM's last interval ends
    assert timesteps(num_steps, grid) == timesteps(num_steps)
    assert lcm_times(num_steps, 1.0, 0.001, grid)[-1] == 0.001


def test_they_end_where_the_segment_ends():
    assert lcm_times(2, 0.6, 0.2, GRID) == pytest.approx((0.6, 0.4, 0.2))
    assert plan_lcm(4, TimeGrid(50, last=0.01)).jumps[-1].s == 0.0


@pytest.mark.parametrize("num_steps", [0, 51])
def test_more_steps_than_intervals_are_refused(num_steps):
    with pytest.raises(SamplingError, match="the grid has 50 intervals"):
        lcm_times(num_steps, 1.0, 0.0, GRID)


T, S = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.5, 0.0, 0.3])


@pytest.mark.parametrize(
    "schedule",
    [RectifiedFlow(), VariancePreserving.scaled_linear(), VariancePreserving.linear(prediction="v")],
    ids=["flow", "epsilon", "v"],
)
def test_reach_is_how_far_a_wrong_prediction_moves_the_jump(schedule):
    x, guess = torch.randn(2, 3, 2, 2, 2, 2, dtype=torch.float64)
    moved = jump(schedule, guess + 1, x, T, S) - jump(schedule, guess, x, T, S)
    torch.testing.assert_close(moved.abs()[:, 0, 0, 0, 0], reach(schedule, T, S))


def test_reach_by_hand():
    torch.testing.assert_close(reach(RectifiedFlow(), T, S), (T - S).double())
    t, s = T.double(), S.double()
    schedule = VariancePreserving.scaled_linear()
    expected = schedule.alpha(s) * schedule.sigma(t) / schedule.alpha(t) - schedule.sigma(s)
    torch.testing.assert_close(reach(schedule, T, S), expected)
    schedule = VariancePreserving.scaled_linear(prediction="v")
    expected = schedule.alpha(s) * schedule.sigma(t) - schedule.sigma(s) * schedule.alpha(t)
    torch.testing.assert_close(reach(schedule, T, S), expected)
