"""Laws of the losses and of the moving average."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.consistency.average import moving_average_
from raydistill.consistency.losses import (
    feature_matching,
    hinge_critic,
    hinge_generator,
    pseudo_huber,
    temporal_coherence,
)
from raydistill.errors import TooFewFrames

seeds = st.integers(0, 2**31)
widths = st.floats(1e-4, 10)
frames = st.integers(1, 7)


def latents(seed, count=1, b=3, f=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((b, 2, f, 2, 2), generator=generator, dtype=torch.float64) for _ in range(count)]


@given(seeds, widths)
def test_pseudo_huber_is_a_symmetric_distance(seed, c):
    a, b = latents(seed, 2)
    found = pseudo_huber(a, b, c)
    assert bool((found > 0).all())
    torch.testing.assert_close(found, pseudo_huber(b, a, c))
    assert torch.equal(pseudo_huber(a, a, c), torch.zeros(3, dtype=torch.float64))
    # between its two limits: never more than |a - b|, never less than |a - b| - c
    distance = (a - b).abs().flatten(1).mean(dim=1)
    assert bool((found <= distance).all())
    assert bool((found >= distance - c).all())


@given(seeds, widths)
def test_pseudo_hubers_gradient_is_bounded_by_one(seed, c):
    a, b = latents(seed, 2)
    a.requires_grad_()
    pseudo_huber(a, b, c).sum().backward()
    assert a.grad is not None
    per_element = a.grad * a[0].numel()
    assert float(per_element.abs().max()) < 1
    torch.testing.assert_close(per_element, ((a - b) / ((a - b) ** 2 + c * c).sqrt()).detach())


@given(seeds)
def test_pseudo_huber_tends_to_the_absolute_difference(seed):
    a, b = latents(seed, 2)
    torch.testing.assert_close(pseudo_huber(a, b, 1e-9), (a - b).abs().flatten(1).mean(dim=1))


@given(seeds, widths, st.permutations(range(3)))
def test_losses_are_per_sample(seed, c, order):
    guess, goal = latents(seed, 2)
    for loss in (lambda a, b: pseudo_huber(a, b, c), lambda a, b: temporal_coherence(a, b, 2)):
        assert torch.equal(loss(guess[order], goal[order]), loss(guess, goal)[order])


@given(seeds, st.integers(2, 7), st.integers(1, 6))
def test_temporal_coherence_ignores_what_is_constant_in_time(seed, f, stride):
    guess, goal, still = latents(seed, 3, f=f)
    if f <= stride:
        with pytest.raises(TooFewFrames):
            temporal_coherence(guess, goal, stride)
        return
    found = temporal_coherence(guess, goal, stride)
    still = still[:, :, :1]
    torch.testing.assert_close(temporal_coherence(guess + still, goal, stride), found)
    torch.testing.assert_close(temporal_coherence(guess, goal + still, stride), found)
    torch.testing.assert_close(temporal_coherence(goal + still, goal, stride), torch.zeros_like(found))
    assert bool((found > 0).all())


@given(seeds)
def test_hinges_push_apart_and_pull_back(seed):
    maps = [m.flatten(1) for m in latents(seed, 2)]
    real, fake = [m.requires_grad_() for m in maps[:1]], [m.requires_grad_() for m in maps[1:]]
    hinge_critic(real, fake).sum().backward()
    assert bool((real[0].grad <= 0).all())  # the critic raises what is real
    assert bool((fake[0].grad >= 0).all())  # and lowers what is not
    fake[0].grad = None
    hinge_generator(fake).sum().backward()
    assert bool((fake[0].grad <= 0).all())  # the generator raises its own


@given(seeds)
def test_feature_matching_is_zero_only_between_equals(seed):
    a, b = latents(seed, 2)
    assert torch.equal(feature_matching([a], [a]), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(feature_matching([a, a], [b, a]), ((a - b) ** 2).flatten(1).mean(dim=1) / 2)


@given(seeds, st.floats(0, 0.999), st.integers(1, 20))
def test_moving_average_closed_form(seed, decay, num_steps):
    start, *sources = latents(seed, num_steps + 1, b=1, f=1)
    target = [start.clone()]
    for source in sources:
        moving_average_(target, [source], decay)
    weights = [(1 - decay) * decay ** (num_steps - 1 - k) for k in range(num_steps)]
    expected = decay**num_steps * start + sum(w * x for w, x in zip(weights, sources, strict=True))
    torch.testing.assert_close(target[0], expected)
