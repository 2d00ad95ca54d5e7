"""Algorithms 1 and 2: what is compared with what, and where gradients go."""

from dataclasses import replace

import pytest
import torch

from raydistill.config.stages import ObjectiveConfig
from raydistill.consistency.phases import Phases
from raydistill.consistency.schedule import (
    DCM_GRID,
    SAME_TIME,
    RectifiedFlow,
    TimeGrid,
    VariancePreserving,
)
from raydistill.errors import NonFiniteLoss
from raydistill.experts.detail import Judges, critic_losses, detail_look, renoised_pair
from raydistill.experts.loop import require_finite
from raydistill.experts.meter import Meter
from raydistill.experts.semantic import (
    Jumped,
    Losses,
    Networks,
    Segment,
    Term,
    consistency_losses,
    consistency_pair,
    consistency_terms,
)
from raydistill.models.critic import TokenCritic
from raydistill.models.gaussian import GaussianStudent, GaussianTeacher
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch

GRID = TimeGrid(50)
PLAIN = ObjectiveConfig(normalise_jump=False)


def _segment(upper=1.0, lower=0.6, grid=GRID):
    return Segment(RectifiedFlow(), grid, upper, lower, seed=3)


def _batch(size=64, shape=(4, 4, 4, 4)):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(size, *shape, generator=rng, dtype=torch.float64)
    return Batch(torch.arange(size), latents, torch.randn(size, 3, 32, generator=rng, dtype=torch.float64))


def semantic_losses(nets, segment, batch, objective):
    return consistency_losses(nets, segment, batch, objective)[0]


def _exact(lower=0.6, deviation=0.5):
    teacher = GaussianTeacher(mean=0.3, deviation=deviation)
    edges = Phases.dual(0.6) if lower else Phases.single()
    return Networks(GaussianStudent(teacher, edges), GaussianStudent(teacher, edges), teacher)


def test_the_exact_student_of_a_straight_teacher_has_no_loss():
    nets = _exact(deviation=0.0)
    pair = consistency_pair(nets, _segment(), _batch())
    torch.testing.assert_close(pair.guess, pair.goal, rtol=0, atol=1e-12)


def test_the_exact_students_loss_falls_with_the_square_of_the_teachers_step():
    def loss(num_intervals):
        pair = consistency_pair(_exact(), _segment(grid=TimeGrid(num_intervals)), _batch())
        return (pair.guess - pair.goal).abs().mean().item()

    assert loss(100) / loss(50) == pytest.approx(0.25, rel=0.15)  # one Euler step's error is O(h^2)


def test_a_wrong_student_has_a_loss():
    exact = _exact()
    wrong = replace(exact, student=exact.teacher)
    assert (
        semantic_losses(wrong, _segment(), _batch(), PLAIN).total
        > 20 * semantic_losses(exact, _segment(), _batch(), PLAIN).total
    )


def test_the_goal_of_the_last_interval_is_the_teachers_euler_point():
    # With r = s the target network must not matter: f(x, s -> s) = x.
    segment = _segment(upper=0.62)
    nets = replace(_exact(), target=lambda x, t, text: torch.full_like(x, 1e6))
    batch = _batch()
    pair = consistency_pair(nets, segment, batch)
    t, r, s = segment.times(batch.index)
    assert torch.equal(r, s)
    x_t = (1 - 0.62) * batch.latents + 0.62 * segment.noise(batch.index, batch.latents)
    torch.testing.assert_close(pair.goal, x_t + (0.6 - 0.62) * nets.teacher(x_t, t, batch.text))


def test_the_goal_is_the_targets_jump_from_one_teacher_step_nearer_the_data():
    teacher = GaussianTeacher(mean=0.3, deviation=0.5)
    target = lambda x, t, text: 2.0 * x  # noqa: E731
    nets = Networks(lambda x, t, text: torch.zeros_like(x), target, teacher)
    segment, batch = _segment(), _batch()
    pair = consistency_pair(nets, segment, batch)
    t, r, s = (v.view(-1, 1, 1, 1, 1) for v in segment.times(batch.index))
    assert bool((t > r).all())
    assert bool((r >= s).all())
    x_t = (1 - t) * batch.latents + t * segment.noise(batch.index, batch.latents)
    x_r = x_t + (r - t) * teacher(x_t, t.flatten(), batch.text)
    torch.testing.assert_close(pair.goal, x_r + (s - r) * 2.0 * x_r)
    torch.testing.assert_close(pair.guess, x_t)


