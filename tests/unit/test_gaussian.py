"""The closed-form teacher, and the consistency loss on it: the exact map, and only it, is the fixed point."""

import pytest
import torch

from raydistill.consistency.function import jump
from raydistill.consistency.losses import pseudo_huber
from raydistill.consistency.phases import Phases
from raydistill.consistency.schedule import DCM_GRID, RECTIFIED_FLOW, TimeGrid
from raydistill.consistency.solver import euler
from raydistill.models.gaussian import GaussianStudent, GaussianTeacher

TEACHER = GaussianTeacher(0.3, 0.7)
KAPPA = DCM_GRID.nodes[49 - 37]


def text(b):
    return torch.zeros(b, 1, 1, dtype=torch.float64)


def euler_step(teacher):
    return lambda x, t, r: euler(RECTIFIED_FLOW, teacher, x, t, r, text(len(x)))


def normal(seed, b):
    return torch.randn((b, 2, 3, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_velocity_is_the_derivative_of_the_exact_map():
    x, t = normal(1, 4), times(0.9, 0.6, 0.3, 0.05)
    h = 1e-6
    slope = (TEACHER.consistency_map(x, t, t + h) - TEACHER.consistency_map(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(TEACHER(x, t, text(len(t))), slope, rtol=1e-7, atol=1e-7)


def test_the_map_carries_noise_to_the_data():
    noise = normal(2, 4)
    x0 = TEACHER.consistency_map(
        noise, torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    )
    torch.testing.assert_close(x0, 0.3 + 0.7 * noise)


def test_mean_and_deviation_may_differ_by_position():
    mean, deviation = normal(3, 1), normal(4, 1).abs() + 0.1
    teacher, noise = GaussianTeacher(mean, deviation), normal(5, 2)
    x0 = teacher.consistency_map(noise, times(1, 1), times(0, 0))
    torch.testing.assert_close(x0, mean + deviation * noise)


def consistency_gap(student, target, step, grid, phases):
    """Pseudo-Huber distance of f_student(x_t, t -> s) to f_target(x_r, r -> s) on every interval."""
    t, r = grid.interval(torch.arange(grid.num_intervals))
    s = phases.end(t)
    x0 = 0.3 + 0.7 * normal(6, len(t))
    x_t = RECTIFIED_FLOW.add_noise(x0, normal(7, len(t)), t)
    x_r = step(x_t, t, r)
    goal = jump(RECTIFIED_FLOW, target(x_r, r, text(len(t))), x_r, r, s)
    guess = jump(RECTIFIED_FLOW, student(x_t, t, text(len(t))), x_t, t, s)
    return pseudo_huber(guess, goal, 1e-3), goal, x_r


@pytest.mark.parametrize("boundary", [0.2, 0.6, 0.92])
def test_the_exact_map_is_a_fixed_point_of_the_consistency_loss(boundary):
    phases = Phases.dual(boundary)
    student = GaussianStudent(TEACHER, phases)
    gap, _, _ = consistency_gap(student, student, TEACHER.consistency_map, TimeGrid(25), phases)
    assert float(gap.max()) < 1e-25


def test_wrong_maps_are_not():
    phases = Phases.dual(0.6)

    def short(x_t, t, text):
        return 0.9 * GaussianStudent(TEACHER, phases)(x_t, t, text)

    for wrong in (TEACHER, short):
        gap, _, _ = consistency_gap(wrong, wrong, TEACHER.consistency_map, TimeGrid(25), phases)
        assert float(gap.mean()) > 1e-5


def test_the_teacher_in_place_of_the_target_is_not_a_fixed_point():
    # The classic wrong port: with the teacher's straight line as the goal, the exact student has a loss.
    phases = Phases.dual(0.6)
    student = GaussianStudent(TEACHER, phases)
    gap, _, _ = consistency_gap(student, TEACHER, TEACHER.consistency_map, TimeGrid(25), phases)
    assert float(gap.mean()) > 1e-5


def test_eulers_gap_vanishes_with_its_step():
    phases, gaps = Phases.dual(0.6), []
    student = GaussianStudent(TEACHER, phases)
    for num in (25, 50, 100):
        gap, _, _ = consistency_gap(student, student, euler_step(TEACHER), TimeGrid(num), phases)
        gaps.append(float(gap.mean()))
    assert gaps[0] > 4 * gaps[1] > 16 * gaps[2] > 0


@pytest.mark.parametrize("edges", [(1.0, DCM_GRID.last), (1.0, KAPPA, DCM_GRID.last)])
def test_straight_line_teacher_and_student_have_no_loss_at_any_index(edges):
    # deviation 0: all data is one video, every path is a straight line, and teacher and student agree.
    phases, teacher = Phases(edges), GaussianTeacher(0.3, 0.0)
    step = euler_step(teacher)
    t, r = DCM_GRID.interval(torch.arange(50))
    s = phases.end(t)
    x_t = RECTIFIED_FLOW.add_noise(torch.full((50, 2, 3, 2, 2), 0.3, dtype=torch.float64), normal(8, 50), t)
    x_r = step(x_t, t, r)
    goal = jump(RECTIFIED_FLOW, teacher(x_r, r, text(len(t))), x_r, r, s)
    guess = jump(RECTIFIED_FLOW, teacher(x_t, t, text(len(t))), x_t, t, s)
    assert float(pseudo_huber(guess, goal, 1e-3).max()) < 1e-25


def test_at_the_boundary_interval_the_target_is_the_teachers_euler_point():
    phases = Phases.dual(KAPPA, DCM_GRID.last)

    def nonsense(x_t, t, text):
        return 100 * x_t.sin()

    _, goal, x_r = consistency_gap(nonsense, nonsense, euler_step(TEACHER), DCM_GRID, phases)
    last_semantic, last_detail = 49 - 38, 49 - 0
    assert torch.equal(goal[last_semantic], x_r[last_semantic])
    assert torch.equal(goal[last_detail], x_r[last_detail])
    assert not torch.equal(goal[0], x_r[0])
