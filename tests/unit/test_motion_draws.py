"""Where paths begin, by whom the teacher is guided, how onlookers are heard: with networks in closed form."""

from dataclasses import replace

import torch

from raydistill.config.stages import ObjectiveConfig
from raydistill.consistency.schedule import RECTIFIED_FLOW, TimeGrid, VariancePreserving
from raydistill.experts.semantic import (
    Networks,
    Segment,
    Term,
    consistency_losses,
    starting_point,
    teacher_step,
)
from raydistill.models.gaussian import GaussianTeacher
from raydistill.types import Batch, Origin

TEACHER = GaussianTeacher(mean=0.3, deviation=0.5)
SEGMENT = Segment(RECTIFIED_FLOW, TimeGrid(10), 1.0, 0.0, seed=3, guidance=(1.0, 3.0), simulates=True)


def networks():
    return Networks(
        TEACHER, TEACHER, TEACHER, lambda x, t, text, w: TEACHER(x, t, text) * w.view(-1, 1, 1, 1, 1)
    )


def batch_of(*origins):
    count = len(origins)
    rng = torch.Generator().manual_seed(0)
    latents, x_r = torch.randn(2, count, 2, 3, 2, 2, generator=rng, dtype=torch.float64)
    text = torch.zeros(count, 1, 4, dtype=torch.float64)
    return Batch(torch.arange(count), latents, text, torch.tensor([int(o) for o in origins]), x_r)


def test_a_recorded_state_is_where_the_path_is():
    batch = batch_of(Origin.VIDEO, Origin.RECORDED)
    t, _, _ = SEGMENT.times(batch.index)
    x_t = starting_point(networks(), SEGMENT, batch, t)
    assert torch.equal(x_t[1], batch.latents[1])
    noise = SEGMENT.noise(batch.index, batch.latents)
    torch.testing.assert_close(x_t[0], RECTIFIED_FLOW.add_noise(batch.latents, noise, t)[0])


def test_at_full_noise_the_start_is_noise_alone_on_every_schedule():
    segment = replace(SEGMENT, schedule=VariancePreserving.scaled_linear(), simulates=False)
    batch = replace(batch_of(Origin.VIDEO, Origin.VIDEO), origin=None, x_r=None)
    t = torch.tensor([1.0, 0.9], dtype=torch.float64)
    x_t = starting_point(networks(), segment, batch, t)
    noise = segment.noise(batch.index, batch.latents)
    assert torch.equal(x_t[0], noise[0])
    torch.testing.assert_close(x_t[1], segment.schedule.add_noise(batch.latents, noise, t)[1])


def test_simulated_samples_start_at_the_students_own_clip_of_the_caption():
    batch = replace(batch_of(Origin.SIMULATED, Origin.VIDEO), x_r=None)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    x_t = starting_point(networks(), SEGMENT, batch, t)
    pure = SEGMENT.noise(batch.index, batch.latents, "simulated noise")
    one = torch.ones(2, dtype=torch.float64)
    x0 = pure - TEACHER(pure, one, batch.text)
    noise = SEGMENT.noise(batch.index, batch.latents)
    torch.testing.assert_close(x_t[0], 0.5 * x0[0] + 0.5 * noise[0])
    torch.testing.assert_close(x_t[1], 0.5 * batch.latents[1] + 0.5 * noise[1])


def test_every_sample_has_a_guidance_scale_of_its_own():
    batch = batch_of(Origin.VIDEO, Origin.RECORDED, Origin.VIDEO)
    t, r, _ = SEGMENT.times(batch.index)
    scales = SEGMENT.scales(batch.index)
    assert len(set(scales.tolist())) == 3
    assert all(1.0 <= w < 3.0 for w in scales.tolist())
    x_r = teacher_step(networks(), SEGMENT, batch, batch.latents, (t, r))
    assert torch.equal(x_r[1], batch.x_r[1])
    for i in (0, 2):
        here = slice(i, i + 1)
        velocity = scales[i] * TEACHER(batch.latents[here], t[here], batch.text[here])
        torch.testing.assert_close(x_r[here], batch.latents[here] + (r[i] - t[i]) * velocity)


def test_what_an_onlooker_says_reaches_the_student_as_a_term_would():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    nets = replace(networks(), student=lambda x, t, text: weight * TEACHER(x, t, text))
    batch = replace(batch_of(*[Origin.VIDEO] * 4), origin=None, x_r=None)
    segment = replace(SEGMENT, simulates=False, guidance=None)
    kept = {}

    def look(batch, pair, leaf):
        kept["guess"] = pair.guess
        return {"size": Term(0.5, leaf.square().flatten(1).mean(dim=1), pair.t)}, "for later"

    objective = ObjectiveConfig()
    losses, seen = consistency_losses(nets, segment, batch, objective, {"someone": look})
    (ours,) = torch.autograd.grad(losses.total, weight)
    assert seen == {"someone": "for later"}
    direct, _ = consistency_losses(nets, segment, batch, objective)
    consistency_losses(nets, segment, batch, objective, {"someone": look})
    whole = direct.total + 0.5 * kept["guess"].square().flatten(1).mean(dim=1).mean()
    (theirs,) = torch.autograd.grad(whole, weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(losses.total, whole)