def test_only_the_student_gets_gradients():
    weights = {
        name: torch.ones((), dtype=torch.float64, requires_grad=True)
        for name in ("student", "target", "teacher")
    }
    fields = {name: (lambda x, t, text, w=w: w * x) for name, w in weights.items()}
    semantic_losses(Networks(**fields), _segment(), _batch(), PLAIN).total.backward()
    assert weights["student"].grad is not None
    assert weights["student"].grad != 0
    assert weights["target"].grad is None
    assert weights["teacher"].grad is None


def test_times_stay_inside_the_segment_and_reach_every_interval():
    for upper, lower, count in ((1.0, 0.6, 20), (0.6, 0.0, 30)):
        t, r, s = _segment(upper, lower).times(torch.arange(2000))
        assert t.max() == pytest.approx(upper)
        assert s.unique().tolist() == [lower]
        assert r.min() == pytest.approx(lower)
        assert len(t.unique()) == count
        assert bool((t > r).all())
        assert bool((r >= s).all())


def test_numbers_do_not_depend_on_how_samples_are_batched():
    segment, nets, whole = _segment(), _exact(), _batch(8)
    halves = [Batch(whole.index[i], whole.latents[i], whole.text[i]) for i in (slice(0, 4), slice(4, 8))]
    both = torch.cat([consistency_pair(nets, segment, half).goal for half in halves])
    torch.testing.assert_close(consistency_pair(nets, segment, whole).goal, both)


def test_normalising_by_the_jump_measures_mean_velocities():
    segment, batch = _segment(), _batch()
    teacher = GaussianTeacher(mean=0.3, deviation=0.5)
    nets = Networks(
        lambda x, t, text: teacher(x, t, text) + 0.01, GaussianStudent(teacher, Phases.dual(0.6)), teacher
    )
    pair = consistency_pair(nets, segment, batch)
    terms = consistency_terms(
        pair, ObjectiveConfig(normalise_jump=True, temporal_coherence=1.0, coherence_stride=2)
    )
    length = (pair.t - pair.s).view(-1, 1, 1, 1, 1)
    scaled = replace(pair, guess=pair.guess / length, goal=pair.goal / length)
    plain = consistency_terms(scaled, replace(PLAIN, temporal_coherence=1.0, coherence_stride=2))
    for name in ("consistency", "temporal_coherence"):
        torch.testing.assert_close(terms[name].value, plain[name].value)


def test_a_term_of_weight_0_is_not_computed():
    assert set(semantic_losses(_exact(), _segment(), _batch(), PLAIN).terms) == {"consistency"}


def _stage(real="data", last=0.0):
    """A small detail stage: student, slow target and teacher of the real classes, with judges."""
    nets = [build_tiny_teacher(seed, dim_head=12, num_heads=2, num_layers=2) for seed in (0, 1, 2)]
    for i, net in enumerate(nets):
        rng = torch.Generator().manual_seed(i)
        for p in net.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    student, target, teacher = nets
    teacher.requires_grad_(False)
    torch.manual_seed(0)
    critic = TokenCritic(2, 24, 8)
    batch = _batch(4)
    batch = Batch(batch.index, batch.latents.float(), batch.text.float())
    judges = Judges(teacher, critic, (0, 1), teacher.token_grid(batch.latents), real)
    return Networks(student, target, teacher), judges, _segment(0.6, last, TimeGrid(5, last=last)), batch


OBJECTIVE = ObjectiveConfig(adversarial=0.7, feature_matching=0.3)


