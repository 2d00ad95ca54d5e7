import pytest
import torch

from raydistill.consistency.function import jump
from raydistill.consistency.schedule import RECTIFIED_FLOW, TimeGrid, VariancePreserving
from raydistill.consistency.solver import euler, guide, guided, guided_by, heun, solve
from raydistill.models.gaussian import GaussianTeacher

SHAPE = (3, 2, 3, 2, 2)
TEXT = torch.zeros(3, 2, 4, dtype=torch.float64)


def normal(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def reads_text(x_t, t, text):
    """A field that shows which sample, time and text it was asked with."""
    return x_t * t.view(-1, 1, 1, 1, 1) + text.sum(dim=(1, 2)).view(-1, 1, 1, 1, 1)


def test_euler_goes_towards_the_data_by_hand():
    x, t, r = normal(1), times(1.0, 0.6, 0.2), times(0.9, 0.5, 0.0)
    field = GaussianTeacher(0.3, 0.7)
    expected = x + (r - t).view(-1, 1, 1, 1, 1) * field(x, t, TEXT)
    torch.testing.assert_close(euler(RECTIFIED_FLOW, field, x, t, r, TEXT), expected)


def test_euler_is_exact_on_straight_lines():
    x0, noise, t, r = normal(1), normal(2), times(1.0, 0.6, 0.2), times(0.9, 0.5, 0.0)
    x_t = RECTIFIED_FLOW.add_noise(x0, noise, t)
    found = euler(RECTIFIED_FLOW, lambda *_: noise - x0, x_t, t, r, TEXT)
    torch.testing.assert_close(found, RECTIFIED_FLOW.add_noise(x0, noise, r))


def test_guidance_by_hand():
    cond, uncond = normal(1), normal(2)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    # DCM's w = 5 is cond + 5 (cond - uncond): ours is 6.
    torch.testing.assert_close(guide(cond, uncond, 6.0), cond + 5 * (cond - uncond))


@pytest.mark.parametrize(("batched", "passes"), [(True, [6]), (False, [3, 3])])
def test_guided_makes_one_batched_pass_or_two(batched, passes):
    sizes = []

    def field(x_t, t, text):
        sizes.append((len(x_t), len(t), len(text)))
        return reads_text(x_t, t, text)

    x, t = normal(1), times(0.9, 0.5, 0.1)
    text, null = TEXT + times(1, 2, 3).view(-1, 1, 1), torch.full((2, 4), -0.5, dtype=torch.float64)
    found = guided(field, null, 3.0, batched=batched)(x, t, text)
    assert sizes == [(size, size, size) for size in passes]
    cond, uncond = reads_text(x, t, text), reads_text(x, t, null.expand_as(text))
    torch.testing.assert_close(found, uncond + 3 * (cond - uncond))


def test_guidance_of_one_is_off():
    assert guided(reads_text, torch.zeros(2, 4), 1.0) is reads_text


def test_a_scale_for_each_sample_is_that_samples_guidance_in_one_pass():
    sizes = []

    def field(x_t, t, text):
        sizes.append(len(x_t))
        return reads_text(x_t, t, text)

    x, t = normal(1), times(0.9, 0.5, 0.1)
    text, null = TEXT + times(1, 2, 3).view(-1, 1, 1), torch.full((2, 4), -0.5, dtype=torch.float64)
    scales = (6.0, 1.0, 0.0)
    found = guided_by(field, null)(x, t, text, times(*scales))
    assert sizes == [6]
    for i, w in enumerate(scales):
        torch.testing.assert_close(found[i], guided(reads_text, null, w)(x, t, text)[i])
        constant = guided_by(reads_text, null)(x, t, text, times(w, w, w))
        torch.testing.assert_close(constant, guided(reads_text, null, w)(x, t, text))


def error_of(method, num_intervals):
    teacher, x = GaussianTeacher(0.4, 0.5), normal(5)
    found = solve(RECTIFIED_FLOW, teacher, x, TimeGrid(num_intervals).times, TEXT, method)
    exact = teacher.consistency_map(x, times(1, 1, 1), times(0, 0, 0))
    return float((found - exact).abs().max())


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_against_the_gaussian_oracle(method, order):
    coarse, fine = error_of(method, 40), error_of(method, 80)
    assert torch.log2(torch.tensor(coarse / fine)).item() == pytest.approx(order, abs=0.15)


class PerfectNoise:
    """The exact epsilon of data N(0, deviation^2) on a variance-preserving schedule."""

    def __init__(self, schedule, deviation):
        self.schedule, self.deviation = schedule, deviation

    def spread(self, t):
        return (self.schedule.alpha(t) * self.deviation) ** 2 + self.schedule.sigma(t) ** 2

    def __call__(self, x_t, t, text):
        return (self.schedule.sigma(t) / self.spread(t)).view(-1, 1, 1, 1, 1) * x_t


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_on_a_variance_preserving_schedule(method, order):
    # A smooth table: interpolation must not limit the order.
    schedule = VariancePreserving(tuple(1 - 0.99 * (k + 1) / 400 for k in range(400)))
    field, x = PerfectNoise(schedule, 0.5), normal(6)
    ends = times(0.8, 0.8, 0.8), times(0.2, 0.2, 0.2)
    exact = (field.spread(ends[1]) / field.spread(ends[0])).sqrt().view(-1, 1, 1, 1, 1) * x
    errors = []
    for num in (20, 40):
        path = torch.linspace(0.8, 0.2, num + 1, dtype=torch.float64)
        errors.append(float((solve(schedule, field, x, path, TEXT, method) - exact).abs().max()))
    assert torch.log2(torch.tensor(errors[0] / errors[1])).item() == pytest.approx(order, abs=0.2)


def test_heun_steps_with_two_passes():
    calls = []

    def field(x_t, t, text):
        calls.append(t[0].item())
        return x_t

    heun(RECTIFIED_FLOW, field, normal(1), times(1, 1, 1), times(0.5, 0.5, 0.5), TEXT)
    assert calls == [1.0, 0.5]


def test_solve_visits_every_node_once():
    asked = []

    def field(x_t, t, text):
        asked.append(t.tolist())
        return torch.zeros_like(x_t)

    x = normal(1)
    torch.testing.assert_close(solve(RECTIFIED_FLOW, field, x, TimeGrid(4).times, TEXT), x)
    assert asked == [[u] * 3 for u in (1.0, 0.75, 0.5, 0.25)]


def test_shapes_are_enforced_here():
    with pytest.raises(TypeError, match="Type-check"):
        jump(RECTIFIED_FLOW, normal(1), normal(1), times(1, 1), times(0, 0))
