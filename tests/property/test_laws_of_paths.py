"""Laws of the path: conversions, the consistency function, the exact maps, solvers, guidance."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.consistency.function import jump
from raydistill.consistency.phases import Phases
from raydistill.consistency.schedule import RECTIFIED_FLOW, TimeGrid, VariancePreserving, diffuse, renoise
from raydistill.consistency.solver import euler, guide, guided, heun, solve
from raydistill.models.gaussian import GaussianStudent, GaussianTeacher
from raydistill.sampler import build_plan, sample

B = 4
schedules = st.sampled_from(
    [
        RECTIFIED_FLOW,
        VariancePreserving.scaled_linear(prediction="epsilon"),
        VariancePreserving.scaled_linear(prediction="v"),
    ]
)
seeds = st.integers(0, 2**31)
teachers = st.builds(GaussianTeacher, st.floats(-2, 2), st.floats(0.1, 3))
TEXT = torch.zeros(B, 1, 1, dtype=torch.float64)


def latents(seed, count=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((B, 2, 3, 2, 2), generator=generator, dtype=torch.float64) for _ in range(count)]


@st.composite
def ordered_times(draw, count):
    """`count` tensors of times, each sample's falling from one to the next."""
    rows = [
        sorted(draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count)), reverse=True)
        for _ in range(B)
    ]
    return [torch.tensor([row[k] / 1000 for row in rows], dtype=torch.float64) for k in range(count)]


@given(schedules, seeds, ordered_times(1))
def test_a_jump_to_where_it_is_changes_nothing(schedule, seed, times):
    x, prediction = latents(seed, 2)
    assert torch.equal(jump(schedule, prediction, x, times[0], times[0]), x)


@given(schedules, seeds, ordered_times(1))
def test_conversions_are_inverse(schedule, seed, times):
    x0, noise = latents(seed, 2)
    t = times[0]
    x_t = schedule.add_noise(x0, noise, t)
    prediction = schedule.to_prediction(x0, noise, t)
    torch.testing.assert_close(schedule.to_x0(prediction, x_t, t), x0)
    torch.testing.assert_close(schedule.to_noise(prediction, x_t, t), noise)


@given(schedules, seeds, ordered_times(1))
def test_any_prediction_explains_its_own_state(schedule, seed, times):
    x_t, prediction = latents(seed, 2)
    t = times[0]
    x0, noise = schedule.to_x0(prediction, x_t, t), schedule.to_noise(prediction, x_t, t)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), x_t, rtol=1e-9, atol=1e-9)


@given(schedules, seeds, ordered_times(2))
def test_a_jump_with_the_true_prediction_lands_on_the_path(schedule, seed, times):
    x0, noise = latents(seed, 2)
    t, s = times
    prediction = schedule.to_prediction(x0, noise, t)
    found = jump(schedule, prediction, schedule.add_noise(x0, noise, t), t, s)
    torch.testing.assert_close(found, schedule.add_noise(x0, noise, s))


@given(teachers, seeds, ordered_times(3))
def test_exact_maps_compose(teacher, seed, times):
    (x,), (t, r, s) = latents(seed), times
    there = teacher.consistency_map(teacher.consistency_map(x, t, r), r, s)
    torch.testing.assert_close(there, teacher.consistency_map(x, t, s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(teacher.consistency_map(x, t, t), x)


@given(teachers, seeds, st.integers(1, 24))
def test_perfect_experts_hand_over_exactly(teacher, seed, node):
    grid = TimeGrid(25)
    boundary = grid.nodes[node]
    student = GaussianStudent(teacher, Phases.dual(boundary))
    (x,), ends = latents(seed), (torch.ones(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64))
    found = sample(
        {"semantic": student, "detail": student}, RECTIFIED_FLOW, build_plan(2, boundary, grid), x, TEXT
    )
    torch.testing.assert_close(found, teacher.consistency_map(x, *ends), rtol=1e-10, atol=1e-10)


@settings(max_examples=8)
@given(st.floats(-2, 2), st.floats(0.3, 0.6), seeds)
def test_euler_is_of_order_one_and_heun_of_order_two(mean, deviation, seed):
    teacher, (x,) = GaussianTeacher(mean, deviation), latents(seed)
    exact = teacher.consistency_map(x, *(torch.full((B,), u, dtype=torch.float64) for u in (0.9, 0.3)))
    for method, order in (("euler", 1), ("heun", 2)):
        errors = []
        for num in (16, 32):
            path = torch.linspace(0.9, 0.3, num + 1, dtype=torch.float64)
            errors.append((solve(RECTIFIED_FLOW, teacher, x, path, TEXT, method) - exact).norm())
        assert abs(float(torch.log2(errors[0] / errors[1])) - order) < 0.2


@given(schedules, seeds, ordered_times(2))
def test_no_step_is_no_step_for_every_solver(schedule, seed, times):
    (x,), t = latents(seed), times[0]
    for step in (euler, heun):
        assert torch.equal(step(schedule, lambda x_t, t, text: x_t.sin(), x, t, t, TEXT), x)


@given(seeds, st.floats(-3, 9), st.floats(-3, 9), st.floats(0, 1))
def test_guidance_is_affine_and_runs_from_unconditional_to_conditional(seed, a, b, mix):
    cond, uncond = latents(seed, 2)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    between = guide(cond, uncond, mix * a + (1 - mix) * b)
    torch.testing.assert_close(between, mix * guide(cond, uncond, a) + (1 - mix) * guide(cond, uncond, b))


@given(seeds, st.floats(-3, 9))
def test_the_batched_pass_is_two_passes(seed, guidance_scale):
    x, shape = latents(seed, 2)
    t, null = torch.linspace(0.1, 1, B, dtype=torch.float64), torch.full((2, 3), 0.5, dtype=torch.float64)
    text = shape[:, 0, :2, 0, :1].expand(B, 2, 3)

    def field(x_t, t, text):
        return x_t.sin() * t.view(-1, 1, 1, 1, 1) + text.sum((1, 2)).view(-1, 1, 1, 1, 1)

    expected = guide(field(x, t, text), field(x, t, null.expand_as(text)), guidance_scale)
    torch.testing.assert_close(guided(field, null, guidance_scale)(x, t, text), expected)


@given(schedules, seeds, ordered_times(3))
def test_noising_in_two_parts_has_the_variance_of_noising_at_once(schedule, seed, times):
    # Noise of variance 1 each: coefficients of data and both noises, by sending ones and zeros through.
    t, r, s = (u.clamp(max=0.999) for u in times)
    one, zero = (
        torch.ones((B, 1, 1, 1, 1), dtype=torch.float64),
        torch.zeros((B, 1, 1, 1, 1), dtype=torch.float64),
    )

    def twice(x, first, second):
        return diffuse(diffuse(x, first, r, s, schedule), second, t, r, schedule)

    torch.testing.assert_close(twice(one, zero, zero), diffuse(one, zero, t, s, schedule))
    variance = twice(zero, one, zero) ** 2 + twice(zero, zero, one) ** 2
    torch.testing.assert_close(variance, diffuse(zero, one, t, s, schedule) ** 2, rtol=1e-7, atol=1e-12)


@given(seeds, ordered_times(2))
def test_renoising_clean_data_is_noising_it(seed, times):
    x0, noise = latents(seed, 2)
    t, zero = times[0], torch.zeros(B, dtype=torch.float64)
    torch.testing.assert_close(renoise(x0, noise, t, zero), RECTIFIED_FLOW.add_noise(x0, noise, t))
    torch.testing.assert_close(diffuse(x0, noise, t, zero), RECTIFIED_FLOW.add_noise(x0, noise, t))