def detail_losses(nets, judges, segment, batch):
    """The detail stage's draw, and what the critic keeps."""
    looks = {"critic": detail_look(judges, segment, OBJECTIVE)}
    losses, kept = consistency_losses(nets, segment, batch, OBJECTIVE, looks)
    return losses, kept["critic"]


@pytest.mark.parametrize(("real", "last"), [("data", 0.0), ("target", 0.0), ("target", 0.15)])
def test_the_leafs_detour_gives_the_gradient_of_the_whole_sum(real, last):
    nets, judges, segment, batch = _stage(real, last)
    losses, _ = detail_losses(nets, judges, segment, batch)
    losses.total.backward()
    taken = {n: p.grad.clone() for n, p in nets.student.named_parameters()}
    assert all(p.grad is None for p in judges.critic.parameters())
    assert all(p.grad is None for net in (judges.teacher, nets.target) for p in net.parameters())
    nets.student.zero_grad()

    direct = _direct_total(nets, judges, segment, batch)
    torch.testing.assert_close(losses.total, direct)
    direct.backward()
    for name, p in nets.student.named_parameters():
        torch.testing.assert_close(taken[name], p.grad, rtol=1e-4, atol=1e-6)


def _direct_total(nets, judges, segment, batch):
    """The same objective in one graph, as the formulas stand."""
    pair = consistency_pair(nets, segment, batch)
    _, a, _ = segment.times(batch.index, "adversarial time")
    n, at = segment.noise(batch.index, pair.guess, "adversarial noise"), a.float().view(-1, 1, 1, 1, 1)
    s = segment.lower
    real = batch.latents if judges.real == "data" else pair.goal
    fake, real = (((1 - at) * x + (at - s) * n) / (1 - s) for x in (pair.guess, real))
    fake_maps, fake_seen = judges.teacher.features(fake, a, batch.text, judges.blocks)
    _, real_seen = judges.teacher.features(real, a, batch.text, judges.blocks)
    total = consistency_terms(pair, OBJECTIVE)["consistency"].value.mean()
    logits = torch.cat(judges.critic(fake_maps, judges.grid))
    total = total + 0.7 * torch.relu(1 - logits).mean()
    return (
        total
        + 0.3
        * torch.stack([(f - r).square().mean() for f, r in zip(fake_seen, real_seen, strict=True)]).mean()
    )


def test_against_the_target_both_take_the_straight_line_from_the_segments_end_with_one_noise():
    segment, batch = _segment(1.0, 0.3, TimeGrid(3, last=0.3)), _batch(8)
    guess, goal, s = batch.latents, batch.latents.flip(0), torch.full((8,), 0.3, dtype=torch.float64)
    fake, real, a = renoised_pair(segment, batch, Jumped(guess, goal, s, s, s), guess, "target")
    at, n = a.view(-1, 1, 1, 1, 1), segment.noise(batch.index, guess, "adversarial noise")
    torch.testing.assert_close(fake, ((1 - at) * guess + (at - 0.3) * n) / 0.7)
    torch.testing.assert_close(real, ((1 - at) * goal + (at - 0.3) * n) / 0.7)


def test_on_a_variance_preserving_path_the_critic_sees_the_noise_that_its_time_says():
    """Unit data stays of unit variance, and the fake and the real side still share their noise."""
    schedule = VariancePreserving.scaled_linear(prediction="v").with_less_signal(3.0, zero_terminal=True)
    segment = replace(_segment(0.6, 0.0, TimeGrid(5)), schedule=schedule)
    batch = _batch(64, (1, 4, 8, 8))
    rng, s = torch.Generator().manual_seed(5), torch.zeros(64, dtype=torch.float64)
    guess = torch.randn(batch.latents.shape, generator=rng).double()
    fake, real, a = renoised_pair(segment, batch, Jumped(guess, -guess, s, s, s), guess, "target")
    alpha, n = schedule.alpha(a).view(-1, 1, 1, 1, 1), segment.noise(batch.index, guess, "adversarial noise")
    torch.testing.assert_close(fake - real, 2 * alpha * guess)
    torch.testing.assert_close((fake + real) / 2, schedule.sigma(a).view(-1, 1, 1, 1, 1) * n)
    assert fake.std().item() == pytest.approx(1.0, rel=0.02)


