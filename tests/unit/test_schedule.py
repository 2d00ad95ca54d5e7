import math

import pytest
import torch

from raydistill.consistency.function import jump
from raydistill.consistency.schedule import (
    DCM_GRID,
    RECTIFIED_FLOW,
    TimeGrid,
    VariancePreserving,
    diffuse,
    renoise,
    shift,
)
from raydistill.errors import InvalidValue

SHAPE = (4, 2, 3, 2, 2)


def normal(seed, *shape):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


# DCM's index i counts from the data: 1000 sigma_i at shift 17, N = 50.
DCM_TABLE = {
    0: 257.6, 1: 414.6, 2: 520.4, 4: 653.8, 8: 788.7, 9: 809.5, 17: 905.3, 18: 912.4, 25: 948.5, 28: 959.1,
    33: 973.06, 34: 975.41, 35: 977.64, 36: 979.75, 37: 981.763, 38: 983.68, 40: 987.25, 43: 992.04,
    46: 996.26, 49: 1000.0,
}  # fmt: skip


@pytest.mark.parametrize("index", DCM_TABLE)
def test_dcm_sigma_table(index):
    found = DCM_GRID.nodes[49 - index]
    s = (index + 1) / 50
    assert found == pytest.approx(17 * s / (1 + 16 * s), abs=1e-12)
    digits = len(str(DCM_TABLE[index]).partition(".")[2])
    assert round(1000 * found, digits) == DCM_TABLE[index]


def test_dcm_constants_to_1e6():
    sigma = dict(enumerate(reversed(DCM_GRID.nodes[:-1])))
    assert sigma[37] == pytest.approx(0.98176292, abs=1e-6)
    assert sigma[34] == pytest.approx(0.97540984, abs=1e-6)
    assert DCM_GRID.last == pytest.approx(0.016732, abs=1e-6)  # sigma(0.001), not 0
    assert DCM_GRID.nodes[-1] == DCM_GRID.last


def test_grid_nodes_intervals_and_neighbours():
    grid = TimeGrid(25)
    assert len(grid.nodes) == 26
    assert grid.times.dtype == torch.float64
    assert grid.nodes[0] == 1.0
    assert grid.nodes[-1] == 0.0
    assert grid.snap(0.6) == 0.6
    t, r = grid.interval(torch.tensor([0, 9, 24]))
    assert torch.equal(t, grid.times[[0, 9, 24]])
    assert torch.equal(r, grid.times[[1, 10, 25]])
    assert r[1] == 0.6  # the last semantic interval ends exactly at the boundary
    assert grid.intervals_in(1.0, 0.6) == range(10)
    assert grid.intervals_in(0.6, 0.0) == range(10, 25)


def test_a_time_that_went_through_float32_is_still_its_node():
    boundary = float(torch.tensor(0.6, dtype=torch.float32))
    assert boundary != 0.6
    assert TimeGrid(25).snap(boundary) == 0.6


def test_a_boundary_off_the_grid_names_its_neighbours():
    with pytest.raises(InvalidValue, match=r"0\.61: a node of the grid; the nearest are 0\.6 and 0\.64"):
        TimeGrid(25).intervals_in(1.0, 0.61)


@pytest.mark.parametrize(
    "values",
    [
        {"num_intervals": 0},
        {"shift": 0.0},
        {"shift": -1.0},
        {"shift": math.inf},
        {"last": -0.1},
        {"last": 0.5},
    ],
)
def test_grids_out_of_range_are_refused(values):
    with pytest.raises(InvalidValue):
        TimeGrid(**{"num_intervals": 4, **values})


def test_shift_of_the_teachers_default():
    assert shift(0.5, 3.0) == pytest.approx(0.75)
    assert torch.equal(shift(times(0, 0.5, 1), 3.0), times(0, 0.75, 1))


def test_rectified_flow_by_hand():
    x0, noise, t = normal(1), normal(2), times(0.0, 0.25, 0.5, 1.0)
    x_t = RECTIFIED_FLOW.add_noise(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[3], noise[3])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
    velocity = RECTIFIED_FLOW.to_prediction(x0, noise, t)
    assert torch.equal(velocity, noise - x0)


def test_jump_on_rectified_flow_is_the_euler_like_step():
    x, v, t, s = normal(1), normal(2), times(1, 0.9, 0.6, 0.2), times(0.98, 0.6, 0.0, 0.1)
    torch.testing.assert_close(jump(RECTIFIED_FLOW, v, x, t, s), x + (s - t).view(-1, 1, 1, 1, 1) * v)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_jump_on_variance_preserving_is_ddim(prediction):
    schedule = VariancePreserving.scaled_linear(prediction=prediction)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cumprod = (1 - betas).cumprod(0)
    x0, noise = normal(1), normal(2)
    k, j = [999, 500, 19, 1], [979, 480, 0, 0]  # DDIM's integer timesteps
    t, s = (times(*((i + 1) / 1000 for i in which)) for which in (k, j))
    a_t, a_s = (cumprod[which].view(-1, 1, 1, 1, 1) for which in (k, j))
    x_t = a_t.sqrt() * x0 + (1 - a_t).sqrt() * noise
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), x_t)
    found = jump(schedule, schedule.to_prediction(x0, noise, t), x_t, t, s)
    torch.testing.assert_close(found, a_s.sqrt() * x0 + (1 - a_s).sqrt() * noise)


