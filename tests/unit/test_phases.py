import pytest
import torch

from raydistill.consistency.phases import Phases, split_evenly, split_times
from raydistill.consistency.schedule import DCM_GRID, TimeGrid
from raydistill.errors import InvalidValue, SamplingError

HUNYUAN = DCM_GRID.nodes[49 - 37]  # sigma_37
WAN = DCM_GRID.nodes[49 - 34]


def dcm_indices(times):
    return [49 - DCM_GRID.node(t) for t in times[:-1]]


@pytest.mark.parametrize(
    ("num_steps", "indices"),
    [(2, [49, 37]), (4, [49, 43, 37, 18]), (8, [49, 46, 43, 40, 37, 28, 18, 9])],
)
def test_dcm_step_lists(num_steps, indices):
    times = split_times(Phases.dual(HUNYUAN, DCM_GRID.last), num_steps, DCM_GRID)
    assert dcm_indices(times) == indices
    assert times[-1] == DCM_GRID.last


def test_dcm_rule_on_wan():
    times = split_times(Phases.dual(WAN, DCM_GRID.last), 4, DCM_GRID)
    assert dcm_indices(times) == [49, 42, 34, 17]


def test_odd_counts_give_the_extra_step_to_the_noisy_phase():
    times = split_times(Phases.dual(0.6), 3, TimeGrid(25))
    assert times == (1.0, 0.8, 0.6, 0.0)
    assert len(split_times(Phases((1.0, 0.8, 0.4, 0.0)), 5, TimeGrid(25))) == 6


def test_a_single_phase_is_split_over_the_whole_grid():
    assert split_times(Phases.single(), 4, TimeGrid(8)) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert split_times(Phases.single(), 1, TimeGrid(8)) == (1.0, 0.0)


def test_splits_that_do_not_exist_are_refused():
    grid = TimeGrid(25)
    with pytest.raises(SamplingError, match="each needs one"):
        split_times(Phases.dual(0.6), 1, grid)
    with pytest.raises(SamplingError, match=r"11 steps from 1 to 0\.6: the grid has 10"):
        split_times(Phases.dual(0.6), 22, grid)
    with pytest.raises(SamplingError):
        split_evenly(1.0, 0.6, 0, grid)
    with pytest.raises(InvalidValue, match="nearest"):
        split_times(Phases.dual(0.61), 4, grid)


def test_a_sample_exactly_at_the_boundary_is_the_detail_experts():
    phases = Phases.dual(HUNYUAN, DCM_GRID.last)
    t = torch.tensor(DCM_GRID.nodes[11:14], dtype=torch.float64)  # one above, the boundary, one below
    assert phases.index(t).tolist() == [0, 1, 1]
    assert phases.end(t).tolist() == [HUNYUAN, DCM_GRID.last, DCM_GRID.last]


@pytest.mark.parametrize("boundary", [0.6, 0.9, HUNYUAN, WAN])
def test_routing_survives_float32_times(boundary):
    # float32(0.6) is above 0.6: a bare comparison would send the boundary to the semantic expert.
    t = torch.tensor([boundary], dtype=torch.float32)
    assert Phases.dual(boundary).index(t).tolist() == [1]
    assert Phases.dual(boundary).index(t.double()).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_times_are_refused(dtype):
    # bfloat16 has 0.984 and 0.980 around the boundary 0.98176 and nothing between: it cannot be asked.
    with pytest.raises(ValueError, match="cannot tell neighbours apart"):
        Phases.dual(HUNYUAN).index(torch.tensor([HUNYUAN], dtype=dtype))


def test_times_at_the_end_stay_in_the_last_phase():
    phases = Phases.dual(0.6, 0.1)
    assert phases.index(torch.tensor([0.1, 0.05, 0.0], dtype=torch.float64)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "edges", [(1.0,), (1.0, 1.0), (1.0, 0.5, 0.6), (0.9, 0.0), (1.0, -0.1), (1.0, 0.5, 0.5)]
)
def test_edges_that_do_not_fall_are_refused(edges):
    with pytest.raises(InvalidValue):
        Phases(edges)


def test_crossing_is_refused_by_name():
    phases = Phases.dual(0.6)
    phases.require_no_crossing((1.0, 0.8, 0.6, 0.0))
    with pytest.raises(SamplingError, match=r"from 0\.8 to 0\.4 crosses the boundary 0\.6"):
        phases.require_no_crossing((1.0, 0.8, 0.4, 0.0))


def test_wans_published_list_crosses():
    # DCM's own Wan list jumps 982 -> 949 over the boundary 975.4.
    with pytest.raises(SamplingError, match=r"0\.97541"):
        Phases.dual(WAN).require_no_crossing((1.0, 0.992, 0.982, 0.949, 0.905, 0.81, 0.0))