def test_against_data_a_perfect_students_sample_is_as_noisy_as_the_real_one():
    # What has the law of data noised to the grid's end, 0.3, must not stand out at any time.
    segment, batch = _segment(1.0, 0.3, TimeGrid(3, last=0.3)), _batch(256, (1, 4, 8, 8))
    rng = torch.Generator().manual_seed(5)
    s = torch.full((256,), 0.3, dtype=torch.float64)
    leaf = segment.schedule.add_noise(
        batch.latents, torch.randn(batch.latents.shape, generator=rng).double(), s
    )
    fake, real, a = renoised_pair(segment, batch, Jumped(leaf, leaf, s, s, s), leaf, "data")
    for time in a.unique():
        ours, theirs = fake[a == time].std().item(), real[a == time].std().item()
        assert ours == pytest.approx(theirs, rel=0.01), float(time)


def test_the_critics_turn_reuses_features_and_reaches_the_critic_alone():
    nets, judges, segment, batch = _stage()
    passes = []
    judges.teacher.transformer.register_forward_hook(lambda *_: passes.append(1))
    _, seen = detail_losses(nets, judges, segment, batch)
    assert len(passes) == 3  # one step of the ODE, the student's sample, the real one
    losses = critic_losses(judges.critic, seen, judges.grid)
    losses.total.backward()
    assert len(passes) == 3
    assert all(p.grad is not None for p in judges.critic.parameters())
    assert all(p.grad is None for p in nets.student.parameters())


def test_the_critic_learns_to_tell_data_from_a_bad_student():
    nets, judges, segment, batch = _stage()
    optimiser = torch.optim.AdamW(judges.critic.parameters(), lr=1e-2)
    first = None
    for _ in range(30):
        _, seen = detail_losses(nets, judges, segment, batch)
        loss = critic_losses(judges.critic, seen, judges.grid).total
        first = first if first is not None else loss.item()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < 0.7 * first


@pytest.mark.parametrize(
    ("grid", "lower"), [(GRID, 0.6), (DCM_GRID, DCM_GRID.nodes[37]), (TimeGrid(3), 1 / 3)]
)
def test_noise_levels_share_what_is_drawn(grid, lower):
    segment = _segment(1.0, lower, grid)
    levels = segment.levels(5)
    assert (levels[0], levels[-1]) == (grid.snap(lower), 1.0)
    t, _, _ = segment.times(torch.arange(6000))
    count = torch.bincount(torch.bucketize(t, torch.tensor(levels[1:-1], dtype=torch.float64) + SAME_TIME))
    assert len(count) == min(5, len(grid.intervals_in(1.0, lower)))
    assert count.min() > 0.6 * count.max()


def test_a_term_that_is_not_finite_stops_the_run_by_name():
    nan = Losses(
        torch.tensor(0.0), {"feature_matching": Term(0.0, torch.tensor([1.0, torch.nan]), torch.zeros(2))}
    )
    with pytest.raises(NonFiniteLoss, match="'feature_matching' is nan at step 17"):
        require_finite(nan, 17)


def test_the_meter_means_by_term_and_noise_level():
    meter, t = Meter([0.0, 0.2, 0.4, 0.8, 1.0]), torch.tensor([0.2, 0.21, 1.0, 0.95])
    meter.add(Losses(torch.tensor(0.0), {"a": Term(1.0, torch.tensor([1.0, 2.0, 3.0, 5.0]), t)}))
    meter.add(Losses(torch.tensor(0.0), {"a": Term(1.0, torch.tensor([3.0]), torch.tensor([0.1]))}))
    assert meter.read() == {
        "loss/a": pytest.approx(14 / 5),
        "bucket/0.000-0.200/a": pytest.approx(2.0),
        "bucket/0.200-0.400/a": pytest.approx(2.0),
        "bucket/0.800-1.000/a": pytest.approx(4.0),
    }