# alpha and sigma at DDIM's timesteps, to four digits (Stable Diffusion's betas, AnimateDiff's).
WEIGHTS = {
    "scaled_linear": {
        19: (0.9911, 0.1333), 259: (0.8118, 0.5840), 499: (0.5269, 0.8499), 759: (0.2285, 0.9735),
        979: (0.0769, 0.9970), 999: (0.0683, 0.9977),
    },
    "linear": {
        19: (0.9905, 0.1377), 259: (0.7417, 0.6707), 499: (0.4023, 0.9155), 759: (0.1439, 0.9896),
        979: (0.0448, 0.9990), 999: (0.0397, 0.9992),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_the_teachers_schedules(kind):
    schedule = getattr(VariancePreserving, kind)()
    t = times(*((k + 1) / 1000 for k in WEIGHTS[kind]))
    alpha, sigma = zip(*WEIGHTS[kind].values(), strict=True)
    torch.testing.assert_close(schedule.alpha(t), times(*alpha), rtol=0, atol=6e-5)
    torch.testing.assert_close(schedule.sigma(t), times(*sigma), rtol=0, atol=6e-5)


def test_variance_preserving_ends():
    schedule = VariancePreserving((0.9, 0.5, 0.1))
    t = times(0, 1 / 3, 1 / 2, 1)
    torch.testing.assert_close(schedule.alpha(t) ** 2, times(1, 0.9, 0.7, 0.1))
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("table", [(), (0.5, 0.6), (0.5, 0.0), (1.0, 0.5)])
def test_tables_that_do_not_decrease_are_refused(table):
    with pytest.raises(InvalidValue):
        VariancePreserving(table)


def test_unknown_prediction_is_refused():
    # The shape checks of the tests see it first; without them it is InvalidValue.
    with pytest.raises((InvalidValue, TypeError), match="epsilon"):
        VariancePreserving((0.5,), "velocity")


def test_renoise_at_its_own_time_is_identity_and_at_one_is_noise():
    x, noise = normal(1), normal(2)
    s = times(0.016732, 0.2, 0.6, 0.0)
    torch.testing.assert_close(renoise(x, noise, s, s), x)
    torch.testing.assert_close(renoise(x, noise, torch.ones_like(s), s), noise)


def test_shared_noise_cancels_between_real_and_fake():
    # The pair differs by (1 - sigma_a) / (1 - sigma_e) times what guess and goal differ by.
    guess, goal, noise = normal(1), normal(2), normal(3)
    a, s = times(0.2576, 0.5, 0.9, 0.97), torch.full((4,), DCM_GRID.last, dtype=torch.float64)
    scale = ((1 - a) / (1 - s)).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(
        renoise(guess, noise, a, s) - renoise(goal, noise, a, s), scale * (guess - goal)
    )


def test_renoise_is_a_little_short_of_the_exact_variance():
    # DCM's linear formula gives 0.245 where 0.257 is exact, at sigma_a = 0.2576.
    zero, one = (
        torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64),
        torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
    )
    a, s = times(DCM_GRID.nodes[49]), times(DCM_GRID.last)
    assert renoise(zero, one, a, s).item() == pytest.approx(0.245, abs=5e-4)
    assert diffuse(zero, one, a, s).item() == pytest.approx(0.257, abs=5e-4)


@pytest.mark.parametrize("schedule", [RECTIFIED_FLOW, VariancePreserving.scaled_linear()])
def test_diffuse_reaches_the_law_of_noising_at_once(schedule):
    t, s = times(0.9, 0.6, 1.0, 0.3), times(0.3, 0.6, 0.2, 0.0)
    zero, one = (
        torch.zeros(4, 1, 1, 1, 1, dtype=torch.float64),
        torch.ones(4, 1, 1, 1, 1, dtype=torch.float64),
    )
    scale, spread = (diffuse(*pair, t, s, schedule).flatten() for pair in ((one, zero), (zero, one)))
    torch.testing.assert_close(scale * schedule.alpha(s), schedule.alpha(t))
    torch.testing.assert_close((scale * schedule.sigma(s)) ** 2 + spread**2, schedule.sigma(t) ** 2)


def test_float32_latents_stay_float32():
    x, t = normal(1).float(), times(1, 0.9, 0.6, 0.2)
    for schedule in (RECTIFIED_FLOW, VariancePreserving.scaled_linear()):
        assert jump(schedule, x, x, t, t / 2).dtype == torch.float32
        assert schedule.add_noise(x, x, t).dtype == torch.float32
        assert diffuse(x, x, t, t / 2, schedule).dtype == torch.float32
